// Packing plans: n samples of l_i tokens into packs of C tokens, 1 <= l_i <= C, n < 2^31.
//
// best_fit and search see only how many samples there are of each length. They answer with runs, "the next `count`
// samples of this length go into this pack"; which samples those are is decided when the runs are dealt out: by
// number, or in a seeded order. So the number of packs does not depend on the seed.
//
// nova_kernels/packing/reference.py has every function in plain Python; both give the same plan, item by item.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "completion.h"

namespace nova::packing {

struct Run {
  std::int32_t pack;
  std::int32_t length;
  std::int32_t count;
};

struct Runs {
  std::vector<Run> runs;
  std::int32_t num_packs = 0;
};

// Best fit decreasing: longest first, each into the fullest pack that still takes it; of equally full packs into
// the one that was touched last.
Runs best_fit(const Histogram& counts);

// The samples in a random order, as a stream (see stream.h) with this window. A small window of a random order keeps the
// lengths that are left distributed as they were, where longest first leaves what no longer fits together.
Runs search(const Histogram& counts, std::int64_t window);

// The better of two windows.
Runs search(const Histogram& counts);

// The better of best_fit and, where that is more than one pack in a thousand above the bound, search.
Runs best_of_all(const Histogram& counts);

// No plan has fewer packs: the largest of L1 = ceil(sum l / C), L2 (Martello and Toth, 1990) and the bounds of the dual
// feasible functions u(1) ... u(100) (Fekete and Schepers, 2001).
std::int64_t lower_bound(const Histogram& counts);

// Throws std::invalid_argument for a length outside 1 ... capacity.
Histogram count(const std::int32_t* lengths, std::int64_t n, std::int64_t capacity);

// Runs -> samples, into order[0 ... n - 1]; returns offsets: pack b holds order[offsets[b]] ... order[offsets[b + 1] - 1].
// A seed shuffles the packs, and the samples of each length before they are dealt.
std::vector<std::int64_t> deal(const Runs& runs, const Histogram& counts, const std::int32_t* lengths, std::int64_t n,
                               std::optional<std::uint64_t> seed, std::int64_t* order);

// Next fit: the samples stay in their order; a seed shuffles the packs. Output as in deal.
std::vector<std::int64_t> sequential(const std::int32_t* lengths, std::int64_t n, std::int64_t capacity,
                                     std::optional<std::uint64_t> seed, std::int64_t* order);

}  // namespace nova::packing
