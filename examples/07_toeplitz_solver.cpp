// A layer is a matrix: written out, and as an operator with which Eigen's solver undoes a blur
// without writing the matrix down.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/concertina.hpp>

#include <Eigen/IterativeLinearSolvers>

#include <cstdlib>
#include <iostream>

int main() {
  using namespace concertina;
  // [1 4 1] x [1 4 1]: symmetric, and its matrix is positive definite.
  const Conv2d<double> blur({.out = 1, .in = 1, .kernel_size = 3, .padding = 1},
                            {1, 4, 1, 4, 16, 4, 1, 4, 1});
  std::cout << "on maps of 2x3 it is\n" << Eigen::MatrixXd(toeplitz(blur, {2, 3})) << "\n\n";

  const PerAxis<2> size{24, 32};
  const ToeplitzOperator<double, 2> op(blur, size);
  const Eigen::VectorXd sharp = Eigen::VectorXd::LinSpaced(op.cols(), -1, 1).array().sin();
  const Eigen::VectorXd blurred = op * sharp;

  Eigen::ConjugateGradient<ToeplitzOperator<double, 2>, Eigen::Lower | Eigen::Upper,
                           Eigen::IdentityPreconditioner>
      solver(op);
  solver.setTolerance(1e-12);
  const Eigen::VectorXd restored = solver.solve(blurred);
  const double error = (restored - sharp).norm() / sharp.norm();
  std::cout << "restored after " << solver.iterations() << " steps, relative error " << error
            << '\n';

  // And back: the matrix gives the layer whose matrix it is.
  const bool back = conv_from_toeplitz(toeplitz(blur, {4, 4}), blur.shape(), {4, 4}) == blur;
  // The condition number is at most (6 / 2)^2 = 9, so the residual's tolerance bounds the error.
  const bool good = solver.info() == Eigen::Success && error < 9e-12 && back;
  if (!std::cout.flush()) std::cerr << "standard output: not all of it could be written\n";
  return std::cout && good ? EXIT_SUCCESS : EXIT_FAILURE;
}
