// Caches in files: they come back bit by bit, and nothing else is taken for one.

#include "allocations.hpp"
#include "kv_cache_steps.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <fstream>
#include <stdexcept>
#include <streambuf>

namespace cca::test { namespace {

/// A cache of sequences that fill nothing, a part and all of their windows, with the tokens for more.
struct example {
  cache_setup setup;
  operands<float> tokens;
  kv_cache<float> cache;

  explicit example(const options& options = {.group_size = 3, .window = 4}, std::int64_t capacity = 0)
      : setup(example_cache(options, {.batch = 3, .capacity = capacity, .rewind = 2})),
        tokens([this] {
          random_engine random(1);
          return random_tokens(setup, 3, 40, random);
        }()),
        cache(setup.make()) {
    append(cache, 1, sequence_of(tokens_of(tokens, {0, 5}), 1));
    append(cache, 2, sequence_of(tokens_of(tokens, {0, 20}), 2));
    cache.truncate(2, 18);
  }
};

kv_cache<float> load_from(const std::string& file) {
  std::istringstream stream(file);
  return load<float>(stream);
}

/// What a file is refused with. Whatever it claims, it costs no more than a few megabytes.
std::string refusal_of_file(const std::string& file) {
  std::istringstream stream(file);
  const allocation_limit limit(1'000'000, std::size_t{1} << 25);
  return refusal_of<std::runtime_error>([&] { (void)load<float>(stream); });
}

testing::AssertionResult refused(const std::string& file, const std::string& because = "cca: cache file: ") {
  const std::string message = refusal_of_file(file);
  if (message.find(because) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "refused with \"" << message << "\", not \"" << because << "\"";
}

// ---------------------------------------------------------------------------------------------------- there and back

TEST(KvCacheFile, ComesBackBitByBit) {
  std::vector<options> all{{},
                           {.group_size = 3, .window = 4},
                           {.group_size = 1, .window = 1, .softmax_scale = 0.5},
                           {.window = 3, .sink_tokens = 2},
                           {.group_size = 2, .window = 3, .sink_tokens = 4},
                           {.group_size = 2, .window = 3, .sink_tokens = 7}};  // beyond the second sequence
  for (const pooling pool : all_poolings)
    for (const core_heads cores : all_core_heads)
      all.push_back({.group_size = 4, .window = 7, .pool = pool, .core_heads = cores});
  for (const options& options : all)
    for (const std::int64_t capacity : {0, 64}) {
      example e(options, capacity);
      const std::string file = content(e.cache);
      kv_cache<float> loaded = load_from(file);
      EXPECT_EQ(content(loaded), file);
      EXPECT_EQ(loaded.shape(), e.cache.shape());
      EXPECT_EQ(describe(loaded.options()), describe(options));
      EXPECT_EQ(loaded.bytes(), e.cache.bytes());
      for (std::int64_t b = 0; b < 3; ++b) {
        EXPECT_EQ(loaded.length(b), e.cache.length(b));
        EXPECT_EQ(loaded.least_length(b), e.cache.least_length(b));
      }
      for (const range part : {range{20, 21}, {21, 40}}) {
        const token_views<float> next = tokens_of(e.tokens, part);
        EXPECT_TRUE(same_bits(attend(loaded, next), attend(e.cache, next))) << describe(e.setup);
      }
      EXPECT_EQ(content(loaded), content(e.cache));
    }
}

TEST(KvCacheFile, NothingBehindItIsRead) {
  const std::string one = content(example().cache), other = content(example({.group_size = 2, .window = 3}).cache);
  std::stringstream stream(one + other + "more");
  EXPECT_EQ(content(load<float>(stream)), one);
  EXPECT_EQ(content(load<float>(stream)), other);
  std::string rest;
  stream >> rest;
  EXPECT_EQ(rest, "more");
}

// ------------------------------------------------------------------------------------------------------------ damage

TEST(KvCacheFile, EveryChangedByteIsNoticed) {
  const std::string file = content(example().cache);
  for (std::size_t i = 0; i < file.size(); ++i)
    for (const int change : {1, 0x80, 0xff}) {
      std::string damaged = file;
      damaged[i] = static_cast<char>(damaged[i] ^ change);
      ASSERT_TRUE(refused(damaged)) << "byte " << i << " of " << file.size() << " changed by " << change;
    }
}

TEST(KvCacheFile, EveryMissingEndIsNoticed) {
  const std::string file = content(example().cache);
  for (std::size_t size = 0; size < file.size(); ++size)
    ASSERT_TRUE(refused(file.substr(0, size), "ends too early")) << size << " of " << file.size() << " bytes";
}

/// Bytes that are lost, doubled, exchanged or made up, many at a time.
TEST(KvCacheFile, NoMutationIsTakenForACache) {
  const std::string file = content(example().cache);
  random_engine random(2);
  const auto place = [&](const std::string& text) {
    return static_cast<std::size_t>(draw(random, 0, std::ssize(text) - 1));
  };
  for (int i = 0; i < 3000; ++i) {
    std::string mutated = file;
    for (std::int64_t changes = draw(random, 1, 4); changes > 0; --changes) {
      const std::size_t at = place(mutated), count = static_cast<std::size_t>(draw(random, 1, 40));
      switch (draw(random, 0, 3)) {
        case 0:
          mutated.erase(at, count);
          break;
        case 1:
          mutated.insert(at, mutated.substr(place(mutated), count));
          break;
        case 2:
          std::swap(mutated[at], mutated[place(mutated)]);
          break;
        default:
          for (std::size_t j = at; j < std::min(at + count, mutated.size()); ++j)
            mutated[j] = static_cast<char>(draw(random, -128, 127));
      }
      if (mutated.empty()) break;
    }
    // Behind the file anything may follow.
    if (mutated.substr(0, file.size()) == file) continue;
    ASSERT_TRUE(refused(mutated)) << "mutation " << i;
  }
}

TEST(KvCacheFile, AnotherFileIsNotOne) {
  EXPECT_TRUE(refused("", "ends too early"));
  EXPECT_TRUE(refused(std::string(10'000, '\0'), "is not one"));
  EXPECT_TRUE(refused(std::string(10'000, 'c'), "is not one"));
  std::istringstream doubles(content(example().cache));
  EXPECT_THROW((void)load<double>(doubles), std::runtime_error);
}

// ----------------------------------------------------------------------------------------------------------- forgery

/// What a file says before its sequences, in either version.
struct forged_header {
  detail::cache_file_start start{};
  detail::element_code elements = detail::element_code::of<float, float>();
  cca::options options{.group_size = 3, .window = 4};
  cache_shape shape{.batch = 1, .heads = 1, .kv_heads = 1, .dim = 1, .value_dim = 1, .capacity = 0, .rewind = 2};
  std::vector<detail::cache_file_option> more{};
};

/// A file whose checksums are right, of a header and the numbers of one sequence, and so many elements.
std::string forge(const forged_header& header, const std::array<std::int64_t, 2>& numbers = {0, 0},
                  std::int64_t elements = 0) {
  std::ostringstream stream;
  detail::checked_writer writer(stream);
  writer.put(&header.start, 1);
  if (header.start.version == 1) {
    const cca::options& o = header.options;
    const detail::cache_file_header_1 old{header.elements,
                                          static_cast<std::uint32_t>(o.pool),
                                          static_cast<std::uint32_t>(o.core_heads),
                                          o.softmax_scale.has_value(),
                                          o.softmax_scale.value_or(0),
                                          o.group_size,
                                          o.window,
                                          header.shape};
    writer.put(&old, 1);
  } else {
    auto all = detail::cache_file::options_of(header.options);
    all.insert(all.end(), header.more.begin(), header.more.end());
    const detail::cache_file_header present{header.elements, static_cast<std::uint32_t>(all.size()), header.shape};
    writer.put(&present, 1);
    writer.end_part();
    writer.put(all.data(), std::ssize(all));
  }
  writer.end_part();
  writer.put(numbers.data(), 2);
  writer.end_part();
  const std::vector<float> content(static_cast<std::size_t>(elements));
  writer.put(content.data(), elements);
  writer.end_part();
  return stream.str();
}

/// Of a cache that makes sense: one head of dim 1, groups of 3 and a window of 4.
forged_header good_header(std::uint32_t version = 2) {
  forged_header header;
  header.start.version = version;
  return header;
}

TEST(KvCacheFile, AForgedHeaderIsRefused) {
  constexpr std::int64_t huge = std::int64_t{1} << 57, greatest = std::numeric_limits<std::int64_t>::max();
  for (const std::uint32_t version : {1u, 2u}) {
    SCOPED_TRACE(testing::Message() << "version " << version);
    const kv_cache<float> good = load_from(forge(good_header(version), {7, 0}, (2 + 7) * 2));
    EXPECT_EQ(good.length(), 7);
    EXPECT_EQ(good.options().group_size, 3);
    EXPECT_EQ(good.shape().rewind, 2);

    const auto expect_refused = [&](const auto& change, const std::string& because) {
      forged_header header = good_header(version);
      change(header);
      EXPECT_TRUE(refused(forge(header), because));
      EXPECT_TRUE(refused(forge(header, {7, 0}, 18), because));
    };
    expect_refused([](auto& h) { h.start.magic[0] = 'C'; }, "is not one");
    expect_refused([](auto& h) { h.start.byte_order = 0x04030201; }, "byte order");
    expect_refused([](auto& h) { h.start.version = 3; }, "got version 3, wants 1 or 2");
    expect_refused([](auto& h) { h.elements.bytes = 8; }, "got elements of 8 bytes");
    expect_refused([](auto& h) { h.options.pool = static_cast<pooling>(5); }, "options.pool");
    expect_refused([](auto& h) { h.options.core_heads = static_cast<core_heads>(2); }, "options.core_heads");
    expect_refused([](auto& h) { h.options.softmax_scale = std::numeric_limits<double>::infinity(); },
                   "options.softmax_scale");
    for (const std::int64_t wrong : {std::int64_t{0}, std::int64_t{-1}, -greatest - 1}) {
      expect_refused([&](auto& h) { h.options.window = wrong; }, "options.window");
      expect_refused([&](auto& h) { h.shape.heads = wrong; }, "shape.heads");
      expect_refused([&](auto& h) { h.shape.kv_heads = wrong; }, "shape.kv_heads");
      expect_refused([&](auto& h) { h.shape.dim = wrong; }, "shape.dim");
      if (wrong == 0) continue;
      expect_refused([&](auto& h) { h.options.group_size = wrong; }, "options.group_size");
      expect_refused([&](auto& h) { h.shape.batch = wrong; }, "sequences");
      expect_refused([&](auto& h) { h.shape.value_dim = wrong; }, "shape.value_dim");
      expect_refused([&](auto& h) { h.shape.capacity = wrong; }, "shape.capacity");
      expect_refused([&](auto& h) { h.shape.rewind = wrong; }, "shape.rewind");
    }
    expect_refused([](auto& h) { h.shape.kv_heads = 2; }, "shape.kv_heads");
    expect_refused([](auto& h) { h.options.window = unlimited; }, "options.group_size");
    expect_refused([](auto& h) { h.shape.batch = std::int64_t{1} << 40; }, "ends too early");
    expect_refused([](auto& h) { h.shape.batch = greatest; }, "ends too early");
    for (const std::int64_t most : {huge, greatest}) {
      expect_refused([&](auto& h) { h.shape.capacity = most; }, "");
      expect_refused([&](auto& h) { h.shape.heads = h.shape.dim = most; }, "shape.capacity");
    }
  }
}

/// All options come back; one that this library does not have is not passed over.
TEST(KvCacheFile, OptionsAreKeptByName) {
  forged_header header = good_header();
  options all{.group_size = 3,
              .window = 4,
              .sink_tokens = 2,
              .core_heads = core_heads::per_kv_head,
              .softmax_scale = 0.25,
              .pooling_scale = 2.5,
              .softcap = 30};
  for (const pooling pool : all_poolings) {
    all.pool = pool;
    all.pooling_scale = pool == pooling::last_query ? 2.5 : 1;  // no other has a use for it
    header.options = all;
    EXPECT_EQ(describe(load_from(forge(header, {0, all.sink_tokens})).options()), describe(all));
    EXPECT_EQ(describe(load_from(content(kv_cache<float>(header.shape, all))).options()), describe(all));
  }

  header.more.push_back({.name = {'n', 'e', 'w'}, .code = {}});
  EXPECT_TRUE(refused(forge(header, {0, all.sink_tokens}), "got an option new"));
  header.more = {{.name = {'s', 'o', 'f', 't', 'c', 'a', 'p'}, .code = detail::encode_option(-1.0)}};
  EXPECT_TRUE(refused(forge(header), "options.softcap"));
}

TEST(KvCacheFile, AForgedSequenceIsRefused) {
  constexpr std::int64_t greatest = std::numeric_limits<std::int64_t>::max();
  // A sequence of 9 has cores of three groups, and its next query sees tokens from 6 on.
  for (const std::array<std::int64_t, 2>& numbers :
       std::vector<std::array<std::int64_t, 2>>{{-1, 0},
                                                {0, 1},
                                                {9, -1},
                                                {9, 7},
                                                {9, 9},
                                                {9, 10},
                                                {20, 8},
                                                {-greatest, -greatest},
                                                {greatest, greatest},
                                                {greatest, 0},
                                                {(std::int64_t{1} << 62) + 1, std::int64_t{1} << 62}})
    EXPECT_TRUE(refused(forge(good_header(), numbers, 1000), "got raw tokens")) << text_of(numbers);
  EXPECT_EQ(load_from(forge(good_header(), {9, 6}, (3 + 3) * 2)).raw_count(), 3);

  // Behind four sink tokens the next query of 9 sees tokens from 4 on; what is held begins there, were there fewer tokens.
  forged_header sunk = good_header();
  sunk.options.sink_tokens = 4;
  for (const std::array<std::int64_t, 2>& numbers :
       std::vector<std::array<std::int64_t, 2>>{{9, 3}, {9, 5}, {9, 0}, {2, 2}, {2, 0}, {2, 5}})
    EXPECT_TRUE(refused(forge(sunk, numbers, 1000), "got raw tokens")) << text_of(numbers);
  EXPECT_EQ(load_from(forge(sunk, {9, 4}, (1 + 4 + 5) * 2)).raw_count(), 9);
  EXPECT_EQ(load_from(forge(sunk, {2, 4}, 2 * 2)).raw_count(), 2);

  // Rows that the file does not have.
  constexpr std::int64_t length = std::int64_t{1} << 61;
  EXPECT_TRUE(refused(forge(good_header(), {length, length - 9}, 1000), "more than memory has"));
  EXPECT_TRUE(refused(forge(good_header(), {length >> 8, (length >> 8) - 9}, 1000), "ends too early"));
  for (const auto& change : std::vector<std::function<void(forged_header&)>>{
           [](auto& h) { h.shape.heads = std::int64_t{1} << 57; }, [](auto& h) { h.shape.dim = std::int64_t{1} << 57; },
           [](auto& h) { h.shape.value_dim = std::int64_t{1} << 57; },
           [](auto& h) { h.options.window = unlimited - 1; }, [](auto& h) { h.shape.rewind = unlimited; }}) {
    forged_header header = good_header();
    change(header);
    EXPECT_TRUE(refused(forge(header, {length >> 8, 0}, 1000)));
    EXPECT_TRUE(refused(forge(header, {7, 0}, 10)));
  }
}

/// A file that claims heads by the billion but has nothing of them takes no time.
TEST(KvCacheFile, EmptySequencesOfManyHeadsAreNoWork) {
  forged_header header = good_header();
  header.shape.heads = std::int64_t{1} << 57;
  EXPECT_EQ(load_from(forge(header)).length(), 0);
  EXPECT_EQ(load_from(forge(header, {2, 0}, 4)).length(), 2);
}

// ----------------------------------------------------------------------------------------------------------- streams

/// Takes so many bytes and no more.
class full_buffer : public std::streambuf {
 public:
  explicit full_buffer(std::size_t room) : room_(room) {}

 private:
  int_type overflow(int_type c) override { return room_ > 0 ? (--room_, traits_type::not_eof(c)) : traits_type::eof(); }

  std::size_t room_;
};

TEST(KvCacheFile, AStreamThatFailsIsNoticed) {
  const example e;
  const std::size_t size = content(e.cache).size();
  for (std::size_t room = 0; room <= size; ++room) {
    full_buffer buffer(room);
    std::ostream stream(&buffer);
    if (room < size)
      ASSERT_THROW(save(e.cache, stream), std::runtime_error) << "room for " << room << " of " << size << " bytes";
    else
      ASSERT_NO_THROW(save(e.cache, stream));
  }
}

/// What a file's buffer took may still not get to the disk.
TEST(KvCacheFile, AFullDiskIsNoticed) {
  std::ofstream full("/dev/full", std::ios::binary);
  if (!full) GTEST_SKIP() << "no /dev/full";
  EXPECT_THROW(save(example().cache, full), std::runtime_error);
}

}}  // namespace cca::test
