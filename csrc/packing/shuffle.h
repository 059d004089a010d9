// Seeded permutations in integers only: the same on every platform. Draw i of a stream is splitmix64 of
// (seed, stream, i); it is brought below `bound` (at most 2^32) by (draw >> 32) * bound >> 32.
#pragma once

#include <cstdint>
#include <utility>

namespace nova::packing {

class Draws {
 public:
  Draws(std::uint64_t seed, std::uint64_t stream) : start_(mix(seed + stream * golden)) {}

  std::uint64_t below(std::uint64_t bound, std::uint64_t index) const {
    return (mix(start_ + (index + 1) * golden) >> 32) * bound >> 32;
  }

  // Fisher and Yates; entry k uses draw first + k.
  template <class T>
  void shuffle(T* values, std::int64_t count, std::uint64_t first = 0) const {
    for (std::int64_t k = count - 1; k > 0; --k)
      std::swap(values[k], values[below(static_cast<std::uint64_t>(k) + 1, first + static_cast<std::uint64_t>(k))]);
  }

 private:
  static constexpr std::uint64_t golden = 0x9E3779B97F4A7C15;

  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

  std::uint64_t start_;
};

}  // namespace nova::packing
