// SPDX-License-Identifier: Apache-2.0
#include "transfer.hpp"

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>

namespace cifar {
namespace {

template <class Scalar>
using Lane = Eigen::Map<Eigen::Array<Scalar, lanes, 1>>;

template <class Scalar>
void require_size(const char* loss, const Maps<Scalar>& student, const Maps<Scalar>& teacher) {
  if (student.numbers() == teacher.numbers()) return;
  throw concertina::ShapeError(std::string(loss) + ": the student has " +
                               std::to_string(student.numbers()) + " numbers, the teacher " +
                               std::to_string(teacher.numbers()));
}

/// Probabilities of one chunk: softmax(z / temperature).
template <class Scalar>
void softmax(Scalar* z, Index classes, Scalar temperature, std::vector<Row<Scalar>>& result) {
  Eigen::Array<Scalar, lanes, 1> largest = Lane<Scalar>(z),
                                 sum = Eigen::Array<Scalar, lanes, 1>::Zero();
  for (Index k = 1; k < classes; ++k) largest = largest.max(Lane<Scalar>(z + k * lanes));
  for (Index k = 0; k < classes; ++k) {
    Lane<Scalar> to(result[static_cast<std::size_t>(k)].image.data());
    to = ((Lane<Scalar>(z + k * lanes) - largest) / temperature).exp();
    sum += to;
  }
  for (Index k = 0; k < classes; ++k) {
    Lane<Scalar>(result[static_cast<std::size_t>(k)].image.data()) /= sum;
  }
}

/// Rows of features in double, each divided by its norm: [image][feature].
struct Directions {
  Eigen::MatrixXd rows;
  Eigen::VectorXd norms;
};

template <class Scalar>
Directions directions(const Tape<Scalar>& tape, Maps<Scalar>& maps) {
  const Index images = tape.images(), numbers = maps.numbers();
  Directions result{Eigen::MatrixXd(images, numbers), Eigen::VectorXd(images)};
  for (Index image = 0; image < images; ++image) {
    const Scalar* from = maps.values(image / lanes) + image % lanes;
    for (Index i = 0; i < numbers; ++i) {
      result.rows(image, i) = static_cast<double>(from[i * lanes]);
    }
  }
  // Features that are all zero have no direction, and get no gradient.
  result.norms = result.rows.rowwise().norm().cwiseMax(1e-30);
  result.rows = result.norms.cwiseInverse().asDiagonal() * result.rows;
  return result;
}

/// Cosines scaled to 0 .. 1, with what keeps their logarithm finite.
Eigen::MatrixXd similarities(const Directions& directions) {
  constexpr double eps = 1e-7;
  return ((directions.rows * directions.rows.transpose()).array() + 1) / 2 + eps;
}

}  // namespace

template <class Scalar>
void distillation(Tape<Scalar>& tape, Maps<Scalar>& logits, Maps<Scalar>& teacher,
                  double temperature, double weight) {
  require_size("distillation", logits, teacher);
  // The cross-entropy's forward pass has set the gradient already, so this adds to it.
  static_cast<void>(tape.first_writer(logits));
  const Index classes = logits.numbers();
  Operation operation;
  operation.backward.each([=, &tape, &logits, &teacher](Index chunk, Index) {
    const auto t = static_cast<Scalar>(temperature);
    std::vector<Row<Scalar>> own(static_cast<std::size_t>(classes)), wanted(own.size());
    softmax(logits.values(chunk), classes, t, own);
    softmax(teacher.values(chunk), classes, t, wanted);
    Row<Scalar> mask = tape.mask(chunk);
    const Scalar share = static_cast<Scalar>(weight) * t / static_cast<Scalar>(tape.images());
    Scalar* gradient = logits.gradients(chunk);
    for (std::size_t k = 0; k < own.size(); ++k, gradient += lanes) {
      Lane<Scalar>(gradient) +=
          share * Lane<Scalar>(mask.image.data()) *
          (Lane<Scalar>(own[k].image.data()) - Lane<Scalar>(wanted[k].image.data()));
    }
  });
  tape.record(std::move(operation));
}

template <class Scalar>
void hint_loss(Tape<Scalar>& tape, Maps<Scalar>& features, Maps<Scalar>& hint) {
  require_size("hint", features, hint);
  const auto first_writer = tape.first_writer(features), hint_writer = tape.first_writer(hint);
  Operation operation;
  operation.backward.each([=, &tape, &features, &hint](Index chunk, Index) {
    const Row<Scalar> mask = tape.mask(chunk);
    const Scalar share = 2 / static_cast<Scalar>(tape.images() * features.numbers());
    const bool first = first_writer(), hint_first = hint_writer();
    for (Index i = 0; i < features.numbers() * lanes; i += vector_lanes<Scalar>) {
      const Vector<Scalar> own =
          share * vector_at(mask.image.data() + i % lanes) *
          (vector_at(features.values(chunk) + i) - vector_at(hint.values(chunk) + i));
      Vector<Scalar>& to = vector_at(features.gradients(chunk) + i);
      to = first ? own : to + own;
      if (!hint.differentiable) continue;
      Vector<Scalar>& hint_to = vector_at(hint.gradients(chunk) + i);
      hint_to = hint_first ? -own : hint_to - own;
    }
  });
  tape.record(std::move(operation));
}

template <class Scalar>
void similarity_transfer(Tape<Scalar>& tape, Maps<Scalar>& features, Maps<Scalar>& teacher) {
  const auto gradient = std::make_shared<Eigen::MatrixXd>();  // [image][feature]
  Operation operation;
  operation.forward.then([gradient, &tape, &features, &teacher] {
    if (!tape.training()) return;
    const Directions student = directions(tape, features);
    const Eigen::MatrixXd own = similarities(student);
    Eigen::MatrixXd wanted = similarities(directions(tape, teacher));
    wanted.array().colwise() /= wanted.rowwise().sum().eval().array();
    const Eigen::VectorXd sums = own.rowwise().sum();
    const auto images = static_cast<double>(tape.images());
    // The row's sum of wanted is 1: d loss / d own(i, j), and half of
    // it for the cosine.
    Eigen::MatrixXd slope = -(wanted.array() / own.array()).matrix();
    slope.colwise() += sums.cwiseInverse();
    slope /= 2 * images;
    const Eigen::MatrixXd along = (slope + slope.transpose()) * student.rows;
    const Eigen::VectorXd radial = along.cwiseProduct(student.rows).rowwise().sum();
    *gradient =
        student.norms.cwiseInverse().asDiagonal() * (along - radial.asDiagonal() * student.rows);
    for (Index image = 0; image < tape.images(); ++image) {
      if (student.norms[image] <= 1e-30) gradient->row(image).setZero();
    }
  });
  const auto first_writer = tape.first_writer(features);
  operation.backward.each([=, &tape, &features](Index chunk, Index) {
    const bool first = first_writer();
    Scalar* to = features.gradients(chunk);
    for (Index i = 0; i < features.numbers(); ++i) {
      for (Index image = chunk * lanes; image < (chunk + 1) * lanes; ++image, ++to) {
        const Scalar own =
            image < tape.images() ? static_cast<Scalar>((*gradient)(image, i)) : Scalar(0);
        *to = first ? own : *to + own;
      }
    }
  });
  tape.record(std::move(operation));
}

#define CIFAR_INSTANTIATE(Scalar)                                                          \
  template void distillation(Tape<Scalar>&, Maps<Scalar>&, Maps<Scalar>&, double, double); \
  template void hint_loss(Tape<Scalar>&, Maps<Scalar>&, Maps<Scalar>&);                    \
  template void similarity_transfer(Tape<Scalar>&, Maps<Scalar>&, Maps<Scalar>&);
CIFAR_INSTANTIATE(float)
CIFAR_INSTANTIATE(double)
#undef CIFAR_INSTANTIATE

}  // namespace cifar
