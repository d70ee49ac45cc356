#include "amx_emulator.hpp"

#if defined(__x86_64__) && defined(__linux__)

#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace {

using namespace cca::test;

// The tiles of palette 1, the only one there is. A double word of theirs is a float, or a pair of 16-bit numbers.
constexpr std::size_t tile_count = 8, max_rows = 16, max_columns = 16;

/// The operand of LDTILECFG. The upper halves of its arrays are for palettes to come.
struct configuration {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t bytes_per_row[2 * tile_count];
  std::uint8_t rows[2 * tile_count];
};
static_assert(sizeof(configuration) == 64);

/// What lies outside its configured shape is zero.
struct tile {
  std::uint32_t at[max_rows][max_columns];
};

struct tile_state {
  configuration config;
  tile tiles[tile_count];
};

// Zero from the start: in a signal handler it must not have to be constructed.
constinit thread_local tile_state state{};

constinit std::atomic<std::uint64_t> loads{0}, stores{0}, products{0}, configurations{0};

void count(std::atomic<std::uint64_t>& counter) { counter.fetch_add(1, std::memory_order_relaxed); }

/// Stands for the fault that the processor would raise. Only what is safe in a signal handler.
void require(bool condition, const char* what) {
  if (condition) return;
  for (const char* text : {"AMX emulator: ", what, "\n"})
    if (write(STDERR_FILENO, text, std::strlen(text)) < 0) break;
  std::abort();
}

// ------------------------------------------------------------------------------------------------------ configuration

void require_valid(const configuration& config) {
  require(config.palette == 1, "#GP, LDTILECFG of an unknown palette");
  // The processor would go on from there: the state after a page fault, which is not emulated.
  require(config.start_row == 0, "LDTILECFG with a start row is not emulated");
  for (const std::uint8_t reserved : config.reserved) require(reserved == 0, "#GP, LDTILECFG with reserved bits");
  for (std::size_t t = 0; t < std::size(config.rows); ++t) {
    const unsigned rows = config.rows[t], bytes = config.bytes_per_row[t];
    require(t < tile_count || (rows == 0 && bytes == 0), "#GP, LDTILECFG of more than 8 tiles");
    require(rows <= max_rows, "#GP, LDTILECFG of more than 16 rows");
    require(bytes <= 4 * max_columns, "#GP, LDTILECFG of more than 64 bytes per row");
    require((rows == 0) == (bytes == 0), "#GP, LDTILECFG of rows without bytes, or bytes without rows");
  }
}

void load_configuration(const std::byte* from) {
  configuration config;
  std::memcpy(&config, from, sizeof(config));
  count(configurations);
  // Palette 0 is the initial state, whatever else is there.
  if (config.palette == 0)
    config = {};
  else
    require_valid(config);
  state = {};
  state.config = config;
}

std::size_t rows_of(std::size_t t) { return state.config.rows[t]; }
std::size_t columns_of(std::size_t t) { return state.config.bytes_per_row[t] / 4u; }

void require_configured(std::size_t t) {
  require(state.config.palette != 0, "#UD, tiles are not configured");
  require(state.config.rows[t] != 0, "#UD, this tile is not configured");
}

void require_whole_columns(std::size_t t) {
  require_configured(t);
  require(state.config.bytes_per_row[t] % 4 == 0, "#UD, bytes per row are not a multiple of 4");
}

// ------------------------------------------------------------------------------------------------------------ memory

void load(std::size_t t, std::uintptr_t from, std::uintptr_t stride) {
  require_whole_columns(t);
  count(loads);
  state.tiles[t] = {};
  for (std::size_t row = 0; row < rows_of(t); ++row)
    std::memcpy(state.tiles[t].at[row], reinterpret_cast<const void*>(from + row * stride), 4 * columns_of(t));
}

void store(std::size_t t, std::uintptr_t to, std::uintptr_t stride) {
  require_whole_columns(t);
  count(stores);
  for (std::size_t row = 0; row < rows_of(t); ++row)
    std::memcpy(reinterpret_cast<void*>(to + row * stride), state.tiles[t].at[row], 4 * columns_of(t));
}

// ---------------------------------------------------------------------------------------------------------- products

/// The pairs of a tile, taken apart.
struct pairs {
  float even[max_rows][max_columns], odd[max_rows][max_columns];
};

float from_bfloat16(std::uint32_t bits) { return std::bit_cast<float>(bits << 16); }

/// In integers as far as it goes: a half's denormals count, but as the bits of a float they would be flushed.
float from_half(std::uint32_t bits) {
  const std::uint32_t sign = (bits & 0x8000) << 16, exponent = bits >> 10 & 0x1f, magnitude = (bits & 0x7fff) << 13;
  const std::uint32_t rebias = exponent == 0x1f ? 0xff - 0x1f : 127 - 15;
  const std::uint32_t denormal = std::bit_cast<std::uint32_t>(static_cast<float>(bits & 0x3ff) * 0x1p-24f);
  return std::bit_cast<float>(sign | (exponent == 0 ? denormal : magnitude + (rebias << 23)));
}

template <float (*to_float)(std::uint32_t)>
[[gnu::noinline]] void take_apart(const tile& from, pairs& to) {
  for (std::size_t row = 0; row < max_rows; ++row)
    for (std::size_t column = 0; column < max_columns; ++column) {
      to.even[row][column] = to_float(from.at[row][column] & 0xffff);
      to.odd[row][column] = to_float(from.at[row][column] >> 16);
    }
}

/// a b + c, rounded once. The product is exact in double, and a sum of floats that is rounded to 53 bits first comes out
/// as if rounded to 24 at once, since 53 >= 2 * 24 + 2 (Figueroa, When is double rounding innocuous?, 1995).
float multiply_add(float a, float b, float c) {
  return static_cast<float>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}

/// As in the manual: the even elements have one sum, the odd ones another, and that of both is added to the tile.
/// All columns are computed, whatever the shape, for the vectoriser. Not inline: the mode of rounding has been set by
/// then, and compilers do not know that arithmetic depends on it.
[[gnu::noinline]] void multiply(const pairs& a, const pairs& b, std::size_t depth, std::size_t t) {
  for (std::size_t row = 0; row < rows_of(t); ++row) {
    float even[max_columns] = {}, odd[max_columns] = {};
    for (std::size_t k = 0; k < depth; ++k) {
      for (std::size_t column = 0; column < max_columns; ++column)
        even[column] = multiply_add(a.even[row][k], b.even[k][column], even[column]);
      for (std::size_t column = 0; column < max_columns; ++column)
        odd[column] = multiply_add(a.odd[row][k], b.odd[k][column], odd[column]);
    }
    for (std::size_t column = 0; column < columns_of(t); ++column) {
      std::uint32_t& sum = state.tiles[t].at[row][column];
      sum = std::bit_cast<std::uint32_t>(std::bit_cast<float>(sum) + (even[column] + odd[column]));
    }
  }
}

template <float (*to_float)(std::uint32_t)>
void multiply(std::size_t t, std::size_t a, std::size_t b) {
  for (const std::size_t each : {t, a, b}) require_whole_columns(each);
  require(t != a && t != b && a != b, "#UD, a product's tiles are not three");
  require(rows_of(t) == rows_of(a) && columns_of(t) == columns_of(b) && columns_of(a) == rows_of(b),
          "#UD, the shapes of a product's tiles do not fit");
  count(products);
  pairs even_odd_a, even_odd_b;
  take_apart<to_float>(state.tiles[a], even_odd_a);
  take_apart<to_float>(state.tiles[b], even_odd_b);
  // Rounds to nearest, takes denormals for zero, and flushes them to it: until the handler returns, when the system
  // restores what the thread had.
  constexpr unsigned all_masked = 0x1f80, denormals_are_zeros = 0x40, flush_to_zero = 0x8000;
  _mm_setcsr(all_masked | denormals_are_zeros | flush_to_zero);
  multiply(even_odd_a, even_odd_b, columns_of(a), t);
}

// ------------------------------------------------------------------------------------------------------- instructions

/// An instruction of VEX's map 0F38, 128 bits, W0, as all of AMX are.
struct instruction {
  unsigned opcode;
  unsigned prefix;           ///< that VEX implies: 0, 1 for 66, 2 for f3, 3 for f2
  unsigned mode, reg, rm;    ///< ModRM, and the bits that VEX adds
  unsigned source;           ///< VEX.vvvv
  std::uintptr_t address;    ///< base and displacement of the operand in memory
  std::uintptr_t index = 0;  ///< of the same, scaled
  std::uintptr_t end;        ///< where the next one begins
};

using registers = greg_t[NGREG];

/// By their numbers in instructions.
std::uintptr_t general_register(const registers& values, unsigned number) {
  constexpr std::array order{REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return static_cast<std::uintptr_t>(values[order[number]]);
}

/// Takes a number from the code.
template <class T>
T next(const std::uint8_t*& code) {
  T value;
  std::memcpy(&value, code, sizeof(T));
  code += sizeof(T);
  return value;
}

/// The operand in memory, what follows ModRM. `base_bit` and `index_bit` are 8 where VEX adds them.
void decode_address(const registers& values, const std::uint8_t*& code, unsigned base_bit, unsigned index_bit,
                    instruction& i) {
  unsigned base = i.rm;
  if (i.rm == 4) {
    const unsigned sib = next<std::uint8_t>(code), index = (sib >> 3 & 7) | index_bit;
    base = sib & 7;
    if (index != 4) i.index = general_register(values, index) << (sib >> 6);  // 4 says that there is none
  }
  const bool no_base = i.mode == 0 && base == 5;
  std::int64_t displacement = 0;
  if (i.mode == 1) displacement = next<std::int8_t>(code);
  if (i.mode == 2 || no_base) displacement = next<std::int32_t>(code);
  i.address = static_cast<std::uintptr_t>(displacement);
  if (!no_base)
    i.address += general_register(values, base | base_bit);
  else if (i.rm == 5)
    i.address += reinterpret_cast<std::uintptr_t>(code);  // relative to the next instruction
}

/// Whether there is one. Never reads beyond it: its page may be the last.
bool decode(const registers& values, instruction& i) {
  const auto* code = reinterpret_cast<const std::uint8_t*>(values[REG_RIP]);
  if (next<std::uint8_t>(code) != 0xc4) return false;
  const unsigned first = ~next<std::uint8_t>(code) & 0xffu, second = next<std::uint8_t>(code);
  // All bits but those of the map, W, the vectors' length and the prefix are stored inverted.
  constexpr unsigned not_map_0f38 = ~2u & 0x1f;
  if ((first & 0x1f) != not_map_0f38 || (second & 0x84) != 0) return false;
  i.prefix = second & 3;
  i.source = ~second >> 3 & 0xf;
  i.opcode = next<std::uint8_t>(code);
  if (i.opcode != 0x49 && i.opcode != 0x4b && i.opcode != 0x5c) return false;
  const unsigned modrm = next<std::uint8_t>(code), reg_bit = first >> 4 & 8, index_bit = first >> 3 & 8,
                 base_bit = first >> 2 & 8;
  i.mode = modrm >> 6;
  i.reg = (modrm >> 3 & 7) | reg_bit;
  i.rm = modrm & 7;
  if (i.mode == 3)
    i.rm |= base_bit;
  else
    decode_address(values, code, base_bit, index_bit, i);
  i.end = reinterpret_cast<std::uintptr_t>(code);
  return i.reg < tile_count && i.rm < tile_count && i.source < tile_count;
}

/// Opcode 49.
bool configure(const instruction& i) {
  const std::uintptr_t address = i.address + i.index;
  if (i.prefix == 0 && i.mode != 3 && i.reg == 0) {
    load_configuration(reinterpret_cast<const std::byte*>(address));
  } else if (i.prefix == 1 && i.mode != 3 && i.reg == 0) {
    std::memcpy(reinterpret_cast<void*>(address), &state.config, sizeof(state.config));
  } else if (i.prefix == 0 && i.mode == 3 && i.reg == 0 && i.rm == 0) {
    state = {};
  } else if (i.prefix == 3 && i.mode == 3 && i.rm == 0) {
    require_configured(i.reg);
    state.tiles[i.reg] = {};
  } else {
    return false;
  }
  return true;
}

/// Whether it is one of AMX.
bool execute(const instruction& i) {
  if (i.opcode == 0x5c) {
    if (i.mode != 3 || i.prefix < 2) return false;
    i.prefix == 2 ? multiply<from_bfloat16>(i.reg, i.rm, i.source) : multiply<from_half>(i.reg, i.rm, i.source);
    return true;
  }
  if (i.source != 0) return false;
  if (i.opcode == 0x49) return configure(i);
  if (i.mode == 3 || i.rm != 4 || i.prefix == 0) return false;
  i.prefix == 2 ? store(i.reg, i.address, i.index) : load(i.reg, i.address, i.index);
  return true;
}

// ------------------------------------------------------------------------------------------------------------- signals

struct sigaction previous;

/// As if this handler were not there.
void forward(int signal, siginfo_t* info, void* context) {
  if ((previous.sa_flags & SA_SIGINFO) != 0) {
    previous.sa_sigaction(signal, info, context);
  } else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN) {
    previous.sa_handler(signal);
  } else {
    // It waits until this handler returns.
    sigaction(signal, &previous, nullptr);
    raise(signal);
  }
}

void handle(int signal, siginfo_t* info, void* context) {
  registers& values = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  instruction i{};
  // A signal that a program sent has a code of at most 0, and nothing to do with where it arrives.
  if (info->si_code > 0 && decode(values, i) && execute(i))
    values[REG_RIP] = static_cast<greg_t>(i.end);
  else
    forward(signal, info, context);
}

bool install() {
  struct sigaction action {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  return sigaction(SIGILL, &action, &previous) == 0;
}

}  // namespace

namespace cca::test {

bool install_amx_emulator() {
  static const bool installed = install();
  return installed;
}

amx_counts amx_instructions() { return {loads, stores, products, configurations}; }

bool amx_state_is_initial() { return state.config.palette == 0; }

}  // namespace cca::test

#else

namespace cca::test {

bool install_amx_emulator() { return false; }
amx_counts amx_instructions() { return {}; }
bool amx_state_is_initial() { return true; }

}  // namespace cca::test

#endif
