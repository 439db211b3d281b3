// Losses of knowledge transfer: each against its definition in plain loops, each gradient against
// central differences of that.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/transfer.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <catch2/catch.hpp>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

using namespace cifar;
using Catch::Matchers::Contains;
using concertina::test::message_of, concertina::test::Rng;

namespace {

/// Numbers [image][number].
using Rows = std::vector<std::vector<double>>;

Rows random_rows(Index images, Index numbers, double scale, Rng& rng) {
  Rows rows(static_cast<std::size_t>(images));
  for (auto& row : rows) {
    for (Index i = 0; i < numbers; ++i) row.push_back(concertina::random_uniform(rng, scale));
  }
  return rows;
}

/// Lanes without an image get a number that would show.
void put(Maps<double>& maps, const Rows& rows) {
  const auto images = static_cast<Index>(rows.size());
  for (Index chunk = 0; chunk * lanes < images; ++chunk) {
    for (Index i = 0; i < maps.numbers(); ++i) {
      for (Index lane = 0; lane < lanes; ++lane) {
        const Index image = chunk * lanes + lane;
        maps.values(chunk)[i * lanes + lane] =
            image < images ? rows[static_cast<std::size_t>(image)][static_cast<std::size_t>(i)]
                           : 100.0;
      }
    }
  }
}

double gradient_of(Maps<double>& maps, std::size_t image, std::size_t number) {
  const auto chunk = static_cast<Index>(image) / lanes;
  return maps.gradients(
      chunk)[static_cast<Index>(number) * lanes + static_cast<Index>(image) % lanes];
}

/// The derivative of loss() to the fourth order.
double derivative(double& number, const std::function<double()>& loss) {
  const double start = number, step = 1e-3;
  const auto at = [&](double by) {
    number = start + by;
    return loss();
  };
  const double near = at(step) - at(-step), far = at(2 * step) - at(-2 * step);
  number = start;
  return (8 * near - far) / (12 * step);
}

void check_gradient(Maps<double>& maps, Rows& rows, const std::function<double()>& loss) {
  for (std::size_t image = 0; image < rows.size(); ++image) {
    for (std::size_t i = 0; i < rows[image].size(); ++i) {
      INFO("image " << image << ", number " << i);
      CHECK(gradient_of(maps, image, i) ==
            Approx(derivative(rows[image][i], loss)).epsilon(1e-7).margin(1e-9));
    }
  }
}

std::vector<double> softmax(const std::vector<double>& z, double temperature) {
  std::vector<double> p;
  double sum = 0;
  for (const double number : z) {
    p.push_back(std::exp(number / temperature));
    sum += p.back();
  }
  for (double& number : p) number /= sum;
  return p;
}

constexpr Index batches[] = {1, 16, 19};

}  // namespace

TEST_CASE("distillation adds the softened cross-entropy to that of the labels", "[cifar]") {
  constexpr double temperature = 3, weight = 0.75;
  for (const Index images : batches) {
    INFO(images << " images");
    Rng rng(1);
    Rows z = random_rows(images, 5, 6, rng);
    const Rows t = random_rows(images, 5, 6, rng);
    ThreadPool pool(2);
    Tape<double> tape(images, pool);
    Maps<double>&logits = tape.maps(5, 1, 1), &teacher = tape.maps(5, 1, 1, false);
    put(logits, z), put(teacher, t);
    CrossEntropy<double> entropy(tape, logits);
    entropy.set_weight(1 - weight);
    distillation(tape, logits, teacher, temperature, weight);
    entropy.set_labels(std::vector<std::uint8_t>(static_cast<std::size_t>(images), 2));
    const auto loss = [&] {
      double sum = 0;
      for (std::size_t n = 0; n < z.size(); ++n) {
        sum -= (1 - weight) * std::log(softmax(z[n], 1)[2]);
        const auto own = softmax(z[n], temperature), wanted = softmax(t[n], temperature);
        for (std::size_t k = 0; k < 5; ++k) {
          sum -= weight * temperature * temperature * wanted[k] * std::log(own[k]);
        }
      }
      return sum / static_cast<double>(images);
    };
    for (int time = 0; time < 2; ++time) {  // the second is not added to the first
      tape.forward(images, true);
      tape.backward();
      check_gradient(logits, z, loss);
    }
  }
}

TEST_CASE("a hint's gradient goes to the features, and to a projection that learns", "[cifar]") {
  for (const bool learned : {false, true}) {
    for (const Index images : batches) {
      INFO(images << " images" << (learned ? ", learned" : ""));
      Rng rng(2);
      Rows f = random_rows(images, 3, 2, rng), h = random_rows(images, 3, 2, rng);
      ThreadPool pool(1);
      Tape<double> tape(images, pool);
      Maps<double>&features = tape.maps(3, 1, 1), &hint = tape.maps(3, 1, 1, learned);
      put(features, f), put(hint, h);
      hint_loss(tape, features, hint);
      const auto loss = [&] {
        double sum = 0;
        for (std::size_t n = 0; n < f.size(); ++n) {
          for (std::size_t i = 0; i < 3; ++i) sum += std::pow(f[n][i] - h[n][i], 2);
        }
        return sum / static_cast<double>(3 * images);
      };
      tape.forward(images, true);
      tape.backward();
      check_gradient(features, f, loss);
      if (learned) check_gradient(hint, h, loss);
    }
  }
}

TEST_CASE("similarity transfer is the divergence of the teacher's from the student's", "[cifar]") {
  for (const Index images : {2, 16, 19}) {
    INFO(images << " images");
    Rng rng(3);
    Rows f = random_rows(images, 4, 2, rng);
    const Rows t = random_rows(images, 6, 2, rng);
    ThreadPool pool(2);
    Tape<double> tape(images, pool);
    Maps<double>&features = tape.maps(4, 1, 1), &teacher = tape.maps(6, 1, 1, false);
    put(features, f), put(teacher, t);
    similarity_transfer(tape, features, teacher);
    const auto probabilities = [](const Rows& rows) {
      Rows p(rows.size());
      for (std::size_t a = 0; a < rows.size(); ++a) {
        double sum = 0;
        for (const auto& other : rows) {
          double product = 0, own = 0, others = 0;
          for (std::size_t i = 0; i < other.size(); ++i) {
            product += rows[a][i] * other[i];
            own += rows[a][i] * rows[a][i], others += other[i] * other[i];
          }
          p[a].push_back((product / std::sqrt(own * others) + 1) / 2 + 1e-7);
          sum += p[a].back();
        }
        for (double& number : p[a]) number /= sum;
      }
      return p;
    };
    const auto loss = [&] {
      const Rows own = probabilities(f), wanted = probabilities(t);
      double sum = 0;
      for (std::size_t a = 0; a < own.size(); ++a) {
        for (std::size_t b = 0; b < own.size(); ++b) {
          sum += wanted[a][b] * std::log(wanted[a][b] / own[a][b]);
        }
      }
      return sum / static_cast<double>(images);
    };
    tape.forward(images, true);
    tape.backward();
    check_gradient(features, f, loss);
  }
}

TEST_CASE("features that are all zero get no gradient of their similarities", "[cifar]") {
  ThreadPool pool(1);
  Tape<double> tape(2, pool);
  Maps<double>&features = tape.maps(2, 1, 1), &teacher = tape.maps(2, 1, 1, false);
  put(features, {{0, 0}, {1, 2}});
  put(teacher, {{1, 0}, {0, 1}});
  similarity_transfer(tape, features, teacher);
  tape.forward(2, true);
  tape.backward();
  for (std::size_t image = 0; image < 2; ++image) {
    for (std::size_t i = 0; i < 2; ++i) CHECK(std::isfinite(gradient_of(features, image, i)));
  }
  CHECK(gradient_of(features, 0, 0) == 0);
}

TEST_CASE("students and teachers of other sizes are refused", "[cifar]") {
  ThreadPool pool(1);
  Tape<float> tape(1, pool);
  Maps<float>&a = tape.maps(2, 1, 1), &b = tape.maps(3, 1, 1);
  CHECK_THAT(message_of<concertina::ShapeError>([&] { distillation(tape, a, b, 4, 1); }),
             Contains("distillation") && Contains("2 numbers") && Contains("3"));
  CHECK_THAT(message_of<concertina::ShapeError>([&] { hint_loss(tape, a, b); }), Contains("hint"));
}
