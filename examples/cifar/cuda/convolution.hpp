// The convolutions of a small network as block programs: of a batch of maps, and their gradients
// for the maps and for the kernel. Stride 1, no dilation, one group.
// Maps are [image][channel][y][x].
//
// In all of them a thread keeps a tile of sums in registers, 8 channels by 4 neighbouring positions
// (or by the taps of a kernel's row), and a row of the map slides past the kernel's row there. All
// that is read from shared memory comes in fours. Of a multiprocessor's cycle, 4 warps multiply and
// add while shared memory serves one access of a warp to 128 bytes, so each of these accesses must
// feed more than 4 multiply-adds of a warp. For a row of K taps:
//
//           of a thread, of a warp:                       multiply-adds for an access
//           multiply-adds   map       other   accesses    K = 3      5      7      9
//   maps    32 K            M fours   2 K     4 M + 2 K     6.9    8.9    8.6    9.6
//   kernel  32 K            M fours   8       4 M + 8       6.0   10.0   11.2   14.4
//
// with M = (K + 3) / 4 rounded up. A warp's threads read different fours of the map, an access for
// eight of them, and all the same of the other: a kernel's taps, or the gradient of the output.
// From the device's memory a number is read once for each block that needs it, and then feeds 8 K^2
// multiply-adds (a map), one for each position of the block's tile (a kernel).
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "convolution_tiles.hpp"
#include "convolve.hpp"
#include "kernel_gradient.hpp"

namespace cifar::cuda {

// What callers call. Each makes its programs and calls run(program, what for) with them, in order:
// launch() on the device, execute() in tests.

template <class Scalar>
struct ConvolutionForward {
  ConvolutionShape shape;
  const Scalar* x = nullptr;       ///< [batch][in][height][width]
  const Scalar* weight = nullptr;  ///< [out][in][kernel][kernel]
  const Scalar* bias = nullptr;    ///< [out], or null for none
  Scalar* y = nullptr;             ///< [batch][out][out height][out width]
  Index busy = busy_blocks;
};

/// y[n][o][j] = bias[o] + the sum of weight[o][c][a] * x[n][c][j - padding + a], x zero outside, as
/// torch.nn.Conv2d.
/// Throws  what validate() throws
template <class Scalar, class Run>
void convolution_forward(const ConvolutionForward<Scalar>& arguments, Run&& run) {
  validate(arguments.shape);
  detail::with_kernel(arguments.shape.kernel, [&](auto kernel) {
    run(Convolve<Scalar, kernel>({.shape = arguments.shape,
                                  .x = arguments.x,
                                  .weight = arguments.weight,
                                  .bias = arguments.bias,
                                  .y = arguments.y,
                                  .adjoint = false},
                                 arguments.busy),
        "a convolution");
  });
}

template <class Scalar>
struct ConvolutionInputGradient {
  ConvolutionShape shape;          ///< of the convolution
  const Scalar* dy = nullptr;      ///< [batch][out][out height][out width]
  const Scalar* weight = nullptr;  ///< [out][in][kernel][kernel]
  Scalar* dx = nullptr;            ///< [batch][in][height][width], overwritten
  Index busy = busy_blocks;
};

/// dx[n][c][i] = the sum of weight[o][c][a] * dy[n][o][i + padding - a], dy zero outside.
/// Throws  what validate() throws
template <class Scalar, class Run>
void convolution_input_gradient(const ConvolutionInputGradient<Scalar>& arguments, Run&& run) {
  validate(arguments.shape);
  detail::with_kernel(arguments.shape.kernel, [&](auto kernel) {
    run(Convolve<Scalar, kernel>({.shape = arguments.shape.adjoint(),
                                  .x = arguments.dy,
                                  .weight = arguments.weight,
                                  .bias = nullptr,
                                  .y = arguments.dx,
                                  .adjoint = true},
                                 arguments.busy),
        "a convolution's gradient for its input");
  });
}

template <class Scalar>
struct ConvolutionWeightGradient {
  ConvolutionShape shape;
  const Scalar* x = nullptr;    ///< [batch][in][height][width]
  const Scalar* dy = nullptr;   ///< [batch][out][out height][out width]
  Scalar* workspace = nullptr;  ///< convolution_workspace() numbers, of any values
  Scalar* dw = nullptr;         ///< [out][in][kernel][kernel], overwritten
  Scalar* db = nullptr;         ///< [out], overwritten, or null for none
  Index busy = busy_blocks;
};

/// Numbers of a workspace.
/// Throws  what validate() throws
template <class Scalar>
Index convolution_workspace(const ConvolutionShape& shape, Index busy = busy_blocks) {
  validate(shape);
  const detail::KernelTile tile = detail::kernel_tile<Scalar>(shape, busy);
  return tile.slices * tile.slice_numbers(shape);
}

/// dw[o][c][a] = the sum of dy[n][o][j] * x[n][c][j - padding + a], x zero outside; db[o] = the sum
/// of dy[n][o][j]. The same numbers every time: sums are added up in one order.
/// Throws  what validate() throws
template <class Scalar, class Run>
void convolution_weight_gradient(const ConvolutionWeightGradient<Scalar>& arguments, Run&& run) {
  validate(arguments.shape);
  const detail::KernelTile tile = detail::kernel_tile<Scalar>(arguments.shape, arguments.busy);
  detail::with_kernel(arguments.shape.kernel, [&](auto kernel) {
    run(KernelGradientSlices<Scalar, kernel>({.shape = arguments.shape,
                                              .x = arguments.x,
                                              .dy = arguments.dy,
                                              .workspace = arguments.workspace,
                                              .bias = arguments.db != nullptr},
                                             tile),
        "a convolution's gradient for its kernel");
  });
  run(KernelGradientSum<Scalar>({.shape = arguments.shape,
                                 .workspace = arguments.workspace,
                                 .dw = arguments.dw,
                                 .db = arguments.db},
                                tile),
      "the sum of a gradient's slices");
}

}  // namespace cifar::cuda
