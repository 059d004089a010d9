// What the kernels ask of the machine beyond the CUDA language, the three formats of logits, and one row of them.
//
// nvcc compiles this for the GPU. A C++17 compiler compiles the same kernels for tests after it has included
// csrc/tests/cuda_on_cpu.h, which brings the names of the CUDA language and of the first section.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define NOVA_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace nova::cuda {

__device__ __forceinline__ uint4 load16(const void* address) { return __ldg(static_cast<const uint4*>(address)); }

__device__ __forceinline__ void store16(void* address, uint4 words) { *static_cast<uint4*>(address) = words; }

__device__ __forceinline__ float half_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

__device__ __forceinline__ std::uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }

// The larger one; NaN if either is. One instruction, unlike fmaxf with a test.
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// 2^x to two units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace nova::cuda
#endif

namespace nova::cuda {

// Threads of a CTA. Two CTAs per SM leave each thread 64 registers.
#ifndef NOVA_THREADS
#define NOVA_THREADS 512
#endif
constexpr int kThreads = NOVA_THREADS;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kSector = 32;       // bytes that memory hands out at once
constexpr int kVectorBytes = 16;  // of one load

static_assert(kThreads % 32 == 0 && kWarps <= 32, "a CTA is a number of whole warps");

__host__ __device__ constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ float bits_as_float(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

__device__ __forceinline__ std::uint32_t float_as_bits(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Formats. `Bits` holds a logit as it is stored. Its key is an unsigned integer of the same size in the same order:
// NaN is the largest whatever its sign and payload, -0 equals +0, and nothing but -inf has the key of -inf.
template <class BitsOf>
__device__ __forceinline__ BitsOf ordered(BitsOf bits, bool is_nan, bool is_zero) {
  constexpr BitsOf sign = static_cast<BitsOf>(BitsOf{1} << (8 * sizeof(BitsOf) - 1));
  if (is_nan) return static_cast<BitsOf>(~BitsOf{0});
  if (is_zero) return sign;
  return static_cast<BitsOf>((bits & sign) != 0 ? ~bits : bits | sign);
}

struct Float32 {
  using Bits = std::uint32_t;
  static constexpr Bits kMinusInfinity = 0xff800000u;
  static constexpr Bits kMinusInfinityKey = 0x007fffffu;
  static __device__ __forceinline__ float to_float(Bits bits) { return bits_as_float(bits); }
  static __device__ __forceinline__ Bits key(float x) { return ordered(float_as_bits(x), x != x, x == 0.0f); }
};

struct BFloat16 {
  using Bits = std::uint16_t;
  static constexpr Bits kMinusInfinity = 0xff80u;
  static constexpr Bits kMinusInfinityKey = 0x007fu;
  static __device__ __forceinline__ float to_float(Bits bits) {
    return bits_as_float(static_cast<std::uint32_t>(bits) << 16);
  }
  static __device__ __forceinline__ Bits key(float x) {
    return ordered(static_cast<Bits>(float_as_bits(x) >> 16), x != x, x == 0.0f);
  }
};

struct Float16 {
  using Bits = std::uint16_t;
  static constexpr Bits kMinusInfinity = 0xfc00u;
  static constexpr Bits kMinusInfinityKey = 0x03ffu;
  static __device__ __forceinline__ float to_float(Bits bits) { return half_to_float(bits); }
  static __device__ __forceinline__ Bits key(float x) { return ordered(float_to_half(x), x != x, x == 0.0f); }
};

enum Format { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

__device__ __forceinline__ float load_logit(const void* row, int format, int column) {
  if (format == kFloat32) return static_cast<const float*>(row)[column];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(row)[column];
  return format == kBFloat16 ? BFloat16::to_float(bits) : Float16::to_float(bits);
}

template <class F>
constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(typename F::Bits));  // logits of one load

// The logits of one load, or their keys.
template <class F>
struct Vector {
  std::uint32_t words[4];

  __device__ __forceinline__ void put(int i, typename F::Bits bits) {  // where nothing but 0 was before
    constexpr int per_word = 4 / sizeof bits;
    words[i / per_word] |= static_cast<std::uint32_t>(bits) << (16 * (i % per_word));
  }

  __device__ __forceinline__ float operator[](int i) const {
    using Bits = typename F::Bits;
    if constexpr (sizeof(Bits) == 4) return F::to_float(words[i]);
    return F::to_float(static_cast<Bits>(words[i / 2] >> (16 * (i % 2))));
  }
};

// One row. Its entries have positions from `begin` to `end` - 1, counted from the sector boundary at or before its
// first entry, so that groups of positions are whole sectors wherever the row starts. Outside it is -inf.
template <class F>
struct Row {
  using Bits = typename F::Bits;
  const Bits* data;
  int begin, end;

  __device__ __forceinline__ Row(const Bits* first, int vocabulary) : data(first) {
    begin = static_cast<int>(reinterpret_cast<std::uintptr_t>(first) % kSector / sizeof(Bits));
    end = begin + vocabulary;
  }

  __device__ __forceinline__ bool holds(int from, int to) const { return from >= begin && to <= end; }

  __device__ __forceinline__ Bits bits(int position) const {
    return holds(position, position + 1) ? data[position - begin] : F::kMinusInfinity;
  }

  __device__ __forceinline__ float operator[](int position) const { return F::to_float(bits(position)); }

  // Entries from `position`, a multiple of kVector; all of them must lie in the row.
  __device__ __forceinline__ Vector<F> whole_vector(int position) const {
    const uint4 loaded = load16(data + (position - begin));
    return {{loaded.x, loaded.y, loaded.z, loaded.w}};
  }

  __device__ __forceinline__ Vector<F> vector(int position) const {
    if (holds(position, position + kVector<F>)) return whole_vector(position);
    Vector<F> made{};
#pragma unroll
    for (int i = 0; i < kVector<F>; ++i) made.put(i, bits(position + i));
    return made;
  }
};

}  // namespace nova::cuda
