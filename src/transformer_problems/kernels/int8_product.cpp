// y = x W^T for float32 rows x and a matrix W of int8 with a scale for each output: each row is rounded to int8 by a
// scale of its own, products are summed exactly in int32, and both scales are multiplied in at the end.
//
// A rounded input is kept as itself plus 128, unsigned: processors multiply unsigned by signed bytes (VNNI), four at a
// time. What the 128 adds is taken off by the sum of each row of W.
//
// W stays as it is, one row an output. A few rows of x take dot products along it, four outputs at a time, which read
// every weight once from memory. More rows are worth a rearranged copy of 32 outputs, in the second cache and one at a
// time: four inputs of each side by side, against which four inputs of a row of x are multiplied in one instruction.

// By default GCC keeps to vectors of 32 bytes.
#if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("prefer-vector-width=512")
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && !defined(PORTABLE)
#define HAS_VNNI
#include <immintrin.h>
#endif

#define UNROLLED _Pragma("GCC unroll 16") for

namespace {

constexpr int32_t kOffset = 128;
constexpr int64_t kVector = 64;  // bytes
constexpr int kGroup = 4;        // outputs of a dot product
constexpr int kPanel = 32;       // outputs rearranged together
constexpr int64_t kFewRows = 8;  // fewer are not worth rearranging for

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
template <class T> using Aligned = std::unique_ptr<T[], Free>;

int64_t rounded_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

template <class T> Aligned<T> aligned(int64_t count) {
  return Aligned<T>(static_cast<T*>(std::aligned_alloc(kVector, rounded_up(count * sizeof(T), kVector))));
}

// The scale of a row, and its rounded values plus an offset. NaN in a row makes its scale, and so its outputs, NaN.
template <class Byte> float round_row(const float* x, Byte* rounded, int64_t inputs, float fixed_scale, int offset) {
  uint32_t largest_bits = 0;  // magnitudes order as their bits do, NaN above all; integers are compared many at once
  for (int64_t i = 0; i < inputs; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    largest_bits = std::max(largest_bits, bits & 0x7fffffffu);
  }
  float largest;
  std::memcpy(&largest, &largest_bits, sizeof largest);
  float scale = largest == 0 ? 1 : largest / 127;
  if (fixed_scale > 0 && largest_bits <= 0x7f800000u) scale = fixed_scale;
  const float inverse = 1 / scale;
  for (int64_t i = 0; i < inputs; ++i) {
    const float bounded = std::min(127.0f, std::max(-127.0f, x[i] * inverse));
    rounded[i] = Byte(int32_t(std::nearbyint(bounded)) + offset);
  }
  return scale;
}

int32_t dot(const uint8_t* x, const int8_t* w, int64_t inputs) {
  int32_t sum = 0;
  for (int64_t i = 0; i < inputs; ++i) sum += int32_t(x[i]) * int32_t(w[i]);
  return sum;
}

#ifdef HAS_VNNI

__mmask64 first(int64_t count) { return count >= kVector ? ~__mmask64(0) : ~__mmask64(0) >> (kVector - count); }

// sums += the dot products of four unsigned bytes of x with four signed ones of w, in place: of the intrinsic GCC makes
// copies, for which many sums at once have no registers.
inline __attribute__((always_inline)) void add_products(__m512i& sums, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(x), "v"(w));
}

// The four totals of four vectors of sums.
__m128i totals(const __m512i* sums) {
  const __m512i ab =
      _mm512_add_epi32(_mm512_unpacklo_epi32(sums[0], sums[1]), _mm512_unpackhi_epi32(sums[0], sums[1]));
  const __m512i cd =
      _mm512_add_epi32(_mm512_unpacklo_epi32(sums[2], sums[3]), _mm512_unpackhi_epi32(sums[2], sums[3]));
  const __m512i lanes = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(lanes), _mm512_extracti64x4_epi64(lanes, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// Rows and columns of 16 by 16 groups of four bytes change places.
void transpose(__m512i* rows) {
  __m512i pairs[16], fours[16];
  UNROLLED (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  UNROLLED (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  UNROLLED (int j = 0; j < 4; ++j) {  // quarter q of fours[4 g + j] holds column 4 q + j of rows 4 g to 4 g + 3
    const __m512i even = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0x88);
    const __m512i odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], 0xdd);
    const __m512i late_even = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0x88);
    const __m512i late_odd = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], 0xdd);
    rows[j] = _mm512_shuffle_i32x4(even, late_even, 0x88);
    rows[4 + j] = _mm512_shuffle_i32x4(odd, late_odd, 0x88);
    rows[8 + j] = _mm512_shuffle_i32x4(even, late_even, 0xdd);
    rows[12 + j] = _mm512_shuffle_i32x4(odd, late_odd, 0xdd);
  }
}

#endif

struct Product {
  const int8_t* weight;
  const int32_t* weight_sums;
  const float* scales;
  const float* bias;
  float* y;
  int64_t inputs, outputs;
  const uint8_t* rounded;
  int64_t stride;  // of `rounded`, a multiple of kVector, in bytes
  const float* row_scales;

  void finish(int64_t r, int64_t o, const int32_t* sums, int64_t count) const {
    float* written = y + r * outputs + o;
    for (int64_t c = 0; c < count; ++c)
      written[c] = float(sums[c] - kOffset * weight_sums[o + c]) * (row_scales[r] * scales[o + c]);
    if (bias)
      for (int64_t c = 0; c < count; ++c) written[c] += bias[o + c];
  }

  void plain(int64_t rows, int64_t o, int64_t end) const {
    for (; o < end; ++o)
      for (int64_t r = 0; r < rows; ++r) {
        const int32_t sum = dot(rounded + r * stride, weight + o * inputs, inputs);
        finish(r, o, &sum, 1);
      }
  }
#ifdef HAS_VNNI

  // 16 outputs of some rows, or as many as there are.
  template <int R>
  inline __attribute__((always_inline)) void finish(int64_t row, int64_t o, const __m512i* sums) const {
    const __mmask16 there = o + 16 <= outputs ? 0xffff : o < outputs ? (1 << (outputs - o)) - 1 : 0;
    const __m512i offsets =
        _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(there, weight_sums + o), _mm512_set1_epi32(kOffset));
    const __m512 output_scales = _mm512_maskz_loadu_ps(there, scales + o);
    const __m512 added = bias ? _mm512_maskz_loadu_ps(there, bias + o) : _mm512_setzero_ps();
    UNROLLED (int r = 0; r < R; ++r) {
      const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[r], offsets));
      const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(row_scales[row + r]), output_scales);
      const __m512 scaled = _mm512_mul_ps(exact, scale);
      _mm512_mask_storeu_ps(y + (row + r) * outputs + o, there, bias ? _mm512_add_ps(scaled, added) : scaled);
    }
  }

  template <int R> void dots(int64_t row, int64_t o) const {
    const uint8_t* x = rounded + row * stride;
    const int8_t* w = weight + o * inputs;
    __m512i kept[R][kGroup];
    UNROLLED (int r = 0; r < R; ++r)
      UNROLLED (int c = 0; c < kGroup; ++c) kept[r][c] = _mm512_setzero_si512();
    for (int64_t i = 0; i < inputs; i += kVector) {
      const __mmask64 there = first(inputs - i);
      UNROLLED (int c = 0; c < kGroup; ++c) {
        __builtin_prefetch(w + (c + kGroup) * inputs + i);  // the next group: rows are too short to be foreseen
        const __m512i weights = _mm512_maskz_loadu_epi8(there, w + c * inputs + i);
        UNROLLED (int r = 0; r < R; ++r)
          add_products(kept[r][c], _mm512_load_si512(x + r * stride + i), weights);
      }
    }
    for (int r = 0; r < R; ++r) {
      int32_t sums[kGroup];
      _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), totals(kept[r]));
      finish(row + r, o, sums, kGroup);
    }
  }

  // W of kPanel outputs from o on as [inputs / 4, kPanel, 4]; zeros where there are no outputs or inputs.
  void rearrange(int64_t o, int8_t* panel) const {
    for (int half = 0; half < 2; ++half, o += 16)
      for (int64_t i = 0; i < inputs; i += kVector) {
        const __mmask64 there = first(inputs - i);
        __m512i square[16];
        UNROLLED (int c = 0; c < 16; ++c) {
          const int8_t* row = weight + (o + c) * inputs + i;
          __builtin_prefetch(row + 16 * inputs);  // rows are too short to be foreseen
          square[c] = _mm512_maskz_loadu_epi8(o + c < outputs ? there : 0, row);
        }
        transpose(square);
        for (int k = 0; k < 16; ++k) _mm512_store_si512(panel + (i / 4 + k) * kPanel * 4 + half * kVector, square[k]);
      }
  }

  template <int R> int64_t tiles(int64_t row, int64_t end, int64_t o, const int8_t* panel) const {
    for (; row + R <= end; row += R) {
      const uint8_t* x = rounded + row * stride;
      __m512i low[R], high[R];
      UNROLLED (int r = 0; r < R; ++r) low[r] = high[r] = _mm512_setzero_si512();
      for (int64_t i = 0; i < inputs; i += 4) {
        const __m512i w = _mm512_load_si512(panel + i * kPanel), v = _mm512_load_si512(panel + i * kPanel + kVector);
        UNROLLED (int r = 0; r < R; ++r) {
          int32_t four;
          std::memcpy(&four, x + r * stride + i, sizeof four);
          const __m512i inputs_of_row = _mm512_set1_epi32(four);
          add_products(low[r], inputs_of_row, w);
          add_products(high[r], inputs_of_row, v);
        }
      }
      finish<R>(row, o, low);
      finish<R>(row, o + 16, high);
    }
    return row;
  }

  void few(int64_t rows, int64_t o, int64_t end) const {
    for (; o + kGroup <= end; o += kGroup) {
      int64_t r = 0;
      for (; r + 4 <= rows; r += 4) dots<4>(r, o);
      for (; r + 2 <= rows; r += 2) dots<2>(r, o);
      if (r < rows) dots<1>(r, o);
    }
    plain(rows, o, end);
  }

  void many(int64_t rows, int64_t o, int8_t* panel) const {
    rearrange(o, panel);
    tiles<1>(tiles<4>(tiles<12>(0, rows, o, panel), rows, o, panel), rows, o, panel);
  }
#endif

  // Outputs from o on, kPanel of them or as many as there are.
  void answer(int64_t rows, int64_t o, int8_t* panel) const {
    const int64_t end = std::min(outputs, o + kPanel);
#ifdef HAS_VNNI
    if (rows < kFewRows)
      few(rows, o, end);
    else
      many(rows, o, panel);
#else
    plain(rows, o, end);
#endif
  }
};

}  // namespace

extern "C" void int8_round(const float* x, int8_t* rounded, float* scales, int64_t rows, int64_t inputs,
                           int64_t workers, double fixed_scale) {
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    scales[r] = round_row(x + r * inputs, rounded + r * inputs, inputs, float(fixed_scale), 0);
}

extern "C" void int8_product(const float* x, const int8_t* weight, const int32_t* weight_sums, const float* scales,
                             const float* bias, float* y, int64_t rows, int64_t inputs, int64_t outputs,
                             int64_t workers, double fixed_scale) {
  const int64_t stride = rounded_up(inputs, kVector);
  const auto rounded = aligned<uint8_t>(rows * stride);
  const auto row_scales = aligned<float>(rows);
  const Product product{weight,         weight_sums, scales, bias, y, inputs, outputs, rounded.get(), stride,
                        row_scales.get()};
#pragma omp parallel num_threads(workers)
  {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      row_scales[r] = round_row(x + r * inputs, rounded.get() + r * stride, inputs, float(fixed_scale), kOffset);
    const auto panel = aligned<int8_t>(rows < kFewRows ? 0 : kPanel * stride);
#pragma omp for schedule(static)
    for (int64_t o = 0; o < outputs; o += kPanel) product.answer(rows, o, panel.get());
  }
}
