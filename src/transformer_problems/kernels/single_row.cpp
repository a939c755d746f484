// What a step of decoding does to its single row in bfloat16: y = W x for a matrix [outputs, inputs] in row-major order,
// and y = x / sqrt(mean(x^2) + eps) * w.
//
// Of a matrix every weight is read once, so memory sets the pace. A worker takes a range of rows, widens the weights to float32 by
// a shift, and asks for the bytes some lines ahead, which the processor's own prefetcher, stopped by each page, does not.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kAhead = 1024;  // weights, 2 KiB
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

inline Floats widened(const uint16_t* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Floats floats;
  std::memcpy(&floats, &words, sizeof floats);
  return floats;
}

inline Floats loaded(const float* from) {
  Floats floats;
  std::memcpy(&floats, from, sizeof floats);
  return floats;
}

inline float widened_one(uint16_t half) {
  const uint32_t word = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

inline uint16_t rounded(float value) {  // to the nearest bfloat16, ties to even
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if ((word & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // NaN
  return uint16_t((word + 0x7FFF + ((word >> 16) & 1)) >> 16);
}

inline float row_times(const uint16_t* row, const float* x, int64_t inputs) {
  Floats even{}, odd{};  // two sums, so that an addition need not wait for the one before it
  int64_t i = 0;
  for (; i + 2 * kLanes <= inputs; i += 2 * kLanes) {
    __builtin_prefetch(row + i + kAhead);
    even += widened(row + i) * loaded(x + i);
    odd += widened(row + i + kLanes) * loaded(x + i + kLanes);
  }
  const Floats both = even + odd;
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += both[lane];
  for (; i < inputs; ++i) sum += widened_one(row[i]) * x[i];
  return sum;
}

}  // namespace

extern "C" void row_product_bfloat16(const uint16_t* weight, const uint16_t* x, uint16_t* y, int64_t outputs,
                                     int64_t inputs, int64_t workers) {
  std::vector<float> wide(inputs);
  for (int64_t i = 0; i < inputs; ++i) wide[i] = widened_one(x[i]);
#pragma omp parallel for num_threads(workers) schedule(static)
  for (int64_t o = 0; o < outputs; ++o) y[o] = rounded(row_times(weight + o * inputs, wide.data(), inputs));
}

extern "C" void rms_norm_bfloat16(const uint16_t* x, const uint16_t* weight, uint16_t* y, int64_t width, double eps) {
  float squares[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = widened_one(x[i + lane]);
      squares[lane] += value * value;
    }
  float sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += squares[lane];
  for (; i < width; ++i) sum += widened_one(x[i]) * widened_one(x[i]);
  const float scale = 1 / std::sqrt(sum / float(width) + float(eps));
  for (i = 0; i < width; ++i) y[i] = rounded(widened_one(x[i]) * scale * widened_one(weight[i]));
}
