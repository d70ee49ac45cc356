// Attention of raw float files, for programs in other languages that compare theirs with ours:
//
//   cca_run key=value...     kind (cca, dense), length, dim, heads, kv_heads, group, window, sink_tokens, threads, gradient,
//                            directory, element (float, bfloat16)
//
// reads query, key and value, `[heads][length][dim]` each, from the directory's files of these names. It says
// how it was built, then answers every line of input: "run" computes once and prints the time, "write" writes the result
// to the file `out` there. With `gradient=1` it also reads grad_out, a run goes forward and backward, and grad_query,
// grad_key and grad_value are written. Files always hold floats; bfloat16 operands and results are rounded from them and
// to them, and multiplied by the processor's matrix unit.

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include <Eigen/Core>
#include <unsupported/Eigen/CXX11/ThreadPool>

#include <cca/cca.hpp>

#include "machine.hpp"
#include "operands.hpp"

namespace {

std::map<std::string, std::string> parse(int argc, char** argv) {
  std::map<std::string, std::string> arguments{{"kind", "cca"},     {"heads", "1"},    {"group", "1"},
                                               {"threads", "1"},    {"gradient", "0"}, {"directory", "."},
                                               {"element", "float"}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::size_t equals = argument.find('=');
    if (equals == std::string::npos) throw std::invalid_argument(argument + ": wants key=value");
    arguments[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  return arguments;
}

template <class Element>
void read(bench::tensor<Element>& to, const std::string& path) {
  std::vector<float> floats(to.data.size());
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(floats.size() * sizeof(float));
  if (!file.read(reinterpret_cast<char*>(floats.data()), bytes))
    throw std::runtime_error(path + ": wants " + std::to_string(bytes) + " bytes");
  std::transform(floats.begin(), floats.end(), to.data.begin(), [](float x) { return static_cast<Element>(x); });
}

template <class Element>
void write(const bench::tensor<Element>& from, const std::string& path) {
  const std::vector<float> floats(from.data.begin(), from.data.end());
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(floats.data()), static_cast<std::streamsize>(floats.size() * sizeof(float)));
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

/// One call, or the gradient after it.
template <class Element>
class attention {
  using tensor = bench::tensor<Element>;

 public:
  attention(std::int64_t heads, std::int64_t kv_heads, std::int64_t length, std::int64_t dim, bool gradient,
            const cca::options& options)
      : gradient_(gradient),
        options_(options),
        query_(1, heads, length, dim),
        key_(1, kv_heads, length, dim),
        value_(1, kv_heads, length, dim),
        out_(1, heads, length, dim) {
    if (!gradient) return;
    lse_ = bench::tensor<float>(1, heads, length, 1);
    grad_out_ = out_;
    grad_query_ = bench::tensor<float>(1, heads, length, dim);
    grad_key_ = grad_value_ = bench::tensor<float>(1, kv_heads, length, dim);
  }

  void read_operands(const std::string& directory) {
    read(query_, directory + "query");
    read(key_, directory + "key");
    read(value_, directory + "value");
    if (gradient_) read(grad_out_, directory + "grad_out");
  }

  void compute(const cca::execution& run) {
    const cca::inputs in{query_.view(), key_.view(), value_.view()};
    cca::results<Element, float> to{out_.view()};
    if (gradient_) to.lse = cca::bhs(lse_.data.data(), 1, in.query.heads(), in.query.length());
    cca::attention(in, to, options_, run);
    if (!gradient_) return;
    cca::attention_gradient(in, to, cca::incoming{grad_out_.view()},
                            cca::gradients{grad_query_.view(), grad_key_.view(), grad_value_.view()}, options_, run);
  }

  void write_results(const std::string& directory) const {
    if (!gradient_) return write(out_, directory + "out");
    write(grad_query_, directory + "grad_query");
    write(grad_key_, directory + "grad_key");
    write(grad_value_, directory + "grad_value");
  }

 private:
  bool gradient_;
  cca::options options_;
  tensor query_, key_, value_, out_, grad_out_;
  bench::tensor<float> lse_, grad_query_, grad_key_, grad_value_;
};

template <class Element>
void serve(std::map<std::string, std::string> arguments) {
  const auto number = [&](const std::string& name) { return std::stoll(arguments.at(name)); };
  const std::int64_t heads = number("heads"), kv_heads = arguments.contains("kv_heads") ? number("kv_heads") : heads;
  const std::int64_t length = number("length"), dim = number("dim");
  const bool dense = arguments["kind"] == "dense";
  if (!dense && arguments["kind"] != "cca") throw std::invalid_argument("kind: wants cca or dense");
  cca::options options{.group_size = dense ? 0 : number("group"), .unit = cca::best_unit<Element>()};
  if (arguments.contains("window")) options.window = number("window");
  if (arguments.contains("sink_tokens")) options.sink_tokens = number("sink_tokens");

  const std::string directory = arguments["directory"] + "/";
  attention<Element> attention(heads, kv_heads, length, dim, number("gradient") != 0, options);
  attention.read_operands(directory);
  Eigen::ThreadPool helpers(static_cast<int>(number("threads")) - 1);
  const cca::thread_pool_executor run(helpers);

  std::cout << R"({"compiler": ")" << bench::compiler << R"(", "instruction_set": ")" << bench::instruction_set()
            << R"("})" << std::endl;
  for (std::string command; std::getline(std::cin, command);) {
    if (command == "write") {
      attention.write_results(directory);
      std::cout << "{}" << std::endl;
      continue;
    }
    const double peak = bench::fma_peak<float>();
    double thread_seconds = 0;
    const double seconds =
        bench::elapsed_seconds([&] { thread_seconds = bench::seconds([&] { attention.compute(run); }); });
    std::cout << R"({"seconds": )" << seconds << R"(, "thread_seconds": )" << thread_seconds << R"(, "peak": )" << peak
              << "}" << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto arguments = parse(argc, argv);
    const std::string element = arguments.at("element");
    if (element == "float") return serve<float>(arguments), 0;
    if (element == "bfloat16") return serve<Eigen::bfloat16>(arguments), 0;
    throw std::invalid_argument("element: wants float or bfloat16");
  } catch (const std::exception& error) {
    std::cerr << "cca_run: " << error.what() << '\n';
    return 1;
  }
}
