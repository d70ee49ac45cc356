// The layers' gradients against central differences in double, and trainings that must end in the same bits.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "trainer.hpp"

namespace train_lm {
namespace {

/// A pool that the tests share; three threads with the calling one, whatever the machine has.
const executor& threads() {
  static Eigen::ThreadPool pool(2);
  static const executor run(pool);
  return run;
}

matrix<double> random_matrix(std::int64_t rows, std::int64_t columns) {
  static std::mt19937_64 random(7);
  parameter<double> result("", rows, columns);
  result.randomize(random, 1);
  return result.value;
}

std::vector<std::uint8_t> random_bytes(std::int64_t count, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(count));
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random() % 256);
  return bytes;
}

/// Compares `gradient` with differences of `loss` by elements of `x`, at most about `samples` of them. The formula's
/// error is h^4 times a fifth derivative, that of the losses' rounding epsilon / h: about equal at this h.
void expect_gradient(matrix<double>& x, const matrix<double>& gradient, const std::function<double()>& loss,
                     std::int64_t samples = 1000) {
  const double h = std::pow(std::numeric_limits<double>::epsilon(), 0.2);
  ASSERT_EQ(x.rows(), gradient.rows());
  ASSERT_EQ(x.cols(), gradient.cols());
  const double largest = gradient.cwiseAbs().maxCoeff();
  EXPECT_GT(largest, 0);
  for (std::int64_t i = 0; i < x.size(); i += std::max<std::int64_t>(x.size() / samples, 1)) {
    double& element = x.reshaped<Eigen::RowMajor>()(i);
    const double there = element;
    const auto at = [&](double offset) {
      element = there + offset;
      return loss();
    };
    const double difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
    element = there;
    ASSERT_NEAR(gradient.reshaped<Eigen::RowMajor>()(i), difference, 1e-8 * std::max(largest, 1.0)) << "element " << i;
  }
}

// More tokens than a block of them, and no multiple of it.
constexpr std::int64_t tokens = token_block + 3;

TEST(gradient, linear) {
  linear<double> layer("", row_block + 5, 6);
  layer.weight.value = random_matrix(row_block + 5, 6);
  matrix<double> x = random_matrix(tokens, 6), y, grad_x;
  const matrix<double> grad_y = random_matrix(tokens, row_block + 5);
  const auto loss = [&] {
    layer.forward(threads(), x, y);
    return y.cwiseProduct(grad_y).sum();
  };
  layer.backward(threads(), x, grad_y, grad_x);
  expect_gradient(x, grad_x, loss);
  expect_gradient(layer.weight.value, layer.weight.gradient, loss);
}

TEST(gradient, linear_residual) {
  linear<double> layer("", 5, 6);
  layer.weight.value = random_matrix(5, 6);
  const matrix<double> x = random_matrix(tokens, 6), base = random_matrix(tokens, 5);
  matrix<double> plain, residual;
  layer.forward(threads(), x, plain);
  layer.forward(threads(), x, base, residual);
  EXPECT_LE((plain + base - residual).cwiseAbs().maxCoeff(), 1e-14);
}

TEST(gradient, rms_norm_adds) {
  rms_norm<double> layer("", 7);
  layer.gain.value = random_matrix(1, 7);
  matrix<double> x = random_matrix(tokens, 7), y;
  column<double> scale;
  const matrix<double> grad_y = random_matrix(tokens, 7), before = random_matrix(tokens, 7);
  const auto loss = [&] {
    layer.forward(threads(), x, scale, y);
    return y.cwiseProduct(grad_y).sum() + x.cwiseProduct(before).sum();
  };
  loss();
  matrix<double> grad_x = before;
  layer.backward(threads(), x, scale, grad_y, grad_x);
  expect_gradient(x, grad_x, loss);
  expect_gradient(layer.gain.value, layer.gain.gradient, loss);
}

TEST(gradient, rope_turns_back) {
  const std::int64_t length = 5, heads = 2, head_dim = 6;
  const rope<double> positions(length, head_dim);
  matrix<double> x = random_matrix(2 * length, 3 * head_dim);  // the third head is not turned
  const matrix<double> grad_y = random_matrix(2 * length, 3 * head_dim);
  matrix<double> grad_x = grad_y;
  positions.turn(threads(), grad_x, heads, -1);
  expect_gradient(x, grad_x, [&] {
    matrix<double> y = x;
    positions.turn(threads(), y, heads, 1);
    return y.cwiseProduct(grad_y).sum();
  });
  // What a score depends on is how far apart two tokens are.
  matrix<double> same = random_matrix(1, 3 * head_dim).replicate(2 * length, 1);
  positions.turn(threads(), same, heads, 1);
  EXPECT_NEAR(same.row(0).dot(same.row(2)), same.row(7).dot(same.row(9)), 1e-12);
  EXPECT_GT(std::abs(same.row(0).dot(same.row(2)) - same.row(0).dot(same.row(3))), 1e-3);
}

TEST(gradient, swiglu) {
  matrix<double> x = random_matrix(tokens, 8), y, grad_x;
  const matrix<double> grad_y = random_matrix(tokens, 4);
  swiglu::backward(threads(), x, grad_y, grad_x);
  expect_gradient(x, grad_x, [&] {
    swiglu::forward(threads(), x, y);
    return y.cwiseProduct(grad_y).sum();
  });
}

TEST(gradient, embedding) {
  embedding<double> layer("", 3);
  layer.weight.value = random_matrix(256, 3);
  const auto bytes = random_bytes(tokens, 3);
  const matrix<double> grad_y = random_matrix(tokens, 3);
  layer.backward(bytes, grad_y);
  layer.backward(bytes, grad_y);  // written, not added to
  matrix<double> y;
  expect_gradient(layer.weight.value, layer.weight.gradient, [&] {
    layer.forward(bytes, y);
    return y.cwiseProduct(grad_y).sum();
  });
}

TEST(gradient, cross_entropy) {
  const auto targets = random_bytes(tokens, 4);
  matrix<double> x = random_matrix(tokens, 256), gradient = x;
  cross_entropy(threads(), gradient, targets);
  expect_gradient(x, gradient, [&] {
    matrix<double> logits = x;
    return cross_entropy(threads(), logits, targets);
  });
  matrix<double> even = matrix<double>::Constant(tokens, 256, 3);
  EXPECT_NEAR(cross_entropy(threads(), even, targets), std::log(256.0), 1e-12);
}

class every_attention : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(of, every_attention, testing::Values("dense", "cca", "mean", "max", "window"),
                         [](const auto& test) { return test.param; });

// Through all of the model, whose attention sees two or three cores at the end of a sequence.
TEST_P(every_attention, gradient_of_model) {
  const model_sizes sizes{.layers = 2, .dim = 16, .heads = 4, .kv_heads = 2, .hidden = 10, .context = 19};
  model<double> model(sizes, choose_attention(GetParam(), 4, 6), 5);
  const auto bytes = random_bytes(2 * sizes.context, 1), targets = random_bytes(2 * sizes.context, 2);
  model.gradient(threads(), bytes, targets);
  std::vector<matrix<double>> gradients;
  for (const parameter<double>* p : model.parameters()) gradients.push_back(p->gradient);
  for (std::size_t i = 0; i < gradients.size(); ++i) {
    SCOPED_TRACE(model.parameters()[i]->name);
    expect_gradient(
        model.parameters()[i]->value, gradients[i], [&] { return model.loss(threads(), bytes, targets); }, 40);
  }
}

TEST(attention, is_what_was_chosen) {
  const model_sizes sizes{.layers = 2, .dim = 16, .heads = 4, .kv_heads = 2, .hidden = 10, .context = 19};
  const auto bytes = random_bytes(2 * sizes.context, 1), targets = random_bytes(2 * sizes.context, 2);
  const auto loss = [&](const char* name, std::int64_t group_size, std::int64_t window) {
    return model<double>(sizes, choose_attention(name, group_size, window), 5).loss(threads(), bytes, targets);
  };
  const std::vector<double> losses{loss("dense", 4, 6), loss("cca", 4, 6), loss("cca", 5, 6),   loss("cca", 4, 7),
                                   loss("mean", 4, 6),  loss("max", 4, 6), loss("window", 4, 6)};
  for (std::size_t i = 0; i < losses.size(); ++i)
    for (std::size_t j = 0; j < i; ++j) EXPECT_GT(std::abs(losses[i] - losses[j]), 1e-9) << i << " and " << j;
  EXPECT_NEAR(loss("cca", 4, sizes.context), losses.front(), 1e-12);  // a window that holds all
}

// A later byte is never seen.
TEST_P(every_attention, is_causal) {
  const model_sizes sizes{.layers = 2, .dim = 16, .heads = 4, .kv_heads = 2, .hidden = 10, .context = 19};
  model<double> model(sizes, choose_attention(GetParam(), 4, 6), 5);
  auto bytes = random_bytes(sizes.context, 1);
  const auto targets = random_bytes(sizes.context, 2);
  model.gradient(threads(), bytes, targets);
  const matrix<double> before = model.logits_gradient();
  bytes[12] = static_cast<std::uint8_t>(bytes[12] + 1);
  model.gradient(threads(), bytes, targets);
  EXPECT_EQ(before.topRows(12), model.logits_gradient().topRows(12));
  EXPECT_NE(before.row(12), model.logits_gradient().row(12));
}

/// With tokens for four blocks: of two, the sum is the same in either order.
settings small_training(const std::string& attention) {
  settings s;
  s.attention = attention;
  s.group_size = 4, s.window = 8;
  s.layers = 2, s.dim = 24, s.heads = 4, s.kv_heads = 2, s.hidden = 20, s.context = 50;
  s.batch = 20, s.steps = 20, s.warmup = 3, s.validation_sequences = 9, s.learning_rate = 1e-2;
  return s;
}

/// Text with something to learn in it.
std::string counted_text() {
  std::string text;
  for (int i = 0; text.size() < 5000; ++i) text += fmt::format("{} and {} are {}. ", i, i + 1, 2 * i + 1);
  return text;
}

struct outcome {
  std::vector<matrix<float>> weights;
  std::vector<double> training;
  std::vector<std::pair<std::int64_t, double>> validation;

  explicit outcome(const trainer<float>& trainer)
      : training(trainer.log().training), validation(trainer.log().validation) {
    for (const parameter<float>* p : trainer.parameters()) weights.push_back(p->value);
  }
  bool operator==(const outcome&) const = default;
};

void train(trainer<float>& trainer, int steps) {
  for (int i = 0; i < steps; ++i) trainer.step();
  trainer.validate();
}

TEST_P(every_attention, learns) {
  const corpus text(counted_text(), 50, 0.2);
  settings settings = small_training(GetParam());
  settings.steps = 100;
  trainer<float> trainer(settings, text, threads());
  train(trainer, 100);
  EXPECT_NEAR(trainer.log().training.front(), std::log(256.0), 0.1);  // even odds
  EXPECT_LT(trainer.log().validation.back().second, 2.3);             // fewer than ten bytes to choose from
}

TEST_P(every_attention, resumes_exactly) {
  const corpus text(counted_text(), 50, 0.2);
  const auto path =
      (std::filesystem::temp_directory_path() / ("train_lm_test." + GetParam() + ".safetensors")).string();
  const settings settings = small_training(GetParam());

  trainer<float> whole(settings, text, threads());
  train(whole, 10);
  train(whole, 10);

  trainer<float> first(settings, text, threads());
  train(first, 10);
  first.save(path);
  trainer<float> second(settings, text, threads());
  second.resume(path);
  train(second, 10);
  std::filesystem::remove(path);

  EXPECT_EQ(outcome(second), outcome(whole));
  EXPECT_FALSE(outcome(second) == outcome(first));
}

TEST_P(every_attention, threads_leave_no_trace) {
  const corpus text(counted_text(), 50, 0.2);
  Eigen::ThreadPool none(0);
  const executor serial(none);
  trainer<float> one(small_training(GetParam()), text, serial), three(small_training(GetParam()), text, threads());
  train(one, 5);
  train(three, 5);
  EXPECT_EQ(outcome(one), outcome(three));
}

TEST(checkpoint, of_other_settings_or_text_is_refused) {
  const corpus text(counted_text(), 50, 0.2), other(counted_text() + ".", 50, 0.2);
  const auto path = (std::filesystem::temp_directory_path() / "train_lm_test.refused.safetensors").string();
  trainer<float>(small_training("cca"), text, threads()).save(path);
  settings changed = small_training("cca");
  changed.window = 9;
  trainer<float> other_window(changed, text, threads()), other_text(small_training("cca"), other, threads());
  try {
    other_window.resume(path);
    ADD_FAILURE() << "no refusal";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("window = 8, got 9"), std::string::npos) << error.what();
  }
  EXPECT_THROW(other_text.resume(path), std::invalid_argument);
  std::filesystem::remove(path);
}

TEST(data, validation_is_held_out) {
  const std::string text = std::string(800, 'a') + std::string(200, 'b');
  const corpus corpus(text, 50, 0.2);
  EXPECT_EQ(corpus.training_size(), 800);
  for (std::int64_t step = 0; step < 100; ++step)
    for (const auto& bytes : {corpus.training_batch(1, step, 4).bytes, corpus.training_batch(1, step, 4).targets})
      EXPECT_EQ(std::count(bytes.begin(), bytes.end(), 'a'), 200);
  const auto held_out = corpus.validation_batch(0, 9, 9);
  EXPECT_EQ(std::count(held_out.targets.begin(), held_out.targets.end(), 'b'), 450);
}

TEST(data, batches_depend_on_seed_and_step) {
  const std::vector<std::uint8_t> bytes = random_bytes(5000, 1);
  const corpus corpus(std::string(bytes.begin(), bytes.end()), 50, 0.2);
  EXPECT_EQ(corpus.training_batch(1, 2, 3).bytes, corpus.training_batch(1, 2, 3).bytes);
  EXPECT_NE(corpus.training_batch(1, 2, 3).bytes, corpus.training_batch(1, 3, 3).bytes);
  EXPECT_NE(corpus.training_batch(1, 2, 3).bytes, corpus.training_batch(2, 2, 3).bytes);
  const auto batch = corpus.training_batch(1, 2, 1);
  EXPECT_TRUE(std::equal(batch.bytes.begin() + 1, batch.bytes.end(), batch.targets.begin()));
}

TEST(optimiser, steps_by_hand) {
  parameter<double> weight("", 2, 1), gain("", 1, 1);
  weight.value << 2, 3;
  gain.value << 2;
  adamw<double> optimizer({&weight, &gain}, 0.5);
  double m = 0, v = 0, expected_weight = 2, expected_gain = 2;
  for (std::int64_t step = 0; step < 5; ++step) {
    const double g = 0.3 * static_cast<double>(step + 1), rate = 0.1;
    weight.gradient << g, 0;
    gain.gradient << g;
    optimizer.update(threads(), step, rate);
    m = 0.9 * m + 0.1 * g;
    v = 0.95 * v + 0.05 * g * g;
    const auto t = static_cast<double>(step + 1);
    const double change = rate * m / (1 - std::pow(0.9, t)) / (std::sqrt(v / (1 - std::pow(0.95, t))) + 1e-8);
    expected_weight -= rate * 0.5 * expected_weight + change;
    expected_gain -= change;
    EXPECT_NEAR(weight.value(0), expected_weight, 1e-14);
    EXPECT_NEAR(gain.value(0), expected_gain, 1e-14);
  }
  EXPECT_NEAR(weight.value(1), 3 * std::pow(1 - 0.05, 5), 1e-14);  // no gradient: decay alone
}

TEST(optimiser, clips_the_norm_of_all) {
  parameter<double> a("", 1, 1), b("", 1, 1);
  a.gradient << 3;
  b.gradient << 4;
  EXPECT_EQ(clip_gradients<double>({&a, &b}, 10), 5);
  EXPECT_EQ(a.gradient(0), 3);
  EXPECT_EQ(clip_gradients<double>({&a, &b}, 1), 5);
  EXPECT_NEAR(a.gradient(0), 0.6, 1e-15);
  EXPECT_NEAR(b.gradient(0), 0.8, 1e-15);
}

TEST(optimiser, warms_up_then_decays) {
  const schedule schedule{.steps = 100, .warmup = 10, .learning_rate = 2};
  EXPECT_NEAR(schedule.at(0), 0.2, 1e-15);
  EXPECT_NEAR(schedule.at(9), 2, 1e-15);
  EXPECT_NEAR(schedule.at(55), 1.1, 1e-12);
  EXPECT_NEAR(schedule.at(100), 0.2, 1e-15);
}

TEST(settings, that_do_not_fit_are_refused) {
  const auto refused = [](auto change) {
    settings s;
    change(s);
    EXPECT_THROW(require_valid(s), std::invalid_argument);
  };
  EXPECT_NO_THROW(require_valid({}));
  refused([](settings& s) { s.kv_heads = 3; });
  refused([](settings& s) { s.dim = 190; });
  refused([](settings& s) { s.dim = 4; });  // a head of 1 has no pairs to turn
  refused([](settings& s) { s.warmup = s.steps + 1; });
  EXPECT_THROW(choose_attention("sparse", 4, 8), std::invalid_argument);
  EXPECT_THROW(corpus("too short", 50, 0.2), std::invalid_argument);
}

}  // namespace
}  // namespace train_lm
