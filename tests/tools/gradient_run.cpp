// gradient_run name=value...: attention and its gradients, for torch_gradient.py and transformers_layers.py. The names are
// those of sizes (batch, heads, kv_heads, length, dim, value_dim), of options, and `sinks` with 1 for a sink logit per
// head. Reads query, key, value, the sink logits, and the gradients of the output and of the log-sum-exp, raw floats, from
// the standard input; writes the output, the log-sum-exp and the gradients of query, key, value and sink logits.

#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

#include "gradient_entry_points.hpp"

namespace {

using namespace cca::test;

[[noreturn]] void fail(const std::string& message) {
  std::fputs(("gradient_run: " + message + '\n').c_str(), stderr);
  std::exit(2);
}

/// Moves the elements of a tensor from or to a file by `fread` or `fwrite`.
void transfer(tensor<float>& tensor, const auto& move) {
  const auto size = static_cast<std::size_t>(tensor.view().dim());
  for_each_row(tensor.view(), [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    if (move(tensor.row(b, h, i), size) != size) fail("not as many numbers as the sizes say");
  });
}

void parse(std::string_view text, std::int64_t& number) {
  number = text == "unlimited" ? cca::unlimited : std::stoll(std::string(text));
}
void parse(std::string_view text, double& number) { number = std::stod(std::string(text)); }
void parse(std::string_view text, cca::detail::number& number) { parse(text, number.value); }
template <class Enum>
requires std::is_enum_v<Enum> void parse(std::string_view text, Enum& value) {
  const auto names = cca::detail::enumerators(Enum{});
  const auto found = std::find(names.begin(), names.end(), text);
  if (found == names.end()) fail("unknown value " + std::string(text));
  value = static_cast<Enum>(found - names.begin());
}
template <class Option>
void parse(std::string_view text, std::optional<Option>& option) {
  parse(text, option.emplace());
}

/// Sets what a `name=value` of the command line names.
void set(std::string_view argument, problem& p, std::int64_t& sinks) {
  const std::size_t equals = (std::min)(argument.find('='), argument.size());
  const std::string_view name = argument.substr(0, equals), value = argument.substr((std::min)(equals + 1, argument.size()));
  bool known = false;
  const auto offer = [&](std::string_view offered, auto& to) {
    if (name == offered) known = true, parse(value, to);
  };
  offer("batch", p.sizes.batch);
  offer("heads", p.sizes.heads);
  offer("kv_heads", p.sizes.kv_heads);
  offer("length", p.sizes.queries);
  offer("dim", p.sizes.dim);
  offer("value_dim", p.sizes.value_dim);
  offer("sinks", sinks);
  cca::detail::for_each_option(p.options, offer);
  if (!known) fail("unknown argument " + std::string(argument));
}

}  // namespace

int main(int count, char** arguments) {
  problem p{.entry = entry::attention};
  std::int64_t sinks = 0;
  for (int i = 1; i < count; ++i) set(arguments[i], p, sinks);
  p.sizes.keys = p.sizes.queries;

  gradient_memory<float> memory(p);
  tensor<float> sink_logits({1, p.sizes.heads, sinks, 1}), grad_sinks = sink_logits;
  const auto read = [](float* row, std::size_t size) { return std::fread(row, 4, size, stdin); };
  const auto write = [](float* row, std::size_t size) { return std::fwrite(row, 4, size, stdout); };
  // In memory: query, key, value, out, lse, grad_out, grad_lse.
  for (const std::size_t given : {0u, 1u, 2u}) transfer(memory.operands[given], read);
  transfer(sink_logits, read);
  for (const std::size_t given : {5u, 6u}) transfer(memory.operands[given], read);

  cca::test::arguments<float> call_arguments = memory.arguments();
  if (sinks > 0) {
    call_arguments.sinks = without_dim(std::as_const(sink_logits).view());
    call_arguments.grad_sinks = without_dim(grad_sinks.view());
  }
  cca::test::arguments<float> forward = call_arguments;
  forward.results = {memory.operands[3].view(), memory.operands[4].view()};
  call(p, forward);
  call_gradient(p, call_arguments);

  for (const std::size_t made : {3u, 4u}) transfer(memory.operands[made], write);
  for (tensor<float>& gradient : memory.results) transfer(gradient, write);
  transfer(grad_sinks, write);
}
