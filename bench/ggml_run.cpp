// ggml's causal flash attention of raw float files, for compare.py; built where CMake is told CCA_BENCH_GGML.
//
//   ggml_run key=value...     length, dim, directory, type of keys and values (f32, f16)
//
// It speaks like cca_run. As in llama.cpp, queries go in batches of 512 (`n_ubatch`) over the keys up to the batch's
// last and a mask, which is filled before the clock starts.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include <ggml-cpu.h>
#include <ggml.h>

#include "machine.hpp"

namespace {

constexpr std::int64_t batch = 512;
constexpr std::size_t cache_line = 64;

std::vector<float> read(const std::string& path, std::int64_t count) {
  std::vector<float> data(static_cast<std::size_t>(count));
  const auto bytes = static_cast<std::streamsize>(data.size() * sizeof(float));
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(data.data()), bytes))
    throw std::runtime_error(path + ": wants " + std::to_string(bytes) + " bytes");
  return data;
}

/// One head's attention, `[length][dim]` each.
class attention {
 public:
  attention(const std::string& directory, ggml_type type, std::int64_t length, std::int64_t dim)
      : type_(type), length_(length), dim_(dim), query_(read(directory + "/query", length * dim)), out_(query_.size()) {
    key_ = convert(read(directory + "/key", length * dim));
    value_ = convert(read(directory + "/value", length * dim));
    mask_.reserve(static_cast<std::size_t>(length * batch));
  }

  [[nodiscard]] const std::vector<float>& out() const { return out_; }

  /// Seconds of the calling thread, which is the only one that works.
  double run() {
    double seconds = 0;
    for (std::int64_t first = 0; first < length_; first += batch)
      seconds += run(first, std::min(batch, length_ - first));
    return seconds;
  }

 private:
  [[nodiscard]] std::vector<std::uint8_t> convert(const std::vector<float>& from) const {
    std::vector<std::uint8_t> to(from.size() * ggml_type_size(type_));
    if (type_ == GGML_TYPE_F16)
      ggml_cpu_fp32_to_fp16(from.data(), reinterpret_cast<ggml_fp16_t*>(to.data()), length_ * dim_);
    else
      std::copy_n(from.data(), from.size(), reinterpret_cast<float*>(to.data()));
    return to;
  }

  double run(std::int64_t first, std::int64_t count) {
    const std::int64_t seen = first + count;
    mask_.assign(static_cast<std::size_t>(seen * count), ggml_fp32_to_fp16(-INFINITY));
    for (std::int64_t i = 0; i < count; ++i)
      std::fill_n(mask_.begin() + i * seen, first + i + 1, ggml_fp32_to_fp16(0.0f));

    const std::unique_ptr<ggml_context, decltype(&ggml_free)> context(
        ggml_init(
            {.mem_size = 16 * ggml_tensor_overhead() + ggml_graph_overhead(), .mem_buffer = nullptr, .no_alloc = true}),
        ggml_free);
    const auto tensor = [&](ggml_type type, std::int64_t columns, std::int64_t rows, void* data) {
      ggml_tensor* t = ggml_new_tensor_3d(context.get(), type, columns, rows, 1);
      t->data = data;
      return t;
    };
    ggml_tensor* out = ggml_flash_attn_ext(
        context.get(), tensor(GGML_TYPE_F32, dim_, count, query_.data() + first * dim_),
        tensor(type_, dim_, seen, key_.data()), tensor(type_, dim_, seen, value_.data()),
        tensor(GGML_TYPE_F16, seen, count, mask_.data()), 1 / std::sqrt(static_cast<float>(dim_)), 0, 0);
    out->data = out_.data() + first * dim_;
    ggml_cgraph* graph = ggml_new_graph(context.get());
    ggml_build_forward_expand(graph, out);
    ggml_cplan plan = ggml_graph_plan(graph, 1, nullptr);
    work_.resize(plan.work_size + cache_line);
    std::size_t space = work_.size();
    void* work = work_.data();
    plan.work_data = static_cast<std::uint8_t*>(std::align(cache_line, plan.work_size, work, space));
    ggml_status status{};
    const double seconds = bench::seconds([&] { status = ggml_graph_compute(graph, &plan); });
    if (status != GGML_STATUS_SUCCESS) throw std::runtime_error("ggml could not compute");
    return seconds;
  }

  ggml_type type_;
  std::int64_t length_, dim_;
  std::vector<float> query_, out_;
  std::vector<std::uint8_t> key_, value_, work_;
  std::vector<ggml_fp16_t> mask_;
};

void serve(std::map<std::string, std::string> arguments) {
  const std::string directory = arguments.at("directory"), type = arguments.at("type");
  if (type != "f32" && type != "f16") throw std::invalid_argument("type: wants f32 or f16");
  ggml_cpu_init();
  attention attention(directory, type == "f16" ? GGML_TYPE_F16 : GGML_TYPE_F32, std::stoll(arguments.at("length")),
                      std::stoll(arguments.at("dim")));
  std::cout << R"({"ggml": ")" << ggml_version() << R"(", "avx512": )" << ggml_cpu_has_avx512() << "}" << std::endl;
  for (std::string command; std::getline(std::cin, command);) {
    if (command == "write") {
      std::ofstream file(directory + "/out", std::ios::binary);
      file.write(reinterpret_cast<const char*>(attention.out().data()),
                 static_cast<std::streamsize>(attention.out().size() * sizeof(float)));
      if (!file.flush()) throw std::runtime_error(directory + "/out: cannot be written");
      std::cout << "{}" << std::endl;
    } else {
      const double peak = bench::fma_peak<float>();
      std::cout << R"({"thread_seconds": )" << attention.run() << R"(, "peak": )" << peak << "}" << std::endl;
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    std::map<std::string, std::string> arguments;
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      const std::size_t equals = argument.find('=');
      if (equals == std::string::npos) throw std::invalid_argument(argument + ": wants key=value");
      arguments[argument.substr(0, equals)] = argument.substr(equals + 1);
    }
    serve(arguments);
  } catch (const std::exception& error) {
    std::cerr << "ggml_run: " << error.what() << '\n';
    return 1;
  }
}
