// The matrix that a layer is: against the layer itself, in products, in Eigen's solvers, and back
// to the kernel.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/toeplitz.hpp>

#include <concertina/contract.hpp>
#include <concertina/modular.hpp>
#include <concertina/transposed.hpp>

#include "support.hpp"

#include <Eigen/IterativeLinearSolvers>

#include <complex>
#include <limits>

namespace concertina::test {
namespace {

template <class Scalar>
using Dense = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

template <Layer F>
Dense<typename F::Scalar> dense(const F& layer, const PerAxis<F::Rank>& input_size) {
  return toeplitz(layer, input_size);
}

template <class Scalar>
Eigen::VectorX<Scalar> random_vector(Index length, Rng& rng) {
  Eigen::VectorX<Scalar> vector(length);
  for (Scalar& number : vector) number = static_cast<Scalar>(random_index(rng, -4, 4));
  return vector;
}

template <class Scalar, int Rank>
Eigen::VectorX<Scalar> flattened(const FeatureMap<Scalar, Rank>& map) {
  return Eigen::Map<const Eigen::VectorX<Scalar>>(map.values().data(),
                                                  static_cast<Index>(map.values().size()));
}

/// The smallest size on which each tap reads the map somewhere, by trying.
template <int Rank>
PerAxis<Rank> size_that_shows_every_tap(const ConvShape<Rank>& shape) {
  PerAxis<Rank> size = 1;
  for (int axis = 0; axis < Rank; ++axis) {
    const auto shown = [&](Index tap) {
      for (Index j = 0; j < counted_positions(shape, size[axis], axis); ++j) {
        const Index i =
            j * shape.stride[axis] - shape.padding.start[axis] + tap * shape.dilation[axis];
        if (i >= 0 && i < size[axis]) return true;
      }
      return false;
    };
    for (Index tap = 0; tap < shape.kernel_size[axis];)
      shown(tap) ? ++tap : (++size[axis], tap = 0);
  }
  return size;
}

TEST_CASE("the matrix of the paper's supplement", "[toeplitz]") {
  const Conv2d<int> layer({.out = 1, .in = 1, .kernel_size = 2, .bias = true}, {1, 2, 3, 4}, {5});
  Dense<int> expected(4, 9);
  expected << 1, 2, 0, 3, 4, 0, 0, 0, 0,  //
      0, 1, 2, 0, 3, 4, 0, 0, 0,          //
      0, 0, 0, 1, 2, 0, 3, 4, 0,          //
      0, 0, 0, 0, 1, 2, 0, 3, 4;
  CHECK((dense(layer, 3) == expected));
  CHECK((toeplitz(layer, 3).toDense() == expected));
  Dense<int> whole = Dense<int>::Zero(5, 10);
  whole.topLeftCorner(4, 9) = expected;
  whole.col(9) << 5, 5, 5, 5, 1;
  CHECK((augmented(layer, 3).toDense() == whole));
}

TEMPLATE_TEST_CASE_SIG("the matrix times a map is the layer of the map", "[toeplitz]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(1);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 40)) {
    INFO(to_string(shape));
    const auto layer = small_integers<float>(shape, rng);
    const PerAxis<Rank> size = random_input_size(shape, rng, Rank == 3 ? 2 : 4);
    const auto map = small_integers<float, Rank>({.channels = shape.in, .size = size}, rng);
    const Eigen::VectorXf x = flattened(map), y = flattened(layer(map));
    Eigen::VectorXf linear = y;
    for (Index row = 0; shape.bias && row < y.size(); ++row) {
      linear[row] -= layer.bias()[static_cast<std::size_t>(row * shape.out / y.size())];
    }
    CHECK((toeplitz(layer, size) * x == linear));
    CHECK((dense(layer, size) * x == linear));
    CHECK((ToeplitzOperator(layer, size) * x == linear));
    Eigen::VectorXf x1(x.size() + 1), y1(y.size() + 1);
    x1 << x, 1;
    y1 << y, 1;
    CHECK((augmented(layer, size) * x1 == y1));
  }
}

TEMPLATE_TEST_CASE_SIG("every tap on the map has an entry, zero or not", "[toeplitz]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(2);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 20)) {
    INFO(to_string(shape));
    Conv<int, Rank> ones(shape);
    std::ranges::fill(ones.weight(), 1);
    const PerAxis<Rank> size = random_input_size(shape, rng, 2);
    const Index entries = (dense(ones, size).array() == 1).count();
    const auto zeros = toeplitz(Conv<int, Rank>(shape), size);
    CHECK(zeros.nonZeros() == entries);
    CHECK(zeros.isCompressed());
    CHECK(zeros.data().allocatedSize() == entries);
    CHECK(augmented(ones, size).nonZeros() == entries + 1 + (shape.bias ? zeros.rows() : 0));
  }
}

TEMPLATE_TEST_CASE_SIG("matrices multiply as layers do, biases included", "[toeplitz]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(3);
  int exact = 0, inexact = 0;
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, Rank == 3 ? 20 : 60)) {
    ConvShape<Rank> after = random_shape_after(shape, rng);
    if (random_index(rng, 0, 1) == 0) after = unpadded(after);  // padding is rarely exact there
    INFO(to_string(shape) << ", " << to_string(after));
    const auto inner = small_integers<PrimeField>(shape, rng);
    const auto outer = small_integers<PrimeField>(after, rng);
    const PerAxis<Rank> size = random_input_size(std::vector{shape, after}, rng);
    const PerAxis<Rank> between = output_size(shape, size);
    try {
      const Conv<PrimeField, Rank> product =
          contract(outer * inner, Border<Rank>{.input_size = size});
      CHECK((toeplitz(product, size).toDense() ==
             (toeplitz(outer, between) * toeplitz(inner, size)).toDense()));
      CHECK((augmented(product, size).toDense() ==
             (augmented(outer, between) * augmented(inner, size)).toDense()));
      ++exact;
    } catch (const InexactError&) {
      ++inexact;
    }
  }
  CHECK(exact > 5);
  CHECK((inexact > 0 || Rank == 0));
}

TEMPLATE_TEST_CASE_SIG("the operator is the matrix, and so is its transpose", "[toeplitz]",
                       ((int Rank), Rank), 0, 1, 2, 3) {
  Rng rng(4);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 20)) {
    INFO(to_string(shape));
    const auto layer = small_integers<double>(shape, rng);
    const PerAxis<Rank> size = random_input_size(shape, rng, 2);
    const auto op = ToeplitzOperator(layer, size);
    const auto matrix = dense(layer, size);
    REQUIRE(op.rows() == matrix.rows());
    REQUIRE(op.cols() == matrix.cols());
    const Eigen::VectorXd x = random_vector<double>(op.cols(), rng);
    const Eigen::VectorXd y = random_vector<double>(op.rows(), rng);
    const Eigen::VectorXd forward = matrix * x, backward = matrix.transpose() * y;
    CHECK((op.transpose() * y == backward));
    CHECK((op.adjoint() * y == backward));
    CHECK((op.transpose().transpose() * x == forward));

    Eigen::VectorXd sum = y;
    sum.noalias() -= op * (2 * x);
    CHECK((sum == y - 2 * forward));
    Eigen::MatrixXd columns(op.cols(), 2), products(op.rows(), 2);
    columns << x, -x;
    products << forward, -forward;
    CHECK((op * columns == products));
    CHECK((op * Dense<double>(columns) == products));
  }
}

TEST_CASE("an operator over a field, and a vector multiplied in place", "[toeplitz]") {
  Rng rng(5);
  Conv2d<PrimeField> layer({.out = 2, .in = 2, .kernel_size = 3, .padding = 1});
  fill_random(layer.weight(), rng);
  Eigen::VectorX<PrimeField> x = random_vector<PrimeField>(2 * 5 * 4, rng);
  const Eigen::VectorX<PrimeField> y = dense(layer, {5, 4}) * x;
  x = ToeplitzOperator(layer, {5, 4}) * x;
  CHECK((x == y));
}

TEST_CASE("the adjoint of complex numbers is conjugated, the transpose is not", "[toeplitz]") {
  using Complex = std::complex<double>;
  const Conv1d<Complex> layer({.out = 1, .in = 1, .kernel_size = 2, .stride = 2},
                              {{1, 2}, {3, -1}});
  const auto op = ToeplitzOperator(layer, 6);
  const auto matrix = dense(layer, 6);
  const Eigen::VectorX<Complex> y{{{1, 1}, {2, -3}, {0, 4}}};
  CHECK((op.transpose() * y == matrix.transpose() * y));
  CHECK((op.adjoint() * y == matrix.adjoint() * y));
  CHECK((op.conjugate() * (op.adjoint() * y) == matrix.conjugate() * (matrix.adjoint() * y)));
  CHECK(transposed(layer)({{.size = 3}, std::span(y.data(), 3)}) ==
        FeatureMap<Complex, 1>({.size = 6}, [&] {
          const Eigen::VectorX<Complex> x = matrix.transpose() * y;
          return std::vector<Complex>(x.begin(), x.end());
        }()));
}

TEST_CASE("Eigen's iterative solvers take the operator", "[toeplitz]") {
  Rng rng(6);
  using Operator = ToeplitzOperator<double, 2>;

  SECTION("least squares, more equations than unknowns and fewer") {
    for (const Index out : {2, 6}) {
      const auto layer = small_integers<double, 2>(
          {.out = out, .in = 2, .kernel_size = 3, .stride = 2, .padding = 2}, rng);
      const auto op = ToeplitzOperator(layer, {5, 6});
      const Eigen::VectorXd y = random_vector<double>(op.rows(), rng);
      Eigen::LeastSquaresConjugateGradient<Operator, Eigen::IdentityPreconditioner> solver(op);
      solver.setMaxIterations(1000);
      const Eigen::VectorXd x = solver.solve(y);
      CHECK(solver.info() == Eigen::Success);
      CHECK((op.adjoint() * (op * x - y)).norm() <= 1e-8 * y.norm());
    }
  }
  SECTION("a square system") {
    auto layer =
        small_integers<double, 2>({.out = 2, .in = 2, .kernel_size = 3, .padding = 1}, rng);
    for (std::size_t channel : {0u, 1u}) layer.weight()[channel * 27 + 4] = 100;  // the diagonal
    const auto op = ToeplitzOperator(layer, {6, 7});
    const Eigen::VectorXd x = random_vector<double>(op.cols(), rng), y = op * x;
    const Eigen::BiCGSTAB<Operator, Eigen::IdentityPreconditioner> solver(op);
    CHECK((solver.solve(y) - x).norm() <= 1e-8 * x.norm());
  }
}

TEMPLATE_TEST_CASE_SIG("back from the matrix to the kernel", "[toeplitz]", ((int Rank), Rank), 0, 1,
                       2, 3) {
  Rng rng(7);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, Rank == 3 ? 10 : 40)) {
    INFO(to_string(shape));
    const auto layer = small_integers<PrimeField>(shape, rng);
    const PerAxis<Rank> size = size_that_shows_every_tap(shape);
    const auto matrix = toeplitz(layer, size);
    const auto same = [&](const auto& back) {
      return !back.shape().bias && std::ranges::equal(back.weight(), layer.weight());
    };
    CHECK(same(conv_from_toeplitz(matrix, shape, size)));
    const Eigen::SparseMatrix<PrimeField> by_columns = matrix;
    CHECK(same(conv_from_toeplitz(by_columns, shape, size)));
    CHECK(same(conv_from_toeplitz(dense(layer, size), shape, size)));
    const Eigen::MatrixX<PrimeField> dense = matrix;
    CHECK(same(conv_from_toeplitz(dense, shape, size)));
    for (int axis = 0; axis < Rank; ++axis) {
      PerAxis<Rank> smaller = size;
      if (--smaller[axis] < 1 || counted_positions(shape, smaller[axis], axis) < 1) continue;
      const auto less = toeplitz(layer, smaller);
      CHECK_THROWS_AS(conv_from_toeplitz(less, shape, smaller), ShapeError);
    }
  }
}

TEMPLATE_TEST_CASE_SIG("a changed entry is noticed, or the matrix of what comes back", "[toeplitz]",
                       ((int Rank), Rank), 0, 1, 2) {
  Rng rng(8);
  for (const ConvShape<Rank>& shape : all_shapes<Rank>(rng, 20)) {
    INFO(to_string(shape));
    const PerAxis<Rank> size = size_that_shows_every_tap(shape);
    Conv<int, Rank> ones(shape);
    std::ranges::fill(ones.weight(), 1);
    const auto pattern = dense(ones, size);
    const auto original = dense(small_integers<int>(shape, rng), size);
    for (int trial = 0; trial < 30; ++trial) {
      auto matrix = original;
      const Index row = random_index(rng, 0, matrix.rows() - 1);
      const Index column = random_index(rng, 0, matrix.cols() - 1);
      matrix(row, column) += 1;
      try {
        const Conv<int, Rank> back = conv_from_toeplitz(matrix, shape, size);
        CHECK((dense(back, size) == matrix));
        CHECK(pattern(row, column) == 1);
      } catch (const NotToeplitzError& error) {
        CHECK_THAT(error.what(), Catch::Contains("(" + to_string(shape).substr(0, 6)));
        const Eigen::SparseMatrix<int> sparse = matrix.sparseView();
        CHECK(message_of<NotToeplitzError>([&] { conv_from_toeplitz(sparse, shape, size); }) ==
              error.what());
      }
    }
  }
}

TEST_CASE("the first entry that is not of the form is named", "[toeplitz]") {
  const Conv2d<int> layer({.out = 2, .in = 2, .kernel_size = 2, .groups = 2},
                          {1, 2, 3, 4, 5, 6, 7, 8});
  auto matrix = dense(layer, 3);  // 8 x 18
  const auto message = [&] {
    return message_of<NotToeplitzError>([&] { conv_from_toeplitz(matrix, layer.shape(), {3, 3}); });
  };
  matrix(7, 14) = -6;
  CHECK_THAT(message(), Catch::Contains("entry (7, 14), output channel 1 at position 1x1 and input "
                                        "channel 1 at position 1x2, is -6 instead of 6"));
  matrix(5, 8) = 9;  // the other group
  CHECK_THAT(message(), Catch::Contains("entry (5, 8), output channel 1 at position 0x1 and input "
                                        "channel 0 at position 2x2, is 9 instead of 0"));
  matrix(2, 3) = 0;  // absent from a sparse matrix
  CHECK_THAT(message(), Catch::Contains("entry (2, 3)") && Catch::Contains("is 0 instead of 1"));

  Eigen::MatrixXi full = Eigen::MatrixXi::Ones(2, 2);
  CHECK_THAT(
      message_of<NotToeplitzError>(
          [&] { conv_from_toeplitz(full, ConvShape<0>{.out = 2, .in = 2, .groups = 2}, {}); }),
      Catch::Contains("entry (0, 1), output channel 0 and input channel 1, is 1 instead of 0"));
}

TEST_CASE("a matrix of another size, or that hides a tap, is refused", "[toeplitz]") {
  const ConvShape<2> shape{.out = 1, .in = 1, .kernel_size = 3, .padding = 1};
  const Conv2d<int> layer(shape);
  CHECK_THAT(message_of<ShapeError>([&] { conv_from_toeplitz(toeplitz(layer, 4), shape, {4, 5}); }),
             Catch::Contains("16x16") && Catch::Contains("20x20") && Catch::Contains("4x5"));
  CHECK_THAT(
      message_of<ShapeError>([&] { conv_from_toeplitz(toeplitz(layer, {4, 1}), shape, {4, 1}); }),
      Catch::Contains("tap 0x0") && Catch::Contains("4x1"));
  CHECK_THROWS_AS(conv_from_toeplitz(Eigen::MatrixXi(1, 1), ConvShape<0>{.out = 1}, {}),
                  ShapeError);
  CHECK_THROWS_AS(toeplitz(Conv2d<int>({.out = 1, .in = 1, .kernel_size = 3}), 2), ShapeError);
  CHECK_THROWS_AS(ToeplitzOperator(layer, {0, 3}), ShapeError);
}

TEST_CASE("an operator refuses a vector of another length", "[toeplitz]") {
  const auto op = ToeplitzOperator(Conv1d<double>({.out = 2, .in = 1, .kernel_size = 2}), 4);
  const Eigen::VectorXd x = Eigen::VectorXd::Zero(6);
  CHECK_THAT(message_of<ShapeError>([&] { op* x; }),
             Catch::Contains("6x4 matrix") && Catch::Contains("length 6"));
  CHECK_NOTHROW(op.adjoint() * x);
}

TEST_CASE("a matrix over the limit is refused before it is allocated", "[toeplitz]") {
  const Conv2d<float> layer({.out = 1, .in = 1, .kernel_size = 2, .bias = true});
  const auto bytes = [](std::size_t entries, std::size_t rows) {
    return MemoryLimit{entries * (sizeof(float) + sizeof(int)) + (rows + 1) * sizeof(int)};
  };
  const auto less = [](MemoryLimit limit) { return MemoryLimit{limit.bytes - 1}; };
  CHECK_NOTHROW(toeplitz(layer, 3, bytes(16, 4)));
  CHECK_THROWS_AS(toeplitz(layer, 3, less(bytes(16, 4))), SizeError);
  CHECK_NOTHROW(augmented(layer, 3, bytes(21, 5)));
  CHECK_THROWS_AS(augmented(layer, 3, less(bytes(21, 5))), SizeError);
  CHECK_THAT(message_of<SizeError>([&] { toeplitz(layer, 3, {147}); }),
             Catch::Contains("4x9 matrix takes 148 bytes") && Catch::Contains("limit of 147"));

  // These would fail otherwise if they were allocated: petabytes, and more than can be counted.
  constexpr Index large = Index{1} << 24;
  const MemoryLimit none{std::numeric_limits<std::size_t>::max()};
  CHECK_THAT(message_of<SizeError>([&] { toeplitz(layer, large); }),
             Catch::Contains("281474943156225x281474976710656 matrix"));
  CHECK_THAT(message_of<SizeError>([&] { toeplitz(layer, large, none); }),
             Catch::Contains("32-bit indices"));
  CHECK_THROWS_AS(augmented(layer, large), SizeError);
  CHECK_THROWS_AS(ToeplitzOperator(layer, Index{1} << 40), SizeError);
}

}  // namespace
TEST_CASE("a layer at a size is a fully connected layer, and joins others", "[toeplitz]") {
  Rng rng(51);
  for (const ConvShape<2>& shape : all_shapes<2>(rng, 20)) {
    const PerAxis<2> size = random_input_size(shape, rng);
    const auto layer = small_integers<double>(shape, rng);
    const auto x = small_integers<double, 2>({.batch = 3, .channels = shape.in, .size = size}, rng);
    const auto y = layer(x);
    const FeatureMap<double, 0> flat({.batch = 3, .channels = shape.in * numel(size)},
                                     {x.values().begin(), x.values().end()});
    const auto linear = conv_as_linear(layer, size);
    CHECK(linear.shape().groups == shape.groups);
    CHECK(std::ranges::equal(linear(flat).values(), y.values()));
    const auto other = small_integers<double>(linear.shape(), rng);
    const Linear<double> sum = contract(linear + other);
    CHECK(sum.shape() == linear.shape());
    for (std::size_t i = 0; i < sum.weight().size(); ++i) {
      CHECK(sum.weight()[i] == linear.weight()[i] + other.weight()[i]);
    }
    // The adjoint of writing the matrix out, which is linear in the layer.
    const auto inner_product = [](const auto& f, const auto& g) {
      return std::inner_product(f.weight().begin(), f.weight().end(), g.weight().begin(), 0.0) +
             std::inner_product(f.bias().begin(), f.bias().end(), g.bias().begin(), 0.0);
    };
    CHECK(inner_product(linear, other) ==
          inner_product(layer, conv_as_linear_gradient(shape, size, other)));
    CHECK_THROWS_AS(conv_as_linear_gradient(shape, size, Linear<double>({.out = 1, .in = 1})),
                    ShapeError);
  }
}

TEST_CASE("gradients of stored halves are summed in float", "[toeplitz]") {
  const ConvShape<2> shape{.out = 1, .in = 1};
  Linear<Eigen::bfloat16> ones({.out = 1024, .in = 1024});
  for (Eigen::bfloat16& element : ones.weight()) element = Eigen::bfloat16(1);
  CHECK(conv_as_linear_gradient(shape, 32, ones).weight()[0] == Eigen::bfloat16(1024));
}

TEST_CASE("an operator that was moved from throws", "[toeplitz]") {
  Conv1d<double> doubled({.out = 1, .in = 1}, {2});
  ToeplitzOperator<double, 1> op(doubled, 3);
  const ToeplitzOperator<double, 1> kept = std::move(op);
  const Eigen::Vector3d x(1, 2, 3);
  CHECK_THROWS_AS(op * x, ShapeError);
  CHECK_THROWS_AS(op.transpose() * x, ShapeError);
  CHECK(Eigen::VectorXd(kept * x) == 2 * x);
  const Conv1d<double> taken = std::move(doubled);
  CHECK_THROWS_AS(toeplitz(doubled, 3), ShapeError);
  CHECK_THROWS_AS(ToeplitzOperator(doubled, 3), ShapeError);
  CHECK(Eigen::VectorXd(toeplitz(taken, 3) * x) == 2 * x);
}

}  // namespace concertina::test
