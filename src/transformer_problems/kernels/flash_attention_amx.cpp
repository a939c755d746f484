// softmax(q k^T / sqrt(D)) v for bfloat16, exact, with the matrix instructions of AMX: a tile holds 16 rows of 64
// bytes, and one instruction adds the product of two tiles of bfloat16 to a tile of float32.
//
// Keys and values are packed once, in the order in which tiles of right factors are read: pairs of terms side by side.
// A worker takes a few blocks of kRows queries of a head and goes through the keys kKeys at a time, which the blocks
// share while they are in the second cache. The scores of a block stay in the first as float32, become weights relative
// to the largest score so far, and are rounded to bfloat16 in their own place, which is the order of left factors. The
// output is float32 until the end; it is scaled again where a larger score appears.
//
// Some compilers declare tile loads without what they read: `settle` keeps stores before them where they are.

#include <immintrin.h>

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace {

constexpr int64_t kTile = 16;    // rows of a tile, and its columns in float32
constexpr int64_t kDepth = 32;   // bfloat16 terms in a row of a tile
constexpr int64_t kTileSize = kTile * kDepth;
constexpr int64_t kRows = 32;    // queries of a block, two tiles
constexpr int64_t kBlocks = 4;   // that share keys at most
constexpr int64_t kKeys = 256;   // keys in work; their scores fill two thirds of a first cache of 48 KiB
constexpr int64_t kWidth = 256;  // largest head
constexpr int64_t kScoreLine = kKeys + kTile;  // a line further, so that rows do not share the same sets of the cache
constexpr float kNever = -std::numeric_limits<float>::infinity();

inline int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline void settle() { asm volatile("" ::: "memory"); }

// Token t of head h of sequence b begins at data[b * batch + h * head + t * token].
template <class T> struct Heads {
  T* data;
  int64_t batch, head, token;
  T* at(int64_t b, int64_t h, int64_t t) const { return data + b * batch + h * head + t * token; }
};

struct Sizes {
  int64_t batch, heads, groups, queries, keys, width, is_causal, workers;
  int64_t padded_keys() const { return up_to(keys, kDepth); }
  int64_t padded_width() const { return up_to(width, kDepth); }
  int64_t packed() const { return padded_keys() * padded_width(); }  // of one head
  int64_t visible_to(int64_t query) const {
    const int64_t seen = is_causal ? keys - queries + query + 1 : keys;
    return seen < 0 ? 0 : seen;
  }
};

struct alignas(64) TileConfig {  // the form that LDTILECFG reads
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
const TileConfig kWholeTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

struct alignas(64) Block {
  float out[kRows * kWidth];
  float sums[kRows * kTile];  // a partial sum in each lane
  float shifts[kRows];        // the largest score so far, in base 2
  uint16_t queries[kRows * kWidth];
  int64_t start, rows;
};

struct alignas(64) Room {
  float scores[kRows * kScoreLine];
  Block blocks[kBlocks];
};

// Keys [32 tokens, width] as right factors of q k^T: for 16 keys and 32 terms of depth a tile, whose row r holds the
// terms 2r and 2r + 1 of each key.
void pack_keys(const uint16_t* from, int64_t token, int64_t count, int64_t width, uint16_t* to) {
  const int64_t steps = up_to(width, kDepth) / kDepth;
  std::memset(to, 0, 2 * steps * kTileSize * sizeof(uint16_t));
  for (int64_t key = 0; key < count; ++key) {
    const uint16_t* row = from + key * token;
    uint16_t* tiles = to + key / kTile * steps * kTileSize + key % kTile * 2;
    int64_t d = 0;
    for (; d + 2 <= width; d += 2) std::memcpy(tiles + d / 2 * kDepth, row + d, 2 * sizeof(uint16_t));
    if (d < width) tiles[d / 2 * kDepth] = row[d];
  }
}

// Values [32 tokens, width] as right factors of weights: for 32 keys and 16 columns a tile, whose row r holds the keys
// 2r and 2r + 1 of each column.
void pack_values(const uint16_t* from, int64_t token, int64_t count, int64_t width, uint16_t* to) {
  const int64_t padded = up_to(width, kDepth);
  for (int64_t key = 0; key < kDepth; key += 2)
    for (int64_t d = 0; d < padded; d += kTile) {
      const __mmask16 there = d + kTile <= width ? 0xFFFF : d < width ? (1 << (width - d)) - 1 : 0;
      const uint16_t* row = from + key * token + d;
      const __m256i even = _mm256_maskz_loadu_epi16(key < count ? there : 0, row);
      const __m256i odd = _mm256_maskz_loadu_epi16(key + 1 < count ? there : 0, row + token);
      const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
      _mm512_storeu_si512(to + d / kTile * kTileSize + key / 2 * kDepth,
                          _mm512_or_si512(_mm512_cvtepu16_epi32(even), upper));
    }
}

// c [32, 32] = a [32, 32 steps] b, added to what is there or not. Of b the tiles of both columns follow `step` after
// one another; lines are in bytes.
inline void product(const uint16_t* a, int64_t a_line, const uint16_t* left, const uint16_t* right, int64_t step,
                    int64_t steps, float* c, int64_t c_line, bool add) {
  const uint8_t* lower = (const uint8_t*)a + kTile * a_line;
  uint8_t* lower_c = (uint8_t*)c + kTile * c_line;
  if (add) {
    _tile_loadd(0, c, c_line);
    _tile_loadd(1, c + kTile, c_line);
    _tile_loadd(2, lower_c, c_line);
    _tile_loadd(3, lower_c + 64, c_line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t p = 0; p < steps; ++p) {
    _tile_loadd(4, (const uint8_t*)a + p * 64, a_line);
    _tile_loadd(6, left + p * step, 64);
    _tile_loadd(7, right + p * step, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + p * 64, a_line);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_line);
  _tile_stored(1, c + kTile, c_line);
  _tile_stored(2, lower_c, c_line);
  _tile_stored(3, lower_c + 64, c_line);
}

// 2^x, exactly 0 below 2^-126 and for -inf, NaN for NaN: 2^n times the series of the rest, short of it by 0.35^6 / 6!,
// a thousandth of what rounding to bfloat16 costs.
inline __m512 power_of_two(__m512 x) {
  constexpr float ln2 = 0.693147180559945f;
  constexpr float c2 = ln2 * ln2 / 2, c3 = c2 * ln2 / 3, c4 = c3 * ln2 / 4, c5 = c4 * ln2 / 5;
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 series = _mm512_fmadd_ps(_mm512_set1_ps(c5), r, _mm512_set1_ps(c4));
  series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(c3));
  series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(c2));
  series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(ln2));
  series = _mm512_fmadd_ps(series, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ), series, n);
}

// 32 values to the nearest bfloat16, ties to even. Without the instruction for it, NaNs stay NaNs where they come from
// bfloat16 or from arithmetic, whose lower halves are 0.
inline void store_rounded(uint16_t* to, __m512 low, __m512 high) {
#ifdef __AVX512BF16__
  const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
  std::memcpy(to, &both, sizeof both);
#else
  const __m512i half = _mm512_set1_epi32(0x7FFF), one = _mm512_set1_epi32(1);
  const __m512 values[2] = {low, high};
  for (int64_t part = 0; part < 2; ++part) {
    const __m512i bits = _mm512_castps_si512(values[part]);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i sum = _mm512_add_epi32(bits, _mm512_add_epi32(half, odd));
    _mm256_storeu_si256((__m256i*)(to + part * kTile), _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
  }
#endif
}

// -inf for keys from `visible` on and for those that the mask hides.
inline void hide(float* row, int64_t visible, int64_t columns, const uint8_t* seen) {
  const __m512 never = _mm512_set1_ps(kNever);
  for (int64_t j = 0; seen && j < visible; j += kTile) {
    const __m128i flags = _mm_loadu_si128((const __m128i*)(seen + j));
    _mm512_mask_storeu_ps(row + j, _mm_testn_epi8_mask(flags, flags), never);
  }
  for (int64_t j = visible / kTile * kTile; j < columns; j += kTile)
    _mm512_mask_storeu_ps(row + j, j < visible ? __mmask16(0xFFFF << (visible - j)) : __mmask16(0xFFFF), never);
}

// Makes scores of one query weights, in bfloat16 at the start of their row, and brings to their scale what came before.
inline void weigh(float* row, int64_t columns, float factor, float& shift, float* sums, float* out, int64_t width) {
  __m512 most = _mm512_loadu_ps(row), more = _mm512_loadu_ps(row + kTile);
  for (int64_t j = kDepth; j < columns; j += kDepth) {
    most = _mm512_max_ps(_mm512_loadu_ps(row + j), most);
    more = _mm512_max_ps(_mm512_loadu_ps(row + j + kTile), more);
  }
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(most, more)) * factor;
  __m512 sum = _mm512_loadu_ps(sums), other = _mm512_setzero_ps();
  if (largest > shift) {
    const __m512 scale = _mm512_set1_ps(std::exp2(shift - largest));
    sum = _mm512_mul_ps(sum, scale);
    for (int64_t d = 0; d < width; d += kTile)
      _mm512_storeu_ps(out + d, _mm512_mul_ps(_mm512_loadu_ps(out + d), scale));
    shift = largest;
  }
  const __m512 slope = _mm512_set1_ps(factor), base = _mm512_set1_ps(shift == kNever ? 0.0f : shift);
  uint16_t* weights = (uint16_t*)row;
  for (int64_t j = 0; j < columns; j += kDepth) {
    const __m512 left = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + j), slope, base));
    const __m512 right = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + j + kTile), slope, base));
    sum = _mm512_add_ps(sum, left);
    other = _mm512_add_ps(other, right);
    store_rounded(weights + j, left, right);
  }
  _mm512_storeu_ps(sums, _mm512_add_ps(sum, other));
}

// Queries [rows, width] that have seen no key.
void begin(const uint16_t* from, int64_t token, int64_t start, int64_t rows, int64_t width, Block& block) {
  const int64_t line = up_to(width, kDepth);
  std::memset(block.queries, 0, kRows * line * sizeof(uint16_t));
  for (int64_t i = 0; i < rows; ++i) std::memcpy(block.queries + i * line, from + i * token, width * sizeof(uint16_t));
  std::memset(block.sums, 0, sizeof block.sums);
  std::memset(block.out, 0, kRows * line * sizeof(float));
  for (float& shift : block.shifts) shift = kNever;
  block.start = start, block.rows = rows;
}

void write(const float* out, const float* sums, int64_t width, uint16_t* to) {
  const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(sums));
  if (total == 0) return void(std::memset(to, 0, width * sizeof(uint16_t)));
  const __m512 each = _mm512_set1_ps(1 / total);
  for (int64_t d = 0; d < width; d += kDepth) {
    alignas(64) uint16_t rounded[kDepth];
    store_rounded(rounded, _mm512_mul_ps(_mm512_loadu_ps(out + d), each),
                  _mm512_mul_ps(_mm512_loadu_ps(out + d + kTile), each));
    std::memcpy(to + d, rounded, least(kDepth, width - d) * sizeof(uint16_t));
  }
}

// The block through the keys from `first` on, kKeys of them or as many as one of its queries may see.
void see(const Sizes& s, int64_t first, const uint16_t* keys, const uint16_t* values, const uint8_t* seen,
         float* scores, Block& block) {
  const int64_t width = s.padded_width(), depths = width / kDepth;
  const int64_t columns = least(kKeys, up_to(s.visible_to(block.start + block.rows - 1) - first, kDepth));
  const float factor = float(1.4426950408889634 / std::sqrt(double(s.width)));  // log2(e) / sqrt(D)
  settle();
  for (int64_t j = 0; j < columns; j += kDepth) {
    const uint16_t* tiles = keys + (first + j) * width;
    product(block.queries, width * 2, tiles, tiles + depths * kTileSize, kTileSize, depths, scores + j, kScoreLine * 4,
            false);
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    float* row = scores + i * kScoreLine;
    const int64_t visible = s.visible_to(block.start + i) - first;
    hide(row, visible < 0 ? 0 : least(visible, columns), columns, seen ? seen + first : nullptr);
    weigh(row, columns, factor, block.shifts[i], block.sums + i * kTile, block.out + i * width, width);
  }
  settle();
  for (int64_t d = 0; d < width; d += kDepth) {
    const uint16_t* tiles = values + first * width + d * kDepth;
    product((const uint16_t*)scores, kScoreLine * 4, tiles, tiles + kTileSize, width * kDepth, columns / kDepth,
            block.out + d, width * 4, true);
  }
}

struct Packed {
  std::unique_ptr<uint16_t[]> keys, values;  // not filled in vain: workers are the first to touch what they pack
  std::vector<uint8_t> seen;
};

// Within a parallel region.
void pack_together(const Sizes& s, Heads<const uint16_t> k, Heads<const uint16_t> v, Packed& packed) {
  const int64_t blocks = s.padded_keys() / kDepth, size = kDepth * s.padded_width();
#pragma omp for schedule(static)
  for (int64_t task = 0; task < s.batch * s.groups * blocks; ++task) {
    const int64_t head = task / blocks, first = task % blocks * kDepth, count = least(kDepth, s.keys - first);
    const int64_t b = head / s.groups, g = head % s.groups;
    pack_keys(k.at(b, g, first), k.token, count, s.width, packed.keys.get() + task * size);
    pack_values(v.at(b, g, first), v.token, count, s.width, packed.values.get() + task * size);
  }
}

// Blocks from `task` on of a head of a sequence, `together` of them or as many as there are.
void attend(const Sizes& s, int64_t b, int64_t h, int64_t task, int64_t together, Heads<const uint16_t> q,
            const Packed& packed, Heads<uint16_t> out, Room& room) {
  const int64_t head = (b * s.groups + h / (s.heads / s.groups)) * s.packed(), width = s.padded_width();
  const uint8_t* seen = packed.seen.empty() ? nullptr : packed.seen.data() + b * s.padded_keys();
  const int64_t from = task * together * kRows, until = least(s.queries, from + together * kRows);
  const int64_t count = up_to(until - from, kRows) / kRows;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t start = from + i * kRows;
    begin(q.at(b, h, start), q.token, start, least(kRows, until - start), s.width, room.blocks[i]);
  }
  for (int64_t first = 0; first < s.visible_to(until - 1); first += kKeys)
    for (int64_t i = 0; i < count; ++i)
      if (first < s.visible_to(room.blocks[i].start + room.blocks[i].rows - 1))
        see(s, first, packed.keys.get() + head, packed.values.get() + head, seen, room.scores, room.blocks[i]);
  for (int64_t i = 0; i < until - from; ++i) {
    const Block& block = room.blocks[i / kRows];
    write(block.out + i % kRows * width, block.sums + i % kRows * kTile, s.width, out.at(b, h, from + i));
  }
}

void forward(const Sizes& s, Heads<const uint16_t> q, Heads<const uint16_t> k, Heads<const uint16_t> v,
             const uint8_t* mask, Heads<uint16_t> out) {
  Packed packed;
  packed.keys.reset(new uint16_t[s.batch * s.groups * s.packed()]);
  packed.values.reset(new uint16_t[s.batch * s.groups * s.packed()]);
  if (mask) packed.seen.resize(s.batch * s.padded_keys());
  for (int64_t b = 0; mask && b < s.batch; ++b)
    std::memcpy(packed.seen.data() + b * s.padded_keys(), mask + b * s.keys, s.keys);
  const int64_t heads = s.batch * s.heads, blocks = up_to(s.queries, kRows) / kRows;
  const int64_t share = heads * blocks / (4 * s.workers);  // four tasks a worker keep all at work to the end
  const int64_t together = share < 1 ? 1 : least(share, kBlocks), tasks = up_to(blocks, together) / together;
  std::vector<std::unique_ptr<Room>> rooms(s.workers);  // here, for what lacks memory within ends the process
  for (auto& room : rooms) room.reset(new Room);
#pragma omp parallel num_threads(s.workers)
  {
    Room& room = *rooms[omp_get_thread_num()];
    pack_together(s, k, v, packed);
    _tile_loadconfig(&kWholeTiles);
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < heads * tasks; ++i)  // those with the most keys first
      attend(s, i / tasks / s.heads, i / tasks % s.heads, tasks - 1 - i % tasks, together, q, packed, out, room);
    _tile_release();
  }
}

}  // namespace

// Asks Linux, once for the whole process, to let it use tiles; 0, or the number of the error.
extern "C" int64_t permit_tiles() {
  constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0 ? 0 : errno;
}

// `tensors`: q, k, v, mask or null, out. `sizes`: those of Sizes in order, then batch, head and token strides of q, k,
// v and out. Returns 0, or 1 where there was not enough memory.
extern "C" int64_t flash_attention_bfloat16(void* const* tensors, const int64_t* sizes) {
  const Sizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
  const int64_t* strides = sizes + 8;
  const auto read = [&](int64_t i) {
    return Heads<const uint16_t>{(const uint16_t*)tensors[i], strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  try {
    forward(s, read(0), read(1), read(2), (const uint8_t*)tensors[3],
            Heads<uint16_t>{(uint16_t*)tensors[4], strides[9], strides[10], strides[11]});
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
