// A stream of samples into packs, with at most `window` samples waiting.
//
// When `window` samples wait, one pack is closed: the oldest of them, completed by a bounded search among the others
// (minimum bin slack: Gupta and Ho, 1999). Every pack takes the oldest, so no sample waits while more than `window`
// packs are closed. What is not taken stays for the next pack; of equally long samples the older goes first.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "completion.h"

namespace nova::packing {

struct Sample {
  std::int64_t id;
  std::int64_t length;
};

class Stream {
 public:
  static constexpr std::int64_t default_tries = 512;

  Stream(std::int64_t capacity, std::int64_t window, std::int64_t tries = default_tries);

  // True when `window` samples wait: close() is due before the next push.
  bool full() const { return size_ == window_; }
  bool empty() const { return size_ == 0; }
  std::int64_t size() const { return size_; }

  void push(Sample sample);

  // The samples of one pack, in the order they were chosen; at least one must wait.
  const std::vector<Sample>& close();

  // The samples that wait, oldest first.
  std::vector<Sample> waiting() const;

 private:
  struct Slot {
    Sample sample;
    std::int32_t next;  // the next younger one of the same length, or -1
    bool taken;
  };

  Sample take_oldest_of(std::int64_t length);

  std::int64_t capacity_, window_, size_ = 0;
  Completion lengths_;
  std::vector<std::int32_t> oldest_, youngest_;  // per length, slot or -1
  std::vector<Slot> slots_;
  std::vector<std::int32_t> free_;
  std::deque<std::int32_t> arrivals_;  // slots; those taken are dropped when they reach the front
  std::vector<Sample> pack_;
};

}  // namespace nova::packing
