// A set of integers in [0, limit], one bit each, with a 64-ary tree of summary words above the bits.
// insert, erase, at_least and at_most take one step per level: three levels reach 262,144, four 16.8 million.
#pragma once

#include <cstdint>
#include <vector>

namespace nova::packing {

inline int lowest_bit(std::uint64_t word) { return __builtin_ctzll(word); }
inline int highest_bit(std::uint64_t word) { return 63 - __builtin_clzll(word); }

class IntegerSet {
 public:
  static constexpr std::int64_t none = -1;

  explicit IntegerSet(std::int64_t limit) {
    std::int64_t words = limit + 1;
    do {
      words = (words + 63) / 64;
      levels_.emplace_back(static_cast<std::size_t>(words), 0);
    } while (words > 1);
  }

  void insert(std::int64_t value) {
    for (auto& level : levels_) {
      std::uint64_t& word = level[value >> 6];
      const bool was_empty = word == 0;
      word |= std::uint64_t{1} << (value & 63);
      if (!was_empty) return;
      value >>= 6;
    }
  }

  void erase(std::int64_t value) {
    for (auto& level : levels_) {
      std::uint64_t& word = level[value >> 6];
      word &= ~(std::uint64_t{1} << (value & 63));
      if (word != 0) return;
      value >>= 6;
    }
  }

  // The smallest member >= value, or none.
  std::int64_t at_least(std::int64_t value) const {
    for (std::size_t height = 0; height < levels_.size(); ++height) {
      const std::int64_t index = value >> 6;
      if (index >= static_cast<std::int64_t>(levels_[height].size())) return none;
      const std::uint64_t word = levels_[height][index] >> (value & 63);
      if (word != 0) return descend(height, value + lowest_bit(word), lowest_bit);
      value = index + 1;
    }
    return none;
  }

  // The largest member <= value, or none.
  std::int64_t at_most(std::int64_t value) const {
    for (std::size_t height = 0; height < levels_.size() && value >= 0; ++height) {
      const std::int64_t index = value >> 6;
      const std::uint64_t word = levels_[height][index] << (63 - (value & 63));
      if (word != 0) return descend(height, value - (63 - highest_bit(word)), highest_bit);
      value = index - 1;
    }
    return none;
  }

 private:
  template <class Pick>
  std::int64_t descend(std::size_t height, std::int64_t value, Pick pick) const {
    while (height-- > 0) value = value * 64 + pick(levels_[height][value]);
    return value;
  }

  std::vector<std::vector<std::uint64_t>> levels_;
};

}  // namespace nova::packing
