#pragma once

#include <charconv>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include <cca/options.hpp>

namespace bench {

/// What `--shape KIND:KEY=VALUE,...` asks for. A kind of cases takes the keys that it knows; `finish` refuses the others.
class shape {
 public:
  /// Throws `std::invalid_argument` for a text of another form.
  explicit shape(std::string_view text) : text_(text) {
    const std::size_t colon = text.find(':');
    kind_ = text.substr(0, colon);
    text = colon == text.npos ? std::string_view() : text.substr(colon + 1);
    while (!text.empty()) {
      const std::size_t comma = text.find(',');
      add(text.substr(0, comma));
      text = comma == text.npos ? std::string_view() : text.substr(comma + 1);
    }
  }

  [[nodiscard]] const std::string& kind() const { return kind_; }
  [[nodiscard]] bool has(const char* key) const { return values_.count(key) != 0; }

  /// The value of a key, at least `least`, or what it is otherwise.
  std::int64_t take(const char* key, std::int64_t otherwise, std::int64_t least = 1) {
    const std::string value = take_text(key, std::to_string(otherwise));
    std::int64_t number = 0;
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
    if (error != std::errc() || end != value.data() + value.size() || number < least)
      refuse(key, value, "a whole number of at least " + std::to_string(least));
    return number;
  }
  std::string take_text(const char* key, const std::string& otherwise) {
    wanted_ += std::string(wanted_.empty() ? "" : ", ") + key;
    const auto node = values_.extract(key);
    return node.empty() ? otherwise : node.mapped();
  }

  /// Throws `std::invalid_argument` for a key that was not taken.
  void finish() const {
    if (!values_.empty()) refuse(values_.begin()->first, values_.begin()->second, "one of the keys " + wanted_);
  }
  /// Throws it for the value of a key.
  [[noreturn]] void refuse(const std::string& key, const std::string& value, const std::string& wanted) const {
    throw std::invalid_argument("--shape " + text_ + ": got " + key + "=" + value + ", wants " + wanted);
  }

 private:
  void add(std::string_view setting) {
    const std::size_t equals = setting.find('=');
    if (equals == setting.npos)
      throw std::invalid_argument("--shape " + text_ + ": got " + std::string(setting) + ", wants KEY=VALUE");
    const std::string key(setting.substr(0, equals));
    if (!values_.emplace(key, setting.substr(equals + 1)).second)
      throw std::invalid_argument("--shape " + text_ + ": got " + key + " twice");
  }

  std::string text_, kind_, wanted_;
  std::map<std::string, std::string> values_;
};

/// What a query sees: everything, a window, or cores before a window.
struct context {
  std::int64_t group_size = 0, window = cca::unlimited;

  [[nodiscard]] const char* name() const {
    return group_size > 0 ? "cca" : window == cca::unlimited ? "dense" : "local";
  }
};

/// The contexts of the cases that a shape asks for: `cca` and `local` that one, `dense` also what its `g` and `s` make,
/// beside it.
inline std::vector<context> take_contexts(shape& of, std::string_view kind) {
  const bool beside = kind == "dense" && (of.has("g") || of.has("s"));
  const context some{kind == "local" ? 0 : of.take("g", kind == "cca" ? 16 : 0, kind == "cca" ? 1 : 0),
                     of.take("s", kind == "dense" ? cca::unlimited : 1024)};
  std::vector<context> all;
  if (kind == "dense") all.push_back({});
  if (kind != "dense" || beside) all.push_back(some);
  return all;
}

/// The name of a case, which grows by `/KEY:VALUE`.
struct case_name {
  std::string text;

  void add(const char* key, std::int64_t value) { text += std::string("/") + key + ":" + std::to_string(value); }
  void add(const context& seen) {
    if (seen.group_size > 1) add("g", seen.group_size);
    if (seen.window != cca::unlimited) add("s", seen.window);
  }
};

}  // namespace bench
