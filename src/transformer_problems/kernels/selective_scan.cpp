// The selective scan  h[t] = exp(delta[t] A) h[t-1] + delta[t] u[t] B[t],  y[t] = C[t] . h[t],  and its gradients.
//
// Row-major layouts: u, delta, y [batch, tokens, channels]; A [states, channels]; B, C [batch, tokens, states].
// `checkpoints` [chunks + 1, batch, states, channels] holds h before each chunk of tokens and after the last one;
// the backward pass recomputes the states of one chunk at a time from it.
//
// Neighbouring channels share a vector register, so the recurrence needs no shuffles. A worker takes a range of
// vectors; within a chunk it visits them one after the other, so that the chunk's rows stay in its cache.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr int kVectorBytes = 64;
template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(kVectorBytes))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(kVectorBytes))); };
template <class T> using Vector = typename VectorOf<T>::type;
typedef int32_t IntVector __attribute__((vector_size(kVectorBytes)));
template <class T> constexpr int64_t kLanes = kVectorBytes / sizeof(T);

// x = n ln 2 + r with |r| <= ln(2) / 2, then e^r by its Taylor series to r^7 (error 5e-9) and 2^n by its bits.
// Below -87 the result is e^-87 (1.6e-38); above 88 it is infinite, a little before float's own limit of 88.7.
inline Vector<float> exponential(Vector<float> x) {
  using V = Vector<float>;
  const V least = V{} - 87.0f, most = V{} + 88.0f;
  const V bounded = x < least ? least : (x > most ? most : x);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
  const V shifted = bounded * 1.44269504f + shift;
  const V n = shifted - shift;
  const V r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
  V power = r * (1.0f / 5040) + 1.0f / 720;
  power = power * r + 1.0f / 120;
  power = power * r + 1.0f / 24;
  power = power * r + 1.0f / 6;
  power = power * r + 0.5f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  IntVector bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;  // 0x4B400000 are the bits of `shift`, 127 is the exponent's offset
  V scale;
  std::memcpy(&scale, &bits, sizeof scale);
  const V infinite = V{} + std::numeric_limits<float>::infinity();
  return x > most ? infinite : power * scale;
}

inline Vector<double> exponential(Vector<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <class T> inline Vector<T> load(const T* from, int64_t count) {
  Vector<T> x{};
  if (count == kLanes<T>) std::memcpy(&x, from, sizeof x);
  else for (int64_t i = 0; i < count; ++i) x[i] = from[i];
  return x;
}

template <class T> inline void store(T* to, Vector<T> x, int64_t count) {
  if (count == kLanes<T>) std::memcpy(to, &x, sizeof x);
  else for (int64_t i = 0; i < count; ++i) to[i] = x[i];
}

template <class T> inline T sum(Vector<T> x) {
  T total = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
}

struct Sizes {
  int64_t batch, tokens, channels, states, chunk, workers;
  int64_t chunks() const { return (tokens + chunk - 1) / chunk; }
  int64_t end(int64_t k) const { return std::min((k + 1) * chunk, tokens); }
};

// Calls visit(worker, first, last) with a range of vectors of channels, one thread a worker.
template <class T, class Visit> void share(const Sizes& size, Visit visit) {
  const int64_t vectors = (size.channels + kLanes<T> - 1) / kLanes<T>;
  const auto range = [&](int64_t w) { visit(w, vectors * w / size.workers, vectors * (w + 1) / size.workers); };
  std::vector<std::thread> others;
  for (int64_t w = 1; w < size.workers; ++w) others.emplace_back(range, w);
  range(0);
  for (auto& other : others) other.join();
}

template <class T>
void forward(const T* u, const T* delta, const T* A, const T* B, const T* C, T* y, T* checkpoints, Sizes size) {
  using V = Vector<T>;
  const int64_t S = size.states, width = size.channels, plane = S * width;
  share<T>(size, [&](int64_t, int64_t first, int64_t last) {
    std::vector<V> h(S), a(S);
    for (int64_t b = 0; b < size.batch; ++b)
      for (int64_t k = 0; k < size.chunks(); ++k)
        for (int64_t v = first; v < last; ++v) {
          const int64_t c = v * kLanes<T>, count = std::min(kLanes<T>, width - c);
          const T* before = checkpoints + (k * size.batch + b) * plane + c;
          T* after = checkpoints + ((k + 1) * size.batch + b) * plane + c;
          for (int64_t s = 0; s < S; ++s) a[s] = load(A + s * width + c, count), h[s] = load(before + s * width, count);
          for (int64_t t = k * size.chunk; t < size.end(k); ++t) {
            const int64_t row = b * size.tokens + t, at = row * width + c;
            const V step = load(delta + at, count), input = step * load(u + at, count);
            V out{};
            for (int64_t s = 0; s < S; ++s) {
              h[s] = exponential(step * a[s]) * h[s] + input * B[row * S + s];
              out += h[s] * C[row * S + s];
            }
            store(y + at, out, count);
          }
          for (int64_t s = 0; s < S; ++s) store(after + s * width, h[s], count);
        }
  });
}

// grad_state [batch, states, channels] holds the gradient of the last state and, on return, that of the first.
// grad_A [batch, states, channels] and grad_B, grad_C [workers, batch, tokens, states] arrive as zeros and are
// to be summed over their first dimension: no two workers write to one place, and sums have a fixed order.
template <class T>
void backward(const T* grad_y, const T* u, const T* delta, const T* A, const T* B, const T* C, const T* checkpoints,
              T* grad_state, T* grad_u, T* grad_delta, T* grad_A, T* grad_B, T* grad_C, Sizes size) {
  using V = Vector<T>;
  const int64_t S = size.states, width = size.channels, plane = S * width;
  share<T>(size, [&](int64_t worker, int64_t first, int64_t last) {
    std::vector<V> a(S), carry(S), sum_A(S);
    std::vector<V> h((size.chunk + 1) * S), decay(size.chunk * S), sum_B(size.chunk * S), sum_C(size.chunk * S);
    for (int64_t b = 0; b < size.batch; ++b)
      for (int64_t k = size.chunks() - 1; k >= 0; --k) {
        const int64_t start = b * size.tokens + k * size.chunk, length = size.end(k) - k * size.chunk;
        std::fill(sum_B.begin(), sum_B.end(), V{});
        std::fill(sum_C.begin(), sum_C.end(), V{});
        for (int64_t v = first; v < last; ++v) {
          const int64_t c = v * kLanes<T>, count = std::min(kLanes<T>, width - c);
          const T* before = checkpoints + (k * size.batch + b) * plane + c;
          T* state = grad_state + b * plane + c;
          T* total_A = grad_A + b * plane + c;
          for (int64_t s = 0; s < S; ++s) {
            a[s] = load(A + s * width + c, count), h[s] = load(before + s * width, count);
            carry[s] = load(state + s * width, count), sum_A[s] = load(total_A + s * width, count);
          }
          for (int64_t t = 0; t < length; ++t) {
            const int64_t row = start + t, at = row * width + c;
            const V step = load(delta + at, count), input = step * load(u + at, count);
            const V grad = load(grad_y + at, count);
            const V* old = &h[t * S];
            V *now = &h[(t + 1) * S], *kept = &decay[t * S], *gathered = &sum_C[t * S];
            for (int64_t s = 0; s < S; ++s) {
              const V factor = exponential(step * a[s]), value = factor * old[s] + input * B[row * S + s];
              kept[s] = factor;
              now[s] = value;
              gathered[s] += value * grad;
            }
          }
          for (int64_t t = length - 1; t >= 0; --t) {
            const int64_t row = start + t, at = row * width + c;
            const V step = load(delta + at, count), value = load(u + at, count), input = step * value;
            const V grad = load(grad_y + at, count);
            const V *old = &h[t * S], *kept = &decay[t * S];
            V* gathered = &sum_B[t * S];
            V of_input{}, of_step{};
            for (int64_t s = 0; s < S; ++s) {
              const V of_state = carry[s] + grad * C[row * S + s], back = of_state * kept[s];
              const V of_exponent = back * old[s];
              carry[s] = back;
              gathered[s] += of_state * input;
              sum_A[s] += of_exponent * step;
              of_step += of_exponent * a[s];
              of_input += of_state * B[row * S + s];
            }
            store(grad_u + at, of_input * step, count);
            store(grad_delta + at, of_step + of_input * value, count);
          }
          for (int64_t s = 0; s < S; ++s) {
            store(state + s * width, carry[s], count);
            store(total_A + s * width, sum_A[s], count);
          }
        }
        const int64_t out = (worker * size.batch * size.tokens + start) * S;
        for (int64_t i = 0; i < length * S; ++i) grad_B[out + i] = sum<T>(sum_B[i]), grad_C[out + i] = sum<T>(sum_C[i]);
      }
  });
}

}  // namespace

#define EXPORT(T, suffix)                                                                                            \
  extern "C" void selective_scan_forward_##suffix(const T* u, const T* delta, const T* A, const T* B, const T* C,    \
                                                  T* y, T* checkpoints, const int64_t* sizes) {                      \
    forward<T>(u, delta, A, B, C, y, checkpoints,                                                                    \
               Sizes{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]});                                   \
  }                                                                                                                  \
  extern "C" void selective_scan_backward_##suffix(                                                                  \
      const T* grad_y, const T* u, const T* delta, const T* A, const T* B, const T* C, const T* checkpoints,         \
      T* grad_state, T* grad_u, T* grad_delta, T* grad_A, T* grad_B, T* grad_C, const int64_t* sizes) {              \
    backward<T>(grad_y, u, delta, A, B, C, checkpoints, grad_state, grad_u, grad_delta, grad_A, grad_B, grad_C,      \
                Sizes{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]});                                  \
  }

EXPORT(float, float32)
EXPORT(double, float64)
