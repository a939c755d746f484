// y = gelu(x + bias) and its gradients, each in one pass over memory, for float32 and float64.
//
// gelu(z) = z Phi(z). With a = |z| the tail Phi(-a) is exp(-a^2/2) P(s) K / (a + K), where s = (a - K) / (a + K) and P
// is a polynomial: the form of Shepherd and Laframboise 1981, doi:10.1090/S0025-5718-1981-0595058-X. Its coefficients
// interpolate the exact function at Chebyshev nodes, to a relative error of 1.3e-8 for float32 and 4e-17 for float64.
// So small results keep their digits, where 1 + erf(z) loses them, and both directions take one exponential. There are
// no branches and no calls in the loops, which the compiler makes vectors of.

// By default GCC keeps to vectors of 32 bytes; those of 64 take two thirds of the time here.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

template <class T> struct Constants;

template <> struct Constants<float> {
  using Bits = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, held in the low bits
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -87.0f;  // below it exp counts as 0
  static constexpr int kExpTerms = 8;       // 0.35^8 / 8! = 5e-9
  static constexpr float kTail[] = {0.1888212846f,     -0.1519741515f,    0.09678416995f,   -0.04663075147f,
                                    0.01510161744f,    -1.881803228e-3f,  -8.808935141e-4f, 3.923284113e-4f,
                                    4.870046279e-5f,   -3.074578925e-5f};
};

template <> struct Constants<double> {
  using Bits = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-1, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -708.0;
  static constexpr int kExpTerms = 14;  // 0.35^14 / 14! = 4e-18
  static constexpr double kTail[] = {
      0.1888212826039378701,    -0.1519741604929729394,   0.09678435018555468492,   -0.04663046448992358733,
      0.01509914372267661238,   -1.885047241396179541e-3, -8.699230905944432892e-4, 4.077046104320396146e-4,
      3.333606383396117078e-5,  -5.777370416458432769e-5, -4.769684467260611389e-7, 8.786042816532376967e-6,
      1.787573269140936871e-7,  -1.479714188699498471e-6, -1.562944031805133134e-7, 2.549309765241458551e-7,
      6.593213796126115509e-8,  -3.853834272569936185e-8, -1.909844623632311425e-8, 3.624073896990879265e-9,
      3.477151179137328728e-9,  2.470816699234212023e-11, -2.387101565457795422e-10};
};

// The k-th coefficient of exp's series, 1 / k!.
template <class T> constexpr T inverse_factorial(int k) { return k < 2 ? T(1) : inverse_factorial<T>(k - 1) / T(k); }

// Every second coefficient from k on, by Horner's rule in the square, unrolled. The two halves of a polynomial wait for
// each other only at the end, so the processor works on both at once.
template <class T, int k> inline T exp_series(T square) {
  if constexpr (k + 2 >= Constants<T>::kExpTerms) return inverse_factorial<T>(k);
  else return exp_series<T, k + 2>(square) * square + inverse_factorial<T>(k);
}

template <class T, int k> inline T tail_polynomial(T square) {
  if constexpr (k + 2 >= sizeof(Constants<T>::kTail) / sizeof(T)) return Constants<T>::kTail[k];
  else return tail_polynomial<T, k + 2>(square) * square + Constants<T>::kTail[k];
}

// exp of x <= 0: 2^n times the series of what is left, |r| <= ln(2) / 2.
template <class T> inline T exp_negative(T x) {
  using C = Constants<T>;
  const T bounded = x < C::kLowest ? C::kLowest : x;
  const T shifted = bounded * T(1.4426950408889634) + C::kRound;
  const T n = shifted - C::kRound;
  const T r = (bounded - n * C::kLn2High) - n * C::kLn2Low;
  const T series = exp_series<T, 0>(r * r) + r * exp_series<T, 1>(r * r);
  typename C::Bits power, bits;
  std::memcpy(&power, &shifted, sizeof(T));
  std::memcpy(&bits, &series, sizeof(T));
  bits += typename C::Bits(uint64_t(power) << C::kMantissa);  // n, in the low bits of `shifted`, joins the exponent
  T result;
  std::memcpy(&result, &bits, sizeof(T));
  return x < C::kLowest ? T(0) : result;
}

template <class T> struct Normal {
  T exponential;  // exp(-z^2/2)
  T below;        // Phi(z)
};

template <class T> inline Normal<T> normal(T z) {
  constexpr T K = 4;
  const T a = std::fabs(z), inverse = T(1) / (a + K);
  const T exponential = exp_negative<T>(T(-0.5) * a * a);
  const T s = T(1) - 2 * K * inverse;
  const T polynomial = tail_polynomial<T, 0>(s * s) + s * tail_polynomial<T, 1>(s * s);
  const T tail = exponential * polynomial * (K * inverse);
  return {exponential, z < 0 ? tail : T(1) - tail};
}

template <class T>
void forward(const T* x, const T* bias, T* y, int64_t rows, int64_t width, int64_t workers) {
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const T* in = x + r * width;
    T* out = y + r * width;
#pragma GCC ivdep  // y is x or apart from it
    for (int64_t i = 0; i < width; ++i) {
      const T z = bias ? in[i] + bias[i] : in[i];
      out[i] = z * normal(z).below;
    }
  }
}

// The gradient by x of each row, and by the bias the sum of them, in double, worker by worker in a fixed order.
template <class T>
void backward(const T* grad, const T* x, const T* bias, T* grad_x, T* grad_bias, int64_t rows, int64_t width,
              int64_t workers) {
  std::vector<double> sums(bias ? workers * width : 0);
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t worker = 0; worker < workers; ++worker) {
    double* sum = sums.data() + (bias ? worker * width : 0);
    for (int64_t r = worker * rows / workers; r < (worker + 1) * rows / workers; ++r) {
      const T *in = x + r * width, *from = grad + r * width;
      T* to = grad_x + r * width;
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) {
        const T z = bias ? in[i] + bias[i] : in[i];
        const Normal<T> n = normal(z);
        to[i] = from[i] * (n.below + z * n.exponential * T(0.39894228040143267794));
      }
      if (bias)
        for (int64_t i = 0; i < width; ++i) sum[i] += double(to[i]);  // the row is in the nearest cache still
    }
  }
  if (!bias) return;
  for (int64_t i = 0; i < width; ++i) {
    double total = 0;
    for (int64_t worker = 0; worker < workers; ++worker) total += sums[worker * width + i];
    grad_bias[i] = T(total);
  }
}

}  // namespace

#define BIAS_GELU(T, NAME)                                                                                           \
  extern "C" void bias_gelu_forward_##NAME(const T* x, const T* bias, T* y, int64_t rows, int64_t width,             \
                                           int64_t workers) {                                                        \
    forward(x, bias, y, rows, width, workers);                                                                       \
  }                                                                                                                  \
  extern "C" void bias_gelu_backward_##NAME(const T* grad, const T* x, const T* bias, T* grad_x, T* grad_bias,       \
                                            int64_t rows, int64_t width, int64_t workers) {                          \
    backward(grad, x, bias, grad_x, grad_bias, rows, width, workers);                                                \
  }

BIAS_GELU(float, float32)
BIAS_GELU(double, float64)
