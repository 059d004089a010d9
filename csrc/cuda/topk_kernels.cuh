// The two kernels: top-K selection, and selection with the KL divergence over the kept entries in the same CTA.
//
// With z the policy's and v the reference's kept logits over the temperature T, p = softmax(z), r = softmax(v) and
// d = log p - log r, all over the kept entries:
//
//   policy_ref   KL(p||r) = sum p d + r - p        by_kept = dKL/dz / T = p (d - KL) / T
//   ref_policy   KL(r||p) = sum p - r - r d        by_kept = (p - r) / T
//
// Each term is >= 0 and is computed so that it is: a (d + exp(-d) - 1), by its series for small |d|; 0 where d = 0.
#pragma once

#include "cuda/topk_select.cuh"

namespace nova::cuda {

struct SelectArguments {
  const void* logits;  // [rows, vocabulary], `stride` entries from row to row
  std::int64_t stride, rows;
  int vocabulary, k;
  float temperature;
  Plan plan;
  std::int32_t* ids;  // [rows, k]
  float* values;      // [rows, k]
  float* lse;         // [rows]
};

struct DivergenceArguments {
  const void *ref, *policy;  // [rows, vocabulary]
  std::int64_t ref_stride, policy_stride, rows;
  int policy_format, vocabulary, k;
  float temperature;
  bool policy_ref;           // the direction
  Plan plan;
  const std::uint8_t* mask;  // [rows] or null: rows with 0 read nothing
  float* kl;                 // [rows]
  float* by_kept;            // [rows, k] or null
  std::int32_t* ids;         // [rows, k]
};

template <class F>
__global__ void __launch_bounds__(kThreads, 2) topk_select_kernel(SelectArguments given) {
  NOVA_SHARED_MEMORY(memory);
  const Shared<F> shared(memory, given.plan);
  shared.work->bins[threadIdx.x] = Bins{};
  for (std::int64_t n = blockIdx.x; n < given.rows; n += gridDim.x) {
    const Row<F> row(static_cast<const typename F::Bits*>(given.logits) + n * given.stride, given.vocabulary);
    std::int32_t* ids = given.ids + n * given.k;
    float* values = given.values + n * given.k;
    const int kept = select_row<F, true>(row, given.k, given.temperature, given.plan, shared, given.lse + n,
                                         [&](int slot, int column, float value) {
                                           ids[slot] = column;
                                           values[slot] = value;
                                         });
    for (int slot = kept + threadIdx.x; slot < given.k; slot += kThreads) {
      ids[slot] = -1;
      values[slot] = -INFINITY;
    }
  }
}

// One number per thread, combined in the same order every time; every thread gets the result.
template <class Combine>
__device__ __forceinline__ float reduce(float x, float* scratch, Combine combine) {
  for (int step = 16; step > 0; step /= 2) x = combine(x, __shfl_xor_sync(kAllLanes, x, step));
  __syncthreads();  // the scratch of the reduction before has been read
  if (lane_index() == 0) scratch[warp_index()] = x;
  __syncthreads();
  x = scratch[0];
  for (int warp = 1; warp < kWarps; ++warp) x = combine(x, scratch[warp]);
  return x;
}

// In place; a thread keeps to its own entries.
__device__ __forceinline__ void log_softmax(float* x, int n, float* scratch) {
  float maximum = -INFINITY, sum = 0.0f;
  for (int i = threadIdx.x; i < n; i += kThreads) maximum = fmaxf(maximum, x[i]);
  maximum = reduce(maximum, scratch, [](float a, float b) { return fmaxf(a, b); });
  for (int i = threadIdx.x; i < n; i += kThreads) sum += expf(x[i] - maximum);
  sum = reduce(sum, scratch, [](float a, float b) { return a + b; });
  for (int i = threadIdx.x; i < n; i += kThreads) x[i] = (x[i] - maximum) - logf(sum);
}

// a (d + exp(-d) - 1) = a d + b - a for d = log a - log b.
__device__ __forceinline__ float divergence(float a, float b, float d) {
  if (fabsf(d) >= 0.7f) return fmaf(a, d, b) - a;
  float series = -1.0f / 362880;
  series = fmaf(series, d, 1.0f / 40320);
  series = fmaf(series, d, -1.0f / 5040);
  series = fmaf(series, d, 1.0f / 720);
  series = fmaf(series, d, -1.0f / 120);
  series = fmaf(series, d, 1.0f / 24);
  series = fmaf(series, d, -1.0f / 6);
  series = fmaf(series, d, 0.5f);
  return series * d * d * a;
}

// KL of a row with `kept` entries from log_p and log_r [kept].
__device__ __forceinline__ float kl_of(const float* log_p, const float* log_r, int kept, bool policy_ref,
                                       float* scratch) {
  float kl = 0.0f;
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    const float p = expf(log_p[i]), r = expf(log_r[i]), d = log_p[i] - log_r[i];
    // p = 0 at log p = -inf: the term is r one way, +inf the other; neither is 0 * inf.
    kl += policy_ref ? divergence(p, r, d == -INFINITY ? -FLT_MAX : d) : divergence(r < FLT_MIN ? FLT_MIN : r, p, -d);
  }
  return reduce(kl, scratch, [](float a, float b) { return a + b; });
}

// One row. The selection's shared memory is free: the kept logits of both sides go where its keys were.
template <class F>
__device__ __forceinline__ void diverge(const DivergenceArguments& given, std::int64_t n, const Row<F>& ref,
                                        const Shared<F>& shared, int kept) {
  float *log_p = reinterpret_cast<float*>(shared.keys), *log_r = log_p + given.k, *scratch = shared.work->sums;
  const std::int64_t first = n * given.policy_stride;
  const char* policy = static_cast<const char*>(given.policy) + first * (given.policy_format == kFloat32 ? 4 : 2);
  const std::int32_t* ids = given.ids + n * given.k;
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    log_p[i] = load_logit(policy, given.policy_format, ids[i]) / given.temperature;
    log_r[i] = ref[ref.begin + ids[i]] / given.temperature;
  }
  log_softmax(log_p, kept, scratch);
  log_softmax(log_r, kept, scratch);
  const float sum = kl_of(log_p, log_r, kept, given.policy_ref, scratch);
  const float kl = kept > 0 ? sum : NAN;  // there is no distribution
  if (threadIdx.x == 0) given.kl[n] = kl;
  if (given.by_kept == nullptr) return;
  float* by_kept = given.by_kept + n * given.k;
  for (int i = threadIdx.x; i < kept; i += kThreads) {
    const float p = expf(log_p[i]), d = log_p[i] - log_r[i];
    const float by_z = given.policy_ref ? p * ((d == -INFINITY ? -FLT_MAX : d) - kl) : p - expf(log_r[i]);
    by_kept[i] = by_z / given.temperature;
  }
  for (int i = kept + threadIdx.x; i < given.k; i += kThreads) by_kept[i] = 0.0f;
}

template <class F>
__global__ void __launch_bounds__(kThreads, 2) topk_kl_kernel(DivergenceArguments given) {
  NOVA_SHARED_MEMORY(memory);
  const Shared<F> shared(memory, given.plan);
  shared.work->bins[threadIdx.x] = Bins{};
  for (std::int64_t n = blockIdx.x; n < given.rows; n += gridDim.x) {
    std::int32_t* ids = given.ids + n * given.k;
    if (given.mask != nullptr && given.mask[n] == 0) {
      for (int i = threadIdx.x; i < given.k; i += kThreads) {
        ids[i] = -1;
        if (given.by_kept != nullptr) given.by_kept[n * given.k + i] = 0.0f;
      }
      if (threadIdx.x == 0) given.kl[n] = 0.0f;
      continue;
    }
    const Row<F> row(static_cast<const typename F::Bits*>(given.ref) + n * given.ref_stride, given.vocabulary);
    const int kept = select_row<F, false>(row, given.k, given.temperature, given.plan, shared, nullptr,
                                          [&](int slot, int column, float) { ids[slot] = column; });
    for (int i = kept + threadIdx.x; i < given.k; i += kThreads) ids[i] = -1;
    __syncthreads();  // the ids are written, the keys have been read
    diverge(given, n, row, shared, kept);
  }
}

}  // namespace nova::cuda
