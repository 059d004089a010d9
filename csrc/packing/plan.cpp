#include "plan.h"

#include <numeric>
#include <stdexcept>

#include "buffer.h"
#include "shuffle.h"
#include "stream.h"

namespace nova::packing {
namespace {

// Streams of draws, as in reference.py.
enum : std::uint64_t { item_stream = 0, pack_stream = 1, search_stream = 2 };

// A search of more than 100,000 samples looks less closely, so that it takes about a second at most.
std::int64_t tries(std::int64_t n) {
  return std::clamp<std::int64_t>(Stream::default_tries * 100'000 / std::max<std::int64_t>(n, 1), 64, Stream::default_tries);
}

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t number_of(const Histogram& counts) { return std::accumulate(counts.begin(), counts.end(), std::int64_t{0}); }

bool fewer(const Runs& a, const Runs& b) { return a.num_packs < b.num_packs; }

// shown[i] = the pack at position i.
std::vector<std::int32_t> order_of_packs(std::int64_t num_packs, std::optional<std::uint64_t> seed) {
  std::vector<std::int32_t> shown(num_packs);
  std::iota(shown.begin(), shown.end(), 0);
  if (seed) Draws(*seed, pack_stream).shuffle(shown.data(), num_packs);
  return shown;
}

}  // namespace

Runs best_fit(const Histogram& counts) {
  const std::int64_t capacity = static_cast<std::int64_t>(counts.size()) - 1;
  Runs result;
  IntegerSet spaces(capacity);                         // free tokens of the packs that have room
  std::vector<std::int32_t> newest(capacity + 1, -1);  // of the packs with this much space, and ...
  std::vector<std::int32_t> older;                     // ... the next one after each pack
  for (std::int64_t length = capacity; length > 0; --length) {
    std::int32_t left = counts[length];
    while (left > 0) {
      std::int64_t space = spaces.at_least(length);
      std::int32_t pack;
      if (space == IntegerSet::none) {
        space = capacity;
        pack = result.num_packs++;
        older.push_back(-1);
      } else {
        pack = newest[space];
        newest[space] = older[pack];
        if (newest[space] < 0) spaces.erase(space);
      }
      // The tightest pack stays the tightest for as long as it takes this length.
      const auto taken = static_cast<std::int32_t>(std::min<std::int64_t>(left, space / length));
      result.runs.push_back({pack, static_cast<std::int32_t>(length), taken});
      left -= taken;
      space -= taken * length;
      if (space > 0) {
        older[pack] = newest[space];
        if (newest[space] < 0) spaces.insert(space);
        newest[space] = pack;
      }
    }
  }
  return result;
}

Runs search(const Histogram& counts, std::int64_t window) {
  const std::int64_t capacity = static_cast<std::int64_t>(counts.size()) - 1;
  const std::int64_t n = number_of(counts);
  std::vector<std::int32_t> lengths;
  lengths.reserve(n);
  for (std::int64_t length = 1; length <= capacity; ++length)
    lengths.insert(lengths.end(), counts[length], static_cast<std::int32_t>(length));
  Draws(0, search_stream).shuffle(lengths.data(), n);

  Runs result;
  Stream stream(capacity, window, tries(n));
  const auto close = [&] {
    for (const Sample& sample : stream.close())
      result.runs.push_back({result.num_packs, static_cast<std::int32_t>(sample.length), 1});
    ++result.num_packs;
  };
  for (const std::int32_t length : lengths) {
    stream.push({0, length});
    if (stream.full()) close();
  }
  while (!stream.empty()) close();
  return result;
}

Runs search(const Histogram& counts) { return std::min(search(counts, 256), search(counts, 32), fewer); }

Runs best_of_all(const Histogram& counts) {
  const std::int64_t bound = lower_bound(counts);
  Runs best = best_fit(counts);
  if ((best.num_packs - bound) * 1000 > bound) best = std::min(best, search(counts), fewer);
  return best;
}

std::int64_t lower_bound(const Histogram& counts) {
  const std::int64_t capacity = static_cast<std::int64_t>(counts.size()) - 1;
  // items[x], tokens[x]: samples shorter than x, and their tokens.
  std::vector<std::int64_t> items(capacity + 2, 0), tokens(capacity + 2, 0);
  for (std::int64_t length = 0; length <= capacity; ++length) {
    items[length + 1] = items[length] + counts[length];
    tokens[length + 1] = tokens[length] + counts[length] * length;
  }
  const std::int64_t all = items[capacity + 1];
  std::int64_t bound = ceil_div(tokens[capacity + 1], capacity);
  const std::int64_t half = capacity / 2 + 1;  // the shortest length above C / 2
  for (std::int64_t a = 0; a < half; ++a) {
    const std::int64_t top = capacity - a + 1;
    const std::int64_t room = (items[top] - items[half]) * capacity - (tokens[top] - tokens[half]);
    const std::int64_t spill = tokens[half] - tokens[a] - room;
    bound = std::max(bound, all - items[half] + (spill > 0 ? ceil_div(spill, capacity) : 0));
  }
  for (std::int64_t k = 1; k <= 100; ++k) {
    std::int64_t floors = 0, exact = 0;  // of (k + 1) l / C, over the lengths that it is no integer for, and the others
    for (std::int64_t j = 1; j <= k + 1; ++j) {
      const std::int64_t length = j * capacity / (k + 1);
      floors += all - items[length + 1];
      if (length * (k + 1) == j * capacity) {
        floors -= (j - 1) * counts[length];
        exact += j * counts[length];
      }
    }
    bound = std::max(bound, ceil_div(floors * (k + 1) + exact * k, k * (k + 1)));
  }
  return bound;
}

Histogram count(const std::int32_t* lengths, std::int64_t n, std::int64_t capacity) {
  Histogram counts(capacity + 1, 0);
  for (std::int64_t i = 0; i < n; ++i) {
    if (lengths[i] < 1 || lengths[i] > capacity) throw std::invalid_argument("lengths must be 1 ... capacity");
    ++counts[lengths[i]];
  }
  return counts;
}

std::vector<std::int64_t> deal(const Runs& runs, const Histogram& counts, const std::int32_t* lengths, std::int64_t n,
                               std::optional<std::uint64_t> seed, std::int64_t* order) {
  // Counting sort: the samples of length l are items[first[l]] ... items[first[l + 1] - 1].
  std::vector<std::int32_t> first(counts.size() + 1, 0);
  std::partial_sum(counts.begin(), counts.end(), first.begin() + 1);
  std::vector<std::int32_t> next = first;
  Buffer<std::int32_t> items(n);
  for (std::int64_t i = 0; i < n; ++i) items[next[lengths[i]]++] = static_cast<std::int32_t>(i);
  if (seed) {
    const Draws draws(*seed, item_stream);
    for (std::size_t length = 0; length < counts.size(); ++length)
      draws.shuffle(items.data() + first[length], counts[length], first[length]);
  }
  std::vector<std::int64_t> fill(runs.num_packs, 0);  // the size of each pack, then where its next sample goes
  for (const Run& run : runs.runs) fill[run.pack] += run.count;
  std::vector<std::int64_t> offsets = {0};
  offsets.reserve(runs.num_packs + 1);
  for (const std::int32_t pack : order_of_packs(runs.num_packs, seed)) {
    offsets.push_back(offsets.back() + fill[pack]);
    fill[pack] = offsets[offsets.size() - 2];
  }
  for (const Run& run : runs.runs) {
    const std::int32_t* from = items.data() + first[run.length];
    std::copy(from, from + run.count, order + fill[run.pack]);
    first[run.length] += run.count;
    fill[run.pack] += run.count;
  }
  return offsets;
}

std::vector<std::int64_t> sequential(const std::int32_t* lengths, std::int64_t n, std::int64_t capacity,
                                     std::optional<std::uint64_t> seed, std::int64_t* order) {
  std::vector<std::int64_t> starts;
  std::int64_t space = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    if (lengths[i] > space) {
      starts.push_back(i);
      space = capacity;
    }
    space -= lengths[i];
  }
  starts.push_back(n);
  std::vector<std::int64_t> offsets = {0};
  for (const std::int32_t pack : order_of_packs(static_cast<std::int64_t>(starts.size()) - 1, seed)) {
    const std::int64_t at = offsets.back();
    offsets.push_back(at + starts[pack + 1] - starts[pack]);
    std::iota(order + at, order + offsets.back(), starts[pack]);
  }
  return offsets;
}

}  // namespace nova::packing
