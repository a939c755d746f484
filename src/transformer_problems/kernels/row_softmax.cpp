// Softmax of scaled rows with a causal limit told by position, and its gradient, each in one call, for float32 and
// float64. row_softmax.cu is the same for CUDA.
//
// A row is read for its largest value, then for its exponentials, and scaled where it was written; rows are short
// enough to stay in the nearest cache in between.

#include <cstdint>
#include <cstring>
#include <limits>

#include "vectors.h"

namespace {

template <class T> constexpr T kNever = -std::numeric_limits<T>::infinity();

template <class T> inline typename Wide<T>::V load_some(const T* from, int64_t count, T rest) {
  if (count >= Wide<T>::lanes) return load(from);
  T held[Wide<T>::lanes];
  for (int64_t lane = 0; lane < Wide<T>::lanes; ++lane) held[lane] = lane < count ? from[lane] : rest;
  return load(held);
}

template <class T> inline void store_some(T* to, typename Wide<T>::V v, int64_t count) {
  std::memcpy(to, &v, (count < Wide<T>::lanes ? count : Wide<T>::lanes) * sizeof(T));
}

template <class T> inline T sum_of(typename Wide<T>::V v) {
  T total = 0;
  for (int64_t lane = 0; lane < Wide<T>::lanes; ++lane) total += v[lane];
  return total;
}

// Columns that row r of a matrix [rows, width] may see: all, or those up to the diagonal into its last corner.
inline int64_t visible_in(int64_t r, int64_t rows, int64_t width, int64_t is_causal) {
  const int64_t until = is_causal ? r + 1 + width - rows : width;
  return until < 0 ? 0 : until;
}

template <class T>
void softmax(const T* scores, T* weights, int64_t matrices, int64_t rows, int64_t width, int64_t is_causal, T scale,
             int64_t workers) {
  using V = typename Wide<T>::V;
  constexpr int64_t lanes = Wide<T>::lanes;
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t line = 0; line < matrices * rows; ++line) {
    const int64_t visible = visible_in(line % rows, rows, width, is_causal);
    const T* in = scores + line * width;
    T* out = weights + line * width;
    V most = V{} + kNever<T>, sum{};
    for (int64_t j = 0; j < visible; j += lanes) {
      const V value = load_some(in + j, visible - j, kNever<T>);
      most = value > most ? value : most;
    }
    T largest = kNever<T>;
    for (int64_t lane = 0; lane < lanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
    const T shift = largest == kNever<T> ? T(0) : largest;
    for (int64_t j = 0; j < visible; j += lanes) {
      const V value = exponential<T>((load_some(in + j, visible - j, kNever<T>) - shift) * scale);
      store_some(out + j, value, visible - j);
      sum += value;
    }
    const T total = sum_of<T>(sum), factor = total == 0 ? T(0) : T(1) / total;
    for (int64_t j = 0; j < visible; ++j) out[j] *= factor;
    std::memset(out + visible, 0, (width - visible) * sizeof(T));
  }
}

template <class T>
void gradient(const T* grad, const T* weights, T* grad_scores, int64_t matrices, int64_t rows, int64_t width,
              int64_t is_causal, T scale, int64_t workers) {
  using V = typename Wide<T>::V;
  constexpr int64_t lanes = Wide<T>::lanes;
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t line = 0; line < matrices * rows; ++line) {
    const int64_t visible = visible_in(line % rows, rows, width, is_causal);
    const T *from = grad + line * width, *weight = weights + line * width;
    T* out = grad_scores + line * width;
    V sum{};
    for (int64_t j = 0; j < visible; j += lanes)
      sum += load_some(from + j, visible - j, T(0)) * load_some(weight + j, visible - j, T(0));
    const T mean = sum_of<T>(sum);
    for (int64_t j = 0; j < visible; ++j) out[j] = scale * weight[j] * (from[j] - mean);
    std::memset(out + visible, 0, (width - visible) * sizeof(T));
  }
}

}  // namespace

#define ROW_SOFTMAX(T, NAME)                                                                                         \
  extern "C" void row_softmax_forward_##NAME(const T* scores, T* weights, int64_t matrices, int64_t rows,            \
                                             int64_t width, int64_t is_causal, double scale, int64_t workers) {      \
    softmax<T>(scores, weights, matrices, rows, width, is_causal, T(scale), workers);                                \
  }                                                                                                                  \
  extern "C" void row_softmax_backward_##NAME(const T* grad, const T* weights, T* grad_scores, int64_t matrices,     \
                                              int64_t rows, int64_t width, int64_t is_causal, double scale,          \
                                              int64_t workers) {                                                     \
    gradient<T>(grad, weights, grad_scores, matrices, rows, width, is_causal, T(scale), workers);                    \
  }

ROW_SOFTMAX(float, float32)
ROW_SOFTMAX(double, float64)
