#include "stream.h"

namespace nova::packing {

Stream::Stream(std::int64_t capacity, std::int64_t window, std::int64_t tries)
    : capacity_(capacity),
      window_(window),
      lengths_(Histogram(capacity + 1, 0), tries),
      oldest_(capacity + 1, -1),
      youngest_(capacity + 1, -1) {}

void Stream::push(Sample sample) {
  if (free_.empty()) {
    free_.push_back(static_cast<std::int32_t>(slots_.size()));
    slots_.emplace_back();
  }
  const std::int32_t slot = free_.back();
  free_.pop_back();
  slots_[slot] = {sample, -1, false};
  arrivals_.push_back(slot);
  if (oldest_[sample.length] < 0) {
    oldest_[sample.length] = slot;
  } else {
    slots_[youngest_[sample.length]].next = slot;
  }
  youngest_[sample.length] = slot;
  lengths_.add(sample.length);
  ++size_;
}

const std::vector<Sample>& Stream::close() {
  while (slots_[arrivals_.front()].taken) {
    free_.push_back(arrivals_.front());
    arrivals_.pop_front();
  }
  // The oldest of all is the oldest of its length.
  const std::int64_t first = slots_[arrivals_.front()].sample.length;
  lengths_.take(first);
  pack_ = {take_oldest_of(first)};
  for (const std::int32_t length : lengths_.fill(capacity_ - first)) pack_.push_back(take_oldest_of(length));
  size_ -= static_cast<std::int64_t>(pack_.size());
  return pack_;
}

std::vector<Sample> Stream::waiting() const {
  std::vector<Sample> samples;
  for (const std::int32_t slot : arrivals_)
    if (!slots_[slot].taken) samples.push_back(slots_[slot].sample);
  return samples;
}

Sample Stream::take_oldest_of(std::int64_t length) {
  Slot& slot = slots_[oldest_[length]];
  slot.taken = true;
  oldest_[length] = slot.next;
  return slot.sample;
}

}  // namespace nova::packing
