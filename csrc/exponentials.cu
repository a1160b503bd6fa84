// The exponentials of a tile of logits on a GPU. It is bound by memory: every logit is read once, 16 bytes at a time and
// past the caches, every exponential is written once in the same way.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include "operators.h"

namespace negotiator {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 8;  // columns of a thread and step: two 16-byte loads

__device__ void store_pack(const float (&values)[kPack], float* to) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
  __stcs(reinterpret_cast<float4*>(to) + 1, make_float4(values[4], values[5], values[6], values[7]));
}

__device__ void store_pack(const float (&values)[kPack], __nv_bfloat16* to) {
  union {
    __nv_bfloat162 pairs[kPack / 2];
    uint4 bits;
  } packed;
  for (int i = 0; i < kPack / 2; ++i) packed.pairs[i] = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
  __stcs(reinterpret_cast<uint4*>(to), packed.bits);
}

__device__ void store_one(float value, float* to) { *to = value; }
__device__ void store_one(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }

// Adds up over the block, always in the same order; the result is valid in thread 0.
__device__ float block_sum(float x) {
  __shared__ float warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(~0u, x, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (float part : warps) sum += part;
  return sum;
}

// A block a row. kAligned: every row of both matrices starts at a multiple of 16 bytes. kStore: `values` is written.
template <typename Out, bool kAligned, bool kStore>
__global__ void __launch_bounds__(kThreads)
    exponentiate(const float* logits, const float* anchors, Out* values, float* sums, float* moments, int64_t columns,
                 int64_t logits_stride, int64_t values_stride, float inverse_temperature) {
  const int64_t row = blockIdx.x;
  logits += row * logits_stride;
  values += row * values_stride;
  const float anchor = anchors[row];
  float sum = 0, moment = 0;
  const auto exponential = [&](float logit) {
    const float log = logit * inverse_temperature - anchor;
    const float value = __expf(log);
    sum += value;
    moment += value * fmaxf(log, -200.0f);  // so that 0 times -inf is 0
    return value;
  };

  const int64_t whole = kAligned ? columns / kPack * kPack : 0;
#pragma unroll 4
  for (int64_t i = kPack * threadIdx.x; i < whole; i += kPack * kThreads) {
    const float4 a = __ldcs(reinterpret_cast<const float4*>(logits + i));
    const float4 b = __ldcs(reinterpret_cast<const float4*>(logits + i) + 1);
    const float pack[kPack] = {exponential(a.x), exponential(a.y), exponential(a.z), exponential(a.w),
                               exponential(b.x), exponential(b.y), exponential(b.z), exponential(b.w)};
    if constexpr (kStore) store_pack(pack, values + i);
  }
  for (int64_t i = whole + threadIdx.x; i < columns; i += kThreads) {
    const float value = exponential(logits[i]);
    if constexpr (kStore) store_one(value, values + i);
  }

  sum = block_sum(sum), moment = block_sum(moment);
  if (threadIdx.x == 0) sums[row] += sum, moments[row] += moment;
}

bool aligned(const Tensor& matrix, int64_t element) {
  return reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0 && matrix.stride(0) * element % 16 == 0;
}

template <typename Out, bool kStore>
void launch(const Tensor& logits, const Tensor& anchors, const Tensor& values, const Tensor& sums,
            const Tensor& moments, float inverse_temperature, cudaStream_t stream) {
  const bool both = aligned(logits, sizeof(float)) && aligned(values, sizeof(Out));
  const auto kernel = both ? exponentiate<Out, true, kStore> : exponentiate<Out, false, kStore>;
  kernel<<<logits.size(0), kThreads, 0, stream>>>(
      static_cast<const float*>(logits.data_ptr()), static_cast<const float*>(anchors.data_ptr()),
      static_cast<Out*>(values.data_ptr()), static_cast<float*>(sums.data_ptr()),
      static_cast<float*>(moments.data_ptr()), logits.size(1), logits.stride(0), values.stride(0), inverse_temperature);
}

void tile_exponentials(const Tensor& logits, const Tensor& anchors, double temperature,
                       const std::optional<Tensor>& values, const Tensor& sums, const Tensor& moments, int64_t stream) {
  require(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float, "logits must be [rows, columns] float32");
  const int64_t rows = logits.size(0);
  const Tensor& out = values ? *values : logits;
  require(out.dim() == 2 && out.size(0) == rows && out.size(1) == logits.size(1),
          "values must have the shape of logits");
  const bool bf16 = out.scalar_type() == ScalarType::BFloat16;
  require(bf16 || out.scalar_type() == ScalarType::Float, "values must be float32 or bfloat16");
  for (const auto& [x, name] : {std::pair{&logits, "logits"}, {&out, "values"}})
    require(x->is_cuda() && (x->numel() == 0 || x->stride(1) == 1),
            std::string(name) + " must be on the GPU with a contiguous last dimension");
  for (const auto& [x, name] : {std::pair{&anchors, "anchors"}, {&sums, "sums"}, {&moments, "moments"}})
    require(x->is_cuda() && x->dim() == 1 && x->size(0) == rows && x->scalar_type() == ScalarType::Float &&
                x->is_contiguous(),
            std::string(name) + " must be a contiguous GPU vector of a float32 a row");
  if (rows == 0) return;
  const auto run = !values ? launch<float, false> : bf16 ? launch<__nv_bfloat16, true> : launch<float, true>;
  run(logits, anchors, out, sums, moments, static_cast<float>(1.0 / temperature),
      reinterpret_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  require(error == cudaSuccess, std::string("tile_exponentials: ") + cudaGetErrorString(error));
}

}  // namespace
}  // namespace negotiator

STABLE_TORCH_LIBRARY_IMPL(negotiator_kernels, CUDA, m) {
  m.impl("tile_exponentials", TORCH_BOX(&negotiator::tile_exponentials));
}
