// Softmax of scaled rows with a causal limit told by position, and its gradient: row_softmax.cpp on a GPU.
//
// A block of threads takes a row. The threads of a warp add up by shuffles, the warps by shared memory.

#include <cstdint>

#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256, kWarp = 32, kWarps = kThreads / kWarp;

struct Larger {
  template <class T> __device__ T operator()(T a, T b) const { return a > b ? a : b; }
};
struct Sum {
  template <class T> __device__ T operator()(T a, T b) const { return a + b; }
};

// Of one value from each thread of the block; every thread gets the result.
template <class T, class Join> __device__ T over_block(T value, Join join) {
  __shared__ T of_warp[kWarps];
  for (int step = kWarp / 2; step > 0; step /= 2) value = join(value, __shfl_xor_sync(0xffffffff, value, step));
  __syncthreads();  // an earlier result has been read by all
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) value = join(value, of_warp[warp]);
  return value;
}

__device__ int64_t visible_in(int64_t r, int64_t rows, int64_t width, bool is_causal) {
  const int64_t until = is_causal ? r + 1 + width - rows : width;
  return until < 0 ? 0 : until;
}

template <class T>
__global__ void softmax(const T* scores, T* weights, int64_t rows, int64_t width, bool is_causal, T scale) {
  const int64_t line = blockIdx.x, visible = visible_in(line % rows, rows, width, is_causal);
  const T* in = scores + line * width;
  T* out = weights + line * width;
  const T never = -T(INFINITY);
  T largest = never, sum = 0;
  for (int64_t j = threadIdx.x; j < visible; j += kThreads) largest = Larger()(in[j], largest);
  largest = over_block(largest, Larger());
  const T shift = largest == never ? T(0) : largest;
  for (int64_t j = threadIdx.x; j < visible; j += kThreads) {
    out[j] = exp((in[j] - shift) * scale);
    sum += out[j];
  }
  sum = over_block(sum, Sum());
  const T factor = sum == T(0) ? T(0) : T(1) / sum;
  for (int64_t j = threadIdx.x; j < width; j += kThreads) out[j] = j < visible ? out[j] * factor : T(0);
}

template <class T>
__global__ void gradient(const T* grad, const T* weights, T* grad_scores, int64_t rows, int64_t width, bool is_causal,
                         T scale) {
  const int64_t line = blockIdx.x, visible = visible_in(line % rows, rows, width, is_causal);
  const T *from = grad + line * width, *weight = weights + line * width;
  T* out = grad_scores + line * width;
  T mean = 0;
  for (int64_t j = threadIdx.x; j < visible; j += kThreads) mean += from[j] * weight[j];
  mean = over_block(mean, Sum());
  for (int64_t j = threadIdx.x; j < width; j += kThreads)
    out[j] = j < visible ? scale * weight[j] * (from[j] - mean) : T(0);
}

}  // namespace

// Both return the error of the launch, 0 for none.
#define ROW_SOFTMAX(T, NAME)                                                                                         \
  extern "C" int row_softmax_forward_##NAME(const T* scores, T* weights, int64_t matrices, int64_t rows,             \
                                            int64_t width, int64_t is_causal, double scale, cudaStream_t stream) {   \
    softmax<T><<<matrices * rows, kThreads, 0, stream>>>(scores, weights, rows, width, is_causal != 0, T(scale));    \
    return cudaGetLastError();                                                                                       \
  }                                                                                                                  \
  extern "C" int row_softmax_backward_##NAME(const T* grad, const T* weights, T* grad_scores, int64_t matrices,      \
                                             int64_t rows, int64_t width, int64_t is_causal, double scale,           \
                                             cudaStream_t stream) {                                                  \
    gradient<T><<<matrices * rows, kThreads, 0, stream>>>(grad, weights, grad_scores, rows, width, is_causal != 0,   \
                                                          T(scale));                                                 \
    return cudaGetLastError();                                                                                       \
  }

ROW_SOFTMAX(float, float32)
ROW_SOFTMAX(double, float64)
