// How many samples of each length are left, and the search for those of them that fill a given space best.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "integer_set.h"

namespace nova::packing {

// counts[l] = how many samples have l tokens; size C + 1.
using Histogram = std::vector<std::int32_t>;

class Completion {
 public:
  // `tries`: how many ways of filling one space are compared at most.
  Completion(Histogram counts, std::int64_t tries)
      : counts_(std::move(counts)),
        capacity_(static_cast<std::int64_t>(counts_.size()) - 1),
        present_(capacity_),
        tries_(tries) {
    for (std::int64_t length = 1; length <= capacity_; ++length)
      if (counts_[length] > 0) present_.insert(length);
  }

  void add(std::int64_t length) {
    ++counts_[length];
    present_.insert(length);
  }

  void take(std::int64_t length) {
    if (--counts_[length] == 0) present_.erase(length);
  }

  // Takes out the lengths that leave the least of `space`, longest first: a depth-first search over the lengths left,
  // longest first, that ends when nothing is left over or after `tries` complete fillings. The first of equals wins.
  const std::vector<std::int32_t>& fill(std::int64_t space) {
    const std::int64_t shortest = present_.at_least(1);
    std::int64_t least = capacity_ + 1, tries = tries_;
    best_.clear();
    chosen_.clear();
    for (std::int64_t next = present_.at_most(space); next != IntegerSet::none || !chosen_.empty();) {
      if (next != IntegerSet::none) {
        take(next);
        chosen_.push_back(static_cast<std::int32_t>(next));
        space -= next;
        next = present_.at_most(std::min(next, space));
        if (next != IntegerSet::none) continue;
        if (space < least) {
          least = space;
          best_ = chosen_;
        }
        if (least == 0 || --tries == 0) break;
      }
      // Back: a shorter one in the place of the last, if another sample still fits beside it.
      const std::int64_t last = chosen_.back();
      chosen_.pop_back();
      add(last);
      space += last;
      next = present_.at_most(std::min(last - 1, space - shortest));
    }
    for (const std::int32_t length : chosen_) add(length);
    for (const std::int32_t length : best_) take(length);
    return best_;
  }

 private:
  Histogram counts_;
  std::int64_t capacity_;
  IntegerSet present_;
  std::int64_t tries_;
  std::vector<std::int32_t> chosen_, best_;
};

}  // namespace nova::packing
