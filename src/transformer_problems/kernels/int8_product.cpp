// y = x W^T for float32 rows x and a matrix W of int8 with a scale for each output: each row is rounded to int8 by a scale
// of its own, products are summed exactly in int32, and both scales are multiplied in at the end.
//
// A rounded input is kept as itself plus 128, unsigned: processors multiply unsigned by signed bytes (VNNI), four at a
// time, which the compiler makes of the plain loop. What the 128 adds is taken off by the sum of each row of W.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

constexpr int32_t kOffset = 128;

// The scale of a row, and its rounded values plus an offset.
template <class Byte> float round_row(const float* x, Byte* rounded, int64_t inputs, float fixed_scale, int32_t offset) {
  float largest = 0;
  if (fixed_scale > 0) {
    largest = fixed_scale * 127;
  } else {
    for (int64_t i = 0; i < inputs; ++i) largest = std::max(largest, std::fabs(x[i]));
  }
  const float scale = largest > 0 ? largest / 127 : 1;
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

}  // namespace

extern "C" void int8_round(const float* x, int8_t* rounded, float* scales, int64_t rows, int64_t inputs, int64_t workers,
                           double fixed_scale) {
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t r = 0; r < rows; ++r)
    scales[r] = round_row(x + r * inputs, rounded + r * inputs, inputs, float(fixed_scale), 0);
}

extern "C" void int8_product(const float* x, const int8_t* weight, const int32_t* weight_sums, const float* scales,
                             const float* bias, float* y, int64_t rows, int64_t inputs, int64_t outputs,
                             int64_t workers, double fixed_scale) {
  std::vector<uint8_t> rounded(rows * inputs);
  std::vector<float> row_scales(rows);
  for (int64_t r = 0; r < rows; ++r)
    row_scales[r] = round_row(x + r * inputs, rounded.data() + r * inputs, inputs, float(fixed_scale), kOffset);
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t r = 0; r < rows; ++r) {
      const int32_t sum = dot(rounded.data() + r * inputs, weight + o * inputs, inputs) - kOffset * weight_sums[o];
      y[r * outputs + o] = float(sum) * (row_scales[r] * scales[o]) + (bias ? bias[o] : 0);
    }
}
