// Launchers of top-K selection and of selection with KL. The algorithm is in topk_select.cuh, the KL in
// topk_kernels.cuh, the interface in topk_select.h.
//
// One CTA of 512 threads per row; as many CTAs as fit at once, two per SM, each taking every grid-th row, so that one
// row's selection hides behind the other's stream. By formula, for N = 8192, V = 151,936, K = 500, bfloat16:
//
//   first read     N V 2 bytes                    2.49 GB   once, 16-byte loads, four in flight per thread
//   second read    N K 32 bytes (K sectors)       0.13 GB   at most; from L2 as far as it holds the 264 rows in flight,
//                                                           which are 80 MB: about half of them on an H200
//   results        N (8 K + 4) bytes              0.03 GB   the KL writes as much, and reads N K sectors of the policy
//   at 4.3 TB/s    0.58 ms + 0.02 to 0.03 ms + 0.01 ms; 32 rounds of 264 rows instead of 31.03 add 3 %: 0.63 to 0.64 ms
//
// In flight per SM: 2 x 512 x 4 x 16 = 64 KB, 32 KB while one CTA selects; 4.3 TB/s over 132 SMs and 0.8 us of latency
// need 26 KB. Exponentials: N V / (132 x 16 per cycle) = 0.33 ms at 1.75 GHz, behind the reads.
//
// Shared memory per CTA: delegates, later the chosen groups' keys; 16 KB of histogram; K chosen groups.
//   bfloat16, float16   37,728 bytes, G = 16      float32   56,720 bytes, G = 16      never above 113 KB: two CTAs
// Registers per thread for sm_90, no spills (the tests look): select 61, 61, 61; KL 64, 64, 63 (bf16, fp16, fp32).
// 1024 threads of 64 registers fill the register file of an SM: two CTAs, half of its threads.
//
// Compute capability 8.0 or newer. Not yet measured on a GPU.
#include "cuda/topk_select.h"

#include <algorithm>

#include "cuda/topk_kernels.cuh"

#ifndef NOVA_SOURCE
#define NOVA_SOURCE "unknown"
#endif

namespace nova::cuda {
namespace {

bool is_possible(std::int64_t vocabulary, std::int64_t k, float temperature) {
  return k >= 2 && k <= kMaxK && k <= vocabulary && vocabulary <= 1 << 30 && temperature > 0.0f;
}

// As many CTAs as the device holds at once, each taking every grid-th row.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), const Arguments& given, int device, void* stream) {
  if (!given.plan.possible) return cudaErrorInvalidValue;
  if (given.rows == 0) return cudaSuccess;
  int processors = 0, per_processor = 0;
  const int bytes = given.plan.shared_bytes;
  cudaError_t error = cudaSetDevice(device);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, kThreads, bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would find it
    return error;
  }
  const std::int64_t resident = static_cast<std::int64_t>(processors) * std::max(per_processor, 1);
  const unsigned grid = static_cast<unsigned>(std::min(given.rows, resident));
  kernel<<<grid, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(given);
  return cudaGetLastError();
}

template <class F>
cudaError_t select(SelectArguments given, int device, void* stream) {
  given.plan = make_plan<F>(given.vocabulary, given.k);
  return launch(topk_select_kernel<F>, given, device, stream);
}

template <class F>
cudaError_t diverge(DivergenceArguments given, int device, void* stream) {
  given.plan = make_plan<F>(given.vocabulary, given.k);
  return launch(topk_kl_kernel<F>, given, device, stream);
}

}  // namespace
}  // namespace nova::cuda

extern "C" {

int nova_topk_select(int device, void* stream, int format, const void* logits, std::int64_t stride, std::int64_t rows,
                     std::int64_t vocabulary, std::int64_t k, float temperature, std::int32_t* ids, float* values,
                     float* lse) {
  using namespace nova::cuda;
  if (!is_possible(vocabulary, k, temperature)) return cudaErrorInvalidValue;
  const SelectArguments given{
      logits, stride, rows, static_cast<int>(vocabulary), static_cast<int>(k), temperature, {}, ids, values, lse};
  if (format == kFloat32) return select<Float32>(given, device, stream);
  if (format == kBFloat16) return select<BFloat16>(given, device, stream);
  return format == kFloat16 ? select<Float16>(given, device, stream) : cudaErrorInvalidValue;
}

int nova_topk_kl(int device, void* stream, int ref_format, const void* ref, std::int64_t ref_stride, int policy_format,
                 const void* policy, std::int64_t policy_stride, std::int64_t rows, std::int64_t vocabulary,
                 std::int64_t k, float temperature, int policy_ref, const std::uint8_t* mask, float* kl, float* by_kept,
                 std::int32_t* ids) {
  using namespace nova::cuda;
  if (!is_possible(vocabulary, k, temperature) || policy_format < kFloat32 || policy_format > kFloat16)
    return cudaErrorInvalidValue;
  const DivergenceArguments given{ref,           policy,      ref_stride,      policy_stride, rows,
                                  policy_format, static_cast<int>(vocabulary), static_cast<int>(k),
                                  temperature,   policy_ref != 0,              {},
                                  mask,          kl,          by_kept,         ids};
  if (ref_format == kFloat32) return diverge<Float32>(given, device, stream);
  if (ref_format == kBFloat16) return diverge<BFloat16>(given, device, stream);
  return ref_format == kFloat16 ? diverge<Float16>(given, device, stream) : cudaErrorInvalidValue;
}

int nova_cuda_check(int device) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) return error;
  return cudaFuncGetAttributes(&attributes, nova::cuda::topk_select_kernel<nova::cuda::BFloat16>);
}

const char* nova_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

const char* nova_cuda_source() { return NOVA_SOURCE; }
}
