#pragma once

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace common {

/// A file's bytes, mapped read-only for as long as this lives.
class mapped_file {
 public:
  explicit mapped_file(const std::string& path) {
    const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw std::system_error(errno, std::generic_category(), "cannot open " + path);
    struct stat status = {};
    ::fstat(file, &status);
    size_ = static_cast<std::size_t>(status.st_size);
    data_ = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
    const int reason = errno;
    ::close(file);
    if (data_ == MAP_FAILED) throw std::system_error(reason, std::generic_category(), "cannot map " + path);
  }
  mapped_file(const mapped_file&) = delete;
  mapped_file& operator=(const mapped_file&) = delete;
  ~mapped_file() { ::munmap(data_, size_); }

  [[nodiscard]] std::span<const std::byte> bytes() const { return {static_cast<const std::byte*>(data_), size_}; }

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0;
};

template <class T>
inline constexpr std::string_view dtype = "";
template <>
inline constexpr std::string_view dtype<float> = "F32";
template <>
inline constexpr std::string_view dtype<double> = "F64";
template <>
inline constexpr std::string_view dtype<std::int32_t> = "I32";
template <>
inline constexpr std::string_view dtype<std::uint8_t> = "U8";

/// A file of named tensors: 8 bytes with the length of a JSON header, the header, then the tensors' bytes.
/// Source: https://huggingface.co/docs/safetensors
class safetensors {
 public:
  using shape = std::vector<std::int64_t>;

  explicit safetensors(const std::string& path) : path_(path), file_(path) {
    std::uint64_t header_size = 0;
    const std::span<const std::byte> bytes = file_.bytes();
    if (bytes.size() < sizeof header_size) refuse("is too short for a header");
    std::memcpy(&header_size, bytes.data(), sizeof header_size);
    if (header_size > bytes.size() - sizeof header_size) refuse("ends inside its header");
    const auto* text = reinterpret_cast<const char*>(bytes.data()) + sizeof header_size;
    header_ = nlohmann::json::parse(text, text + header_size, nullptr, /*allow_exceptions=*/false);
    if (!header_.is_object()) refuse("has no JSON object for a header");
    data_ = bytes.subspan(sizeof header_size + header_size);
  }

  [[nodiscard]] shape shape_of(const std::string& name) const { return entry(name).at("shape").get<shape>(); }

  /// The elements of a tensor, which must have this type and this shape.
  template <class T>
  [[nodiscard]] std::span<const T> tensor(const std::string& name, const shape& wanted) const {
    const nlohmann::json& description = entry(name);
    const auto got = description.at("dtype").get<std::string>() + description.at("shape").dump();
    const auto want = std::string(dtype<T>) + nlohmann::json(wanted).dump();
    if (got != want) refuse(fmt::format("has {} as {}, wanted {}", name, got, want));
    std::size_t elements = 1;
    for (const std::int64_t extent : wanted) elements *= static_cast<std::size_t>(extent);
    const auto [begin, end] = description.at("data_offsets").get<std::pair<std::size_t, std::size_t>>();
    if (end > data_.size() || begin > end || end - begin != elements * sizeof(T)) {
      refuse(fmt::format("has bytes [{}, {}) for {}, wanted {} of its {}", begin, end, name, elements * sizeof(T),
                         data_.size()));
    }
    const std::byte* address = data_.data() + begin;
    if (reinterpret_cast<std::uintptr_t>(address) % alignof(T) != 0) refuse(fmt::format("has {} unaligned", name));
    return {reinterpret_cast<const T*>(address), elements};
  }

  /// From the file's metadata, where every value is a string; empty where it has none of this name.
  [[nodiscard]] std::string text(const std::string& name) const {
    return header_.value("__metadata__", nlohmann::json::object()).value(name, std::string());
  }

  /// A number from the file's metadata.
  [[nodiscard]] double number(const std::string& name) const {
    const std::string text = this->text(name);
    double value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
      refuse(fmt::format("has '{}' for {} in its metadata, wanted a number", text, name));
    }
    return value;
  }

 private:
  [[nodiscard]] const nlohmann::json& entry(const std::string& name) const {
    if (!header_.contains(name)) refuse(fmt::format("has no tensor '{}'", name));
    return header_.at(name);
  }

  [[noreturn]] void refuse(const std::string& reason) const { throw std::runtime_error(path_ + " " + reason); }

  std::string path_;
  mapped_file file_;
  nlohmann::json header_;
  std::span<const std::byte> data_;
};

/// Collects tensors, which stay where they are, and writes them to a file.
class safetensors_writer {
 public:
  void set(const std::string& name, const std::string& value) { header_["__metadata__"][name] = value; }

  template <class T>
  void add(const std::string& name, const safetensors::shape& shape, std::span<const T> elements) {
    const std::span<const std::byte> bytes = std::as_bytes(elements);
    header_[name] = {{"dtype", dtype<T>}, {"shape", shape}, {"data_offsets", {size_, size_ + bytes.size()}}};
    size_ += bytes.size();
    tensors_.push_back(bytes);
  }

  /// The file has all of it or is as it was before: it is written beside its place and put there whole.
  void write(const std::string& path) const {
    std::string header = header_.dump();
    header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the tensors are aligned
    const std::uint64_t header_size = header.size();
    const std::string unfinished = path + ".unfinished";
    std::ofstream file(unfinished, std::ios::binary);
    file.write(reinterpret_cast<const char*>(&header_size), sizeof header_size);
    file.write(header.data(), static_cast<std::streamsize>(header.size()));
    for (const std::span<const std::byte> tensor : tensors_)
      file.write(reinterpret_cast<const char*>(tensor.data()), static_cast<std::streamsize>(tensor.size()));
    file.close();
    if (!file) throw std::runtime_error("cannot write " + unfinished);
    std::filesystem::rename(unfinished, path);
  }

 private:
  nlohmann::json header_ = nlohmann::json::object();
  std::size_t size_ = 0;
  std::vector<std::span<const std::byte>> tensors_;
};

}  // namespace common
