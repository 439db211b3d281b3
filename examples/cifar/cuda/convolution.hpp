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
// launch() on the device, execute() in tests. They throw what validate() and choose_tile() throw.

/// to[n][o][j] = bias[o] + the sum of weight[o][c][a] * from[n][c][j - padding + a], maps zero
/// outside, as torch.nn.Conv2d.
template <class Scalar, class Run>
void convolution_forward(const Convolution<Scalar>& maps, Run&& run) {
  validate(maps.shape);
  detail::with_kernel(maps.shape.kernel, [&](auto kernel) {
    run(Convolve<Scalar, kernel>(maps, false), "a convolution");
  });
}

/// to[n][c][i] = the sum of weight[o][c][a] * from[n][o][i + padding - a], maps zero outside: dL/dx
/// from dL/dy.
template <class Scalar, class Run>
void convolution_input_gradient(const Convolution<Scalar>& maps, Run&& run) {
  validate(maps.shape);
  detail::with_kernel(maps.shape.kernel, [&](auto kernel) {
    run(Convolve<Scalar, kernel>(maps, true), "a convolution's gradient for its input");
  });
}

/// Numbers of a workspace.
template <class Scalar>
Index convolution_workspace(const ConvolutionShape& shape, int busy = busy_blocks) {
  validate(shape);
  const detail::KernelTile tile = detail::choose_kernel_tile<Scalar>(shape, busy);
  return tile.slices * tile.slice_numbers;
}

/// dw[o][c][a] = the sum of dy[n][o][j] * x[n][c][j - padding + a], x zero outside; db[o] = the sum
/// of dy[n][o][j]. The same numbers every time: sums are added up in one order.
template <class Scalar, class Run>
void convolution_weight_gradient(const ConvolutionWeightGradient<Scalar>& maps, Run&& run) {
  validate(maps.shape);
  const detail::KernelTile tile = detail::choose_kernel_tile<Scalar>(maps.shape, maps.busy);
  detail::with_kernel(maps.shape.kernel, [&](auto kernel) {
    run(KernelGradientSlices<Scalar, kernel>{maps, tile},
        "a convolution's gradient for its kernel");
  });
  run(KernelGradientSum<Scalar>{maps, tile}, "the sum of a gradient's slices");
}

}  // namespace cifar::cuda
