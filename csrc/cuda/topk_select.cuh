// The K largest entries of a row by one CTA: exact, deterministic, one read of the row and a second one of K sectors.
//
//   1. Stream   the row is read once. Every G consecutive entries leave their maximum, the delegate, in shared memory
//               as an ordered integer key; the log-sum-exp is accumulated on the way.
//   2. Cut      the K-th largest delegate t0, by radix histograms over the delegates (not the row).
//   3. Choose   exactly K groups: those with a delegate above t0, then the lowest-numbered ones at t0. An entry above
//               t0 is in a group with a delegate above t0. If m entries are still missing, they are the first m ties
//               at t0, and those lie in the chosen groups too, since every group at t0 holds at least one of them.
//   4. Cut      the chosen groups are read again (K sectors, mostly in L2); their K-th largest key t, as in 2.
//   5. Keep     entries above t and the first ties at t, compacted by ballots and prefix sums: ids ascend.
//
// There is no fallback because no input fails: all entries equal cost what any others cost. Rows with fewer than K
// entries above -inf keep those. Counts are sums of integers, so the order of the atomic additions changes nothing.
#pragma once

#include "cuda/device.cuh"

namespace nova::cuda {

constexpr int kDigitBits = 12;  // of one histogram; logits in 16 bits use few of 256 leading bytes, and collide there
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kUnroll = 4;               // loads in flight per thread
constexpr int kMaxK = 4096;              // this and the next keep two CTAs on an SM
constexpr int kMaxKeyBytes = 80 * 1024;  // of delegates and, later, of the chosen groups' keys
constexpr float kLog2E = 1.44269504088896341f;

static_assert(kBins % kThreads == 0, "every thread scans as many bins");

// How a row is divided. Depends on the shape alone, so that it is known before the launch.
struct Plan {
  bool possible;     // false: the delegates do not fit into shared memory
  bool staged;       // keys of the chosen groups are kept in shared memory; false: read again where they are needed
  int group_bits;    // log2 of G
  int key_bytes;     // of delegates and keys
  int shared_bytes;  // of dynamic shared memory
};

// Neighbouring bins of a histogram, scanned by one thread with loads of 16 bytes: fewer bank conflicts than by words.
struct alignas(16) Bins {
  int counts[kBinsPerThread];
};

// Shared memory beside the keys and the list of chosen groups.
struct Workspace {
  Bins bins[kThreads];              // all zero whenever nothing is being counted
  int totals[kWarps];               // of bins
  int above[kWarps], ties[kWarps];  // per warp, of a compaction
  int digit, above_digit;
  float maxima[kWarps], sums[kWarps];

  __device__ __forceinline__ void count(unsigned digit) {
    atomicAdd(&bins[digit / kBinsPerThread].counts[digit % kBinsPerThread], 1);
  }
};

template <class F>
Plan make_plan(int vocabulary, int k) {
  constexpr int key_size = sizeof(typename F::Bits);
  constexpr int largest = kMaxKeyBytes / key_size;
  const int positions = vocabulary + kSector / key_size - 1;
  int first_bits = 0;
  while (1 << first_bits < kVector<F>) ++first_bits;
  // The group that needs least memory, if the chosen groups fit; else the smallest of which the delegates fit.
  Plan plan{};
  std::int64_t best = largest + 1;
  for (int bits = first_bits; bits <= first_bits + 5; ++bits) {
    const std::int64_t groups = divide_up(positions, 1 << bits);
    const std::int64_t chosen = (groups < k ? groups : k) << bits;
    const std::int64_t keys = groups > chosen ? groups : chosen;
    if (keys < best) plan = {true, true, bits, 0, 0}, best = keys;
  }
  for (int bits = first_bits; bits <= first_bits + 5 && !plan.possible; ++bits) {
    best = divide_up(positions, 1 << bits);
    if (best <= largest) plan = {true, false, bits, 0, 0};
  }
  if (!plan.possible) return plan;
  const int kept_bytes = 2 * k * static_cast<int>(sizeof(float));  // the KL keeps both sides' logits there
  plan.key_bytes = static_cast<int>(best) * key_size;
  plan.key_bytes = divide_up(plan.key_bytes > kept_bytes ? plan.key_bytes : kept_bytes, 16) * 16;
  plan.shared_bytes = plan.key_bytes + static_cast<int>(sizeof(Workspace)) + k * static_cast<int>(sizeof(int));
  return plan;
}

// What a CTA's shared memory holds, in this order.
template <class F>
struct Shared {
  typename F::Bits* keys;
  Workspace* work;
  int* chosen;

  __device__ Shared(unsigned char* memory, const Plan& plan)
      : keys(reinterpret_cast<typename F::Bits*>(memory)),
        work(reinterpret_cast<Workspace*>(memory + plan.key_bytes)),
        chosen(reinterpret_cast<int*>(memory + plan.key_bytes + sizeof(Workspace))) {}
};

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }

// sum exp((x - maximum) / temperature) of what was added. The maximum is kept finite: with -inf and +inf in x, the
// terms are 0 and +inf, never NaN.
struct LogSum {
  float maximum = -FLT_MAX, sum = 0.0f;

  __device__ __forceinline__ void raise(float to, float scale) {
    sum *= exp2_approximate((maximum - to) * scale);
    maximum = to;
  }

  template <class F>
  __device__ __forceinline__ void add(const Vector<F>& x, float largest, float scale) {
    if (largest > maximum) raise(fminf(largest, FLT_MAX), scale);
#pragma unroll
    for (int i = 0; i < kVector<F>; ++i) sum += exp2_approximate((x[i] - maximum) * scale);
  }

  __device__ __forceinline__ void add(LogSum other, float scale) {
    const float larger = fmaxf(maximum, other.maximum);
    raise(larger, scale);
    other.raise(larger, scale);
    sum += other.sum;
  }
};

template <class F>
__device__ __forceinline__ void count(Workspace& work, typename F::Bits key, typename F::Bits floor) {
  if (key > floor) work.count(key >> (8 * sizeof key - kDigitBits));
}

// Step 1. Delegates of all groups; the histogram of their leading digits; this thread's part of the log-sum-exp.
template <class F, bool with_lse>
__device__ __forceinline__ LogSum stream(const Row<F>& row, const Plan& plan, const Shared<F>& shared, float scale) {
  const int vectors = divide_up(row.end, kVector<F>), lanes = (1 << plan.group_bits) / kVector<F>;
  const int lane_bits = __ffs(lanes) - 1;
  LogSum log_sum;
  for (int tile = 0; tile < vectors; tile += kUnroll * kThreads) {
    Vector<F> x[kUnroll];
    const int mine = tile + static_cast<int>(threadIdx.x);
    if (row.holds(tile * kVector<F>, (tile + kUnroll * kThreads) * kVector<F>)) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) x[i] = row.whole_vector((mine + i * kThreads) * kVector<F>);
    } else {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) x[i] = row.vector((mine + i * kThreads) * kVector<F>);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int index = mine + i * kThreads;
      float largest = x[i][0];
#pragma unroll
      for (int j = 1; j < kVector<F>; ++j) largest = max_nan(largest, x[i][j]);
      if constexpr (with_lse) log_sum.add(x[i], largest, scale);
      for (int step = 1; step < lanes; step *= 2)
        largest = max_nan(largest, __shfl_xor_sync(kAllLanes, largest, step));
      if (index < vectors && index % lanes == 0) {
        const auto key = F::key(largest);
        shared.keys[index >> lane_bits] = key;
        count<F>(*shared.work, key, F::kMinusInfinityKey);
      }
    }
  }
  return log_sum;
}

struct Digit {
  int value, above, total;  // the digit, keys with a higher one, keys counted
};

// The digit of the `wanted`-th largest key that was counted. Empties the histogram. If fewer were counted, only
// `total` means anything.
__device__ __forceinline__ Digit find_digit(Workspace& work, int wanted) {
  __syncthreads();
  const int place = kThreads - 1 - static_cast<int>(threadIdx.x);  // the first thread has the highest digits
  const Bins mine = work.bins[place];
  work.bins[place] = Bins{};
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) sum += mine.counts[i];
  int up_to_here = sum;
  for (int step = 1; step < 32; step *= 2) {
    const int lower = __shfl_up_sync(kAllLanes, up_to_here, step);
    if (lane_index() >= step) up_to_here += lower;
  }
  if (lane_index() == 31) work.totals[warp_index()] = up_to_here;
  __syncthreads();
  int above = up_to_here - sum, total = 0;
#pragma unroll 4  // all at once would spill registers
  for (int warp = 0; warp < kWarps; ++warp) {
    if (warp < warp_index()) above += work.totals[warp];
    total += work.totals[warp];
  }
#pragma unroll
  for (int i = kBinsPerThread - 1; i >= 0; --i) {
    if (above < wanted && wanted <= above + mine.counts[i]) {
      work.digit = place * kBinsPerThread + i;
      work.above_digit = above;
    }
    above += mine.counts[i];
  }
  __syncthreads();
  return {work.digit, work.above_digit, total};
}

template <class F>
struct Cut {
  typename F::Bits threshold;
  int ties;  // keep what is above the threshold, and this many of the first at it
  int kept;
};

// Steps 2 and 4. Of n keys, of which those above `floor` were counted by their leading digits: the cut that keeps the
// `wanted` largest, or all above the floor if there are fewer.
template <class F, class KeyAt>
__device__ __forceinline__ Cut<F> find_cut(Workspace& work, int n, KeyAt key_at, typename F::Bits floor, int wanted) {
  int shift = 8 * sizeof(typename F::Bits) - kDigitBits;
  const Digit leading = find_digit(work, wanted);
  if (leading.total < wanted) return {floor, 0, leading.total};
  std::uint32_t prefix = leading.value;
  int missing = wanted - leading.above;
  while (shift > 0) {
    const int bits = shift < kDigitBits ? shift : kDigitBits;
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const std::uint32_t key = key_at(i);
      if (key >> shift == prefix) work.count((key >> (shift - bits)) & ((1u << bits) - 1));
    }
    const Digit next = find_digit(work, missing);
    prefix = prefix << bits | static_cast<std::uint32_t>(next.value);
    missing -= next.above;
    shift -= bits;
  }
  return {static_cast<typename F::Bits>(prefix), missing, wanted};
}

// Steps 3 and 5. keep(slot, i) for every i of n whose key is kept, slots in the order of i. A warp takes a run of i.
template <class F, class KeyAt, class Keep>
__device__ __forceinline__ void compact(Workspace& work, int n, KeyAt key_at, const Cut<F>& cut, Keep keep) {
  const int run = divide_up(divide_up(n, 32), kWarps) * 32;
  const int begin = warp_index() * run, end = begin + run < n ? begin + run : n;
  int above = 0, ties = 0;
  for (int i = begin; i < end; i += 32) {
    const int mine = i + lane_index();
    const typename F::Bits key = mine < end ? key_at(mine) : 0;  // 0 is below every threshold
    above += __popc(__ballot_sync(kAllLanes, key > cut.threshold));
    ties += __popc(__ballot_sync(kAllLanes, key == cut.threshold));
  }
  if (lane_index() == 0) {
    work.above[warp_index()] = above;
    work.ties[warp_index()] = ties;
  }
  __syncthreads();
  above = ties = 0;
#pragma unroll 4
  for (int warp = 0; warp < warp_index(); ++warp) {
    above += work.above[warp];
    ties += work.ties[warp];
  }
  const unsigned lower_lanes = (1u << lane_index()) - 1;
  for (int i = begin; i < end; i += 32) {
    const int mine = i + lane_index();
    const typename F::Bits key = mine < end ? key_at(mine) : 0;
    const unsigned is_above = __ballot_sync(kAllLanes, key > cut.threshold);
    const unsigned is_tie = __ballot_sync(kAllLanes, key == cut.threshold);
    const int ties_before = ties + __popc(is_tie & lower_lanes);
    const bool kept = key > cut.threshold || (key == cut.threshold && ties_before < cut.ties);
    if (kept) keep(above + __popc(is_above & lower_lanes) + (ties_before < cut.ties ? ties_before : cut.ties), mine);
    above += __popc(is_above);
    ties += __popc(is_tie);
  }
}

// This thread's part of the log-sum-exp, left where write_lse finds it after the next barrier.
__device__ __forceinline__ void share_log_sum(Workspace& work, LogSum part, float scale) {
  for (int step = 16; step > 0; step /= 2)
    part.add({__shfl_xor_sync(kAllLanes, part.maximum, step), __shfl_xor_sync(kAllLanes, part.sum, step)}, scale);
  if (lane_index() == 0) {
    work.maxima[warp_index()] = part.maximum;
    work.sums[warp_index()] = part.sum;
  }
}

__device__ __forceinline__ void write_lse(const Workspace& work, float scale, float temperature, float* lse) {
  if (threadIdx.x != 0) return;
  LogSum all;
  for (int warp = 0; warp < kWarps; ++warp) all.add({work.maxima[warp], work.sums[warp]}, scale);
  *lse = all.maximum / temperature + logf(all.sum);
}

// All steps. keep(slot, column, value) for each kept entry, in ascending order of both; returns how many there are.
// The bins must be empty; they are again afterwards. lse may be null.
template <class F, bool with_lse, class Keep>
__device__ __forceinline__ int select_row(const Row<F>& row, int k, float temperature, const Plan& plan,
                                          const Shared<F>& shared, float* lse, Keep keep) {
  using Key = typename F::Bits;
  Workspace& work = *shared.work;
  const float scale = kLog2E / temperature;
  __syncthreads();  // the row before has left the shared memory
  const LogSum part = stream<F, with_lse>(row, plan, shared, scale);
  if constexpr (with_lse) share_log_sum(work, part, scale);

  const int groups = divide_up(row.end, 1 << plan.group_bits);
  const auto delegate = [&](int i) { return shared.keys[i]; };
  const Cut<F> by_group = find_cut<F>(work, groups, delegate, F::kMinusInfinityKey, k);
  if constexpr (with_lse) write_lse(work, scale, temperature, lse);
  compact(work, groups, delegate, by_group, [&](int slot, int group) { shared.chosen[slot] = group; });
  __syncthreads();

  // K groups have an entry at or above the threshold, so nothing below it is kept.
  const Key floor = by_group.threshold > F::kMinusInfinityKey ? by_group.threshold - 1 : F::kMinusInfinityKey;
  const int n = by_group.kept << plan.group_bits, in_group = (1 << plan.group_bits) - 1;
  const auto position = [&](int i) {
    return (shared.chosen[i >> plan.group_bits] << plan.group_bits) + (i & in_group);
  };
  for (int i = threadIdx.x * kVector<F>; i < n; i += kThreads * kVector<F>) {
    const Vector<F> x = row.vector(position(i));
    Vector<F> keys{};
#pragma unroll
    for (int j = 0; j < kVector<F>; ++j) {
      const Key key = F::key(x[j]);
      keys.put(j, key);
      count<F>(work, key, floor);
    }
    if (plan.staged) store16(shared.keys + i, {keys.words[0], keys.words[1], keys.words[2], keys.words[3]});
  }
  const auto entry = [&](int i) { return plan.staged ? shared.keys[i] : F::key(row[position(i)]); };
  const Cut<F> by_entry = find_cut<F>(work, n, entry, floor, k);
  compact(work, n, entry, by_entry, [&](int slot, int i) {
    const int at = position(i);
    keep(slot, at - row.begin, row[at]);
  });
  return by_entry.kept;
}

}  // namespace nova::cuda
