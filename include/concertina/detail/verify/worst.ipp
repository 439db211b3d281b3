// What a proof compares, and whether its bounds say anything.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/detail/verify/rounding.hpp>
#include <concertina/verify.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace concertina::detail {

/// Keeps the element nearest to its bound, and whether the bounds say anything. A row is what one
/// output channel multiplies, or its bias.
template <class Scalar>
class Worst {
 public:
  /// Below `least` elements have no relative precision: it is the smallest normal number of what
  /// computes or stores them, and `unit` its unit roundoff.
  Worst(Report& report, long double least, long double unit)
      : report_(report), least_(least), ulp_(2 * unit) {
    if constexpr (rounds<Scalar>) ulp_ = std::max<long double>(ulp_, ulp<Scalar>(1));
  }

  /// `magnitude` is the same element contracted from absolute values; it is unused for exact
  /// scalars. bound(magnitude, computed, reference) is what they may differ by.
  template <class Computed, class Ref, class Bound, class Where>
  void compare(Index row, const Computed& computed, const Ref& reference, const Ref& magnitude,
               const Bound& bound, Where&& where) {
    ++report_.compared;
    if constexpr (rounds<Scalar>) {
      const auto c = static_cast<long double>(computed), r = static_cast<long double>(reference);
      const auto size = static_cast<long double>(magnitude);
      const long double error = std::abs(c - r), allowed = bound(size, c, r);
      if (!std::isfinite(c) || !std::isfinite(r) || !std::isfinite(allowed)) {
        note(where(), error, allowed, 0, "is not finite");
        return;
      }
      const long double ulps = error / ulp<Scalar>(r);
      report_.ulps = std::max(report_.ulps, ulps);
      if (error > allowed) {
        note(where(), error, allowed, ulps, "exceeds its bound");
      } else if (error > 0 && report_.failure.empty() &&
                 (report_.worst.empty() || error * report_.bound > report_.error * allowed)) {
        note(where(), error, allowed, ulps, "");
      }
      if (allowed < std::abs(r)) told_ = true;
      rows_.resize(std::max(rows_.size(), static_cast<std::size_t>(row) + 1));
      // Where nothing has relative precision, only what its bound says nothing of is lost.
      const bool faint = error <= least_ && (allowed < std::abs(r) || 8 * error <= std::abs(r));
      rows_[static_cast<std::size_t>(row)].add(r, std::abs(r) > ulp_ * size, faint ? 0 : error,
                                               where);
      if (error > 0 && !(allowed < size)) {
        if (unsure_.empty() || allowed > least_) unsure_ = where();
        if (allowed > least_) emptied_ = true;
      }
      differs_ = differs_ || error > 0;
    } else if (!(computed == static_cast<Computed>(reference))) {
      note(where(), 1, 0, 0, "differs");
    }
  }

  /// A bound that exceeds what it bounds proves nothing: below the smallest normal number that is
  /// so by nature, and then some other element must tell the layer from one of zeros.
  void judge() {
    if (!report_.failure.empty()) return;
    if (emptied_) {
      report_.undecided = true;
      report_.failure = "the bound of " + unsure_ +
                        " exceeds its magnitude, since its factors may have underflowed; use a "
                        "wider accumulator";
    } else if (differs_ && !told_) {
      report_.undecided = true;
      report_.failure =
          "every element is smaller than its bound; use a wider accumulator, or layers of another "
          "scale";
    } else if (const auto row = lost_row(); row != rows_.end()) {
      report_.undecided = true;
      report_.failure = row->lost_at +
                        " is off by more than rounding leaves of its row, though its bound "
                        "allows it; use a wider accumulator";
    }
  }

 private:
  /// The largest errors of a row, which cancellation may lose it to. Known are elements that are
  /// more than rounding of their factors leaves of a zero.
  struct Row {
    long double largest = 0, lost = 0, known_lost = 0;
    std::string lost_at;

    template <class Where>
    void add(long double reference, bool known, long double error, Where&& where) {
      largest = std::max(largest, std::abs(reference));
      if (error > lost) lost_at = where();
      lost = std::max(lost, error);
      if (known) known_lost = std::max(known_lost, error);
    }
  };

  /// A row with an error that matters, whatever its bound, which layers that cancel each other make
  /// as wide as one likes: that of a known element beside its row's largest, any beside the largest
  /// of all.
  auto lost_row() const {
    long double largest = 0;
    for (const Row& row : rows_) largest = std::max(largest, row.largest);
    const auto matters = [&](long double lost, long double beside) {
      return lost * lost > ulp_ * beside * beside;
    };
    return std::ranges::find_if(rows_, [&](const Row& row) {
      return matters(row.lost, largest) ||
             (row.known_lost > least_ && matters(row.known_lost, row.largest));
    });
  }

  void note(const std::string& where, long double error, long double bound, long double ulps,
            const std::string& failure) {
    if (!report_.failure.empty()) return;
    report_.worst = where;
    report_.error = error;
    report_.bound = bound;
    report_.ulps = std::max(report_.ulps, ulps);
    if (!failure.empty()) report_.failure = where + " " + failure;
  }

  Report& report_;
  long double least_, ulp_;  ///< of 1
  std::vector<Row> rows_;
  std::string unsure_;
  bool emptied_ = false, told_ = false, differs_ = false;
};

}  // namespace concertina::detail
