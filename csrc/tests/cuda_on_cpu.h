// The part of the CUDA language that our kernels use, on the CPU, so that a C++ compiler with sanitizers runs the very
// same kernel source. Not fast and not parallel: blocks run one after another, a block's threads are fibers.
//
// A fiber runs until it waits: at a barrier for its block, at a warp operation for its warp. Which one runs next is
// drawn at random, and whole warps are held back for a while, so that a missing barrier gives wrong results for some
// seeds instead of none. Shared memory is allocated to the byte and starts with random content. Lanes of a warp that
// meet at different operations, and threads that wait for others that have returned, are errors. The address sanitizer
// is told of every switch between fibers; its warning about swapcontext does not concern this.
#pragma once

#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define NOVA_SHARED_MEMORY(name) unsigned char* const name = cuda_on_cpu::block->shared.get()

struct Index3 {
  unsigned x, y, z;
};
struct uint4 {
  unsigned x, y, z, w;
};

inline Index3 threadIdx, blockIdx, gridDim;

namespace cuda_on_cpu {

[[noreturn]] inline void fail(const char* message) {
  std::fprintf(stderr, "cuda_on_cpu: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

enum class Operation { none, ballot, shuffle_xor, shuffle_up };

struct Warp {
  std::uint64_t done = 0;  // operations that all lanes have reached
  int arrived = 0;         // lanes at the next one
  Operation operation = Operation::none;
  std::uint32_t given[2][32];  // a lane may be one operation ahead of another that has not read yet
};

struct Fiber {
  static constexpr std::size_t kStack = 128 * 1024;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  std::uint64_t operations = 0, barriers = 0;  // that it has reached
  bool finished = false;
  void* fake_stack = nullptr;
};

struct Block {
  std::function<void()> body;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char[]> shared;
  std::uint64_t barriers = 0;  // that all threads have reached
  int at_barrier = 0;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_size = 0;
};

inline Block* block;
inline std::mt19937_64 schedule;

inline void enter() {
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_size);
  block->body();
  Fiber& self = block->fibers[threadIdx.x];
  self.finished = true;
  __sanitizer_start_switch_fiber(nullptr, block->scheduler_stack, block->scheduler_size);
  swapcontext(&self.context, &block->scheduler);
}

inline void wait() {
  Fiber& self = block->fibers[threadIdx.x];
  __sanitizer_start_switch_fiber(&self.fake_stack, block->scheduler_stack, block->scheduler_size);
  swapcontext(&self.context, &block->scheduler);
  __sanitizer_finish_switch_fiber(self.fake_stack, &block->scheduler_stack, &block->scheduler_size);
}

inline void resume(std::size_t thread) {
  Fiber& fiber = block->fibers[thread];
  threadIdx.x = static_cast<unsigned>(thread);
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), Fiber::kStack);
  swapcontext(&block->scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

inline bool can_run(std::size_t thread) {
  const Fiber& fiber = block->fibers[thread];
  return !fiber.finished && fiber.barriers <= block->barriers && fiber.operations <= block->warps[thread / 32].done;
}

// One value per lane; returns those of all lanes once all are there.
inline const std::uint32_t* meet(Operation operation, unsigned mask, std::uint32_t value) {
  if (mask != 0xffffffffu) fail("a warp operation without all lanes");
  Warp& warp = block->warps[threadIdx.x / 32];
  std::uint64_t& mine = block->fibers[threadIdx.x].operations;
  if (warp.arrived == 0) warp.operation = operation;
  if (warp.operation != operation) fail("lanes of a warp at different operations");
  std::uint32_t* const given = warp.given[mine++ % 2];
  given[threadIdx.x % 32] = value;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.done;
  }
  wait();
  return given;
}

// Runs body() as `threads` threads of `blocks` blocks.
inline void launch(unsigned blocks, int threads, std::size_t shared_bytes, const std::function<void()>& body) {
  Block now;
  block = &now;
  now.body = body;
  gridDim = {blocks, 1, 1};
  std::vector<std::size_t> runnable;
  std::uint64_t held = 0;  // warps, one bit each
  now.fibers = std::vector<Fiber>(threads);
  for (blockIdx = {0, 0, 0}; blockIdx.x < blocks; ++blockIdx.x) {
    now.barriers = 0;
    now.warps.assign(threads / 32, Warp{});
    now.shared.reset(new unsigned char[shared_bytes]);
    for (std::size_t i = 0; i < shared_bytes; ++i) now.shared[i] = static_cast<unsigned char>(schedule());
    for (Fiber& fiber : now.fibers) {
      fiber.operations = fiber.barriers = 0;
      fiber.finished = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.get(), 0, Fiber::kStack};
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, enter, 0);
    }
    while (true) {
      runnable.clear();
      bool finished = true;
      for (int thread = 0; thread < threads; ++thread) {
        finished = finished && now.fibers[thread].finished;
        if (can_run(thread)) runnable.push_back(thread);
      }
      if (finished) break;
      if (runnable.empty()) fail("threads wait for others that never come");
      // For a while some warps stand still, as long as others can run.
      if (schedule() % 16 == 0) held = schedule() & schedule();
      const auto moving = std::partition(runnable.begin(), runnable.end(),
                                         [&](std::size_t thread) { return (held >> thread / 32 & 1) == 0; });
      if (moving != runnable.begin()) runnable.erase(moving, runnable.end());
      // Each of these threads runs once, in a random order, before the next look.
      for (std::size_t left = runnable.size(); left > 0; --left) {
        std::swap(runnable[schedule() % left], runnable[left - 1]);
        resume(runnable[left - 1]);
      }
    }
  }
  block = nullptr;
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() {
  cuda_on_cpu::Block& block = *cuda_on_cpu::block;
  ++block.fibers[threadIdx.x].barriers;
  if (++block.at_barrier == static_cast<int>(block.fibers.size())) {
    block.at_barrier = 0;
    ++block.barriers;
  }
  cuda_on_cpu::wait();
}

inline unsigned __ballot_sync(unsigned mask, bool vote) {
  const std::uint32_t* votes = cuda_on_cpu::meet(cuda_on_cpu::Operation::ballot, mask, vote);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane) all |= votes[lane] << lane;
  return all;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int step) {
  using cuda_on_cpu::bit_cast;
  const auto bits = bit_cast<std::uint32_t>(value);
  return bit_cast<T>(cuda_on_cpu::meet(cuda_on_cpu::Operation::shuffle_xor, mask, bits)[threadIdx.x % 32 ^ step]);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int step) {
  using cuda_on_cpu::bit_cast;
  const auto bits = bit_cast<std::uint32_t>(value);
  const int lane = static_cast<int>(threadIdx.x % 32), from = lane < step ? lane : lane - step;
  return bit_cast<T>(cuda_on_cpu::meet(cuda_on_cpu::Operation::shuffle_up, mask, bits)[from]);
}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

namespace nova::cuda {

inline uint4 load16(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) cuda_on_cpu::fail("a misaligned load of 16 bytes");
  uint4 loaded;
  std::memcpy(&loaded, address, sizeof loaded);
  return loaded;
}

inline void store16(void* address, uint4 words) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) cuda_on_cpu::fail("a misaligned store of 16 bytes");
  std::memcpy(address, &words, sizeof words);
}

inline float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31u, fraction = bits & 1023u;
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(fraction), -24), sign != 0 ? -1.0f : 1.0f);
  return cuda_on_cpu::bit_cast<float>(sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13);
}

// Rounds towards zero: kernels convert only what a half can hold.
inline std::uint16_t float_to_half(float x) {
  const auto bits = cuda_on_cpu::bit_cast<std::uint32_t>(x), sign = bits >> 16 & 0x8000u;
  const float size = std::fabs(x);
  if (std::isnan(x)) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (size >= 65536.0f) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (size < std::ldexp(1.0f, -14))
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(std::ldexp(size, 24)));
  return static_cast<std::uint16_t>(sign | (((bits & 0x7fffffffu) >> 13) - (112u << 10)));
}

inline float max_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : std::fmax(a, b); }

inline float exp2_approximate(float x) {
  const float power = std::exp2(x);
  return power < 1.17549435e-38f ? 0.0f : power;
}

}  // namespace nova::cuda
