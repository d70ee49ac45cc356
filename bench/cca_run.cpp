// Attention of raw float files, for programs in other languages that compare theirs with ours:
//
//   cca_run key=value...     kind (cca, dense), length, dim, heads, kv_heads, group, window, threads, directory
//
// reads query, key and value, `[heads][length][dim]` each, from the directory's files of these names. It says
// how it was built, then answers every line of input: "run" computes once and prints the time, "write" writes the result
// to the file `out` there.

#include <cstdint>
#include <fstream>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>

#include <unsupported/Eigen/CXX11/ThreadPool>

#include <cca/cca.hpp>

#include "machine.hpp"
#include "operands.hpp"

namespace {

using tensor = bench::tensor<float>;

std::map<std::string, std::string> parse(int argc, char** argv) {
  std::map<std::string, std::string> arguments{
      {"kind", "cca"}, {"heads", "1"}, {"group", "1"}, {"threads", "1"}, {"directory", "."}};
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const std::size_t equals = argument.find('=');
    if (equals == std::string::npos) throw std::invalid_argument(argument + ": wants key=value");
    arguments[argument.substr(0, equals)] = argument.substr(equals + 1);
  }
  return arguments;
}

void read(tensor& to, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(to.data.size() * sizeof(float));
  if (!file.read(reinterpret_cast<char*>(to.data.data()), bytes))
    throw std::runtime_error(path + ": wants " + std::to_string(bytes) + " bytes");
}

void write(const tensor& from, const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(from.data.data()),
             static_cast<std::streamsize>(from.data.size() * sizeof(float)));
  if (!file.flush()) throw std::runtime_error(path + ": cannot be written");
}

void serve(std::map<std::string, std::string> arguments) {
  const auto number = [&](const std::string& name) { return std::stoll(arguments.at(name)); };
  const std::int64_t heads = number("heads"), kv_heads = arguments.contains("kv_heads") ? number("kv_heads") : heads;
  const std::int64_t length = number("length"), dim = number("dim");
  const bool dense = arguments["kind"] == "dense";
  if (!dense && arguments["kind"] != "cca") throw std::invalid_argument("kind: wants cca or dense");
  cca::options options{.group_size = number("group")};
  if (arguments.contains("window")) options.window = number("window");

  tensor query(1, heads, length, dim), key(1, kv_heads, length, dim), value(1, kv_heads, length, dim);
  tensor out(1, heads, length, dim);
  const std::string directory = arguments["directory"] + "/";
  read(query, directory + "query");
  read(key, directory + "key");
  read(value, directory + "value");
  Eigen::ThreadPool helpers(static_cast<int>(number("threads")) - 1);
  const cca::thread_pool_executor run(helpers);

  std::cout << R"({"compiler": ")" << bench::compiler << R"(", "instruction_set": ")" << bench::instruction_set()
            << R"("})" << std::endl;
  for (std::string command; std::getline(std::cin, command);) {
    if (command == "write") {
      write(out, directory + "out");
      std::cout << "{}" << std::endl;
      continue;
    }
    const double peak = bench::fma_peak<float>();
    double thread_seconds = 0;
    const double seconds = bench::elapsed_seconds([&] {
      thread_seconds = bench::seconds([&] {
        dense ? cca::dense_attention(query.view(), key.view(), value.view(), out.view(), options, run)
              : cca::attention(query.view(), key.view(), value.view(), out.view(), options, run);
      });
    });
    std::cout << R"({"seconds": )" << seconds << R"(, "thread_seconds": )" << thread_seconds << R"(, "peak": )" << peak
              << "}" << std::endl;
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    serve(parse(argc, argv));
  } catch (const std::exception& error) {
    std::cerr << "cca_run: " << error.what() << '\n';
    return 1;
  }
}
