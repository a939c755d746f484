// Vectors as wide as the processor's registers, and exp of them.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int64_t kVectorBytes = 64;
#else
constexpr int64_t kVectorBytes = 32;
#endif

template <class T> struct Wide {
  typedef T V __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t lanes = kVectorBytes / sizeof(T);
};

template <class T> inline typename Wide<T>::V load(const T* from) {
  typename Wide<T>::V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T> inline void store(T* to, typename Wide<T>::V v) { std::memcpy(to, &v, sizeof v); }

template <class T> struct Exponent;
template <> struct Exponent<float> {
  typedef int32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa = 23, terms = 8;  // 0.35^8 / 8! = 5e-9
  static constexpr float round = 12582912.0f;     // 1.5 * 2^23: adding it rounds to a whole number, in the low bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f, lowest = -87.0f;
};
template <> struct Exponent<double> {
  typedef int64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int mantissa = 52, terms = 14;  // 0.35^14 / 14! = 4e-18
  static constexpr double round = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-1, ln2_low = 1.90821492927058770002e-10, lowest = -708.0;
};

// exp of x <= 0, or near enough to 0: 2^n times the series of the rest; 0 below `lowest`.
template <class T> inline typename Wide<T>::V exponential(typename Wide<T>::V x) {
  using E = Exponent<T>;
  using V = typename Wide<T>::V;
  const V zero{};
  const V bounded = x < E::lowest ? zero + E::lowest : x;
  const V shifted = bounded * T(1.4426950408889634) + E::round, n = shifted - E::round;
  const V r = (bounded - n * E::ln2_high) - n * E::ln2_low;
  V series = zero + T(1);
#pragma GCC unroll 16
  for (int k = E::terms; k > 0; --k) series = series * r * T(1.0 / k) + T(1);
  typename E::Bits power, bits;
  std::memcpy(&power, &shifted, sizeof power);
  std::memcpy(&bits, &series, sizeof bits);
  bits += power << E::mantissa;
  V result;
  std::memcpy(&result, &bits, sizeof result);
  return x < E::lowest ? zero : result;
}

}  // namespace
