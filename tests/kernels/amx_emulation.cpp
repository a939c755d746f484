// Stands in for the matrix instructions of AMX on x86-64 processors, or systems, without them.
//
// Preloaded into a process, it answers the signal that an unknown instruction raises: decodes it, does to the thread's
// tiles and to memory what Intel's manual says (Software Developer's Manual, volume 2, under each name), and goes on
// behind it. So the kernel that runs is the one that a processor with AMX would run, to the byte. It also
// allows the process to use tiles where it asks Linux; TILES_REFUSED in the environment makes it refuse.
//
// Products are taken without denormals, each element's even and odd terms summed apart and added at the end.

#include <immintrin.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

namespace {

std::atomic<int64_t> products{0}, configured{0};

struct Tiles {
  bool live = false;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  uint8_t data[8][16][64];
};
thread_local Tiles tiles;

[[noreturn]] void give_up(const char* why, const uint8_t* code) {
  std::fprintf(stderr, "amx_emulation: %s at", why);
  for (int i = 0; i < 12; ++i) std::fprintf(stderr, " %02x", code[i]);
  std::fprintf(stderr, "\n");
  std::_Exit(70);
}

int64_t general_register(const ucontext_t& context, int number) {
  static const int places[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                 REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[places[number]];
}

struct Operands {
  int mod, reg, rm;        // extended by the prefix; rm only where it names a register
  int64_t address, stride;  // of memory; the stride is index * scale
  const uint8_t* next;      // the instruction behind
};

// ModRM, SIB and displacement at `code`; r, x and b extend the numbers of registers. For instructions of rows the index
// is their stride, else a part of the address.
Operands decoded(const ucontext_t& context, const uint8_t* code, int r, int x, int b, bool rows) {
  Operands o{code[0] >> 6, (code[0] >> 3 & 7) | r << 3, (code[0] & 7) | b << 3, 0, 0, code + 1};
  if (o.mod == 3) return o;
  int base = o.rm;
  const bool has_sib = (code[0] & 7) == 4;
  if (has_sib) {
    const uint8_t sib = *o.next++;
    const int index = (sib >> 3 & 7) | x << 3;
    base = (sib & 7) | b << 3;
    if (index != 4) o.stride = general_register(context, index) * (int64_t(1) << (sib >> 6));
  }
  int32_t displacement = 0;
  const bool no_base = o.mod == 0 && (base & 7) == 5;
  if (o.mod == 1) displacement = int8_t(*o.next), o.next += 1;
  if (o.mod == 2 || no_base) std::memcpy(&displacement, o.next, 4), o.next += 4;
  o.address = displacement + (rows ? 0 : o.stride);
  if (!no_base) o.address += general_register(context, base);
  if (no_base && !has_sib) o.address += int64_t(o.next);  // relative to the instruction behind
  return o;
}

void configure(const uint8_t* from, const uint8_t* code) {
  if (from[0] != 1 || from[1] != 0) give_up("a configuration of another palette", code);
  configured += tiles.live ? 0 : 1;
  tiles.live = true;
  std::memcpy(tiles.row_bytes, from + 16, sizeof tiles.row_bytes);
  std::memcpy(tiles.rows, from + 48, sizeof tiles.rows);
  std::memset(tiles.data, 0, sizeof tiles.data);
  for (int i = 0; i < 8; ++i)
    if (tiles.row_bytes[i] > 64 || tiles.rows[i] > 16) give_up("a tile too large", code);
  for (int i = 16; i < 64; ++i)
    if (from[i] && (i < 48 ? i >= 32 : i >= 56)) give_up("a configuration of tiles that are not there", code);
}

void release() {
  configured -= tiles.live ? 1 : 0;
  tiles.live = false;
}

float widened(const uint8_t* from) {
  uint16_t half;
  std::memcpy(&half, from, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void multiply(int to, int left, int right, const uint8_t* code) {
  const int terms = tiles.row_bytes[left] / 4, columns = tiles.row_bytes[to] / 4;
  if (to == left || to == right || left == right || tiles.rows[left] != tiles.rows[to] ||
      tiles.rows[right] != terms || tiles.row_bytes[right] != tiles.row_bytes[to])
    give_up("a product of tiles that do not fit", code);
  for (int m = 0; m < tiles.rows[to]; ++m) {
    float even[16] = {}, odd[16] = {}, sum[16];
    for (int k = 0; k < terms; ++k) {
      const float first = widened(&tiles.data[left][m][4 * k]), second = widened(&tiles.data[left][m][4 * k + 2]);
      for (int n = 0; n < columns; ++n) {
        even[n] = __builtin_fmaf(first, widened(&tiles.data[right][k][4 * n]), even[n]);
        odd[n] = __builtin_fmaf(second, widened(&tiles.data[right][k][4 * n + 2]), odd[n]);
      }
    }
    std::memcpy(sum, tiles.data[to][m], sizeof sum);
    for (int n = 0; n < columns; ++n) sum[n] += even[n] + odd[n];
    std::memcpy(tiles.data[to][m], sum, 4 * columns);
  }
  ++products;
}

// The instruction at `code` where it is one of AMX: prefix C4, map 0F38, 128 bits. Returns what is behind it, or null.
const uint8_t* tile_instruction(const ucontext_t& context, const uint8_t* code) {
  if (code[0] != 0xC4 || (code[1] & 0x1F) != 2 || (code[2] & 0x84) != 0) return nullptr;
  const int r = ~code[1] >> 7 & 1, x = ~code[1] >> 6 & 1, b = ~code[1] >> 5 & 1;
  const int other = ~code[2] >> 3 & 15, prefix = code[2] & 3, opcode = code[3];  // prefix: none, 66, F3, F2
  const bool memory = code[4] >> 6 != 3;
  if (opcode == 0x49 && prefix == 0 && !memory) {
    if (code[4] != 0xC0) return nullptr;
    release();
    return code + 5;
  }
  const Operands o = decoded(context, code + 4, r, x, b, opcode == 0x4B);
  if (opcode == 0x49 && prefix == 0) {
    configure((const uint8_t*)o.address, code);
    return o.next;
  }
  if (!tiles.live) give_up("a tile used before it is configured", code);
  if (opcode == 0x49 && prefix == 3 && !memory) {
    std::memset(tiles.data[o.reg], 0, sizeof tiles.data[o.reg]);
  } else if (opcode == 0x4B && memory && (code[4] & 7) == 4 && prefix != 0) {
    if (prefix != 2) std::memset(tiles.data[o.reg], 0, sizeof tiles.data[o.reg]);
    for (int row = 0; row < tiles.rows[o.reg]; ++row) {
      uint8_t *place = (uint8_t*)o.address + row * o.stride, *tile = tiles.data[o.reg][row];
      prefix == 2 ? std::memcpy(place, tile, tiles.row_bytes[o.reg]) : std::memcpy(tile, place, tiles.row_bytes[o.reg]);
    }
  } else if (opcode == 0x5C && prefix == 2 && !memory) {
    multiply(o.reg, o.rm, other, code);
  } else {
    return nullptr;
  }
  return o.next;
}

thread_local bool probing = false, converts = false;
constexpr int kProbe = 6;  // bytes of the instruction in `converts_to_bfloat16`

void answer(int, siginfo_t*, void* opaque) {
  auto& context = *(ucontext_t*)opaque;
  const auto* code = (const uint8_t*)context.uc_mcontext.gregs[REG_RIP];
  _mm_setcsr(0x9FC0);  // no exceptions, to the nearest, denormals as zero both ways; the signal's return restores it
  const uint8_t* next = probing ? code + kProbe : tile_instruction(context, code);
  converts = converts && !probing;
  if (!next) give_up("an instruction that is not emulated", code);
  context.uc_mcontext.gregs[REG_RIP] = (greg_t)next;
}

__attribute__((constructor)) void install() {
  struct sigaction action {};
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace

extern "C" int64_t emulated_products() { return products; }
extern "C" int64_t threads_with_tiles() { return configured; }

// Whether the processor, whatever it lists, runs VCVTNE2PS2BF16, which is not emulated.
extern "C" int64_t converts_to_bfloat16() {
  probing = converts = true;
  asm volatile(".byte 0x62, 0xF2, 0x7F, 0x48, 0x72, 0xC0" ::: "xmm0", "memory");  // of the register 0 by itself
  probing = false;
  return converts;
}

// Stands before the C library's own.
extern "C" long syscall(long number, ...) noexcept {
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& one : a) one = va_arg(list, long);
  va_end(list);
  long result;
  if (number == SYS_arch_prctl && a[0] == 0x1023 && a[1] == 18) {
    result = std::getenv("TILES_REFUSED") ? -EPERM : 0;
  } else {
    register long r10 asm("r10") = a[3];
    register long r8 asm("r8") = a[4];
    register long r9 asm("r9") = a[5];
    asm volatile("syscall"
                 : "=a"(result)
                 : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
                 : "rcx", "r11", "memory");
  }
  if (result < 0 && result > -4096) {
    errno = int(-result);
    return -1;
  }
  return result;
}
