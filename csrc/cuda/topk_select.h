// The C interface of nova_kernels._cuda: plain pointers to device memory, no torch.
//
// Formats: 0 float32, 1 bfloat16, 2 float16. Logits have unit stride over the vocabulary and any stride over the rows,
// in entries; they need no alignment beyond their own type. Outputs are contiguous. Kernels are queued on `stream` of
// the device; the return value is a cudaError_t, 1 (cudaErrorInvalidValue) also for what no kernel can do: k not in
// 2 ... min(vocabulary, 4096), a vocabulary whose group maxima do not fit into shared memory (above 2.6 million in
// float32, 10 million in 16 bits), a temperature that is not positive.
#pragma once

#include <cstdint>

extern "C" {

// The k largest of each row: ids int32 [rows, k] ascending and values float [rows, k], -1 and -inf in slots that fewer
// than k entries above -inf leave; lse float [rows] of logits / temperature. NaN is the largest, ties and -0 with +0 go
// to the lowest index.
int nova_topk_select(int device, void* stream, int format, const void* logits, std::int64_t stride, std::int64_t rows,
                     std::int64_t vocabulary, std::int64_t k, float temperature, std::int32_t* ids, float* values,
                     float* lse);

// The same selection of `ref`, and KL [rows] of `policy` from it over the kept entries; by_kept [rows, k] is its
// derivative by the policy's kept logits, or null. Rows where mask (bytes [rows], or null) is 0 read nothing: KL 0,
// by_kept 0, ids -1. A row without any entry above -inf has KL NaN.
int nova_topk_kl(int device, void* stream, int ref_format, const void* ref, std::int64_t ref_stride, int policy_format,
                 const void* policy, std::int64_t policy_stride, std::int64_t rows, std::int64_t vocabulary,
                 std::int64_t k, float temperature, int policy_ref, const std::uint8_t* mask, float* kl, float* by_kept,
                 std::int32_t* ids);

// Whether the kernels were compiled for this device, as a cudaError_t.
int nova_cuda_check(int device);

const char* nova_cuda_error(int error);  // its description
const char* nova_cuda_source();          // hash of the sources it was built from, see setup.py
}
