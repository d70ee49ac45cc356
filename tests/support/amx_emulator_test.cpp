// The emulated AMX instructions against plain loops. Where the processor has AMX itself, nothing is emulated: then these
// are tests of the loops.

#include "amx_emulator.hpp"

#include <gtest/gtest.h>
#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <thread>
#include <tuple>
#include <vector>

namespace {

using namespace cca::test;

constexpr float infinity = std::numeric_limits<float>::infinity(), least = std::numeric_limits<float>::min();

/// The operand of LDTILECFG.
struct alignas(64) configuration {
  std::array<std::uint8_t, 64> bytes{1};

  configuration& tile(std::size_t t, std::size_t rows, std::size_t bytes_per_row) {
    bytes[16 + 2 * t] = static_cast<std::uint8_t>(bytes_per_row);
    bytes[17 + 2 * t] = static_cast<std::uint8_t>(bytes_per_row >> 8);
    bytes[48 + t] = static_cast<std::uint8_t>(rows);
    return *this;
  }
  configuration& byte(std::size_t i, std::uint8_t value) {
    bytes[i] = value;
    return *this;
  }
};

/// All tiles as large as they can be.
configuration full() {
  configuration config;
  for (std::size_t t = 0; t < 8; ++t) config.tile(t, 16, 64);
  return config;
}

// ------------------------------------------------------------------------------------------------------ instructions

// The intrinsics of g++ do not say which memory they read.
void memory_changes() { asm volatile("" ::: "memory"); }

[[gnu::target("amx-tile")]] void configure(const configuration& config) {
  memory_changes();
  _tile_loadconfig(&config);
}

[[gnu::target("amx-tile")]] configuration stored_configuration() {
  configuration config;
  config.bytes.fill(0xff);
  memory_changes();
  _tile_storeconfig(&config);
  memory_changes();
  return config;
}

[[gnu::target("amx-tile")]] void release() { _tile_release(); }

[[gnu::target("amx-tile")]] void load_tile3(const void* from, std::ptrdiff_t stride) {
  memory_changes();
  _tile_loadd(3, from, stride);
}

[[gnu::target("amx-tile")]] void store_tile3(void* to, std::ptrdiff_t stride) { _tile_stored(3, to, stride); }

/// Tiles 4 and 5 are the operands, 6 is the sum.
[[gnu::target("amx-tile,amx-bf16")]] void load_operands(const void* a, const void* b, const void* c) {
  memory_changes();
  _tile_loadd(4, a, 64);
  _tile_stream_loadd(5, b, 64);
  _tile_loadd(6, c, 64);
}

[[gnu::target("amx-tile,amx-bf16")]] void multiply_bfloat16() { _tile_dpbf16ps(6, 4, 5); }

/// g++ 12 and clang 14 have no name for it.
void multiply_half() { asm volatile(".byte 0xc4, 0xe2, 0x53, 0x5c, 0xf4"); }

[[gnu::target("amx-tile")]] void store_sum(void* c) { _tile_stored(6, c, 64); }

// ------------------------------------------------------------------------------------------------------ plain products

using words = std::array<std::array<std::uint16_t, 32>, 16>;
using sums = std::array<std::array<float, 16>, 16>;

float flushed(float x) { return std::fabs(x) < least ? std::copysign(0.0f, x) : x; }

struct bfloat16_format {
  static void multiply() { multiply_bfloat16(); }
  static float value(std::uint16_t bits) {
    float x;
    const std::array<std::uint16_t, 2> halves{0, bits};
    std::memcpy(&x, &halves, sizeof(x));
    return flushed(x);
  }
  static std::uint16_t bits(double x) {  // of those that it has exactly
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(static_cast<float>(x)) >> 16);
  }
};

struct half_format {
  static void multiply() { multiply_half(); }
  static float value(std::uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float x = std::ldexp(static_cast<float>(exponent == 0 ? mantissa : 1024 + mantissa), std::max(exponent, 1) - 25);
    if (exponent == 31) x = mantissa == 0 ? infinity : std::numeric_limits<float>::quiet_NaN();
    return (bits & 0x8000) != 0 ? -x : x;
  }
  static std::uint16_t bits(double x) {  // but denormals
    int exponent;
    const double mantissa = std::frexp(std::fabs(x), &exponent);
    unsigned bits = x < 0 ? 0x8000 : 0;
    if (std::isinf(x))
      bits |= 0x7c00;
    else if (x != 0)
      bits |= static_cast<unsigned>((exponent + 14) * 1024 + static_cast<int>(mantissa * 2048) - 1024);
    return static_cast<std::uint16_t>(bits);
  }
};

struct shape {
  std::size_t rows = 16, depth = 16, columns = 16;  // depth in pairs
};

/// As the instructions' definition has it: one chain of fused multiplications and additions for the even elements, one
/// for the odd ones, and denormals are zero on either side of each step.
template <class Format>
float plain_sum(const words& a, const words& b, float c, const shape& s, std::size_t row, std::size_t column) {
  float part[2] = {};
  for (std::size_t k = 0; k < s.depth; ++k)
    for (std::size_t i = 0; i < 2; ++i)
      part[i] = flushed(std::fma(Format::value(a[row][2 * k + i]), Format::value(b[k][2 * column + i]), part[i]));
  return flushed(flushed(c) + flushed(part[0] + part[1]));
}

configuration product_configuration(const shape& s) {
  return configuration().tile(4, s.rows, 4 * s.depth).tile(5, s.depth, 4 * s.columns).tile(6, s.rows, 4 * s.columns);
}

/// Runs the instructions.
template <class Format>
sums product(const words& a, const words& b, sums c, const shape& s = {}) {
  configure(product_configuration(s));
  load_operands(&a, &b, &c);
  Format::multiply();
  store_sum(&c);
  release();
  return c;
}

/// Equal to the bit, but for NaNs, of which one is as good as another.
void expect_plain_product(const sums& result, const sums& plain) {
  for (std::size_t row = 0; row < 16; ++row)
    for (std::size_t column = 0; column < 16; ++column) {
      const float x = result[row][column], y = plain[row][column];
      if (std::isnan(x) && std::isnan(y)) continue;
      ASSERT_EQ(std::bit_cast<std::uint32_t>(x), std::bit_cast<std::uint32_t>(y))
          << x << " and " << y << " in row " << row << ", column " << column;
    }
}

template <class Format>
void check_product(const words& a, const words& b, const sums& c, const shape& s = {}) {
  sums plain = c;  // nothing is stored outside of the shape
  for (std::size_t row = 0; row < s.rows; ++row)
    for (std::size_t column = 0; column < s.columns; ++column)
      plain[row][column] = plain_sum<Format>(a, b, c[row][column], s, row, column);
  expect_plain_product(product<Format>(a, b, c, s), plain);
}

using random_engine = std::mt19937_64;

/// Random numbers between 1 and 2, of either sign: sums of their products round at each step.
template <class Format>
auto about_one(random_engine& random) {
  return [&random] { return static_cast<std::uint16_t>((random() & 0x80ff) | Format::bits(1)); };
}

/// The sums are of any bits, among them NaNs, infinities and denormals.
template <class Random>
std::tuple<words, words, sums> random_operands(random_engine& random, const Random& draw_word) {
  words a, b;
  sums c;
  for (words* each : {&a, &b})
    for (auto& row : *each) std::generate(row.begin(), row.end(), draw_word);
  for (auto& row : c)
    for (float& x : row) x = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
  return {a, b, c};
}

// -------------------------------------------------------------------------------------------------------------- tests

constexpr int forwarded = 7;

/// The handler that was there before: ends the process.
void previous_handler(int) { _exit(forwarded); }

bool install_in_front() {
  struct sigaction action {};
  action.sa_handler = previous_handler;
  return sigaction(SIGILL, &action, nullptr) == 0 && install_amx_emulator();
}

class AmxEmulatorTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    static const bool installed = install_in_front();
    ASSERT_TRUE(installed);
    ASSERT_TRUE(install_amx_emulator());
  }

  random_engine random_{1};
};

template <class Format>
class AmxProductTest : public AmxEmulatorTest {};
using formats = testing::Types<bfloat16_format, half_format>;
TYPED_TEST_SUITE(AmxProductTest, formats);

TEST_F(AmxEmulatorTest, ConfigurationsAreStoredAsTheyWereLoaded) {
  EXPECT_TRUE(amx_state_is_initial());
  EXPECT_EQ(stored_configuration().bytes, decltype(configuration::bytes){});
  const configuration config = configuration().tile(0, 1, 3).tile(3, 16, 64).tile(7, 9, 20);
  configure(config);
  EXPECT_FALSE(amx_state_is_initial());
  EXPECT_EQ(stored_configuration().bytes, config.bytes);
  release();
  EXPECT_TRUE(amx_state_is_initial());
  EXPECT_EQ(stored_configuration().bytes, decltype(configuration::bytes){});
  configure(config);
  configure(full().byte(0, 0));  // palette 0, whatever the rest
  EXPECT_TRUE(amx_state_is_initial());
  EXPECT_EQ(stored_configuration().bytes, decltype(configuration::bytes){});
}

TEST_F(AmxEmulatorTest, RowsAreLoadedAndStoredAtStrides) {
  std::vector<std::uint8_t> from(3000);
  for (auto& byte : from) byte = static_cast<std::uint8_t>(random_());
  for (const auto& [rows, bytes] : {std::pair{16, 64}, {1, 4}, {5, 24}, {16, 4}, {3, 64}})
    for (const std::ptrdiff_t stride : {64, 77, -68, 0}) {
      configure(configuration().tile(3, static_cast<std::size_t>(rows), static_cast<std::size_t>(bytes)));
      const std::ptrdiff_t first = stride < 0 ? -stride * 15 : 0;
      load_tile3(from.data() + first, stride);
      std::vector<std::uint8_t> to(3000, 0xaa), plain = to;
      store_tile3(to.data() + 90 * 15, -90);
      for (std::ptrdiff_t row = 0; row < rows; ++row)
        std::copy_n(from.begin() + first + row * stride, bytes, plain.begin() + 90 * (15 - row));
      EXPECT_EQ(to, plain) << rows << " rows of " << bytes << " bytes, stride " << stride;
    }
  release();
}

TEST_F(AmxEmulatorTest, NothingBehindTheLastRowIsRead) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* const memory = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  auto* const end = static_cast<std::byte*>(memory) + page;
  ASSERT_EQ(mprotect(end, page, PROT_NONE), 0);
  configure(configuration().tile(3, 3, 20));
  load_tile3(end - (2 * 64 + 20), 64);
  store_tile3(end - (2 * 64 + 20), 64);
  release();
  munmap(memory, 2 * page);
}

[[gnu::target("amx-tile")]] void zero_tile3() { _tile_zero(3); }

TEST_F(AmxEmulatorTest, TilesAreZeroAtFirstAndByTilezero) {
  const std::array<std::uint8_t, 1024> from = [] {
    std::array<std::uint8_t, 1024> bytes;
    bytes.fill(0x55);
    return bytes;
  }();
  std::array<std::uint8_t, 1024> to;
  for (const auto& clear : {std::function<void()>(zero_tile3), std::function<void()>([] { configure(full()); }),
                            std::function<void()>([] { release(), configure(full()); })}) {
    configure(full());
    load_tile3(&from, 64);
    store_tile3(&to, 64);
    EXPECT_EQ(to, from);
    clear();
    store_tile3(&to, 64);
    EXPECT_EQ(to, decltype(to){});
  }
  release();
}

// Each loads tile 3 from rows 64 bytes apart, by an address of another form.

[[gnu::target("amx-tile")]] void load_by_high_registers(const std::uint8_t* from) {
  asm volatile("mov %0, %%r12\n\tmov $32, %%r13\n\ttileloadd (%%r12, %%r13, 2), %%tmm3" ::"r"(from)
               : "r12", "r13", "memory");
}

[[gnu::target("amx-tile")]] void load_at_displacement(const std::uint8_t* from) {
  asm volatile("mov $16, %%rcx\n\ttileloadd -128(%0, %%rcx, 4), %%tmm3" ::"r"(from + 128) : "rcx", "memory");
}

[[gnu::target("amx-tile")]] void load_at_large_displacement(const std::uint8_t* from) {
  asm volatile("mov %0, %%r13\n\tmov $8, %%r14\n\ttileloadd 0x12345(%%r13, %%r14, 8), %%tmm3" ::"r"(from - 0x12345)
               : "r13", "r14", "memory");
}

/// Of `low_address`.
[[gnu::target("amx-tile")]] void load_without_base(const std::uint8_t*) {
  asm volatile("mov $64, %%rax\n\ttileloadd 0x10000000(, %%rax, 1), %%tmm3" ::: "rax", "memory");
}
constexpr std::uintptr_t low_address = 0x10000000;

[[gnu::target("amx-tile")]] void load_without_stride(const std::uint8_t* from) {
  asm volatile("mov %0, %%r12\n\ttileloadd (%%r12), %%tmm3" ::"r"(from) : "r12", "memory");
}

TEST_F(AmxEmulatorTest, FindsOperandsByEveryFormOfAddress) {
  constexpr std::size_t size = 1024;
  void* const low = mmap(reinterpret_cast<void*>(low_address), size, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  ASSERT_EQ(low, reinterpret_cast<void*>(low_address));
  auto* const from = static_cast<std::uint8_t*>(low);
  std::generate_n(from, size, [this] { return static_cast<std::uint8_t>(random_()); });
  std::array<std::uint8_t, size> to;
  for (const auto load :
       {load_by_high_registers, load_at_displacement, load_at_large_displacement, load_without_base}) {
    configure(full());
    load(from);
    store_tile3(&to, 64);
    EXPECT_TRUE(std::equal(to.begin(), to.end(), from));
  }
  load_without_stride(from);
  store_tile3(&to, 64);
  for (std::size_t i = 0; i < size; ++i) EXPECT_EQ(to[i], from[i % 64]);
  release();
  munmap(low, size);
}

configuration static_configuration __asm__("amx_emulator_test_configuration") = full();

[[gnu::target("amx-tile")]] void configure_by_static_address() {
  asm volatile("ldtilecfg amx_emulator_test_configuration(%%rip)" ::"m"(static_configuration) : "memory");
}

[[gnu::target("amx-tile")]] void configure_by_index(const configuration* configurations, std::size_t i) {
  asm volatile("ldtilecfg -64(%0, %1, 8)" ::"r"(configurations + 1), "r"(8 * i) : "memory");
}

TEST_F(AmxEmulatorTest, FindsConfigurationsByEveryFormOfAddress) {
  configure_by_static_address();
  EXPECT_EQ(stored_configuration().bytes, static_configuration.bytes);
  const std::array<configuration, 2> two{configuration().tile(1, 2, 3), configuration().tile(4, 5, 6)};
  for (std::size_t i = 0; i < two.size(); ++i) {
    configure_by_index(two.data(), i);
    EXPECT_EQ(stored_configuration().bytes, two[i].bytes);
  }
  release();
}

TYPED_TEST(AmxProductTest, IsThatOfTwoMatrices) {
  // Small numbers, whose sums are exact in any order.
  const auto draw_integer = [this] { return static_cast<double>(static_cast<int>(this->random_() % 17) - 8); };
  std::array<std::array<double, 32>, 16> a;
  std::array<std::array<double, 16>, 32> b;
  words packed_a, packed_b;
  sums c{}, plain{};
  for (std::size_t i = 0; i < 16; ++i)
    for (std::size_t k = 0; k < 32; ++k) {
      packed_a[i][k] = TypeParam::bits(a[i][k] = draw_integer());
      packed_b[k / 2][2 * i + k % 2] = TypeParam::bits(b[k][i] = draw_integer());
    }
  for (std::size_t i = 0; i < 16; ++i)
    for (std::size_t j = 0; j < 16; ++j) {
      c[i][j] = static_cast<float>(draw_integer());
      double sum = c[i][j];
      for (std::size_t k = 0; k < 32; ++k) sum += a[i][k] * b[k][j];
      plain[i][j] = static_cast<float>(sum);
    }
  EXPECT_EQ(product<TypeParam>(packed_a, packed_b, c), plain);
}

TYPED_TEST(AmxProductTest, RoundsEveryStepWhateverTheShape) {
  for (const std::size_t rows : {1u, 7u, 16u})
    for (const std::size_t depth : {1u, 5u, 16u})
      for (const std::size_t columns : {1u, 9u, 16u}) {
        auto [a, b, c] = random_operands(this->random_, about_one<TypeParam>(this->random_));
        for (auto& row : c)
          for (float& x : row) x = std::remainder(flushed(x), 100.0f);
        check_product<TypeParam>(a, b, c, {rows, depth, columns});
      }
}

TYPED_TEST(AmxProductTest, TakesAnyBits) {
  const auto draw_word = [this] { return static_cast<std::uint16_t>(this->random_()); };
  // Few of many products are numbers: small depths have more of them.
  for (const std::size_t depth : {1u, 1u, 1u, 1u, 1u, 2u, 2u, 4u, 16u})
    for (int i = 0; i < 20; ++i) {
      const auto [a, b, c] = random_operands(this->random_, draw_word);
      check_product<TypeParam>(a, b, c, {16, depth, 16});
    }
}

/// Element 0 of the product of one row and one column, both given as pairs.
template <class Format>
float dot(std::initializer_list<std::array<std::uint16_t, 2>> a, std::initializer_list<std::array<std::uint16_t, 2>> b,
          float c = 0) {
  words row{}, column{};
  sums sum{};
  sum[0][0] = c;
  for (std::size_t k = 0; k < a.size(); ++k)
    for (std::size_t i = 0; i < 2; ++i) {
      row[0][2 * k + i] = a.begin()[k][i];
      column[k][i] = b.begin()[k][i];
    }
  return product<Format>(row, column, sum, {1, a.size(), 1})[0][0];
}

TYPED_TEST(AmxProductTest, PropagatesNanAndInfinity) {
  const auto bits = [](double x) { return TypeParam::bits(x); };
  const std::uint16_t one = bits(1), inf = bits(infinity), nan = static_cast<std::uint16_t>(inf | 1);
  EXPECT_TRUE(std::isnan(dot<TypeParam>({{nan, 0}}, {{one, 0}})));
  EXPECT_TRUE(std::isnan(dot<TypeParam>({{0, one}}, {{0, nan}})));
  EXPECT_TRUE(std::isnan(dot<TypeParam>({{0, 0}}, {{0, 0}}, std::nanf(""))));
  EXPECT_TRUE(std::isnan(dot<TypeParam>({{inf, 0}}, {{0, 0}})));             // 0 * inf
  EXPECT_TRUE(std::isnan(dot<TypeParam>({{inf, inf}}, {{one, bits(-1)}})));  // inf - inf
  EXPECT_TRUE(std::isnan(dot<TypeParam>({{inf, 0}}, {{one, 0}}, -infinity)));
  EXPECT_EQ(dot<TypeParam>({{inf, one}}, {{one, one}}), infinity);
  EXPECT_EQ(dot<TypeParam>({{one, one}}, {{one, one}}, -infinity), -infinity);
}

TYPED_TEST(AmxProductTest, TakesDenormalSumsForZero) {
  EXPECT_EQ(dot<TypeParam>({{0, 0}}, {{0, 0}}, least / 2), 0);
  EXPECT_EQ(dot<TypeParam>({{0, 0}}, {{0, 0}}, least), least);
}

using AmxDenormalTest = AmxEmulatorTest;

TEST_F(AmxDenormalTest, OfBfloat16AreZero) {
  const std::uint16_t one = bfloat16_format::bits(1), large = bfloat16_format::bits(0x1p100);
  EXPECT_EQ(dot<bfloat16_format>({{0x007f, 0}}, {{large, 0}}), 0);
  EXPECT_EQ(dot<bfloat16_format>({{large, 0}}, {{0x0001, 0}}), 0);
  EXPECT_EQ(dot<bfloat16_format>({{0x0080, 0}}, {{one, 0}}), least);
}

TEST_F(AmxDenormalTest, OfHalfCount) {
  const std::uint16_t one = half_format::bits(1);
  EXPECT_EQ(dot<half_format>({{0x0001, 0}}, {{one, 0}}), 0x1p-24f);
  EXPECT_EQ(dot<half_format>({{0x83ff, 0}}, {{0x0001, 0}}), -0x3ffp-48f);
}

TEST_F(AmxDenormalTest, OfTheSumsAreFlushedAtEachStep) {
  const auto bits = [](double x) { return bfloat16_format::bits(x); };
  // Products of 2^-127, twice: a denormal first, then again.
  EXPECT_EQ(dot<bfloat16_format>({{bits(0x1p-64), 0}, {bits(0x1p-64), 0}}, {{bits(0x1p-63), 0}, {bits(0x1p-63), 0}}),
            0);
  EXPECT_EQ(dot<bfloat16_format>({{bits(0x1p-64), bits(0x1p-64)}}, {{bits(0x1p-63), bits(0x1p-63)}}), 0);
  // The difference of two numbers that are none: 1.5 and 1 of the least.
  EXPECT_EQ(dot<bfloat16_format>({{bits(0x1.8p-126), bits(-0x1p-126)}}, {{bits(1), bits(1)}}), 0);
  EXPECT_EQ(dot<bfloat16_format>({{bits(-0x1p-126), 0}}, {{bits(1), 0}}, 1.5f * least), 0);
  // Products by themselves are not rounded: one of 3/4 of a unit in the sum's last place counts, however small it is.
  EXPECT_EQ(dot<bfloat16_format>({{bits(0x1p-120), 0}, {bits(0x1.8p-80), 0}}, {{bits(1), 0}, {bits(0x1p-64), 0}}),
            0x1.000002p-120f);
}

TEST_F(AmxEmulatorTest, ProductsOverflowOnlyAfterTheSum) {
  const auto bits = [](double x) { return bfloat16_format::bits(x); };
  EXPECT_EQ(dot<bfloat16_format>({{bits(-0x1p127), 0}, {bits(0x1p64), 0}}, {{bits(1), 0}, {bits(0x1p64), 0}}),
            0x1p127f);
  EXPECT_EQ(dot<bfloat16_format>({{bits(0x1p64), 0}, {bits(-0x1p127), 0}}, {{bits(0x1p64), 0}, {bits(1), 0}}),
            infinity);
}

TYPED_TEST(AmxProductTest, NeitherReadsNorChangesTheModeOfRounding) {
  const auto [a, b, c] = random_operands(this->random_, about_one<TypeParam>(this->random_));
  const sums nearest = product<TypeParam>(a, b, c);
  const unsigned before = _mm_getcsr(), up = 0x5f80;
  _mm_setcsr(up);
  const sums same = product<TypeParam>(a, b, c);
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  EXPECT_EQ(after, up);
  expect_plain_product(same, nearest);
}

TEST_F(AmxEmulatorTest, EveryThreadHasItsOwnTiles) {
  configure(configuration().tile(0, 2, 8));
  std::vector<std::jthread> threads;
  for (std::uint64_t seed = 0; seed < 4; ++seed)
    threads.emplace_back([seed] {
      EXPECT_TRUE(amx_state_is_initial());
      random_engine random(seed);
      const shape s{4 * seed + 1, 16 - 4 * seed, seed + 3};
      for (int i = 0; i < 200; ++i) {
        const auto [a, b, c] = random_operands(random, about_one<bfloat16_format>(random));
        check_product<bfloat16_format>(a, b, c, s);
      }
      EXPECT_TRUE(amx_state_is_initial());
    });
  threads.clear();
  EXPECT_FALSE(amx_state_is_initial());
  release();
}

TEST_F(AmxEmulatorTest, Counts) {
  const amx_counts before = amx_instructions();
  product<bfloat16_format>({}, {}, {});
  product<half_format>({}, {}, {});
  const amx_counts after = amx_instructions();
  if (after.products == before.products) GTEST_SKIP() << "the processor has AMX";
  EXPECT_EQ(after.configurations - before.configurations, 2u);
  EXPECT_EQ(after.loads - before.loads, 6u);
  EXPECT_EQ(after.products - before.products, 2u);
  EXPECT_EQ(after.stores - before.stores, 2u);
}

// --------------------------------------------------------------------------------------------------------- wrong uses

using AmxEmulatorDeathTest = AmxEmulatorTest;

TEST_F(AmxEmulatorDeathTest, ConfigurationsAreChecked) {
  EXPECT_DEATH(configure(full().byte(0, 2)), "palette");
  EXPECT_DEATH(configure(full().byte(1, 1)), "start row");
  EXPECT_DEATH(configure(full().byte(2, 1)), "reserved");
  EXPECT_DEATH(configure(full().byte(15, 1)), "reserved");
  EXPECT_DEATH(configure(full().byte(32, 1)), "more than 8 tiles");
  EXPECT_DEATH(configure(full().byte(47, 1)), "more than 8 tiles");
  EXPECT_DEATH(configure(full().byte(56, 1)), "more than 8 tiles");
  EXPECT_DEATH(configure(full().byte(63, 1)), "more than 8 tiles");
  EXPECT_DEATH(configure(full().tile(7, 17, 64)), "more than 16 rows");
  EXPECT_DEATH(configure(full().tile(0, 16, 65)), "more than 64 bytes");
  EXPECT_DEATH(configure(full().tile(0, 16, 256 + 64)), "more than 64 bytes");
  EXPECT_DEATH(configure(full().tile(2, 0, 4)), "without");
  EXPECT_DEATH(configure(full().tile(2, 1, 0)), "without");
}

TEST_F(AmxEmulatorDeathTest, TilesMustBeConfigured) {
  std::array<std::byte, 1024> memory{};
  EXPECT_DEATH(load_tile3(&memory, 64), "tiles are not configured");
  EXPECT_DEATH(store_tile3(&memory, 64), "tiles are not configured");
  EXPECT_DEATH(zero_tile3(), "tiles are not configured");
  EXPECT_DEATH(multiply_bfloat16(), "tiles are not configured");
  EXPECT_DEATH(multiply_half(), "tiles are not configured");
  configure(configuration().tile(2, 1, 4));
  EXPECT_DEATH(load_tile3(&memory, 64), "this tile is not configured");
  EXPECT_DEATH(zero_tile3(), "this tile is not configured");
  configure(configuration().tile(3, 1, 6));
  EXPECT_DEATH(load_tile3(&memory, 64), "multiple of 4");
  EXPECT_DEATH(store_tile3(&memory, 64), "multiple of 4");
  configure(full());
  release();
  EXPECT_DEATH(store_tile3(&memory, 64), "tiles are not configured");
}

// Assemblers refuse them: tdpbf16ps of tiles 6, 4 and 4, of 6, 6 and 5, and of 6, 4 and 6.
void multiply_tile_by_itself() { asm volatile(".byte 0xc4, 0xe2, 0x5a, 0x5c, 0xf4"); }
void multiply_first_operand() { asm volatile(".byte 0xc4, 0xe2, 0x52, 0x5c, 0xf6"); }
void multiply_second_operand() { asm volatile(".byte 0xc4, 0xe2, 0x4a, 0x5c, 0xf4"); }

TEST_F(AmxEmulatorDeathTest, ShapesMustFit) {
  const shape s{5, 6, 7};
  configure(product_configuration(s).tile(6, 4, 28));
  EXPECT_DEATH(multiply_bfloat16(), "do not fit");
  configure(product_configuration(s).tile(6, 5, 24));
  EXPECT_DEATH(multiply_half(), "do not fit");
  configure(product_configuration(s).tile(4, 5, 28));
  EXPECT_DEATH(multiply_bfloat16(), "do not fit");
  configure(product_configuration(s).tile(4, 5, 26));
  EXPECT_DEATH(multiply_bfloat16(), "multiple of 4");
  configure(full());
  EXPECT_DEATH(multiply_tile_by_itself(), "not three");
  EXPECT_DEATH(multiply_first_operand(), "not three");
  EXPECT_DEATH(multiply_second_operand(), "not three");
  release();
}

// A tile of bytes, tdpbssd: of AMX, but not emulated.
void multiply_bytes() { asm volatile(".byte 0xc4, 0xe2, 0x53, 0x5e, 0xf4"); }
// What tdpfp16ps into tmm14 would be, and tilezero with W or of 256 bits.
void multiply_into_tile_14() { asm volatile(".byte 0xc4, 0x62, 0x53, 0x5c, 0xf4"); }
void zero_wide() { asm volatile(".byte 0xc4, 0xe2, 0xfb, 0x49, 0xd8"); }
void zero_long() { asm volatile(".byte 0xc4, 0xe2, 0x7f, 0x49, 0xd8"); }

/// The signal arrives right before an instruction of AMX.
[[gnu::target("amx-tile")]] void raise_before_tilerelease() {
  long call = SYS_tgkill;
  asm volatile("syscall\n\ttilerelease"
               : "+a"(call)
               : "D"(getpid()), "S"(gettid()), "d"(SIGILL)
               : "rcx", "r11", "memory");
}

TEST_F(AmxEmulatorDeathTest, WhatIsNotAmxGoesToTheHandlerBefore) {
  const auto was_forwarded = testing::ExitedWithCode(forwarded);
  configure(full());
  EXPECT_EXIT(__builtin_trap(), was_forwarded, "");
  EXPECT_EXIT(multiply_bytes(), was_forwarded, "");
  EXPECT_EXIT(multiply_into_tile_14(), was_forwarded, "");
  EXPECT_EXIT(zero_wide(), was_forwarded, "");
  EXPECT_EXIT(zero_long(), was_forwarded, "");
  EXPECT_EXIT(raise(SIGILL), was_forwarded, "");
  EXPECT_EXIT(raise_before_tilerelease(), was_forwarded, "");
  release();
}

TEST(AmxEmulatorDefaultDeathTest, WhatIsNotAmxEndsTheProcess) {
  // A process of its own, in which no other test has installed a handler.
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  const auto install = [] {
    signal(SIGILL, SIG_DFL);  // a sanitizer's
    if (!install_amx_emulator()) _exit(0);
  };
  const auto killed = testing::KilledBySignal(SIGILL);
  EXPECT_EXIT((install(), __builtin_trap()), killed, "");
  EXPECT_EXIT((install(), raise(SIGILL)), killed, "");
}

}  // namespace
