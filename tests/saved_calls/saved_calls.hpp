#pragma once

// Random calls whose results were saved: what they are, and how their results lie in a file. All of it is drawn from a hash,
// so that the calls are the same with every standard library and from every version of the tests.

#include <bit>
#include <cstring>
#include <fstream>
#include <map>
#include <stdexcept>
#include <utility>

#include "entry_points.hpp"

namespace cca::test {

/// Numbers that are hashes of their index.
class hash_numbers {
 public:
  explicit hash_numbers(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {  // splitmix64
    std::uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }

  /// A number in `[least, greatest]`.
  std::int64_t draw(std::int64_t least, std::int64_t greatest) {
    return least + static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(greatest - least + 1));
  }

  /// True in one of `times` cases.
  bool once_in(std::int64_t times) { return draw(1, times) == 1; }

  template <class Choices>
  auto choice(const Choices& choices) {
    return choices[static_cast<std::size_t>(draw(0, std::ssize(choices) - 1))];
  }

  /// The sum of four uniform numbers, of deviation 1: no function of the standard library has a say in it.
  double number() {
    const std::uint64_t bits = next();
    std::int64_t sum = -2 * 0xffff;
    for (int i = 0; i < 64; i += 16) sum += static_cast<std::int64_t>(bits >> i & 0xffff);
    return static_cast<double>(sum) / 37837.0;
  }

  /// Any layout that an output may have, or with `broadcast` that an operand may have.
  test::layout layout(bool broadcast) {
    static constexpr std::array<std::array<std::size_t, 3>, 6> orders{
        {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}}};
    test::layout layout{.order = choice(orders), .padding = choice(std::array{0, 0, 1, 3, 16})};
    for (bool& reversed : layout.reversed) reversed = once_in(6);
    for (bool& zero : layout.broadcast) zero = broadcast && once_in(10);
    return layout;
  }

 private:
  std::uint64_t state_;
};

/// One saved call in words of its own: saved_calls_adapter.hpp says it in those of the library.
struct saved_call {
  test::entry entry = entry::dense;
  test::sizes sizes{};
  std::int64_t far_heads = 1, far_length = 0;
  std::int64_t group_size = 1;          // 1: nothing is pooled but by `pool` and `attention`
  std::int64_t window = 0;              // 0: none
  int pooling = 0;                      // last query, mean, max
  bool shared_cores = false;            // one core per key/value head
  std::optional<double> scale{};        // of the softmax
  std::optional<std::int64_t> first{};  // position of query 0
  int unit = 0;                         // none, AVX-512 BF16, AMX
  double spread = 1;                    // of queries and keys: larger ones make a sharper softmax
  std::uint64_t seed = 0;               // of operands and layouts

  friend std::ostream& operator<<(std::ostream& to, const saved_call& c) {
    to << c.entry << ", " << describe(c.sizes) << ", far " << c.far_heads << " x " << c.far_length << ", group size "
       << c.group_size << ", window " << c.window << ", pooling " << c.pooling << ", shared cores " << c.shared_cores;
    if (c.scale) to << ", scale " << *c.scale;
    if (c.first) to << ", first " << *c.first;
    return to << ", unit " << c.unit << ", spread " << c.spread << ", seed " << c.seed;
  }
};

/// A call of an entry point; `times` counts them, and some kinds come with certain counts.
inline saved_call draw_call(entry entry, int times, hash_numbers& random) {
  saved_call c{.entry = entry};
  sizes& s = c.sizes;
  s.batch = random.draw(1, 2);
  s.kv_heads = random.draw(1, 2);
  s.heads = s.kv_heads * random.draw(1, 3);
  s.dim = random.once_in(6) ? random.choice(head_dims) : random.draw(1, 40);
  s.value_dim = random.once_in(6) ? random.choice(head_dims) : random.draw(1, 40);
  s.keys = times % 8 == 7 ? random.draw(130, 300) : random.draw(1, 90);
  s.queries = random.once_in(3) ? random.draw(1, 9) : random.draw(1, s.keys + 9);
  if (times % 8 == 7) s.batch = s.kv_heads = 1, s.heads = random.draw(1, 2);
  if (times % 8 == 3 && entry != entry::merge) {  // few queries of a long context
    s.keys = random.draw(2000, 9000);
    s.queries = random.draw(1, 9);
    s.batch = s.kv_heads = 1;
    s.heads = random.draw(1, 3);
    s.dim = random.draw(1, 12);
    s.value_dim = random.draw(1, 12);
  }
  if (random.once_in(3)) c.scale = random.choice(std::array{0.0, -0.5, 0.3, 1.0});
  c.spread = random.choice(std::array{1.0, 1.0, 2.0, 0.25});
  switch (entry) {
    case entry::pool:
    case entry::attention:
      if (times % 8 == 3) s.keys = random.draw(100, 160);
      s.queries = s.keys;
      c.group_size = random.choice(std::array{1, 2, 3, 4, 7, 16, 40});
      c.pooling = static_cast<int>(random.once_in(2) ? 0 : random.draw(1, 2));
      c.shared_cores = random.once_in(2);
      if (entry == entry::attention)
        c.window = random.draw(1, random.once_in(3) ? s.keys + 5 : 40);
      else if (c.pooling != 0)
        c.scale.reset();
      break;
    case entry::attend:
      c.far_heads = random.choice(std::array<std::int64_t, 3>{1, s.kv_heads, s.heads});
      c.far_length = random.draw(0, 60);
      if (random.once_in(8)) s.keys = 0;
      [[fallthrough]];
    case entry::local:
      if (!random.once_in(4)) {
        c.window = random.draw(1, 60);
        c.group_size = random.draw(1, 9);
      }
      [[fallthrough]];
    case entry::dense:
      if (random.once_in(4)) c.first = random.draw(-20, s.keys + 20);
      break;
    case entry::merge:
      c.scale.reset();
  }
  c.seed = random.next();
  return c;
}

/// The life of a cache.
struct saved_life {
  std::int64_t batch = 1, heads = 1, kv_heads = 1, dim = 1, value_dim = 1, capacity = 0, rewind = 0;
  saved_call options{};  // of it the options

  friend std::ostream& operator<<(std::ostream& to, const saved_life& l) {
    return to << "cache of " << l.batch << " x " << l.heads << "/" << l.kv_heads << ", dims " << l.dim << " and "
              << l.value_dim << ", capacity " << l.capacity << ", rewind " << l.rewind << ", " << l.options;
  }
};

inline constexpr std::int64_t longest_life = 96;  // tokens of a sequence

inline saved_life draw_life(hash_numbers& random) {
  saved_life l{.batch = random.draw(1, 2), .kv_heads = random.draw(1, 2)};
  l.heads = l.kv_heads * random.draw(1, 3);
  l.dim = random.choice(std::array{1, 4, 8, 17, 32});
  l.value_dim = random.choice(std::array{1, 4, 9, 32});
  l.capacity = random.once_in(3) ? longest_life : 0;
  l.rewind = random.draw(0, 5);
  l.options.entry = entry::attention;
  l.options.group_size = random.draw(1, 9);
  l.options.window = random.draw(1, 20);
  if (random.once_in(8)) {
    l.options.group_size = 1;
    l.options.window = 0;
  }
  l.options.pooling = static_cast<int>(random.draw(0, 2));
  l.options.shared_cores = random.once_in(2);
  if (random.once_in(4)) l.options.scale = -0.3;
  l.options.seed = random.next();
  return l;
}

// --------------------------------------------------------------------------------------------------- what was saved

/// What a call gave. The file holds such records one after the other: three numbers of 32 bits, which are its size, its
/// section and its place there, and then what `exchange` wrote.
class saved_record {
 public:
  saved_record() = default;  // to be written
  explicit saved_record(std::vector<char> bytes) : bytes_(std::move(bytes)), reading_(true) {}

  [[nodiscard]] bool reading() const { return reading_; }
  [[nodiscard]] const std::vector<char>& bytes() const { return bytes_; }
  [[nodiscard]] bool used_up() const { return !reading_ || at_ == bytes_.size(); }

  /// Takes `x` from the record, or puts it there.
  template <class T>
  void exchange(T& x) {
    static_assert(std::endian::native == std::endian::little, "as the file has it");
    if (!reading_) return static_cast<void>(bytes_.insert(bytes_.end(), as_bytes(x), as_bytes(x) + sizeof x));
    if (at_ + sizeof x > bytes_.size()) throw std::runtime_error("the saved record is too short");
    std::memcpy(&x, bytes_.data() + at_, sizeof x);
    at_ += sizeof x;
  }

 private:
  template <class T>
  static const char* as_bytes(const T& x) {
    return reinterpret_cast<const char*>(&x);
  }

  std::vector<char> bytes_;
  std::size_t at_ = 0;
  bool reading_ = false;
};

/// All records of a file, by section and place.
class saved_file {
 public:
  using key = std::pair<std::uint32_t, std::uint32_t>;

  explicit saved_file(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::array<std::uint32_t, 3> head;
    while (file.read(reinterpret_cast<char*>(&head), sizeof head)) {
      std::vector<char> bytes(head[0]);
      if (!file.read(bytes.data(), std::ssize(bytes))) throw std::runtime_error("the file of saved records is cut off");
      records_.emplace(key{head[1], head[2]}, std::move(bytes));
    }
  }

  [[nodiscard]] saved_record find(key at) const { return saved_record(records_.at(at)); }

  static void append(const char* path, key at, const saved_record& record) {
    const std::array<std::uint32_t, 3> head{static_cast<std::uint32_t>(record.bytes().size()), at.first, at.second};
    std::ofstream file(path, std::ios::binary | std::ios::app);
    file.write(reinterpret_cast<const char*>(&head), sizeof head);
    file.write(record.bytes().data(), std::ssize(record.bytes()));
  }

 private:
  std::map<key, std::vector<char>> records_;
};

}  // namespace cca::test
