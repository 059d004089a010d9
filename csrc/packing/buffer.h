// Uninitialised memory for scratch arrays; large ones ask for huge pages, which takes away most page faults.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace nova::packing {

template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size) {
    constexpr std::size_t page = std::size_t{1} << 21;
    std::size_t bytes = static_cast<std::size_t>(size) * sizeof(T);
    const bool large = bytes >= page;
    bytes = large ? (bytes + page - 1) / page * page : bytes + 1;
    memory_.reset(static_cast<T*>(large ? std::aligned_alloc(page, bytes) : std::malloc(bytes)));
    if (!memory_) throw std::bad_alloc();
#ifdef __linux__
    if (large) madvise(memory_.get(), bytes, MADV_HUGEPAGE);  // a wish; it may fail
#endif
  }

  T* data() { return memory_.get(); }
  T& operator[](std::int64_t index) { return memory_.get()[index]; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  std::unique_ptr<T, Free> memory_;
};

}  // namespace nova::packing
