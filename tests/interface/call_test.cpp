// The ways to call: arguments in braces, spelled out and one by one; which attention the options mean; and what is
// refused of the arguments that are optional.

#include "entry_points.hpp"

// After support.hpp, which has a say in how Eigen is compiled.
#include <cca/gradient.hpp>
#include <cca/kv_cache.hpp>

namespace cca::test { namespace {

constexpr sizes example_sizes{.batch = 2, .heads = 4, .kv_heads = 2, .queries = 9, .keys = 9, .dim = 5, .value_dim = 3};

/// Operands, results and their gradients, of any kind that a call asks for.
template <class T>
struct all_arguments {
  sizes s = example_sizes;
  tensor<T> query{{s.batch, s.heads, s.queries, s.dim}}, key{{s.batch, s.kv_heads, s.keys, s.dim}},
      value{{s.batch, s.kv_heads, s.keys, s.value_dim}}, out{{s.batch, s.heads, s.queries, s.value_dim}},
      grad_out = out, grad_query = query, grad_key = key, grad_value = value, far_key = key, far_value = value,
      grad_far_key = key, grad_far_value = value;
  tensor<T, 3> lse{{s.batch, s.heads, s.queries}}, grad_lse = lse, sinks{{1, s.heads, 1}}, grad_sinks = sinks;
  tensor<std::int64_t, 3> seen{{s.batch, s.heads, s.queries}};

  explicit all_arguments(random_engine& random) {
    for (tensor<T>* t : {&query, &key, &value, &grad_out, &far_key, &far_value}) t->randomize(random);
    for (tensor<T, 3>* t : {&grad_lse, &sinks}) t->randomize(random);
    seen.fill(2);
  }

  [[nodiscard]] inputs<T> in() { return {query.view(), key.view(), value.view()}; }
  [[nodiscard]] far_context<T> far_rows() { return {far_key.view(), far_value.view(), seen.view()}; }
  [[nodiscard]] cca::results<T> to() { return {out.view(), lse.view()}; }
  [[nodiscard]] cca::results<const T> of() { return {out.view(), lse.view()}; }
  [[nodiscard]] incoming<T> from() { return {grad_out.view(), grad_lse.view()}; }
  [[nodiscard]] gradients<T> grads() { return {grad_query.view(), grad_key.view(), grad_value.view()}; }
};

constexpr options pooled{.group_size = 3, .window = 4};

// ------------------------------------------------------------------------------------------------------------ forms

/// In braces of floats, of a type that is named, with designators, spelled out, and one by one.
TEST(Call, FormsMeanTheSame) {
  random_engine random(1);
  all_arguments<float> a(random);
  all_arguments<double> d(random);
  const auto query = a.query.view(), key = a.key.view(), out = a.out.view();
  const auto value = std::as_const(a.value).view();
  const auto lse = a.lse.view();
  std::vector<std::byte> workspace(workspace_size({query, key, value}, pooled));

  attention({query, key, value}, {out, lse}, pooled, {serial_executor{}, workspace});
  const auto expected = a;
  const auto expect_same = [&](const char* form, bool with_lse) {
    EXPECT_TRUE(same_bits(a.out.view(), tensor_view<float>(all_arguments<float>(expected).out.view()))) << form;
    if (with_lse) {
      EXPECT_TRUE(same_bits(std::as_const(a.lse).view(), expected.lse.view())) << form;
    } else {
      EXPECT_FALSE(same_bits(std::as_const(a.lse).view(), expected.lse.view())) << form;
    }
    a.out.fill(7);
    a.lse.fill(7);
  };
  expect_same("itself", true);
  attention(query, key, value, out, pooled);
  expect_same("one by one", false);
  attention(query, key, value, out, pooled, serial_executor{});
  expect_same("one by one, with an executor", false);
  attention({.query = query, .key = key, .value = value}, {.out = out, .lse = lse}, pooled, serial_executor{});
  expect_same("designators", true);
  attention(inputs{query, key, value}, {out, lse}, pooled);
  expect_same("inputs spelled", true);
  attention(inputs{query, key, value}, cca::results{out}, pooled);
  expect_same("spelled", false);

  attention<double>({d.query.view(), d.key.view(), d.value.view()}, {d.out.view(), d.lse.view()}, pooled);
  const auto by_name = d;
  attention(d.query.view(), d.key.view(), d.value.view(), d.out.fill(0).view(), pooled);
  EXPECT_TRUE(same_bits(std::as_const(d.out).view(), by_name.out.view()));

  // A mixture is computed in double.
  attention(inputs{d.query.view(), key, value}, cca::results{out, d.lse.view()}, pooled);
  EXPECT_FALSE(same_bits(std::as_const(a.out).view(), expected.out.view()));
}

/// Of gradients, far context, pooling and merging.
TEST(Call, BracesDoForEveryFunction) {
  random_engine random(2);
  all_arguments<float> a(random), b = a;
  const auto far_key = a.far_key.view(), far_value = a.far_value.view();
  const auto seen = a.seen.view();
  attend({a.query.view(), a.key.view(), a.value.view()}, {far_key, far_value, seen}, {a.out.view(), a.lse.view()});
  attend(b.in(), b.far_rows(), b.to());
  EXPECT_TRUE(same_bits(a.out.view(), b.out.view()));

  attend_gradient(
      {a.query.view(), a.key.view(), a.value.view()}, {far_key, far_value, seen}, {a.out.view(), a.lse.view()},
      {a.grad_out.view()},
      {a.grad_query.view(), a.grad_key.view(), a.grad_value.view(), a.grad_far_key.view(), a.grad_far_value.view()});
  gradients<float> grads = b.grads();
  grads.far_key = b.grad_far_key.view();
  grads.far_value = b.grad_far_value.view();
  attend_gradient(b.in(), b.far_rows(), b.of(), incoming{b.grad_out.view()}, grads);
  EXPECT_TRUE(same_bits(a.grad_query.view(), b.grad_query.view()));
  EXPECT_TRUE(same_bits(a.grad_far_value.view(), b.grad_far_value.view()));

  attention_gradient({a.query.view(), a.key.view(), a.value.view()}, {a.out.view(), a.lse.view()},
                     {a.grad_out.view(), a.grad_lse.view()},
                     {a.grad_query.view(), a.grad_key.view(), a.grad_value.view()}, pooled);
  attention_gradient(b.in(), b.of(), b.from(), b.grads(), pooled, serial_executor{});
  EXPECT_TRUE(same_bits(a.grad_key.view(), b.grad_key.view()));

  merge({a.out.view(), a.lse.view()}, {a.grad_out.view(), a.grad_lse.view()}, {a.out.view(), a.lse.view()});
  merge(b.of(), cca::results{b.grad_out.view(), b.grad_lse.view()}, b.to());
  EXPECT_TRUE(same_bits(a.lse.view(), b.lse.view()));

  const cache_shape shape{.batch = 2, .heads = 4, .kv_heads = 2, .dim = 5, .value_dim = 3};
  kv_cache<float> one(shape, pooled), other(shape, pooled);
  one.attend({a.query.view(), a.key.view(), a.value.view()}, {a.out.view(), a.lse.view()});
  other.attend(b.query.view(), b.key.view(), b.value.view(), b.out.view(), serial_executor{});
  EXPECT_TRUE(same_bits(a.out.view(), b.out.view()));
}

// ------------------------------------------------------------------------------------------------------- front door

/// Judges `attention` with these options against the textbook of another entry point.
template <class Textbook>
void expect_means(const options& options, const sizes& s, const Textbook& textbook) {
  random_engine random(3);
  const operands<float> o = random_operands<float>(s, random);
  const inputs in{o.query.view(), o.key.view(), o.value.view()};
  attention_rule<float> rule;
  rule.add(collect<float>(s,
                          [&](auto out, auto lse) {
                            attention(in, cca::results{out, lse}, options);
                          }),
           [&]<class Scalar>() { return textbook.template operator()<Scalar>(in); });
  EXPECT_TRUE(rule.holds()) << describe(options) << ", " << describe(s);
}

TEST(FrontDoor, TheOptionsSayWhichAttention) {
  const auto raw = [](const options& options) {
    return [=]<class Scalar>(const auto& in) { return reference::local_attention<Scalar>(in, options); };
  };
  for (const std::int64_t queries : {1, 3, 40}) {
    const sizes s{.heads = 2, .queries = queries, .keys = 40, .dim = 4, .value_dim = 3};
    expect_means({}, s, raw({}));
    expect_means({.group_size = 1}, s, raw({}));  // no query sees a core
    expect_means({.window = 6}, s, raw({.window = 6}));
    expect_means({.window = 6, .first_position = 11}, s, raw({.window = 6, .first_position = 11}));
  }
  // Cores of single tokens are those tokens.
  const sizes s{.heads = 2, .queries = 40, .keys = 40, .dim = 4, .value_dim = 3};
  expect_means({.group_size = 1, .window = 6}, s, raw({}));
  expect_means({.group_size = 3, .window = 6}, s, []<class Scalar>(const auto& in) {
    return reference::attention<Scalar>(in, {.group_size = 3, .window = 6});
  });
}

// --------------------------------------------------------------------------------------------------------- refusals

/// What is written is not what is read, nor written twice; every output against all that its call reads.
TEST(CallRefusals, OutputsThatAreOtherArguments) {
  random_engine random(4);
  all_arguments<float> a(random);
  const auto expect = [&](const std::string& output, const std::string& other, const auto& call) {
    EXPECT_NE(refusal_of(call).find("cca: " + output + ": got the memory of " + other + ", wants memory of its own"),
              std::string::npos)
        << output << ", " << other << ": " << refusal_of(call);
  };
  /// The same memory as other extents.
  const auto at = [](auto view, const auto& memory) {
    view.data = const_cast<float*>(memory.view().data);
    return view;
  };
  inputs<float> in = a.in();
  in.sink_logits = a.sinks.view();
  const auto each_operand = [&](const auto& f) {
    f("query", a.query), f("key", a.key), f("value", a.value), f("sink_logits", a.sinks);
  };
  const auto each_read = [&](const auto& f) {
    each_operand(f);
    f("out", a.out), f("lse", a.lse), f("grad_out", a.grad_out), f("grad_lse", a.grad_lse);
  };
  const auto each_far = [&](const auto& f) { f("far.key", a.far_key), f("far.value", a.far_value); };

  each_operand([&](const char* name, auto& memory) {
    expect("out", name, [&] { attention(in, cca::results{at(a.out.view(), memory)}, pooled); });
    expect("lse", name, [&] { attention(in, cca::results{a.out.view(), at(a.lse.view(), memory)}, pooled); });
    expect("out", name, [&] { attend(in, a.far_rows(), cca::results{at(a.out.view(), memory)}); });
  });
  kv_cache<float> cache({.batch = 2, .heads = 4, .kv_heads = 2, .dim = 5, .value_dim = 3}, pooled);
  expect("out", "value", [&] { cache.attend(in, cca::results{at(a.out.view(), a.value)}); });
  expect("lse", "out", [&] { attention(in, cca::results{a.out.view(), at(a.lse.view(), a.out)}, pooled); });
  each_far([&](const char* name, auto& memory) {
    expect("out", name, [&] { attend(in, a.far_rows(), cca::results{at(a.out.view(), memory)}); });
  });

  gradients<float> grads = a.grads();
  grads.sink_logits = a.grad_sinks.view();
  const auto each_gradient = [&](const auto& f) {
    f("grad_query", &gradients<float>::query), f("grad_key", &gradients<float>::key);
    f("grad_value", &gradients<float>::value), f("grad_sink_logits", &gradients<float>::sink_logits);
  };
  each_gradient([&](const char* output, auto gradient) {
    each_read([&](const char* name, auto& memory) {
      gradients<float> to = grads;
      to.*gradient = at(to.*gradient, memory);
      expect(output, name, [&] { attention_gradient(in, a.of(), a.from(), to, pooled); });
    });
  });
  gradients<float> same = grads;
  same.key.data = same.query.data;
  expect("grad_key", "grad_query", [&] { attention_gradient(in, a.of(), a.from(), same, pooled); });
  gradients<float> with_far = grads;
  with_far.far_key = a.grad_far_key.view();
  each_far([&](const char* name, auto& memory) {
    with_far.far_value = at(a.grad_far_value.view(), memory);
    expect("grad_far_value", name, [&] { attend_gradient(in, a.far_rows(), a.of(), a.from(), with_far); });
  });

  // A merge may write over a part.
  EXPECT_EQ(refusal_of([&] { merge(a.to(), cca::results{a.grad_out.view(), a.grad_lse.view()}, a.to()); }), "none");
  // Where there is nothing, nothing is shared.
  inputs<float> none = a.in();
  cca::results<float> to = a.to();
  none.query.extent[2] = none.key.extent[2] = none.value.extent[2] = to.out.extent[2] = to.lse.extent[2] = 0;
  to.out.data = const_cast<float*>(none.query.data);
  EXPECT_EQ(refusal_of([&] { attention(none, to, pooled); }), "none");
}

TEST(CallRefusals, SayWhereToGo) {
  random_engine random(5);
  all_arguments<float> a(random);
  inputs<float> few = a.in();
  few.query.extent[2] = 3;
  const std::string queries = refusal_of([&] { attention(few, a.to(), pooled); });
  EXPECT_NE(queries.find("query: got 3 queries, wants a query for each of the 9 keys"), std::string::npos) << queries;
  EXPECT_NE(queries.find("kv_cache"), std::string::npos) << queries;

  std::vector<std::byte> memory(1);
  const execution one_byte(serial_executor{}, memory);
  const auto size_function = [](const std::string& text) {
    return text.substr(std::min(text.size(), text.find("(see ")));
  };
  EXPECT_EQ(size_function(refusal_of([&] { attention(a.in(), a.to(), pooled, one_byte); })), "(see workspace_size)");
  EXPECT_EQ(size_function(refusal_of([&] { attend(a.in(), a.far_rows(), a.to(), {}, one_byte); })),
            "(see workspace_size)");
  EXPECT_EQ(size_function(refusal_of([&] { attention_gradient(a.in(), a.of(), a.from(), a.grads(), pooled, one_byte); })),
            "(see gradient_workspace_size)");
}

TEST(CallRefusals, OptionalArgumentsThatDoNotFit) {
  random_engine random(6);
  all_arguments<float> a(random);
  const auto sinks_of = [&](std::int64_t b, std::int64_t h, std::int64_t i) {
    inputs<float> in = a.in();
    in.sink_logits = {a.sinks.view().data, {b, h, i}, {0, 1, 0}};
    return in;
  };
  for (const std::array<std::int64_t, 3>& e : std::vector<std::array<std::int64_t, 3>>{
           {0, 4, 1}, {3, 4, 1}, {1, 2, 1}, {1, 4, 0}, {1, 4, 9}, {2, 4, 8}, {2, 4, 10}}) {
    const std::string text = refusal_of([&] { attention(sinks_of(e[0], e[1], e[2]), a.to(), pooled); });
    EXPECT_NE(text.find("sink_logits: got " + text_of(e) + ", wants [1 or 2, 4, 1] or [2, 4, 9]"),
              std::string::npos)
        << text;
  }
  for (const std::array<std::int64_t, 3>& e : std::vector<std::array<std::int64_t, 3>>{{1, 4, 1}, {2, 4, 1}, {2, 4, 9}})
    EXPECT_EQ(refusal_of([&] { attention(sinks_of(e[0], e[1], e[2]), a.to(), pooled); }), "none");
  inputs<float> null = a.in();
  null.sink_logits.extent = {1, 4, 1};
  EXPECT_NE(refusal_of([&] { attention(null, a.to(), pooled); }).find("sink_logits: got a null"), std::string::npos);

  const auto gradient = [&](const inputs<float>& in, const gradients<float>& to) {
    return refusal_of([&] { attention_gradient(in, a.of(), a.from(), to, pooled); });
  };
  gradients<float> to = a.grads();
  EXPECT_EQ(gradient(sinks_of(1, 4, 1), to), "none");  // not wanted
  to.sink_logits = a.grad_sinks.view();
  EXPECT_EQ(gradient(sinks_of(1, 4, 1), to), "none");
  EXPECT_NE(gradient(a.in(), to).find("grad_sink_logits: got [1, 4, 1], wants none"), std::string::npos);
  EXPECT_NE(gradient(sinks_of(2, 4, 1), to).find("grad_sink_logits: got [1, 4, 1], wants extents [2, 4, 1]"),
            std::string::npos);
  to = a.grads();
  to.far_key = a.grad_far_key.view();
  EXPECT_NE(gradient(a.in(), to).find("grad_far_key: got [2, 2, 9, 5], wants none"), std::string::npos);
  to = a.grads();
  to.far_value = a.grad_far_value.view();
  EXPECT_NE(gradient(a.in(), to).find("grad_far_value: got [2, 2, 9, 3], wants none"), std::string::npos);

  inputs<float> pooling_with_sinks = sinks_of(1, 4, 1);
  tensor<float> core_key({2, 4, 3, 5}), core_value({2, 4, 3, 3});
  EXPECT_NE(refusal_of([&] {
              pool(pooling_with_sinks, cores{core_key.view(), core_value.view()}, {.group_size = 3});
            }).find("sink_logits: got [1, 4, 1], wants none"),
            std::string::npos);
  kv_cache<float> cache({.batch = 2, .heads = 4, .kv_heads = 2, .dim = 5, .value_dim = 3}, pooled);
  EXPECT_NE(refusal_of([&] { cache.attend(sinks_of(1, 3, 1), a.to()); }).find("sink_logits: got [1, 3, 1]"),
            std::string::npos);
}

TEST(Call, SequencesMayAllBeEmptyWhereverTheyBegin) {
  random_engine random(1);
  all_arguments<float> a(random);
  const std::vector<std::int64_t> none(static_cast<std::size_t>(a.s.batch), 0);
  const auto without_tokens = [&](auto view) {
    view.begins = view.ends = none.data();
    return view;
  };
  a.out.fill(7);
  attention(without_tokens(std::as_const(a.query).view()), without_tokens(std::as_const(a.key).view()),
            without_tokens(std::as_const(a.value).view()), without_tokens(a.out.view()));
  EXPECT_EQ(*a.out.row(0, 0, 0), 7);
}

}}  // namespace cca::test
