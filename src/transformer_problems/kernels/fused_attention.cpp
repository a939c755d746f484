// Multi-head self-attention from x to its output, y = concat(softmax(q k^T / sqrt(D)) v) Wo^T + bo with q, k, v from
// one product x Wqkv^T + bqkv, and its gradients, for float32 and float64.
//
// Forward, as many sequences as there are workers go through all steps before the next ones start, so that what lies
// between x and y stays in caches as long as a few sequences fit there. Scores exist for a block of queries at a time.
// Products are of tiles: kTileRows rows by two vectors of columns are summed in registers, from copies of both factors
// in the order in which they are read.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "vectors.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t kTileRows = 12;  // 24 sums in 32 registers
#else
constexpr int64_t kTileRows = 6;  // 12 sums in 16 registers
#endif
template <class T> constexpr int64_t kColumns = 2 * Wide<T>::lanes;
constexpr int64_t kDepth = 128;           // terms summed at a time; their panel fits the first cache
constexpr int64_t kBlock = 96;            // rows that a worker takes at a time, a multiple of kTileRows
constexpr int64_t kScoreBytes = 1 << 19;  // of scores in work, half of a small second cache

inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// A matrix whose element [i, j] lies at data[i * row + j * column].
template <class T> struct View {
  const T* data;
  int64_t row, column;
};

// The right factor of products: panels [depth, columns] one after the other, the last one padded with zeros.
template <class T> struct Panels {
  const T* data;
  int64_t depth;
};

template <class T> inline int64_t panels_size(int64_t depth, int64_t n) { return depth * up_to(n, kColumns<T>); }

template <class T> void pack_panel(View<T> b, int64_t depth, int64_t n, int64_t panel, T* panels) {
  constexpr int64_t columns = kColumns<T>;
  T* out = panels + panel * depth * columns;
  const T* from = b.data + panel * columns * b.column;
  const int64_t count = n - panel * columns < columns ? n - panel * columns : columns;
  if (count < columns) std::memset(out, 0, depth * columns * sizeof(T));
  if (b.column == 1)
    for (int64_t p = 0; p < depth; ++p) std::memcpy(out + p * columns, from + p * b.row, count * sizeof(T));
  else
    for (int64_t p = 0; p < depth; ++p)
      for (int64_t j = 0; j < count; ++j) out[p * columns + j] = from[p * b.row + j * b.column];
}

template <class T> Panels<T> pack(View<T> b, int64_t depth, int64_t n, std::vector<T>& room) {
  if (int64_t(room.size()) < panels_size<T>(depth, n)) room.resize(panels_size<T>(depth, n));
  for (int64_t panel = 0; panel * kColumns<T> < n; ++panel) pack_panel(b, depth, n, panel, room.data());
  return {room.data(), depth};
}

template <class T>
inline void tile(int64_t depth, const T* a, const T* b, T* c, int64_t stride, int64_t rows, int64_t count, bool add) {
  using V = typename Wide<T>::V;
  constexpr int64_t lanes = Wide<T>::lanes, columns = kColumns<T>;
  V sum[kTileRows][2] = {};
  for (int64_t p = 0; p < depth; ++p, a += kTileRows, b += columns) {
    const V left = load(b), right = load(b + lanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < kTileRows; ++r) sum[r][0] += left * a[r], sum[r][1] += right * a[r];
  }
  if (rows == kTileRows && count == columns) {
#pragma GCC unroll 12
    for (int64_t r = 0; r < kTileRows; ++r) {
      T* to = c + r * stride;
      store(to, add ? sum[r][0] + load(to) : sum[r][0]);
      store(to + lanes, add ? sum[r][1] + load(to + lanes) : sum[r][1]);
    }
    return;
  }
  T whole[kTileRows][columns];
#pragma GCC unroll 12
  for (int64_t r = 0; r < kTileRows; ++r) store(whole[r], sum[r][0]), store(whole[r] + lanes, sum[r][1]);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < count; ++j) c[r * stride + j] = add ? c[r * stride + j] + whole[r][j] : whole[r][j];
}

// The left factor of a tile, term by term, with rows of zeros below.
template <class T> inline void pack_rows(View<T> a, int64_t rows, int64_t terms, T factor, T* out) {
  if (rows == kTileRows)
    for (int64_t p = 0; p < terms; ++p)
      for (int64_t r = 0; r < kTileRows; ++r) out[p * kTileRows + r] = factor * a.data[r * a.row + p * a.column];
  else
    for (int64_t p = 0; p < terms; ++p)
      for (int64_t r = 0; r < kTileRows; ++r)
        out[p * kTileRows + r] = r < rows ? factor * a.data[r * a.row + p * a.column] : T(0);
}

// c [m, n] = factor a b, added to what is there or not; a is [m, depth].
template <class T>
void product(int64_t m, int64_t n, int64_t depth, View<T> a, Panels<T> b, T* c, int64_t stride, bool add,
             T factor = 1) {
  constexpr int64_t columns = kColumns<T>;
  alignas(64) T left[kBlock * kDepth];
  for (int64_t i0 = 0; i0 < m; i0 += kBlock)
    for (int64_t p0 = 0; p0 < depth; p0 += kDepth) {
      const int64_t terms = depth - p0 < kDepth ? depth - p0 : kDepth, rows = m - i0 < kBlock ? m - i0 : kBlock;
      for (int64_t i = 0; i < rows; i += kTileRows)
        pack_rows(View<T>{a.data + (i0 + i) * a.row + p0 * a.column, a.row, a.column},
                  rows - i < kTileRows ? rows - i : kTileRows, terms, factor, left + i * terms);
      for (int64_t j = 0; j < n; j += columns)
        for (int64_t i = 0; i < rows; i += kTileRows)
          tile(terms, left + i * terms, b.data + j * b.depth + p0 * columns, c + (i0 + i) * stride + j, stride,
               rows - i < kTileRows ? rows - i : kTileRows, n - j < columns ? n - j : columns, add || p0 > 0);
    }
}

struct Sizes {
  int64_t batch, tokens, width, heads, is_causal, workers;
  int64_t head_dim() const { return width / heads; }
};

// Keys that the queries of rows up to `end` may see, those that the mask hides included.
inline int64_t keys_until(const Sizes& s, int64_t end) { return s.is_causal ? end : s.tokens; }

// -inf for what a query may not see and for the padding of its row.
template <class T> void hide(T* row, int64_t visible, int64_t end, const uint8_t* keys) {
  constexpr T never = -std::numeric_limits<T>::infinity();
  for (int64_t j = visible; j < end; ++j) row[j] = never;
  if (keys)
    for (int64_t j = 0; j < visible; ++j) row[j] = keys[j] ? row[j] : never;
}

// exp(row - its largest) in place of the row; returns the sum, 0 where nothing is visible.
template <class T> T exponentials(T* row, int64_t end, T& largest) {
  using V = typename Wide<T>::V;
  constexpr int64_t lanes = Wide<T>::lanes;
  V most = load(row), sum{};
  for (int64_t j = lanes; j < end; j += lanes) {
    const V next = load(row + j);
    most = next > most ? next : most;
  }
  largest = most[0];
  for (int64_t lane = 1; lane < lanes; ++lane) largest = most[lane] > largest ? most[lane] : largest;
  const T shift = largest == -std::numeric_limits<T>::infinity() ? T(0) : largest;
  for (int64_t j = 0; j < end; j += lanes) {
    const V value = exponential<T>(load(row + j) - shift);
    store(row + j, value);
    sum += value;
  }
  T total = 0;
  for (int64_t lane = 0; lane < lanes; ++lane) total += sum[lane];
  return total;
}

template <class T> struct Room {
  std::vector<T> keys, values, queries, grads, turned, scores, weights;
};

template <class T> int64_t query_block(const Sizes& s, int64_t stride) {
  const int64_t fitting = kScoreBytes / int64_t(sizeof(T)) / stride / kTileRows * kTileRows;
  return fitting < kTileRows ? kTileRows : fitting < kBlock ? fitting : kBlock;
}

// One head of one sequence. qkv [N, 3C] and out [N, C] of the sequence; log_sums [N] of the head, or null.
template <class T>
void head_forward(const Sizes& s, int64_t head, const T* qkv, const uint8_t* keys, T* out, T* log_sums, Room<T>& room) {
  const int64_t dim = s.head_dim(), line = 3 * s.width, stride = up_to(s.tokens, kColumns<T>);
  const T *q = qkv + head * dim, *k = q + s.width, *v = k + s.width;
  const Panels<T> turned_keys = pack(View<T>{k, 1, line}, dim, s.tokens, room.keys);
  const Panels<T> values = pack(View<T>{v, line, 1}, s.tokens, dim, room.values);
  const int64_t block = query_block<T>(s, stride);
  room.scores.resize(block * stride);
  for (int64_t start = 0; start < s.tokens; start += block) {
    const int64_t end = start + block < s.tokens ? start + block : s.tokens, seen = keys_until(s, end);
    T sums[kBlock];
    product(end - start, seen, dim, View<T>{q + start * line, line, 1}, turned_keys, room.scores.data(), stride, false,
            T(1) / std::sqrt(T(dim)));
    for (int64_t i = start; i < end; ++i) {
      T *row = room.scores.data() + (i - start) * stride, largest;
      hide(row, s.is_causal ? i + 1 : s.tokens, up_to(seen, Wide<T>::lanes), keys);
      const T sum = sums[i - start] = exponentials(row, up_to(seen, Wide<T>::lanes), largest);
      if (log_sums) log_sums[i] = sum == 0 ? std::numeric_limits<T>::infinity() : largest + std::log(sum);
    }
    T* to = out + start * s.width + head * dim;
    product(end - start, dim, seen, View<T>{room.scores.data(), stride, 1}, values, to, s.width, false);
    for (int64_t i = 0; i < end - start; ++i)
      for (int64_t d = 0; d < dim; ++d) to[i * s.width + d] = sums[i] == 0 ? T(0) : to[i * s.width + d] / sums[i];
  }
}

// Gradients of one head's queries, keys and values into grad_qkv [N, 3C], which starts at zero.
template <class T>
void head_backward(const Sizes& s, int64_t head, const T* grad, const T* qkv, const T* out, const T* log_sums,
                   const uint8_t* keys, T* grad_qkv, Room<T>& room) {
  const int64_t dim = s.head_dim(), line = 3 * s.width, stride = up_to(s.tokens, kColumns<T>);
  const T *q = qkv + head * dim, *k = q + s.width, *v = k + s.width, scale = T(1) / std::sqrt(T(dim));
  T *grad_q = grad_qkv + head * dim, *grad_k = grad_q + s.width, *grad_v = grad_k + s.width;
  const Panels<T> turned_keys = pack(View<T>{k, 1, line}, dim, s.tokens, room.turned);
  const Panels<T> turned_values = pack(View<T>{v, 1, line}, dim, s.tokens, room.values);
  const Panels<T> plain_keys = pack(View<T>{k, line, 1}, s.tokens, dim, room.keys);
  const int64_t block = query_block<T>(s, stride);
  room.scores.resize(block * stride), room.weights.resize(block * stride);
  for (int64_t start = 0; start < s.tokens; start += block) {
    const int64_t end = start + block < s.tokens ? start + block : s.tokens, rows = end - start;
    const int64_t seen = keys_until(s, end), padded = up_to(seen, Wide<T>::lanes);
    const View<T> query{q + start * line, line, 1}, of_out{grad + start * s.width + head * dim, s.width, 1};
    T *weights = room.weights.data(), *scores = room.scores.data();  // `scores` holds the gradients of both in turn
    product(rows, seen, dim, query, turned_keys, weights, stride, false, scale);
    product(rows, seen, dim, of_out, turned_values, scores, stride, false);
    for (int64_t i = 0; i < rows; ++i) {
      T *weight = weights + i * stride, *score = scores + i * stride, mean = 0;
      hide(weight, s.is_causal ? start + i + 1 : s.tokens, padded, keys);
      for (int64_t d = 0; d < dim; ++d)
        mean += of_out.data[i * s.width + d] * out[(start + i) * s.width + head * dim + d];
      for (int64_t j = seen; j < padded; ++j) score[j] = 0;
      for (int64_t j = 0; j < padded; j += Wide<T>::lanes) {
        const auto value = exponential<T>(load(weight + j) - log_sums[start + i]);
        store(weight + j, value);
        store<T>(score + j, value * (load(score + j) - mean) * scale);
      }
    }
    const Panels<T> outs = pack(of_out, rows, dim, room.grads), queries = pack(query, rows, dim, room.queries);
    product(seen, dim, rows, View<T>{weights, 1, stride}, outs, grad_v, line, true);
    product(seen, dim, rows, View<T>{scores, 1, stride}, queries, grad_k, line, true);
    product(rows, dim, seen, View<T>{scores, stride, 1}, plain_keys, grad_q + start * line, line, false);
  }
}

// Within a parallel region: panels for all workers.
template <class T> void pack_together(View<T> b, int64_t depth, int64_t n, T* panels) {
#pragma omp for schedule(static)
  for (int64_t panel = 0; panel < up_to(n, kColumns<T>) / kColumns<T>; ++panel)
    pack_panel(b, depth, n, panel, panels);
}

// Within a parallel region: y [m, n] = a b + bias, the rows shared out.
template <class T>
void rows_together(int64_t m, int64_t n, int64_t depth, View<T> a, const T* panels, const T* bias, T* y) {
#pragma omp for schedule(dynamic)
  for (int64_t start = 0; start < m; start += kBlock) {
    const int64_t rows = m - start < kBlock ? m - start : kBlock;
    for (int64_t i = start; bias && i < start + rows; ++i) std::memcpy(y + i * n, bias, n * sizeof(T));
    product(rows, n, depth, View<T>{a.data + start * a.row, a.row, a.column}, Panels<T>{panels, depth}, y + start * n,
            n, bias != nullptr);
  }
}

template <class T> void sum_rows(const T* rows, int64_t count, int64_t n, T* sums) {
  if (!sums) return;
#pragma omp for schedule(static)
  for (int64_t start = 0; start < n; start += kColumns<T>) {
    double total[kColumns<T>] = {};
    const int64_t width = n - start < kColumns<T> ? n - start : kColumns<T>;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < width; ++j) total[j] += double(rows[i * n + start + j]);
    for (int64_t j = 0; j < width; ++j) sums[start + j] = T(total[j]);
  }
}

template <class T> std::unique_ptr<T[]> scratch(int64_t size) { return std::unique_ptr<T[]>(new T[size]); }

// kept_qkv [B, N, 3C], kept_out [B, N, C] and log_sums [B, H, N] are written for the backward pass, or null.
template <class T>
void forward(const T* x, const T* qkv_weight, const T* qkv_bias, const T* out_weight, const T* out_bias,
             const uint8_t* mask, T* y, T* kept_qkv, T* kept_out, T* log_sums, const Sizes& s) {
  const int64_t C = s.width, N = s.tokens, group = s.batch < s.workers ? s.batch : s.workers;
  const auto qkv_panels = scratch<T>(panels_size<T>(C, 3 * C)), out_panels = scratch<T>(panels_size<T>(C, C));
  const auto own_qkv = scratch<T>(kept_qkv ? 0 : group * N * 3 * C), own_out = scratch<T>(kept_qkv ? 0 : group * N * C);
#pragma omp parallel num_threads(s.workers)
  {
    Room<T> room;
    pack_together(View<T>{qkv_weight, 1, C}, C, 3 * C, qkv_panels.get());
    pack_together(View<T>{out_weight, 1, C}, C, C, out_panels.get());
    for (int64_t first = 0; first < s.batch; first += group) {
      const int64_t count = s.batch - first < group ? s.batch - first : group;
      T* qkv = kept_qkv ? kept_qkv + first * N * 3 * C : own_qkv.get();
      T* out = kept_qkv ? kept_out + first * N * C : own_out.get();
      rows_together(count * N, 3 * C, C, View<T>{x + first * N * C, C, 1}, qkv_panels.get(), qkv_bias, qkv);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < count * s.heads; ++task) {
        const int64_t b = task / s.heads, h = task % s.heads;
        T* sums = log_sums ? log_sums + ((first + b) * s.heads + h) * N : nullptr;
        head_forward(s, h, qkv + b * N * 3 * C, mask ? mask + (first + b) * N : nullptr, out + b * N * C, sums, room);
      }
      rows_together(count * N, C, C, View<T>{out, C, 1}, out_panels.get(), out_bias, y + first * N * C);
    }
  }
}

// grad_qkv [B, N, 3C] starts at zero; gradients of biases are null where there are none.
template <class T>
void backward(const T* grad, const T* x, const T* qkv_weight, const T* out_weight, const uint8_t* mask, const T* qkv,
              const T* out, const T* log_sums, T* grad_qkv, T* grad_x, T* grad_qkv_weight, T* grad_qkv_bias,
              T* grad_out_weight, T* grad_out_bias, const Sizes& s) {
  const int64_t C = s.width, N = s.tokens, rows = s.batch * N;
  const auto grad_out = scratch<T>(rows * C), out_panels = scratch<T>(panels_size<T>(C, C));
  const auto qkv_panels = scratch<T>(panels_size<T>(3 * C, C)), row_panels = scratch<T>(panels_size<T>(rows, C));
  const T* none = nullptr;
#pragma omp parallel num_threads(s.workers)
  {
    Room<T> room;
    pack_together(View<T>{out_weight, C, 1}, C, C, out_panels.get());
    pack_together(View<T>{qkv_weight, C, 1}, 3 * C, C, qkv_panels.get());
    rows_together(rows, C, C, View<T>{grad, C, 1}, out_panels.get(), none, grad_out.get());
    pack_together(View<T>{out, C, 1}, rows, C, row_panels.get());
    rows_together(C, C, rows, View<T>{grad, 1, C}, row_panels.get(), none, grad_out_weight);
    sum_rows(grad, rows, C, grad_out_bias);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < s.batch * s.heads; ++task) {
      const int64_t b = task / s.heads, h = task % s.heads;
      head_backward(s, h, grad_out.get() + b * N * C, qkv + b * N * 3 * C, out + b * N * C,
                    log_sums + (b * s.heads + h) * N, mask ? mask + b * N : nullptr, grad_qkv + b * N * 3 * C, room);
    }
    rows_together(rows, C, 3 * C, View<T>{grad_qkv, 3 * C, 1}, qkv_panels.get(), none, grad_x);
    pack_together(View<T>{x, C, 1}, rows, C, row_panels.get());
    rows_together(3 * C, C, rows, View<T>{grad_qkv, 1, 3 * C}, row_panels.get(), none, grad_qkv_weight);
    sum_rows(grad_qkv, rows, 3 * C, grad_qkv_bias);
  }
}

template <class T> void forward_of(void* const* t, const int64_t* sizes) {
  forward((const T*)t[0], (const T*)t[1], (const T*)t[2], (const T*)t[3], (const T*)t[4], (const uint8_t*)t[5],
          (T*)t[6], (T*)t[7], (T*)t[8], (T*)t[9], Sizes{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]});
}

template <class T> void backward_of(void* const* t, const int64_t* sizes) {
  backward((const T*)t[0], (const T*)t[1], (const T*)t[2], (const T*)t[3], (const uint8_t*)t[4], (const T*)t[5],
           (const T*)t[6], (const T*)t[7], (T*)t[8], (T*)t[9], (T*)t[10], (T*)t[11], (T*)t[12], (T*)t[13],
           Sizes{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]});
}

}  // namespace

#define FUSED_ATTENTION(T, NAME)                                                                                     \
  extern "C" void fused_attention_forward_##NAME(void* const* tensors, const int64_t* sizes) {                       \
    forward_of<T>(tensors, sizes);                                                                                   \
  }                                                                                                                  \
  extern "C" void fused_attention_backward_##NAME(void* const* tensors, const int64_t* sizes) {                      \
    backward_of<T>(tensors, sizes);                                                                                  \
  }

FUSED_ATTENTION(float, float32)
FUSED_ATTENTION(double, float64)
