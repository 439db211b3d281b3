// Batch norms in training, exactly: their statistics follow from the moments of the input's
// patches, so that a block contracts in every step.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/contract.hpp>
#include <concertina/detail/moments/geometry.hpp>
#include <concertina/feature_map.hpp>
#include <concertina/layers.hpp>
#include <concertina/parallel.hpp>

#include <concepts>
#include <cstddef>
#include <optional>
#include <span>
#include <vector>

namespace concertina {

/// First and second moments of the patches that a kernel reads of a batch: how many there are,
/// their mean, and the sums of products of what is left without the mean. The covariance is scatter
/// / count. Those of two workers' batches are added, which is what synchronised batch norms need:
/// no subtraction of large numbers is involved.
/// Source  Chan, Golub, LeVeque, Algorithms for computing the sample variance, 1983
struct Moments {
  Index count = 0;
  std::vector<double> mean = {};     ///< [groups][taps][channels of a group]
  std::vector<double> scatter = {};  ///< for each group a symmetric matrix over these

  /// Throws  ShapeError where the other's are of other patches
  Moments& operator+=(const Moments& other);
};

/// The moments of the patches that a layer of this shape reads: of channels, kernel size, stride,
/// padding, dilation and groups. Patches hold zeros where they leave the map.
///
/// At stride 1 a product of two pixels serves every pair of taps as far apart, so where that takes
/// less time products are summed for lags between taps instead, (2k - 1)^rank of them, half by
/// symmetry; windows at the border, in which only some taps read, are summed apart and added, so
/// nothing is subtracted. Everything is about the channels' means, and in double.
/// Cost    batch * min(half of (in / groups * taps)^2 * groups * positions, half of the lags * in *
///         in / groups * pixels) multiply-adds; the scatter
/// Throws  ShapeError for an impossible shape, other channels, an empty batch, or a map smaller
///         than the kernel
template <std::floating_point Scalar, int Rank>
Moments patch_moments(const ConvShape<Rank>& shape, const FeatureMapView<const Scalar, Rank>& x,
                      const ParallelFor& run = serial_for);
template <std::floating_point Scalar, int Rank>
Moments patch_moments(const ConvShape<Rank>& shape, const FeatureMap<Scalar, Rank>& x,
                      const ParallelFor& run = serial_for) {
  return patch_moments(shape, FeatureMapView<const Scalar, Rank>(x), run);
}

/// What a batch norm in training normalises by: mean and (biased) variance of each channel.
struct BatchStatistics {
  Index count = 0;  ///< values of each channel, of all workers
  std::vector<double> mean = {}, variance = {};
};

/// Moves running statistics towards a batch's: running = (1 - momentum) * running + momentum *
/// batch's, the variance of the batch unbiased, count / (count - 1) times as large.
/// Throws  ShapeError where channels differ, or of one value
/// Source  torch.nn.BatchNorm2d
template <class Scalar>
void update_running_statistics(BatchNorm<Scalar>& norm, const BatchStatistics& batch,
                               double momentum = 0.1);

/// A contraction whose batch norms are in training: each normalises by the statistics of the batch
/// at hand. A norm normalises a linear function of the block's input, so its statistics follow from
/// the moments of the input's patches; it is then a channel map, and contracts as in inference.
/// Prefix after prefix, the block becomes one layer, which acts on this batch as the block does
/// layer by layer. Computed in double and rounded once.
///
/// A step is
///     const Conv<float, 2>& layer = block.forward(expression, x);
///     // run the layer on x; from dL/dy its gradient, and that of x
///     const auto gradients = block.backward(gradient);
///     block.add_input_gradient(x, input_gradient);  // through the statistics
///
/// Workers that share statistics compute moments(x), add those of all, and pass them to forward;
/// each then calls backward with the sum of all workers' gradients of the layer, and
/// add_input_gradient with its own batch. The gradients of layers are then those of all workers.
/// Source  docs/moments.md
template <std::floating_point Scalar_, int Rank_>
class TrainingContraction {
 public:
  using Scalar = Scalar_;
  static constexpr int Rank = Rank_;

  /// Plans for expressions of this form with batch norms at these places, on inputs of this size.
  ///
  /// `margins`, one for each norm in the order of leaves, are outputs at each side that a norm's
  /// statistics leave out. DBB pads after its inner batch norms with what they give to zero: that
  /// is a padding before the layer before the norm, and as wide a margin (blocks.hpp).
  /// Throws  InexactError where a norm's prefix, or the expression, is not one layer at this size;
  ///         ShapeError where layers, margins or sizes do not fit; SizeError
  explicit TrainingContraction(const Expr<Scalar, Rank>& expression,
                               const PerAxis<Rank>& input_size,
                               const std::vector<Padding<Rank>>& margins = {});

  /// Of the contraction.
  const ConvShape<Rank>& shape() const noexcept { return whole_.shape(); }

  /// Batch norms in the expression.
  std::size_t norms() const noexcept { return prefixes_.size(); }

  /// Multiply-adds of a training step on a batch: of the layers one after another, forward and
  /// backward; and of this, moments, contraction and the layer's own passes included. Norms and
  /// additions are not counted.
  struct Cost {
    Index layered, contracted;
  };
  Cost cost(Index batch) const;

  /// What forward needs to know of a batch; those of workers are added one by one.
  /// Throws  ShapeError where channels or size are not those planned for, or the batch is empty
  std::vector<Moments> moments(const FeatureMapView<const Scalar, Rank>& x,
                               const ParallelFor& run = serial_for) const;

  /// Writes the layer that acts on a batch of these moments as the expression does, its batch norms
  /// in training, to `result`, a view of shape().
  /// Ensures   forward(e, x)(x) == e in training (x), before rounding, which errs by as much of
  ///           |F| |x|: where norms in a row meet a channel that is constant but not zero, or far
  ///           from zero beside its deviation, that is large, and docs/moments.md says what to do
  /// Throws    ShapeError where the expression has another form, `result` another shape, or a norm
  ///           one value per channel; NumericalError naming the channel where variance + eps is not
  ///           positive and finite
  /// Gradient  backward() to the layers, add_input_gradient() to the input
  void forward(const Expr<Scalar, Rank>& expression, std::vector<Moments> moments,
               const ConvView<Scalar, Rank>& result, const ParallelFor& run = serial_for);

  /// The same in storage of its own. Valid until the next call, as are the views of all that
  /// follow.
  const Conv<Scalar, Rank>& forward(const Expr<Scalar, Rank>& expression,
                                    std::vector<Moments> moments,
                                    const ParallelFor& run = serial_for) CONCERTINA_LIFETIMEBOUND {
    forward(expression, std::move(moments), result_, run);
    return result_;
  }
  const Conv<Scalar, Rank>& forward(const Expr<Scalar, Rank>& expression,
                                    const FeatureMapView<const Scalar, Rank>& x,
                                    const ParallelFor& run = serial_for) CONCERTINA_LIFETIMEBOUND {
    return forward(expression, moments(x, run), run);
  }

  /// Those of each norm, in the order of leaves; see update_running_statistics.
  std::span<const BatchStatistics> statistics() const noexcept { return statistics_; }

  /// From dL/dF, F the layer that forward gave, to the gradient of every leaf in the order of
  /// Form::leaves, through mean and variance too. That of a batch norm has the gradients of its
  /// weight and bias as its weight and bias (as if it had them, where it has none); other channel
  /// maps as Contraction::backward gives them; of fixed leaves zeros.
  /// Throws  ShapeError where the gradient has another shape; Error where forward has not been
  ///         called
  std::span<const Conv<Scalar, Rank>> backward(const ConvView<const Scalar, Rank>& gradient,
                                               const ParallelFor& run = serial_for);

  /// Adds the gradient of the batch through the statistics to `gradient`, which has that of the
  /// layer, dL/dx with F held fixed.
  /// Cost    batch * min((in / groups * taps)^2 * groups * positions, lags * in * in / groups *
  ///         pixels) multiply-adds, for each kernel whose moments are taken
  /// Shapes  x and gradient[batch][channels][size...] of the input
  /// Throws  ShapeError where shapes are not the batch's; Error where backward has not been called
  void add_input_gradient(const FeatureMapView<const Scalar, Rank>& x,
                          const FeatureMapView<Scalar, Rank>& gradient,
                          const ParallelFor& run = serial_for) const;

 private:
  /// What stands at a leaf of a plan.
  struct PlanLeaf {
    enum class Kind {
      leaf,    ///< of the expression, by index
      norm,    ///< a batch norm, by index
      prefix,  ///< the contraction of what a batch norm normalises, by its index
      map      ///< a channel map of the plan's own, by index
    };
    Kind kind;
    std::size_t index;
    ConvShape<Rank> shape;
    bool fixed = kind == Kind::map;
    Index in = shape.in, out = shape.out;

    friend bool operator==(const PlanLeaf&, const PlanLeaf&) = default;
  };
  using Plan = detail::Tree<PlanLeaf>;

  /// What a batch norm normalises: the input's contraction up to it.
  struct Prefix {
    Plan plan;
    Contraction<double, Rank> contraction;
    std::size_t leaf;                  // the norm's
    bool fixed = false;                // that
    detail::PatchGeometry geometry;    // of its own patches
    std::size_t patches = 0;           // whose moments have its own
    std::vector<Index> elements = {};  // [groups][weights of a row]: in those
    Conv<double, Rank> kernel;         // the contraction
    ChannelMap<double> norm;           // with the batch's statistics
    std::vector<double> weight_covariance = {};
    Conv<double, Rank> kernel_gradient, norm_gradient;

    Index group_of(Index group, const detail::PatchGeometry& of) const {
      return group / (geometry.groups / of.groups);
    }
  };

  static Form<Rank> form_of(const Plan& plan) {
    return Form<Rank>(plan.map([](const PlanLeaf& leaf) {
      detail::AnyShape shape(leaf.shape);
      shape.fixed = leaf.fixed;
      return shape;
    }));
  }
  Plan plan_of(const detail::Tree<detail::Leaf<Scalar, Rank>>& node,
               const std::optional<Plan>& before, std::span<const Padding<Rank>> margins);
  Plan add_map(ChannelMap<double> map);
  void add_prefix(const Plan& plan, std::size_t leaf, std::span<const Padding<Rank>> margins);
  void choose_patches();
  void require_form(const Expr<Scalar, Rank>& expression) const;
  void load(const Expr<Scalar, Rank>& expression);
  Expr<double, Rank> expression_of(const Plan& plan) const;
  void find_statistics(std::size_t norm);
  void add_statistics_gradient(std::size_t norm);
  void distribute(const Plan& plan, std::span<const Conv<double, Rank>> gradients);

  Form<Rank> form_;
  PerAxis<Rank> input_size_;
  std::vector<ConvShape<Rank>> leaf_shapes_;
  std::vector<bool> is_norm_;             // of each leaf
  Index layered_ = 0;                     // multiply-adds of a map, forward
  std::vector<Prefix> prefixes_;          // one for each norm
  std::vector<ChannelMap<double>> maps_;  // the plan's own
  Plan plan_;
  Contraction<double, Rank> whole_;
  std::vector<detail::PatchGeometry> patches_;
  std::vector<Moments> moments_;
  std::vector<detail::MomentGradient> moment_gradients_;
  std::vector<BatchStatistics> statistics_;
  std::vector<std::optional<Conv<double, Rank>>> layers_;     // leaves in double
  std::vector<std::optional<ChannelMap<double>>> leaf_maps_;  // those that are maps
  std::vector<Conv<double, Rank>> leaf_gradients_;
  Conv<Scalar, Rank> result_;
  std::vector<Conv<Scalar, Rank>> gradients_;
  bool computed_ = false, differentiated_ = false;
};

template <class Scalar, int Rank>
TrainingContraction(const Expr<Scalar, Rank>&, const PerAxis<Rank>&)
    -> TrainingContraction<Scalar, Rank>;
template <class Scalar, int Rank>
TrainingContraction(const Expr<Scalar, Rank>&, const PerAxis<Rank>&,
                    const std::vector<Padding<Rank>>&) -> TrainingContraction<Scalar, Rank>;

}  // namespace concertina

#include <concertina/detail/moments/training.ipp>
