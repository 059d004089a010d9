// The packing core against its own promises, on random inputs, for as many seconds as the first argument says. Meant to
// run under the address and undefined-behaviour sanitizers: `make sanitize`.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <stdexcept>

#include "packing/collate.h"
#include "packing/plan.h"
#include "packing/stream.h"

using namespace nova::packing;

namespace {

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: %s, case %llu\n", __FILE__, __LINE__, #condition, \
                   static_cast<unsigned long long>(current_case));                    \
      std::abort();                                                                   \
    }                                                                                 \
  } while (false)

std::uint64_t current_case = 0;
std::mt19937_64 random_bits;

std::int64_t draw(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random_bits);
}

struct Case {
  std::int64_t capacity;
  std::vector<std::int32_t> lengths;
};

// Small and large, spread and clustered, with full and tiny samples.
Case make_case() {
  Case made;
  made.capacity = draw(0, 9) == 0 ? draw(1, 300'000) : draw(1, 200);
  const std::int64_t low = draw(1, made.capacity), high = draw(low, made.capacity);
  const std::int64_t n = draw(0, 9) == 0 ? draw(0, 3000) : draw(0, 60);
  for (std::int64_t i = 0; i < n; ++i)
    made.lengths.push_back(static_cast<std::int32_t>(draw(0, 19) == 0 ? made.capacity : draw(low, high)));
  return made;
}

// The fewest packs there can be, by trying everything.
std::int64_t optimum(std::vector<std::int32_t> lengths, std::int64_t capacity) {
  std::sort(lengths.rbegin(), lengths.rend());
  auto best = static_cast<std::int64_t>(lengths.size());
  std::vector<std::int64_t> spaces;
  const auto place = [&](const auto& self, std::size_t item) -> void {
    if (static_cast<std::int64_t>(spaces.size()) >= best) return;
    if (item == lengths.size()) {
      best = static_cast<std::int64_t>(spaces.size());
      return;
    }
    for (std::size_t pack = 0; pack < spaces.size(); ++pack) {
      if (spaces[pack] < lengths[item]) continue;
      spaces[pack] -= lengths[item];
      self(self, item + 1);
      spaces[pack] += lengths[item];
    }
    spaces.push_back(capacity - lengths[item]);
    self(self, item + 1);
    spaces.pop_back();
  };
  place(place, 0);
  return best;
}

void check_plan(const Case& given, const std::vector<std::int64_t>& order, const std::vector<std::int64_t>& offsets,
                std::int64_t bound) {
  CHECK(offsets.front() == 0 && offsets.back() == static_cast<std::int64_t>(given.lengths.size()));
  std::vector<std::int64_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  for (std::size_t i = 0; i < sorted.size(); ++i) CHECK(sorted[i] == static_cast<std::int64_t>(i));
  for (std::size_t pack = 0; pack + 1 < offsets.size(); ++pack) {
    CHECK(offsets[pack] < offsets[pack + 1]);
    std::int64_t tokens = 0;
    for (std::int64_t at = offsets[pack]; at < offsets[pack + 1]; ++at) tokens += given.lengths[order[at]];
    CHECK(tokens <= given.capacity);
  }
  CHECK(static_cast<std::int64_t>(offsets.size()) - 1 >= bound);
}

void test_plans() {
  const Case given = make_case();
  const auto n = static_cast<std::int64_t>(given.lengths.size());
  const Histogram counts = count(given.lengths.data(), n, given.capacity);
  const std::int64_t bound = lower_bound(counts);
  if (n <= 8) CHECK(bound <= optimum(given.lengths, given.capacity));
  const auto seed = draw(0, 1) ? std::optional<std::uint64_t>(random_bits()) : std::nullopt;
  std::vector<std::int64_t> order(n);
  for (const Runs& runs : {best_fit(counts), search(counts), best_of_all(counts), search(counts, draw(1, 50))})
    check_plan(given, order, deal(runs, counts, given.lengths.data(), n, seed, order.data()), bound);
  check_plan(given, order, sequential(given.lengths.data(), n, given.capacity, seed, order.data()), bound);
}

void test_stream() {
  const Case given = make_case();
  const std::int64_t window = draw(1, 70);
  Stream stream(given.capacity, window, draw(1, 100));
  std::int64_t next = 0, closed = 0;
  std::vector<std::int64_t> pushed_at, seen;  // packs closed when a sample came; samples handed out
  const auto close = [&] {
    const std::int64_t oldest = stream.waiting().front().id;
    std::int64_t tokens = 0;
    const std::vector<Sample> pack = stream.close();
    CHECK(pack.front().id == oldest);
    for (const Sample& sample : pack) {
      CHECK(sample.length == given.lengths[sample.id]);
      CHECK(closed - pushed_at[sample.id] < window);
      tokens += sample.length;
      seen.push_back(sample.id);
    }
    CHECK(tokens <= given.capacity);
    ++closed;
  };
  for (const std::int32_t length : given.lengths) {
    stream.push({next++, length});
    pushed_at.push_back(closed);
    CHECK(stream.size() <= window);
    if (stream.full()) close();
  }
  while (!stream.empty()) close();
  std::sort(seen.begin(), seen.end());
  CHECK(seen.size() == given.lengths.size());
  for (std::size_t i = 0; i < seen.size(); ++i) CHECK(seen[i] == static_cast<std::int64_t>(i));
}

template <class T>
Tokens as_tokens(std::vector<unsigned char>& memory, const std::vector<std::int64_t>& values, TokenType type) {
  memory.resize(values.size() * sizeof(T));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const T value = static_cast<T>(values[i]);
    std::memcpy(memory.data() + i * sizeof(T), &value, sizeof(T));
  }
  return {memory.data(), static_cast<std::int64_t>(values.size()), type};
}

Tokens as_tokens(std::vector<unsigned char>& memory, const std::vector<std::int64_t>& values) {
  switch (draw(0, 6)) {
    case 0: return as_tokens<std::int8_t>(memory, values, TokenType::int8);
    case 1: return as_tokens<std::uint8_t>(memory, values, TokenType::uint8);
    case 2: return as_tokens<std::int16_t>(memory, values, TokenType::int16);
    case 3: return as_tokens<std::uint16_t>(memory, values, TokenType::uint16);
    case 4: return as_tokens<std::int32_t>(memory, values, TokenType::int32);
    case 5: return as_tokens<std::uint32_t>(memory, values, TokenType::uint32);
    default: return as_tokens<std::int64_t>(memory, values, TokenType::int64);
  }
}

void test_collation() {
  const std::int64_t samples = draw(0, 12), padding = draw(0, 1) * draw(0, 20);
  const bool has_labels = draw(0, 1);
  std::vector<std::vector<unsigned char>> memory(2 * samples);
  std::vector<Tokens> ids, labels;
  std::vector<Bytes> pieces;
  std::vector<std::int64_t> expected_ids, expected_labels, expected_positions;
  std::vector<std::int32_t> expected_bounds = {0};
  std::int64_t longest = 0;
  const auto segment = [&](std::int64_t length) {
    for (std::int64_t i = 0; i < length; ++i) expected_positions.push_back(i);
    expected_bounds.push_back(static_cast<std::int32_t>(expected_positions.size()));
    longest = std::max(longest, length);
  };
  for (std::int64_t sample = 0; sample < samples; ++sample) {
    std::vector<std::int64_t> tokens(draw(1, 40)), targets;
    for (auto& token : tokens) token = draw(0, 127);
    targets = tokens;
    if (has_labels)
      for (auto& target : targets) target = draw(0, 127);
    ids.push_back(as_tokens(memory[2 * sample], tokens));
    labels.push_back(as_tokens(memory[2 * sample + 1], targets));
    pieces.push_back({memory[2 * sample].data(), static_cast<std::int64_t>(memory[2 * sample].size())});
    expected_ids.insert(expected_ids.end(), tokens.begin(), tokens.end());
    targets[0] = ignore_index;
    expected_labels.insert(expected_labels.end(), targets.begin(), targets.end());
    segment(static_cast<std::int64_t>(tokens.size()));
  }
  if (padding > 0) segment(padding);
  expected_ids.resize(expected_ids.size() + padding, 0);
  expected_labels.resize(expected_labels.size() + padding, ignore_index);
  const auto total = static_cast<std::int64_t>(expected_ids.size());
  std::vector<std::int64_t> input_ids(total), targets(total), positions(total);
  std::vector<std::int32_t> bounds(expected_bounds.size());
  const Row row{input_ids.data(), targets.data(), positions.data(), bounds.data()};
  CHECK(lay_out(ids, has_labels ? &labels : nullptr, total, row) == longest);
  CHECK(input_ids == expected_ids && targets == expected_labels);
  CHECK(positions == expected_positions && bounds == expected_bounds);

  std::vector<unsigned char> expected_bytes;
  for (std::int64_t sample = 0; sample < samples; ++sample)
    expected_bytes.insert(expected_bytes.end(), memory[2 * sample].begin(), memory[2 * sample].end());
  expected_bytes.resize(expected_bytes.size() + padding, 0);
  std::vector<unsigned char> bytes(expected_bytes.size(), 1);
  concatenate(pieces, static_cast<std::int64_t>(bytes.size()), bytes.data());
  CHECK(bytes == expected_bytes);
}

void test_integer_set() {
  const std::int64_t limit = draw(0, 1) ? draw(0, 200) : draw(0, 20'000'000 / 64);
  IntegerSet ours(limit);
  std::set<std::int64_t> theirs;
  for (int step = 0; step < 100; ++step) {
    const std::int64_t value = draw(0, limit);
    if (draw(0, 2) > 0) {
      ours.insert(value);
      theirs.insert(value);
    } else {
      ours.erase(value);
      theirs.erase(value);
    }
    const std::int64_t asked = draw(-1, limit);
    const auto above = theirs.lower_bound(asked);
    CHECK(asked < 0 || ours.at_least(asked) == (above == theirs.end() ? IntegerSet::none : *above));
    const auto below = theirs.upper_bound(asked);
    CHECK(ours.at_most(asked) == (below == theirs.begin() ? IntegerSet::none : *std::prev(below)));
  }
}

// One pack of very many samples: no recursion, no quadratic time.
void test_long_packs() {
  const std::vector<std::int32_t> lengths(1 << 20, 1);
  const Histogram counts = count(lengths.data(), lengths.size(), 1 << 20);
  CHECK(best_of_all(counts).num_packs == 1);
  Stream stream(1 << 20, 1 << 20);
  for (std::int64_t id = 0; id < 1 << 20; ++id) stream.push({id, 1});
  CHECK(stream.close().size() == 1 << 20);
}

void test_refusals() {
  for (const std::int32_t wrong : {0, -1, 11, INT32_MIN, INT32_MAX}) {
    const std::vector<std::int32_t> lengths = {3, wrong};
    bool refused = false;
    try {
      count(lengths.data(), 2, 10);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    CHECK(refused);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 2.0;
  test_refusals();
  test_long_packs();
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    random_bits.seed(++current_case);
    test_plans();
    test_stream();
    test_collation();
    test_integer_set();
  }
  std::printf("packing: %llu random cases in %.0f s\n", static_cast<unsigned long long>(current_case), seconds);
  return 0;
}
