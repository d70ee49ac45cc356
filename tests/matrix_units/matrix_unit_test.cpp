// Matrix units: operands of 16 bits, multiplied as they are stored. Their results are measured against the exact ones of
// the same operands by the rule of all errors here, where the plain textbook keeps what a unit keeps in 16 bits: cores, the
// weights that multiply values, and the gradients of the logits. Units that the processor lacks are emulated, if they can be.

#include "unit_calls.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <cca/kv_cache_file.hpp>
#include <iostream>
#include <sstream>
#include <thread>

#include "amx_emulator.hpp"
#include "executors.hpp"
#include "guarded_pages.hpp"

namespace {

using namespace cca;
using namespace cca::test;
using cca::test::results;
using Eigen::bfloat16, Eigen::half;

/// The units that multiply such elements here.
template <class Element>
const std::vector<matrix_unit>& units() {
  static const std::vector<matrix_unit> all = [] {
    detail::matrix_units& present = detail::present_units();
    if (!present.amx_bf16 && install_amx_emulator()) {
      std::cout << "AMX is emulated: this processor has none\n";
      present.amx_bf16 = present.amx_fp16 = true;
    }
    std::vector<matrix_unit> found;
    for (const matrix_unit unit : {matrix_unit::avx512_bf16, matrix_unit::amx})
      if (detail::has_unit<Element>(unit)) found.push_back(unit);
    return found;
  }();
  return all;
}

// ------------------------------------------------------------------------------------------------ the textbook, 16 bits

template <class Element>
float rounded(float x) {
  return static_cast<float>(Element(x));
}

template <class Element>
reference::tensor<float> rounded(reference::tensor<float> t) {
  for (float& x : t.data) x = rounded<Element>(x);
  return t;
}

/// The textbook of a call, with what a unit keeps in 16 bits kept so.
template <class Element>
struct textbook {
  reference::result<float> result;
  reference::gradient<float> grad;

  textbook(const unit_call<Element>& c, tensor_view<const Element> grad_out, lse_view<const float> grad_lse)
      : result{{c.p.sizes.batch, c.p.sizes.heads, c.p.sizes.queries, c.p.sizes.value_dim},
               {c.p.sizes.batch, c.p.sizes.heads, c.p.sizes.queries, 1}} {
    reference::converter<float> numbers;
    const reference::operands<float> in = numbers(c.in());
    const reference::incoming_numbers<float> from = numbers(incoming{grad_out, grad_lse});
    const options& o = c.p.options;
    std::pair<reference::tensor<float>, reference::tensor<float>> cores;
    if (c.p.entry == entry::attention) {
      cores = reference::pool(in, o);
      cores = {rounded<Element>(cores.first), rounded<Element>(cores.second)};
    }
    const partition partition = partition_of(o);
    const auto raw = reference::raw_tokens(o, in.query.length(), in.key.length());
    const auto biases = reference::core_biases(in, o);
    if (c.p.entry == entry::attend) {
      const reference::far_operands<float> far = numbers(c.far_rows());
      go(in, far.key, far.value, from, o, reference::far_rows(in, far, o), raw,
         reference::far_terms(far, in.query.heads()), far.bias.extent);
    } else if (c.p.entry == entry::attention) {
      go(
          in, cores.first.view(), cores.second.view(), from, o,
          [&](std::int64_t, std::int64_t, std::int64_t t) { return reference::first_rows(partition.core_count(t)); }, raw,
          reference::core_terms(o, biases, in.query.heads()),
          {biases.extent[0], biases.extent[1], biases.extent[2]});
    } else {
      go(in, in.key, in.value, from, o, reference::none_seen, raw, {}, {});
    }
    if (c.p.entry != entry::attention) return;
    auto core_key = grad.far_key.view(), core_value = grad.far_value.view();
    core_key.extent[2] = core_value.extent[2] = partition.core_count(in.key.length() - 1);
    const lse_view<const float> grad_bias =
        bhs(std::as_const(grad.far_bias).data.data(), biases.extent[0], biases.extent[1], biases.extent[2]);
    const auto pooled = reference::pool_gradient<float>(in, core_key, core_value, o, grad_bias);
    for (const auto part :
         {&reference::gradient<float>::query, &reference::gradient<float>::key, &reference::gradient<float>::value})
      for (std::size_t i = 0; i < (grad.*part).data.size(); ++i) (grad.*part).data[i] += (pooled.*part).data[i];
  }

 private:
  using matrix = reference::matrix<float>;
  using vector = reference::vector<float>;

  void go(const reference::operands<float>& in, tensor_view<const float> far_key, tensor_view<const float> far_value,
          const reference::incoming_numbers<float>& from, const options& o, const reference::seen_rows_of& seen,
          const reference::raw_tokens_of& raw, const reference::row_terms<float>& far_terms,
          const std::array<std::int64_t, 3>& far_biases) {
    using reference::head;
    const auto &query = in.query, &key = in.key, &value = in.value;
    const auto& [grad_out, grad_lse] = from;
    const auto near_terms = reference::raw_terms(in);
    const std::int64_t first = detail::first_position(o, query.length(), key.length());
    const auto numbers = [](const std::array<std::int64_t, 3>& e) {
      return reference::tensor<float>(e[0], e[1], e[2], 1);
    };
    const auto scale = static_cast<float>(detail::softmax_scale(o, key.dim())), cap = static_cast<float>(o.softcap);
    const auto& sink_extent = in.sink_logits.extent;
    grad = {reference::tensor<float>(query.extent),
            reference::tensor<float>(key.extent),
            reference::tensor<float>(value.extent),
            reference::tensor<float>(far_key.extent),
            reference::tensor<float>(far_value.extent),
            numbers(sink_extent),
            numbers(in.alibi_slopes.extent),
            numbers(in.key_bias.extent),
            numbers(far_biases)};
    for (std::int64_t b = 0; b < query.batch(); ++b)
      for (std::int64_t h = 0; h < query.heads(); ++h) {
        const std::int64_t kv = h / (query.heads() / key.heads()), fh = h / (query.heads() / far_key.heads());
        const matrix q = head(query, b, h), k = head(key, b, kv), v = head(value, b, kv);
        const matrix fk = head(far_key, b, fh), fv = head(far_value, b, fh);
        const matrix dout = head(grad_out, b, h);
        for (std::int64_t i = 0; i < query.length(); ++i) {
          const reference::row_numbers near = raw(i), far_rows = seen(b, h, i);
          const std::int64_t far = far_rows.size(), count = far + near.size();
          float& lse = *result.lse.view().row(b, h, i);
          const float sink = reference::sink_logit(in.sink_logits, b, h, i);
          const auto add_to_sink = [&](float delta) {
            if (in.sink_logits.data != nullptr)
              *grad.sink_logits.view().row(b % sink_extent[0], h, i % sink_extent[2]) -= std::exp(sink - lse) * delta;
          };
          lse = sink;
          if (count == 0) {
            add_to_sink(-*grad_lse.row(b, h, i));
            continue;
          }
          const matrix keys = reference::seen_rows(fk, far_rows, k, near);
          const matrix values = reference::seen_rows(fv, far_rows, v, near);
          const auto round = [](float x) { return rounded<Element>(x); };
          const vector capped = reference::scores(keys, vector(q.row(i)), o);
          vector of_far = capped.head(far), of_near = capped.tail(near.size()), logits(count);
          reference::shift(of_far, in.alibi_slopes, far_terms, b, h, first + i, far_rows);
          reference::shift(of_near, in.alibi_slopes, near_terms, b, h, first + i, near);
          logits << of_far, of_near;
          const float maximum = std::max(logits.maxCoeff(), sink);
          const vector weights = (logits.array() - maximum).exp();
          const float sum = weights.sum() + std::exp(sink - maximum);
          lse = maximum + std::log(sum);
          const vector out = values.transpose() * weights.unaryExpr(round) / sum;
          std::copy_n(out.data(), out.size(), result.out.view().row(b, h, i));

          const vector p = (logits.array() - lse).exp(), dp = values * dout.row(i).transpose();
          const float delta = out.dot(dout.row(i)) - *grad_lse.row(b, h, i);
          add_to_sink(delta);
          vector ds = p.cwiseProduct((dp.array() - delta).matrix());
          if (in.alibi_slopes.data != nullptr)
            *grad.alibi_slopes.view().row(b % grad.alibi_slopes.extent[0], h, 0) -=
                ds.head(far).dot(reference::distances(far_terms, b, h, first + i, far_rows)) +
                ds.tail(near.size()).dot(reference::distances(near_terms, b, h, first + i, near));
          reference::detail::add_to_biases(grad.far_bias, query.heads(), b, h, far_rows, ds.head(far));
          reference::detail::add_to_biases(grad.key_bias, query.heads(), b, h, near, ds.tail(near.size()));
          if (cap > 0) ds.array() *= 1 - (capped / cap).array().square();
          ds = ds.unaryExpr(round).eval();
          head(grad.query, b, h).row(i) = scale * (ds.transpose() * keys);
          const matrix dk = scale * (ds * q.row(i)), dv = p.unaryExpr(round) * dout.row(i);
          head(grad.far_key, b, fh).topRows(far) += dk.topRows(far);
          head(grad.far_value, b, fh).topRows(far) += dv.topRows(far);
          for (std::int64_t j = 0; j < near.size(); ++j) {
            head(grad.key, b, kv).row(near(j)) += dk.row(far + j);
            head(grad.value, b, kv).row(near(j)) += dv.row(far + j);
          }
        }
      }
  }
};

/// What the rules take in, of a call on every unit: out, log-sum-exp, and gradients of query, key, value, far key, far value.
template <class Element>
class rules {
 public:
  void add(const unit_call<Element>& c, random_engine& random, const layout& out_layout = {}) {
    const sizes& s = c.p.sizes;
    tensor<Element> grad_out({s.batch, s.heads, s.queries, s.value_dim});
    tensor<float, 3> grad_lse({s.batch, s.heads, s.queries});
    grad_out.randomize(random);
    grad_lse.randomize(random);
    const textbook<Element> plain(c, std::as_const(grad_out).view(), std::as_const(grad_lse).view());
    const auto& o = c.p.options;
    const auto exact = textbook_attention<double>(c.p, c.in(), c.far_rows());
    const auto dout = std::as_const(grad_out).view();
    const auto dlse = std::as_const(grad_lse).view();
    const auto grad =
        c.p.entry == entry::attend ? reference::attend_gradient<double>(c.in(), c.far_rows(), incoming{dout, dlse}, o)
        : c.p.entry == entry::attention ? reference::attention_gradient<double>(c.in(), incoming{dout, dlse}, o)
                                        : reference::local_attention_gradient<double>(c.in(), incoming{dout, dlse}, o);
    std::ostringstream label;
    label << c.p;
    for (const matrix_unit unit : units<Element>()) {
      const results<float> got = c.forward(unit, {}, out_layout);
      rule_[0].add(got.out.view(), plain.result.out.view(), exact.out.view(), label.str());
      rule_[1].add(with_dim(got.lse.view()), plain.result.lse.view(), exact.lse.view(), label.str());
      const auto grads = c.gradient(unit, got, grad_out, grad_lse);
      const auto parts = {&reference::gradient<float>::query, &reference::gradient<float>::key,
                          &reference::gradient<float>::value, &reference::gradient<float>::far_key,
                          &reference::gradient<float>::far_value};
      const auto exact_parts = {&reference::gradient<double>::query, &reference::gradient<double>::key,
                                &reference::gradient<double>::value, &reference::gradient<double>::far_key,
                                &reference::gradient<double>::far_value};
      for (std::size_t i = 0; i < gradient_result_extents(c.p).size(); ++i)
        rule_[2 + i].add(grads[i].view(), (plain.grad.*(parts.begin()[i])).view(),
                         (grad.*(exact_parts.begin()[i])).view(), label.str());
      const std::size_t first = gradient_result_extents(c.p).size();
      const auto add = [&](std::size_t i, const tensor<float, 3>& of, const auto& textbook, const auto& truth) {
        if (of.view().empty()) return;
        term_rules_[i].add(grads[first + i].view(), textbook.view(), truth.view(), label.str());
        with_terms_[i] = true;
      };
      add(0, c.sinks, plain.grad.sink_logits, grad.sink_logits);
      add(1, c.slopes, plain.grad.alibi_slopes, grad.alibi_slopes);
      add(2, c.key_bias, plain.grad.key_bias, grad.key_bias);
      add(3, c.far_bias, plain.grad.far_bias, grad.far_bias);
    }
  }

  void expect() const { expect(far_ ? 7 : 5); }
  void expect_terms() const {
    const char* const names[] = {"sinks", "slopes", "key bias", "far bias"};
    for (std::size_t i = 0; i < 4; ++i)
      if (with_terms_[i]) {
        EXPECT_TRUE(term_rules_[i].holds()) << names[i];
      }
  }

  /// Of the first `count` of them.
  void expect(std::size_t count) const {
    const char* const names[] = {"out", "lse", "query", "key", "value", "far key", "far value"};
    for (std::size_t i = 0; i < count; ++i) EXPECT_TRUE(rule_[i].holds()) << names[i];
  }

  bool far_ = false;

 private:
  std::array<error_rule<float>, 7> rule_;
  std::array<error_rule<float>, 4> term_rules_;
  std::array<bool, 4> with_terms_{};
};

// ---------------------------------------------------------------------------------------------------------------- tests

template <class Element>
class UnitTest : public testing::Test {
 protected:
  void SetUp() override {
    if (units<Element>().empty()) GTEST_SKIP() << "no unit for such elements, and none can be emulated here";
  }
};
using unit_elements = testing::Types<bfloat16, half>;
TYPED_TEST_SUITE(UnitTest, unit_elements);

TYPED_TEST(UnitTest, EveryHeadDim) {
  random_engine random(1);
  for (const entry entry : unit_entries) {
    rules<TypeParam> rules;
    rules.far_ = entry == entry::attend;
    for (std::size_t i = 0; i < head_dims.size(); ++i) {
      problem p = example(entry, {.queries = 70, .keys = 70, .dim = head_dim(i), .value_dim = head_dim(i, 7)});
      rules.add(unit_call<TypeParam>(p, random), random);
    }
    rules.expect();
  }
}

TYPED_TEST(UnitTest, EveryLengthAroundTilesAndChunks) {
  random_engine random(2);
  for (const entry entry : unit_entries) {
    rules<TypeParam> rules;
    rules.far_ = entry == entry::attend;
    for (const std::int64_t length : {9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 66, 96, 127, 128, 129, 130, 255, 257, 300})
      rules.add(
          unit_call<TypeParam>(example(entry, {.queries = length, .keys = length, .dim = 32, .value_dim = 24}), random),
          random);
    rules.expect();
  }
}

/// Windows and groups of any size, fewer queries than keys, heads that share, layouts, scales of either sign.
TYPED_TEST(UnitTest, EveryConvention) {
  random_engine random(3);
  for (const entry entry : unit_entries) {
    rules<TypeParam> rules;
    rules.far_ = entry == entry::attend;
    for (int times = 0; times < 30; ++times) {
      sizes s{.batch = draw(random, 1, 2), .kv_heads = draw(random, 1, 2), .keys = draw(random, 9, 150)};
      s.heads = s.kv_heads * draw(random, 1, 3);
      s.queries = entry == entry::attention ? s.keys : draw(random, 9, s.keys);
      s.dim = draw(random, 1, 40);
      s.value_dim = draw(random, 1, 40);
      problem p = example(entry, s);
      p.options.window = draw(random, 1, s.keys + 5);
      if (entry != entry::attend) p.options.group_size = draw(random, 1, 9);
      if (entry == entry::attention) {
        p.options.core_heads = draw_from(random, all_core_heads);
        p.options.pool = draw_from(random, all_poolings);
      }
      if (times % 3 == 0) p.options.softmax_scale = draw_from(random, std::array{-0.3, 0.0, 0.02, 0.7});
      if (entry != entry::attention && times % 4 == 0) p.options.first_position = draw(random, -20, s.keys);
      if (times % 2 == 1) p.options.sink_tokens = draw(random, 1, 40);
      if (entry != entry::attention && times % 5 == 3) {
        p.options.group_size = 0;
        p.options.lookahead = draw_from(random, std::array<std::int64_t, 3>{1, 30, unlimited});
        p.options.prefix = draw(random, 0, 40);
      }
      rules.add(unit_call<TypeParam>(p, random, [&] { return random_operand_layout(random); }), random,
                random_layout(random));
    }
    rules.expect();
  }
}

/// Softcaps and sink logits of any extents.
TYPED_TEST(UnitTest, EveryScore) {
  random_engine random(17);
  for (const entry entry : unit_entries) {
    rules<TypeParam> rules;
    rules.far_ = entry == entry::attend;
    for (const double softcap : {0.0, 0.5, 4.0, 30.0})
      for (const bool per_sequence : {false, true})
        for (const bool per_query : {false, per_sequence})
          for (const std::int64_t length : {9, 33, 70, 130}) {
            problem p = example(
                entry,
                {.batch = 2, .heads = 2, .kv_heads = 1, .queries = length, .keys = length, .dim = 24, .value_dim = 16});
            p.options.softcap = softcap;
            unit_call<TypeParam> c(p, random);
            c.sinks = tensor<float, 3>({per_sequence ? 2 : 1, 2, per_query ? length : 1});
            c.sinks.randomize(random, 3);
            rules.add(c, random);
          }
    rules.expect();
    rules.expect_terms();
  }
}

/// Slopes by distance, and biases of rows: of keys, of far rows, of cores.
TYPED_TEST(UnitTest, EveryShift) {
  random_engine random(18);
  for (const entry entry : unit_entries) {
    rules<TypeParam> rules;
    rules.far_ = entry == entry::attend;
    for (const double softcap : {0.0, 4.0})
      for (const bool with_slopes : {false, true})
        for (const bool with_biases : {!with_slopes, true})
          for (const std::int64_t length : {9, 33, 70, 130, 200}) {
            problem p = example(
                entry,
                {.batch = 2, .heads = 4, .kv_heads = 2, .queries = length, .keys = length, .dim = 24, .value_dim = 16});
            p.options.softcap = softcap;
            if (entry == entry::attention && with_biases) p.options.core_bias = core_bias::entropy;
            unit_call<TypeParam> c(p, random);
            if (with_slopes) {
              c.slopes = tensor<float, 3>({2, 4, 1});
              c.slopes.generate([&] { return static_cast<float>(draw(random, 1, 9)) * 0.05f; });
              c.positions = tensor<std::int64_t, 3>({1, 2, p.far_length});
              c.positions.generate([&] { return draw(random, -20, length); });
            }
            if (with_biases && entry != entry::attention)
              c.key_bias = tensor<float, 3>({1, 2, length}).randomize(random, 1);
            if (with_biases && entry == entry::attend)
              c.far_bias = tensor<float, 3>({2, 4, p.far_length}).randomize(random, 1);
            rules.add(c, random);
          }
    rules.expect();
    rules.expect_terms();
  }
}

/// Longer than a block of rows, and several stacks of queries.
TYPED_TEST(UnitTest, ManyBlocks) {
  random_engine random(4);
  rules<TypeParam> rules;
  for (const auto& [g, w] : {std::pair<std::int64_t, std::int64_t>{1, unlimited}, {2, 200}, {16, 300}})
    rules.add(unit_call<TypeParam>({.entry = entry::attention,
                                    .sizes = {.queries = 1100, .keys = 1100, .dim = 16, .value_dim = 16},
                                    .options = {.group_size = g, .window = w}},
                                   random),
              random);
  rules.expect();
}

/// Logits that grow along the rows: the base has to be raised again and again, by a little and by a lot.
TYPED_TEST(UnitTest, GrowingLogits) {
  random_engine random(5);
  for (const double step : {0.3, 5.0, 100.0}) {
    rules<TypeParam> rules;
    unit_call<TypeParam> c({.entry = entry::local,
                            .sizes = {.queries = 330, .keys = 330, .dim = 16, .value_dim = 16},
                            .options = {.softmax_scale = 1.0}},
                           random);
    for (std::int64_t i = 0; i < 330; ++i) {
      c.operands[0].row(0, 0, i)[0] = TypeParam(1.0f);
      c.operands[1].row(0, 0, i)[0] = TypeParam(static_cast<float>(step * static_cast<double>(i)));
    }
    rules.add(c, random);
    // Of a log-sum-exp of 3e4 a float keeps 2^-9, and gradients come from it.
    if (step == 100.0)
      rules.expect(2);
    else
      rules.expect();
  }
}

/// Rows of logits that are all very large or very small are ordinary rows.
TYPED_TEST(UnitTest, LargeLogits) {
  random_engine random(6);
  for (const double logit : {-6e4, 6e4, -1e8, 1e8}) {
    unit_call<TypeParam> c({.entry = entry::local,
                            .sizes = {.queries = 80, .keys = 80, .dim = 16, .value_dim = 16},
                            .options = {.softmax_scale = 1.0}},
                           random);
    for (tensor<TypeParam>* t : {&c.operands[0], &c.operands[1]}) t->fill(TypeParam(0.0f));
    for (std::int64_t i = 0; i < 80; ++i) {
      c.operands[0].row(0, 0, i)[0] = TypeParam(static_cast<float>(logit < 0 ? -std::sqrt(-logit) : std::sqrt(logit)));
      c.operands[1].row(0, 0, i)[0] = TypeParam(static_cast<float>(std::sqrt(std::abs(logit))));
    }
    for (const matrix_unit unit : units<TypeParam>()) {
      const results<float> got = c.forward(unit);
      const auto v = reference::local_attention<double>(inputs{c.operand(0), c.operand(1), c.operand(2)}, c.p.options);
      const auto plain =
          reference::local_attention<float>(inputs{c.operand(0), c.operand(1), c.operand(2)}, c.p.options);
      error_rule<float> out, lse;
      out.add(got.out.view(), plain.out.view(), v.out.view());
      lse.add(with_dim(got.lse.view()), plain.lse.view(), v.lse.view());
      EXPECT_TRUE(out.holds()) << logit;
      EXPECT_TRUE(lse.holds()) << logit;
    }
  }
}

/// A million equal keys: sums over long rows stay accurate.
TYPED_TEST(UnitTest, EqualKeys) {
  if (units<TypeParam>().front() == matrix_unit::amx && !detail::find_matrix_units().amx_bf16)
    GTEST_SKIP() << "too long for an emulated unit";
  const std::int64_t keys = 1 << 20;
  std::vector<TypeParam> query(16), rows(static_cast<std::size_t>(keys), TypeParam(0.7f));
  const tensor_view<const TypeParam> k{rows.data(), {1, 1, keys, 1}, {0, 0, 1, 1}};
  std::fill(query.begin(), query.end(), TypeParam(0.5f));
  std::vector<float> out(16), lse(16);
  options options{.unit = units<TypeParam>().front()};
  options.first_position = keys - 16;
  attention(inputs{bhsd(std::as_const(query).data(), 1, 1, 16, 1), k, k},
            cca::results{bhsd(out.data(), 1, 1, 16, 1), bhs(lse.data(), 1, 1, 16)}, options);
  const auto value = static_cast<float>(rows[0]);
  for (std::int64_t i = 0; i < 16; ++i) {
    // The mean of equal values. Weights are rounded alike, by at most half a unit in their last place.
    EXPECT_NEAR(out[static_cast<std::size_t>(i)], value,
                std::pow(2.0f, -std::numeric_limits<TypeParam>::digits) * value);
    EXPECT_NEAR(lse[static_cast<std::size_t>(i)], std::log(static_cast<double>(keys - 15 + i)) + 0.5 * value, 1e-5);
  }
}

/// The mean of equal values is that value, however weights are rounded: they are divided by the sum of what multiplied.
TYPED_TEST(UnitTest, EqualValues) {
  random_engine random(17);
  constexpr std::int64_t length = 200;
  unit_call<TypeParam> c(example(entry::dense, {.queries = length, .keys = length, .dim = 32, .value_dim = 4}), random);
  c.operands[2].fill(TypeParam(0.7f));
  const auto value = static_cast<float>(TypeParam(0.7f));
  for (const matrix_unit unit : units<TypeParam>()) {
    const results<float> got = c.forward(unit);
    for (std::int64_t i = 0; i < length; ++i)
      for (std::int64_t d = 0; d < 4; ++d) EXPECT_NEAR(got.out.row(0, 0, i)[d], value, 1e-5f) << i;
  }
}

/// NaN and infinity of a token reach the queries that see it, and change no bit of another's results or gradients.
TYPED_TEST(UnitTest, NotFinite) {
  random_engine random(7);
  const std::int64_t length = 150, g = 4, s = 40;
  const problem p{.entry = entry::attention,
                  .sizes = {.queries = length, .keys = length, .dim = 32, .value_dim = 20},
                  .options = {.group_size = g, .window = s}};
  const unit_call<TypeParam> clean(p, random);
  tensor<TypeParam> grad_out({1, 1, length, 20});
  tensor<float, 3> grad_lse({1, 1, length});
  grad_out.randomize(random);
  grad_lse.randomize(random);
  const float infinity = std::numeric_limits<float>::infinity();
  for (const matrix_unit unit : units<TypeParam>()) {
    const results<float> want = clean.forward(unit);
    const auto want_grad = clean.gradient(unit, want, grad_out, grad_lse);
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity})
      for (const std::size_t operand : {0u, 1u, 2u})
        for (const std::int64_t j : {0, 1, 31, 63, 64, 100, 127, 149}) {
          unit_call<TypeParam> spoilt = clean;
          spoilt.operands[operand].row(0, 0, j)[3] = TypeParam(bad);
          const results<float> got = spoilt.forward(unit);
          const auto grad = spoilt.gradient(unit, want, grad_out, grad_lse);
          const std::int64_t group_end = j / g * g + g;
          for (std::int64_t t = 0; t < length; ++t) {
            const bool core = group_end <= t + 1 - s;
            const bool seen = operand == 0 ? t == j || (core && j == group_end - 1) : j <= t;
            const float* out = got.out.row(0, 0, t);
            if (!seen) {
              ASSERT_TRUE(std::equal(out, out + 20, want.out.row(0, 0, t))) << "row " << j << " reaches query " << t;
              ASSERT_TRUE(same_bits(*got.lse.row(0, 0, t), *want.lse.row(0, 0, t)));
            } else if (std::isnan(bad)) {
              // A value shows in its own column, what weighs in all.
              ASSERT_TRUE(std::isnan(out[3])) << "row " << j << " is hidden from query " << t;
              ASSERT_TRUE(operand == 2 || std::isnan(out[0])) << "row " << j << " is hidden from query " << t;
            } else if (operand == 2) {
              ASSERT_FALSE(std::isfinite(out[3])) << "row " << j << " is hidden from query " << t;
            }
            // Gradients of queries before it, but for those that pool, and of the keys behind what its own query sees.
            const float *dq = grad[0].row(0, 0, t), *want_dq = want_grad[0].row(0, 0, t);
            if (!seen && t < j / g * g && t % g != g - 1) {
              ASSERT_TRUE(std::equal(dq, dq + 32, want_dq)) << "row " << j << " reaches the gradient of " << t;
            }
            if (operand == 0 && t > j && t >= group_end) {
              ASSERT_TRUE(std::equal(grad[1].row(0, 0, t), grad[1].row(0, 0, t) + 32, want_grad[1].row(0, 0, t)))
                  << "query " << j << " reaches the gradient of key " << t;
            }
          }
        }
  }
}

/// No output before a token changes by a bit with it, and no gradient of an earlier output reaches it.
TYPED_TEST(UnitTest, Causality) {
  random_engine random(8);
  for (const entry entry : {entry::local, entry::attention}) {
    const problem p = example(entry, {.queries = 200, .keys = 200, .dim = 16, .value_dim = 16});
    const unit_call<TypeParam> clean(p, random);
    for (const matrix_unit unit : units<TypeParam>()) {
      const results<float> want = clean.forward(unit);
      for (const std::int64_t t : {3, 64, 97, 130, 199}) {
        unit_call<TypeParam> other = clean;
        for (std::size_t i = 0; i < 3; ++i)
          for (int d = 0; d < 16; ++d) other.operands[i].row(0, 0, t)[d] = TypeParam(static_cast<float>(40 + d));
        const results<float> got = other.forward(unit);
        for (std::int64_t i = 0; i < t; ++i) {
          ASSERT_TRUE(std::equal(got.out.row(0, 0, i), got.out.row(0, 0, i) + 16, want.out.row(0, 0, i)))
              << i << " of " << t;
          ASSERT_TRUE(same_bits(*got.lse.row(0, 0, i), *want.lse.row(0, 0, i)));
        }
        tensor<TypeParam> grad_out({1, 1, 200, 16});
        tensor<float, 3> grad_lse({1, 1, 200});
        grad_out.fill(TypeParam(0.0f));
        grad_lse.fill(0.0f);
        for (int d = 0; d < 16; ++d) grad_out.row(0, 0, t - 1)[d] = TypeParam(1.0f);
        const auto grad = clean.gradient(unit, want, grad_out, grad_lse);
        for (std::int64_t i = t; i < 200; ++i)
          for (int d = 0; d < 16; ++d)
            ASSERT_TRUE(grad[1].row(0, 0, i)[d] == 0 && grad[2].row(0, 0, i)[d] == 0) << i << " of " << t;
      }
    }
  }
}

/// A query that sees nothing: 0, -inf, and gradients of 0.
TYPED_TEST(UnitTest, NothingSeen) {
  random_engine random(9);
  problem p = example(entry::local, {.queries = 90, .keys = 30, .dim = 8, .value_dim = 8});
  p.options.first_position = -20;
  const unit_call<TypeParam> c(p, random);
  tensor<TypeParam> grad_out({1, 1, 90, 8});
  tensor<float, 3> grad_lse({1, 1, 90});
  grad_out.randomize(random);
  grad_lse.randomize(random);
  for (const matrix_unit unit : units<TypeParam>()) {
    const results<float> got = c.forward(unit);
    const auto grad = c.gradient(unit, got, grad_out, grad_lse);
    for (std::int64_t i = 0; i < 20; ++i) {
      EXPECT_EQ(*got.lse.row(0, 0, i), -std::numeric_limits<float>::infinity());
      for (int d = 0; d < 8; ++d) EXPECT_TRUE(got.out.row(0, 0, i)[d] == 0 && grad[0].row(0, 0, i)[d] == 0);
    }
  }
}

/// Denormals. A unit takes those of bfloat16 for zeros, as its documentation says; those of half are numbers like others.
TYPED_TEST(UnitTest, Denormals) {
  const float tiny = static_cast<float>(std::numeric_limits<TypeParam>::denorm_min()) * 3;
  std::vector<TypeParam> zeros(16), values(16, TypeParam(tiny));
  for (const matrix_unit unit : units<TypeParam>()) {
    std::vector<float> out(16, 7.0f);
    attention(bhsd(std::as_const(zeros).data(), 1, 1, 16, 1), bhsd(std::as_const(zeros).data(), 1, 1, 16, 1),
              bhsd(std::as_const(values).data(), 1, 1, 16, 1), bhsd(out.data(), 1, 1, 16, 1), {.unit = unit});
    for (const float x : out) EXPECT_FLOAT_EQ(x, (std::is_same_v<TypeParam, bfloat16>) ? 0.0f : tiny);
  }
}

/// Bitwise the same for any executor, and the caller's tiles are as they were: from many fresh threads.
TYPED_TEST(UnitTest, AnyExecutor) {
  random_engine random(10);
  for (const entry entry : unit_entries) {
    const problem p = example(entry, {.batch = 2, .heads = 2, .queries = 70, .keys = 70, .dim = 16, .value_dim = 16});
    const unit_call<TypeParam> c(p, random);
    tensor<TypeParam> grad_out({2, 2, 70, 16});
    tensor<float, 3> grad_lse({2, 2, 70});
    grad_out.randomize(random);
    grad_lse.randomize(random);
    for (const matrix_unit unit : units<TypeParam>()) {
      const results<float> want = c.forward(unit);
      const auto want_grad = c.gradient(unit, want, grad_out, grad_lse);
      for (const auto& [name, run] : executors()) {
        EXPECT_TRUE(same_bits(c.forward(unit, run), want)) << name;
        const auto grad = c.gradient(unit, want, grad_out, grad_lse, run);
        for (std::size_t i = 0; i < grad.size(); ++i)
          EXPECT_TRUE(same_bits(grad[i].view(), want_grad[i].view())) << name << ", gradient " << i;
      }
      EXPECT_TRUE(amx_state_is_initial());
    }
  }
}

#if defined(__x86_64__)
/// A caller that has tiles configured finds its configuration again.
TYPED_TEST(UnitTest, ConfigurationIsLeftAsFound) {
  if (units<TypeParam>().back() != matrix_unit::amx) GTEST_SKIP() << "no AMX, and none can be emulated here";
  random_engine random(11);
  const unit_call<TypeParam> c(example(entry::attention, {.queries = 70, .keys = 70, .dim = 16, .value_dim = 16}),
                               random);
  alignas(64) std::array<std::uint8_t, 64> ours{}, found{};
  ours[0] = 1;
  ours[16] = 32;  // bytes of a row, and rows, of tile 0
  ours[48] = 5;
  asm volatile("ldtilecfg %0" : : "m"(ours));
  static_cast<void>(c.forward(matrix_unit::amx));
  asm volatile("sttilecfg %0" : "=m"(found));
  asm volatile("tilerelease");
  EXPECT_EQ(found, ours);
}
#endif

/// Nothing beside the operands is touched, whatever the sizes: their memory ends, or begins, where access faults.
TYPED_TEST(UnitTest, GuardPages) {
  random_engine random(12);
  std::vector<guarded_pages> pages(4);
  for (const bool end : {false, true})
    for (const std::int64_t length : {9, 32, 33, 64, 70, 129})
      for (const std::int64_t dim : {1, 3, 16, 31, 32, 33, 64, 70}) {
        const problem p = example(entry::attention, {.queries = length, .keys = length, .dim = dim, .value_dim = dim});
        const unit_call<TypeParam> c(p, random);
        for (const std::int64_t padding : {0, 3}) {
          std::array<tensor_view<TypeParam>, 3> operand;
          for (std::size_t i = 0; i < 3; ++i) {
            operand[i] = place<TypeParam>(pages[i], end, c.operand(i).extent, padding);
            for (std::int64_t t = 0; t < length; ++t)
              std::copy_n(c.operand(i).row(0, 0, t), dim, operand[i].row(0, 0, t));
          }
          const auto out = place<float>(pages[3], end, c.operand(2).extent, padding);
          for (const matrix_unit unit : units<TypeParam>()) {
            options options = p.options;
            options.unit = unit;
            attention(operand[0], operand[1], operand[2], out, options);
            const results<float> want = c.forward(unit);
            ASSERT_TRUE(same_bits(tensor_view<const float>(out), want.out.view())) << length << ", " << dim;
          }
        }
      }
}

/// A workspace of the size that is asked for will do, one of a byte less is refused; and no other memory is taken.
TYPED_TEST(UnitTest, Workspace) {
  random_engine random(13);
  const unit_call<TypeParam> c(example(entry::attention, {.queries = 90, .keys = 90, .dim = 24, .value_dim = 16}),
                               random);
  for (const matrix_unit unit : units<TypeParam>()) {
    options options = c.p.options;
    options.unit = unit;
    const results<float> want = c.forward(unit);
    tensor<float> out({1, 1, 90, 16});
    std::vector<std::byte> workspace(workspace_size(inputs{c.operand(0), c.operand(1), c.operand(2)}, options));
    attention(c.operand(0), c.operand(1), c.operand(2), out.view(), options, {serial_executor{}, workspace});
    EXPECT_TRUE(same_bits(out.view(), want.out.view()));
    const std::size_t least = workspace.size() - detail::scratch_alignment;
    EXPECT_THROW(attention(c.operand(0), c.operand(1), c.operand(2), out.view(), options,
                           {serial_executor{}, std::span(workspace).first(least - 1)}),
                 std::invalid_argument);
  }
}

/// A key of -inf has no weight, so its value's gradient is 0; lanes that no query fills, where it meets zeros, add nothing.
/// It lies in a block that every query sees whole.
TYPED_TEST(UnitTest, EmptyLanesReachNothing) {
  random_engine random(16);
  constexpr std::int64_t queries = 37, keys = 37 + 2 * detail::sixteen_bit_shape::gradient_block;
  unit_call<TypeParam> c(
      example(entry::local,
              {.batch = 1, .heads = 1, .kv_heads = 1, .queries = queries, .keys = keys, .dim = 32, .value_dim = 16}),
      random);
  c.p.options = {.window = keys};
  *c.operands[1].row(0, 0, 3) = TypeParam(-std::numeric_limits<float>::infinity());
  for (std::int64_t i = 0; i < queries; ++i) *c.operands[0].row(0, 0, i) = TypeParam(1.0f);
  tensor<TypeParam> grad_out({1, 1, queries, 16});
  grad_out.randomize(random);
  tensor<float, 3> grad_lse({1, 1, queries});
  grad_lse.fill(0);
  const auto all_finite = [](const float* row) {
    return std::all_of(row, row + 16, [](float x) { return std::isfinite(x); });
  };
  for (const matrix_unit unit : units<TypeParam>()) {
    const results<float> got = c.forward(unit);
    const auto grad = c.gradient(unit, got, grad_out, grad_lse);
    for (std::int64_t i = 0; i < queries; ++i) EXPECT_TRUE(all_finite(got.out.row(0, 0, i))) << i;
    for (std::int64_t j = 0; j < keys; ++j) EXPECT_TRUE(all_finite(grad[2].row(0, 0, j))) << j;
    for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(grad[2].row(0, 0, 3)[d], 0.0f);
  }
}

/// A cache answers a whole prompt to the bit as `attention` does, and a prompt in pieces, a lone token among them, within
/// the rule. It comes back from a file with the unit that is asked for.
TYPED_TEST(UnitTest, Cache) {
  random_engine random(15);
  problem p = example(entry::attention,
                      {.batch = 2, .heads = 4, .kv_heads = 2, .queries = 90, .keys = 90, .dim = 24, .value_dim = 40});
  p.options.sink_tokens = 5;
  const unit_call<TypeParam> c(p, random);
  const sizes& s = c.p.sizes;
  const tensor<TypeParam> grad_out({s.batch, s.heads, s.queries, s.value_dim});
  const tensor<float, 3> grad_lse({s.batch, s.heads, s.queries});
  const textbook<TypeParam> plain(c, grad_out.view(), grad_lse.view());
  const auto exact = reference::attention<double>(inputs{c.operand(0), c.operand(1), c.operand(2)}, c.p.options);
  const auto rows = [](auto view, range part) {
    view.data = view.row(0, 0, part.begin);
    view.extent[2] = part.size();
    return view;
  };
  error_rule<float> out_rule, lse_rule;
  for (const matrix_unit unit : units<TypeParam>())
    for (const std::vector<std::int64_t>& pieces : {std::vector<std::int64_t>{90}, {40, 1, 33, 16}}) {
      options options = c.p.options;
      options.unit = unit;
      kv_cache<TypeParam> cache(
          {.batch = s.batch, .heads = s.heads, .kv_heads = s.kv_heads, .dim = s.dim, .value_dim = s.value_dim},
          options);
      const auto got = collect<float>(s, [&](tensor_view<float> out, lse_view<float> lse) {
        std::int64_t begin = 0;
        for (const std::int64_t count : pieces) {
          const range part{begin, begin + count};
          lse_view<float> lse_part = lse;
          lse_part.data = lse.row(0, 0, begin);
          lse_part.extent[2] = count;
          cache.attend(inputs{rows(c.operand(0), part), rows(c.operand(1), part), rows(c.operand(2), part)},
                       cca::results{rows(out, part), lse_part});
          begin += count;
          std::stringstream file;
          save(cache, file);
          cache = load<TypeParam>(file, unit);
        }
      });
      EXPECT_EQ(cache.options().unit, unit);
      EXPECT_TRUE(pieces.size() > 1 || same_bits(got, c.forward(unit)));
      out_rule.add(got.out.view(), plain.result.out.view(), exact.out.view(), "cache");
      lse_rule.add(with_dim(got.lse.view()), plain.result.lse.view(), exact.lse.view(), "cache");
    }
  EXPECT_TRUE(out_rule.holds());
  EXPECT_TRUE(lse_rule.holds());
}

/// The units differ in the order of their sums alone: by much less than what they round.
TYPED_TEST(UnitTest, BestIsOneOfThem) {
  random_engine random(14);
  const unit_call<TypeParam> c(example(entry::attention, {.queries = 90, .keys = 90, .dim = 24, .value_dim = 16}),
                               random);
  EXPECT_TRUE(same_bits(c.forward(matrix_unit::best), c.forward(best_unit<TypeParam>())));
  const matrix_unit present = units<TypeParam>().back();
  EXPECT_EQ(detail::present_unit<TypeParam>(), present);
  const bool slower = present == matrix_unit::avx512_bf16 && !detail::avx512_bf16_pays();
  EXPECT_EQ(best_unit<TypeParam>(), slower ? matrix_unit::none : present);
}

/// What multiplies nothing is not asked for in silence.
TEST(UnitRefusals, Name) {
  std::vector<float> f(64);
  std::vector<bfloat16> b(64);
  const auto of = [](auto& x) { return bhsd(std::as_const(x).data(), 1, 1, 16, 4); };
  std::vector<float> written(64);
  const auto out = bhsd(written.data(), 1, 1, 16, 4);
  EXPECT_EQ(refusal_of([&] { attention(of(f), of(f), of(f), out, {.unit = matrix_unit::best}); }), "none");
  EXPECT_EQ(refusal_of([&] { attention(of(f), of(f), of(f), out, {.unit = matrix_unit::amx}); }),
            "cca: options.unit: got amx, wants none: the operands are not all of the same 16-bit type");
  EXPECT_NE(refusal_of([&] { attention(of(b), of(f), of(b), out, {.unit = matrix_unit::amx}); }).find("options.unit"),
            std::string::npos);
  EXPECT_NE(refusal_of([&] { attention(of(b), of(b), of(b), out, {.unit = static_cast<matrix_unit>(9)}); }).find("got 9"),
            std::string::npos);
  EXPECT_NE(refusal_of([&] {
              pool(of(b), of(b), of(b), out, out, {.group_size = 1, .unit = matrix_unit::best});
            }).find("options.unit"),
            std::string::npos);
  const cache_shape shape{.heads = 1, .kv_heads = 1, .dim = 4};
  EXPECT_NE(refusal_of([&] { kv_cache<bfloat16, float>(shape, {.unit = matrix_unit::amx}); }).find("options.unit"),
            std::string::npos);
  if (const matrix_unit unit = detail::present_unit<bfloat16>(); unit != matrix_unit::none) {
    kv_cache<bfloat16> cache(shape, {.unit = unit});
    EXPECT_NE(refusal_of([&] { cache.attend(of(f), of(b), of(b), out); }).find("options.unit"), std::string::npos);
    EXPECT_EQ(cache.length(), 0);
  }
  detail::matrix_units& present = detail::present_units();
  const detail::matrix_units had = std::exchange(present, {});
  EXPECT_EQ(refusal_of([&] { attention(of(b), of(b), of(b), out, {.unit = matrix_unit::amx}); }),
            "cca: options.unit: got amx, wants best, or a unit that this processor has for the operands' type");
  EXPECT_EQ(refusal_of([&] { attention(of(b), of(b), of(b), out, {.unit = matrix_unit::best}); }), "none");
  present = had;
}

}  // namespace
