// A matrix product cut into panels that threads can share.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/tuning.hpp>
#include <concertina/parallel.hpp>

#include <algorithm>

namespace concertina::detail {

/// Calls task(i) for every i in 0 .. count - 1: as `run` does where the multiply-adds are worth it.
inline void share_out(Index multiply_adds, Index count, const ParallelFor& run,
                      ParallelFor::Task task) {
  if (count < 2 || multiply_adds < tuning::least_shared) return serial_for(count, task);
  run(count, task);
}

/// A matrix product's result cut into panels that are computed on their own, each with the whole
/// inner length. The cut depends on the sizes only, so every element is computed in one and the
/// same way, whoever computes which panel.
class Panels {
 public:
  struct Panel {
    Index row, column, rows, columns;
  };

  Panels(Index rows, Index columns, Index inner)
      : rows_(rows),
        columns_(columns),
        height_(rows),
        width_(std::min(columns, tuning::widest_panel)) {
    constexpr Index side = tuning::least_panel_side;
    while (count() < tuning::enough_panels && height_ * width_ * inner > 2 * tuning::least_panel &&
           std::max(height_, width_) > 2 * side) {
      Index& longer = width_ >= height_ ? width_ : height_;
      longer = (longer / 2 + side - 1) / side * side;
    }
  }

  Index count() const { return down() * across(); }

  Panel operator[](Index i) const {
    const Index row = i / across() * height_, column = i % across() * width_;
    return {row, column, std::min(height_, rows_ - row), std::min(width_, columns_ - column)};
  }

 private:
  Index down() const { return (rows_ + height_ - 1) / height_; }
  Index across() const { return (columns_ + width_ - 1) / width_; }

  Index rows_, columns_;
  Index height_, width_;  // of a panel
};

}  // namespace concertina::detail
