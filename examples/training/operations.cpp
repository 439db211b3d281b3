// SPDX-License-Identifier: Apache-2.0
#include "operations.hpp"

#include <Eigen/Core>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <string>
#include <utility>

namespace training {
namespace {

using concertina::ConvShape, concertina::ShapeError;

template <class Scalar>
using Matrix = Eigen::Matrix<Scalar, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
template <class Scalar>
using LaneMatrix = Eigen::Map<Eigen::Matrix<Scalar, Eigen::Dynamic, lanes, Eigen::RowMajor>>;

std::size_t size(Index count) { return static_cast<std::size_t>(count); }

/// Sums of chunks, in their order.
template <class Scalar>
void sum_chunks(Index chunks, const std::vector<Scalar>& parts, std::span<Scalar> sum) {
  constexpr Index block = 4096;  // stays in the first-level cache
  const Index count = std::ssize(sum);
  for (Index first = 0; first < count; first += block) {
    const Index numbers = std::min(block, count - first);
    Eigen::Map<Eigen::ArrayX<Scalar>> to(sum.data() + first, numbers);
    to.setZero();
    for (Index chunk = 0; chunk < chunks; ++chunk) {
      to += Eigen::Map<const Eigen::ArrayX<Scalar>>(parts.data() + chunk * count + first, numbers);
    }
  }
}

/// Throws where a layer's numbers are not as many as its shape says.
template <class Scalar, int Rank>
void check_weights(const std::string& operation, const ConvShape<Rank>& shape,
                   const Weights<Scalar>& weights) {
  const Index count = std::ssize(weights.weight->value);
  const Index biases = weights.bias ? std::ssize(weights.bias->value) : 0;
  if (count == weight_numel(shape) && biases == (shape.bias ? shape.out : 0)) return;
  throw ShapeError(operation + ": " + std::to_string(count) + " weights and " +
                   std::to_string(biases) + " biases are not those of the shape (" +
                   to_string(shape) + (shape.bias ? " with bias)" : " without bias)"));
}

template <class Scalar>
std::pair<std::span<Scalar>, std::span<Scalar>> gradients_of(const Weights<Scalar>& weights) {
  return {gradient_memory(*weights.weight),
          weights.bias ? gradient_memory(*weights.bias) : std::span<Scalar>()};
}

ConvSize conv_size(const ConvShape<2>& shape, Index channels, Index height, Index width) {
  const auto refuse = [&](const std::string& why) {
    throw ShapeError("convolution: " + why + " (" + to_string(shape) + ")");
  };
  const auto& stride = shape.stride;
  const auto& padding = shape.padding;
  if (shape.in != channels) refuse("the maps have " + std::to_string(channels) + " channels");
  if (stride[0] != stride[1] || stride[0] > 2 || shape.dilation != 1 || shape.groups != 1 ||
      padding.start != padding.end) {
    refuse("here strides are 1 or 2, dilation and groups 1, paddings alike on both sides");
  }
  static_cast<void>(output_size(shape, concertina::PerAxis<2>{height, width}));  // throws
  return {.out = shape.out,
          .in = shape.in,
          .kernel_height = shape.kernel_size[0],
          .kernel_width = shape.kernel_size[1],
          .pad_height = padding.start[0],
          .pad_width = padding.start[1],
          .height = height,
          .width = width,
          .stride = stride[0]};
}

}  // namespace

template <class Scalar>
void record_source(Tape<Scalar>& tape, Maps<Scalar>& x,
                   std::function<void(Index chunk, Scalar* to)> source) {
  Operation operation;
  operation.forward.each(
      [&x, source = std::move(source)](Index chunk, Index) { source(chunk, x.values(chunk)); });
  tape.record(std::move(operation));
}

template <class Scalar>
Maps<Scalar>& convolution(Tape<Scalar>& tape, Maps<Scalar>& x, const ConvShape<2>& shape,
                          Weights<Scalar> weights) {
  const ConvSize conv = conv_size(shape, x.channels, x.height, x.width);
  check_weights("convolution", shape, weights);
  Maps<Scalar>& y = tape.maps(conv.out, conv.out_height(), conv.out_width());
  const Index chunks = tape.chunk_capacity(), count = conv.weights();

  struct State {
    std::vector<Scalar> packed, packed_adjoint;
    std::vector<Scalar> weight_parts, bias_parts;  // [chunk][number]
  };
  const auto state = std::make_shared<State>();
  state->packed.resize(size(count));
  state->packed_adjoint.resize(x.differentiable ? size(count) : 0);
  state->weight_parts.resize(size(chunks * count));
  state->bias_parts.resize(weights.bias ? size(chunks * conv.out) : 0);
  const auto [weight_gradient, bias_gradient] = gradients_of(weights);
  const Index spread_scratch =
      conv.stride == 1 ? 0 : conv.out * conv.dense_height() * conv.dense_width() * lanes;
  tape.reserve_scratch(lanes + std::max({convolve_scratch(conv), correlate_scratch(conv),
                                         spread_scratch + convolve_scratch(conv.adjoint())}));

  Operation operation;
  const auto pack = [=, differentiable = x.differentiable] {
    pack_kernel(conv, weights.weight->value.data(), state->packed.data());
    if (!differentiable) return;
    pack_adjoint_kernel(conv, weights.weight->value.data(), state->packed_adjoint.data());
  };
  if (weights.weight->late) {
    operation.forward.then(pack);
  } else {
    operation.prepare = pack;
  }
  operation.forward.each([=, &tape, &x, &y](Index chunk, Index worker) {
    Scalar* to = y.values(chunk);
    const Index map = y.height * y.width * lanes;
    for (Index o = 0; o < conv.out; ++o) {
      std::fill_n(to + o * map, map, weights.bias ? weights.bias->value[size(o)] : Scalar(0));
    }
    convolve(conv, x.values(chunk), state->packed.data(), to, tape.scratch(worker));
  });

  const auto first_writer = tape.first_writer(x);
  operation.backward.each([=, &tape, &x, &y](Index chunk, Index worker) {
    Scalar* scratch = tape.scratch(worker);
    correlate(conv, x.values(chunk), y.gradients(chunk), state->weight_parts.data() + chunk * count,
              scratch);
    const Index positions = y.height * y.width;
    for (Index o = 0; weights.bias && o < conv.out; ++o) {
      Row<Scalar> sum{};
      const Scalar* from = y.gradients(chunk) + o * positions * lanes;
      add_rows(0, positions, sum, [&](Index at, int) { return vector_at(from + at); });
      state->bias_parts[size(chunk * conv.out + o)] = static_cast<Scalar>(sum_lanes(sum));
    }
    if (!x.differentiable) return;
    if (first_writer()) std::fill_n(x.gradients(chunk), x.numbers() * lanes, Scalar(0));
    const Scalar* gradient = y.gradients(chunk);
    if (conv.stride > 1) {
      spread(conv, gradient, scratch);
      gradient = std::exchange(scratch, scratch + spread_scratch);
    }
    convolve(conv.adjoint(), gradient, state->packed_adjoint.data(), x.gradients(chunk), scratch);
  });
  operation.backward.beside([=, &tape, dw = weight_gradient, db = bias_gradient] {
    sum_chunks(tape.chunks(), state->weight_parts, dw);
    sum_chunks(tape.chunks(), state->bias_parts, db);
    if (weights.weight->pullback) weights.weight->pullback();
  });
  tape.record(std::move(operation));
  return y;
}

template <class Scalar>
Maps<Scalar>& linear(Tape<Scalar>& tape, Maps<Scalar>& x, const ConvShape<0>& shape,
                     Weights<Scalar> weights) {
  if (shape.in != x.numbers() || shape.groups != 1) {
    throw ShapeError("linear: the maps have " + std::to_string(x.numbers()) + " numbers (" +
                     to_string(shape) + ")");
  }
  check_weights("linear", shape, weights);
  const Index out = shape.out, in = shape.in;
  Maps<Scalar>& y = tape.maps(out, 1, 1);
  const auto [weight_gradient, bias_gradient] = gradients_of(weights);
  const auto weight = [=] {
    return Eigen::Map<const Matrix<Scalar>>(weights.weight->value.data(), out, in);
  };

  Operation operation;
  operation.forward.each([=, &x, &y](Index chunk, Index) {
    LaneMatrix<Scalar> to(y.values(chunk), out, lanes);
    to.noalias() = weight() * LaneMatrix<Scalar>(x.values(chunk), in, lanes);
    if (!weights.bias) return;
    to.colwise() += Eigen::Map<const Eigen::VectorX<Scalar>>(weights.bias->value.data(), out);
  });
  if (x.differentiable) {
    const auto first_writer = tape.first_writer(x);
    operation.backward.each([=, &x, &y](Index chunk, Index) {
      LaneMatrix<Scalar> to(x.gradients(chunk), in, lanes);
      const LaneMatrix<Scalar> gradient(y.gradients(chunk), out, lanes);
      if (first_writer()) {
        to.noalias() = weight().transpose() * gradient;
      } else {
        to.noalias() += weight().transpose() * gradient;
      }
    });
  }
  // Not in parts by chunks: the whole result over all chunks in order.
  operation.backward.beside([=, &tape, &x, &y, dw = weight_gradient, db = bias_gradient] {
    Eigen::Map<Matrix<Scalar>> sum(dw.data(), out, in);
    sum.setZero();
    std::ranges::fill(db, Scalar(0));
    for (Index chunk = 0; chunk < tape.chunks(); ++chunk) {
      const LaneMatrix<Scalar> gradient(y.gradients(chunk), out, lanes);
      sum.noalias() += gradient * LaneMatrix<Scalar>(x.values(chunk), in, lanes).transpose();
      if (!weights.bias) continue;
      Eigen::Map<Eigen::VectorX<Scalar>>(db.data(), out) += gradient.rowwise().sum();
    }
    if (weights.weight->pullback) weights.weight->pullback();
  });
  tape.record(std::move(operation));
  return y;
}

template <class Scalar>
Maps<Scalar>& batch_norm(Tape<Scalar>& tape, Maps<Scalar>& x, NormTensors<Scalar> tensors,
                         const concertina::Padding<2>& margin) {
  constexpr double eps = 1e-5, momentum = 0.1;
  const Index channels = x.channels, positions = x.height * x.width;
  for (const Tensor<Scalar>* tensor :
       {tensors.weight, tensors.bias, tensors.running_mean, tensors.running_var}) {
    if (std::ssize(tensor->value) == channels) continue;
    throw ShapeError("batch_norm: " + tensor->name + " has " +
                     std::to_string(tensor->value.size()) + " numbers, the maps have " +
                     std::to_string(channels) + " channels");
  }
  const Index inner_height = x.height - margin.start[0] - margin.end[0],
              inner_width = x.width - margin.start[1] - margin.end[1];
  if (inner_height < 1 || inner_width < 1) {
    throw ShapeError("batch_norm: margins of " + to_string(margin.start) + " and " +
                     to_string(margin.end) + " leave nothing of maps of " +
                     std::to_string(x.height) + "x" + std::to_string(x.width));
  }
  const Index counted = inner_height * inner_width;  // positions that statistics are of
  const bool whole = counted == positions;
  /// Calls each(begin, end) for the runs of these positions.
  const auto for_each_run = [=, width = x.width](auto&& each) {
    if (whole) return each(Index{0}, positions);
    for (Index row = 0; row < inner_height; ++row) {
      const Index begin = (margin.start[0] + row) * width + margin.start[1];
      each(begin, begin + inner_width);
    }
  };
  Maps<Scalar>& y = tape.maps(channels, x.height, x.width);
  struct Moments {
    double mean, squares;  // of deviations from the mean
  };
  struct Sums {
    double gradient, product;  // of dL/dy, and of that with the normalised x
  };
  struct Channel {
    Scalar mean, inverse;              // of the deviation
    Scalar factor, offset;             // y = factor * x + offset
    Scalar gradient = 0, product = 0;  // Sums, their means over the batch
  };
  struct State {
    std::vector<Moments> moments;  // [chunk][channel]
    std::vector<Sums> sums;
    std::vector<Channel> channels;
  };
  const auto parts = size(tape.chunk_capacity() * channels);
  const auto state = std::make_shared<State>(State{
      std::vector<Moments>(parts), std::vector<Sums>(parts), std::vector<Channel>(size(channels))});
  const std::span<Scalar> weight_gradient = gradient_memory(*tensors.weight),
                          bias_gradient = gradient_memory(*tensors.bias);
  const auto images_of = [&tape](Index chunk) {
    return static_cast<double>(std::min<Index>(lanes, tape.images() - chunk * lanes));
  };

  Operation operation;
  operation.forward.each([=, &tape, &x](Index chunk, Index) {
    if (!tape.training()) return;
    const Row<Scalar> mask = tape.mask(chunk);
    const double count = images_of(chunk) * static_cast<double>(counted);
    const Scalar* from = x.values(chunk);
    for (Index c = 0; c < channels; ++c, from += positions * lanes) {
      Row<Scalar> sum{}, squares{};
      for_each_run([&](Index begin, Index end) {
        add_rows(begin, end, sum, [&](Index at, int lane) {
          return vector_at(mask.image.data() + lane) * vector_at(from + at);
        });
      });
      const double mean = sum_lanes(sum) / count;
      const auto shift = static_cast<Scalar>(mean);
      for_each_run([&](Index begin, Index end) {
        add_rows(begin, end, squares, [&](Index at, int lane) {
          const Vector<Scalar> deviation =
              vector_at(mask.image.data() + lane) * (vector_at(from + at) - shift);
          return deviation * deviation;
        });
      });
      state->moments[size(chunk * channels + c)] = {mean, sum_lanes(squares)};
    }
  });
  operation.forward.then([=, &tape] {
    const double all = static_cast<double>(tape.images() * counted);
    for (Index c = 0; c < channels; ++c) {
      const std::size_t at = size(c);
      auto& running_mean = tensors.running_mean->value[at];
      auto& running_var = tensors.running_var->value[at];
      double mean = static_cast<double>(running_mean), variance = static_cast<double>(running_var);
      if (tape.training()) {
        double count = 0, squares = 0;
        mean = 0;
        for (Index chunk = 0; chunk < tape.chunks(); ++chunk) {
          const Moments& more = state->moments[size(chunk * channels + c)];
          const double added = images_of(chunk) * static_cast<double>(counted);
          const double distance = more.mean - mean, sum = count + added;
          mean += distance * added / sum;
          squares += more.squares + distance * distance * count * added / sum;
          count = sum;
        }
        variance = squares / all;
        running_mean = static_cast<Scalar>((1 - momentum) * static_cast<double>(running_mean) +
                                           momentum * mean);
        running_var = static_cast<Scalar>((1 - momentum) * static_cast<double>(running_var) +
                                          momentum * squares / std::max(all - 1, 1.0));
      }
      const double inverse = 1 / std::sqrt(variance + eps);
      const double factor = inverse * static_cast<double>(tensors.weight->value[at]);
      const double offset = static_cast<double>(tensors.bias->value[at]) - mean * factor;
      state->channels[at] = {.mean = static_cast<Scalar>(mean),
                             .inverse = static_cast<Scalar>(inverse),
                             .factor = static_cast<Scalar>(factor),
                             .offset = static_cast<Scalar>(offset)};
    }
  });
  operation.forward.each([=, &x, &y](Index chunk, Index) {
    const Scalar* from = x.values(chunk);
    Scalar* to = y.values(chunk);
    for (Index c = 0; c < channels; ++c) {
      const Channel channel = state->channels[size(c)];
      for (Index i = 0; i < positions * lanes; i += vector_lanes<Scalar>) {
        vector_at(to + i) = channel.factor * vector_at(from + i) + channel.offset;
      }
      from += positions * lanes, to += positions * lanes;
    }
  });

  operation.backward.each([=, &x, &y](Index chunk, Index) {
    const Scalar *from = x.values(chunk), *gradient = y.gradients(chunk);
    for (Index c = 0; c < channels; ++c) {
      const Channel& channel = state->channels[size(c)];
      const Scalar mean = channel.mean;
      Row<Scalar> sum{}, product{};
      add_rows(0, positions, sum, [&](Index at, int) { return vector_at(gradient + at); });
      add_rows(0, positions, product, [&](Index at, int) {
        return vector_at(gradient + at) * (vector_at(from + at) - mean);
      });
      from += positions * lanes, gradient += positions * lanes;
      state->sums[size(chunk * channels + c)] = {
          sum_lanes(sum), sum_lanes(product) * static_cast<double>(channel.inverse)};
    }
  });
  operation.backward.then([=, &tape] {
    const double all = static_cast<double>(tape.images() * counted);
    for (Index c = 0; c < channels; ++c) {
      Sums sums{};
      for (Index chunk = 0; chunk < tape.chunks(); ++chunk) {
        const Sums& more = state->sums[size(chunk * channels + c)];
        sums.gradient += more.gradient, sums.product += more.product;
      }
      bias_gradient[size(c)] = static_cast<Scalar>(sums.gradient);
      weight_gradient[size(c)] = static_cast<Scalar>(sums.product);
      state->channels[size(c)].gradient = static_cast<Scalar>(sums.gradient / all);
      state->channels[size(c)].product = static_cast<Scalar>(sums.product / all);
    }
  });
  const auto first_writer = tape.first_writer(x);
  operation.backward.each([=, &tape, &x, &y](Index chunk, Index) {
    if (!x.differentiable) return;
    const Row<Scalar> mask = tape.mask(chunk);
    const bool first = first_writer();
    const Scalar *from = x.values(chunk), *gradient = y.gradients(chunk);
    Scalar* to = x.gradients(chunk);
    for (Index c = 0; c < channels; ++c) {
      // factor * (dy - mean(dy) - xhat * mean(dy * xhat)), the constants taken together;
      // where statistics do not look, factor * dy
      const Channel channel = state->channels[size(c)];
      const Scalar factor = channel.factor, mean = channel.mean, level = channel.gradient;
      const Scalar slope = channel.inverse * channel.product;
      const auto put = [&](Index begin, Index end, Scalar shift, Scalar by) {
        for (Index i = begin * lanes; i < end * lanes; i += vector_lanes<Scalar>) {
          const Vector<Scalar> own =
              factor * vector_at(mask.image.data() + i % lanes) *
              (vector_at(gradient + i) - shift - by * (vector_at(from + i) - mean));
          vector_at(to + i) = first ? own : vector_at(to + i) + own;
        }
      };
      Index done = 0;
      for_each_run([&](Index begin, Index end) {
        put(done, begin, 0, 0);
        put(begin, end, level, slope);
        done = end;
      });
      put(done, positions, 0, 0);
      from += positions * lanes, gradient += positions * lanes, to += positions * lanes;
    }
  });
  tape.record(std::move(operation));
  return y;
}

template <class Scalar>
void relu(Tape<Scalar>& tape, Maps<Scalar>& x) {
  if (x.readers != 0) {
    throw concertina::Error("relu: it would change maps that " + std::to_string(x.readers) +
                            " other operations read");
  }
  const Index numbers = x.numbers() * lanes;
  Operation operation;
  operation.forward.each([=, &x](Index chunk, Index) {
    Scalar* to = x.values(chunk);
    for (Index i = 0; i < numbers; i += vector_lanes<Scalar>) {
      Vector<Scalar>& value = vector_at(to + i);
      value = value < Scalar(0) ? Vector<Scalar>{} : value;  // NaN stays
    }
  });
  operation.backward.each([=, &x](Index chunk, Index) {
    if (!x.differentiable) return;
    const Scalar* value = x.values(chunk);
    Scalar* to = x.gradients(chunk);
    for (Index i = 0; i < numbers; i += vector_lanes<Scalar>) {
      Vector<Scalar>& gradient = vector_at(to + i);
      gradient = vector_at(value + i) > Scalar(0) ? gradient : Vector<Scalar>{};
    }
  });
  tape.record(std::move(operation));
}

namespace {

template <class Scalar>
void require_window(const std::string& operation, const Maps<Scalar>& x,
                    const concertina::PerAxis<2>& kernel) {
  if (x.height >= kernel[0] && x.width >= kernel[1]) return;
  throw ShapeError(operation + ": maps of " + std::to_string(x.height) + "x" +
                   std::to_string(x.width) + " are smaller than the window, " + to_string(kernel));
}

/// Calls each(from, to) for the windows of pooled maps: where, in a chunk, a vector of a window's
/// first number is, and of its result.
template <class Scalar, class Each>
void for_each_window(const Maps<Scalar>& x, const Maps<Scalar>& y, Index stride, Each&& each) {
  Index to = 0;
  for (Index c = 0; c < x.channels; ++c) {
    for (Index row = 0; row < y.height; ++row) {
      Index from = (c * x.height + row * stride) * x.width * lanes;
      for (Index i = 0; i < y.width; ++i, from += stride * lanes, to += lanes) {
        for (int lane = 0; lane < lanes; lane += vector_lanes<Scalar>) each(from + lane, to + lane);
      }
    }
  }
}

}  // namespace

template <class Scalar>
Maps<Scalar>& max_pool(Tape<Scalar>& tape, Maps<Scalar>& x) {
  require_window("max_pool", x, 2);
  Maps<Scalar>& y = tape.maps(x.channels, x.height / 2, x.width / 2);
  const Index below = x.width * lanes;

  Operation operation;
  operation.forward.each([=, &x, &y](Index chunk, Index) {
    const Scalar* values = x.values(chunk);
    Scalar* result = y.values(chunk);
    for_each_window(x, y, 2, [&](Index at, Index to) {
      const Scalar* from = values + at;
      const Vector<Scalar>&a = vector_at(from), &b = vector_at(from + lanes),
            &c = vector_at(from + below), &d = vector_at(from + below + lanes);
      // Either number is kept where it is NaN, so that a diverged training is noticed.
      const auto larger = [](const Vector<Scalar>& p, const Vector<Scalar>& q,
                             Vector<Scalar>& most) { most = ((p > q) | (p != p)) ? p : q; };
      Vector<Scalar> top, bottom, most;
      larger(a, b, top);
      larger(c, d, bottom);
      larger(top, bottom, most);
      vector_at(result + to) = most;
    });
  });
  const auto first_writer = tape.first_writer(x);
  operation.backward.each([=, &x, &y](Index chunk, Index) {
    if (!x.differentiable) return;
    const Scalar *values = x.values(chunk), *results = y.values(chunk),
                 *gradients = y.gradients(chunk);
    Scalar* to = x.gradients(chunk);
    const bool first = first_writer();
    const bool dropped = x.height % 2 != 0 || x.width % 2 != 0;
    if (first && dropped) std::fill_n(to, x.numbers() * lanes, Scalar(0));
    for_each_window(x, y, 2, [&](Index from, Index at) {
      const Vector<Scalar>& largest = vector_at(results + at);
      Vector<Scalar> rest = vector_at(gradients + at);  // zero once it is given
      for (const Index offset : {from, from + lanes, from + below, from + below + lanes}) {
        const auto here = vector_at(values + offset) == largest;
        const Vector<Scalar> own = here ? rest : Vector<Scalar>{};
        rest = here ? Vector<Scalar>{} : rest;
        vector_at(to + offset) = first ? own : vector_at(to + offset) + own;
      }
    });
  });
  tape.record(std::move(operation));
  return y;
}

template <class Scalar>
Maps<Scalar>& average_pool(Tape<Scalar>& tape, Maps<Scalar>& x,
                           const concertina::PerAxis<2>& kernel) {
  require_window("average_pool", x, kernel);
  Maps<Scalar>& y = tape.maps(x.channels, x.height - kernel[0] + 1, x.width - kernel[1] + 1);
  const Scalar share = 1 / static_cast<Scalar>(numel(kernel));
  const Index line = kernel[1] * lanes, window = kernel[0] * x.width * lanes;
  Operation operation;
  operation.forward.each([=, &x, &y](Index chunk, Index) {
    const Scalar* values = x.values(chunk);
    Scalar* result = y.values(chunk);
    for_each_window(x, y, 1, [&](Index from, Index to) {
      Vector<Scalar> sum{};
      for (Index row = from; row < from + window; row += x.width * lanes) {
        for (Index i = row; i < row + line; i += lanes) sum += vector_at(values + i);
      }
      vector_at(result + to) = share * sum;
    });
  });
  const auto first_writer = tape.first_writer(x);
  operation.backward.each([=, &x, &y](Index chunk, Index) {
    if (!x.differentiable) return;
    const Scalar* gradients = y.gradients(chunk);
    Scalar* to = x.gradients(chunk);
    if (first_writer()) std::fill_n(to, x.numbers() * lanes, Scalar(0));
    for_each_window(x, y, 1, [&](Index from, Index at) {
      const Vector<Scalar> own = share * vector_at(gradients + at);
      for (Index row = from; row < from + window; row += x.width * lanes) {
        for (Index i = row; i < row + line; i += lanes) vector_at(to + i) += own;
      }
    });
  });
  tape.record(std::move(operation));
  return y;
}

template <class Scalar>
Maps<Scalar>& detached(Tape<Scalar>& tape, Maps<Scalar>& x) {
  Maps<Scalar>& y = tape.maps(x.channels, x.height, x.width, false);
  Operation operation;
  operation.forward.each([&x, &y](Index chunk, Index) {
    std::copy_n(x.values(chunk), x.numbers() * lanes, y.values(chunk));
  });
  tape.record(std::move(operation));
  return y;
}

template <class Scalar>
Maps<Scalar>& add(Tape<Scalar>& tape, std::vector<Maps<Scalar>*> branches) {
  const Maps<Scalar>& front = *branches.at(0);
  for (const Maps<Scalar>* branch : branches) {
    if (branch->channels == front.channels && branch->height == front.height &&
        branch->width == front.width) {
      continue;
    }
    const auto shown = [](const Maps<Scalar>& maps) {
      return std::to_string(maps.channels) + "x" + std::to_string(maps.height) + "x" +
             std::to_string(maps.width);
    };
    throw ShapeError("add: maps of " + shown(front) + " and of " + shown(*branch));
  }
  Maps<Scalar>& y = tape.maps(front.channels, front.height, front.width);
  const Index numbers = y.numbers() * lanes;
  using Array = Eigen::Map<Eigen::ArrayX<Scalar>>;
  Operation operation;
  operation.forward.each([=, &y](Index chunk, Index) {
    Array sum(y.values(chunk), numbers);
    sum.setZero();
    for (Maps<Scalar>* branch : branches) {
      sum += Array(branch->values(chunk), numbers);
    }
  });
  std::vector<std::function<bool()>> first_writers;
  for (Maps<Scalar>* branch : branches) first_writers.push_back(tape.first_writer(*branch));
  operation.backward.each([=, &y](Index chunk, Index) {
    const Array gradient(y.gradients(chunk), numbers);
    for (std::size_t b = branches.size(); b-- > 0;) {
      if (!branches[b]->differentiable) continue;
      Array to(branches[b]->gradients(chunk), numbers);
      if (first_writers[b]()) {
        to = gradient;
      } else {
        to += gradient;
      }
    }
  });
  tape.record(std::move(operation));
  return y;
}

template <class Scalar>
CrossEntropy<Scalar>::CrossEntropy(Tape<Scalar>& tape, Maps<Scalar>& logits)
    : tape_(tape),
      classes_(logits.numbers()),
      losses_(size(tape.chunk_capacity())),
      corrects_(size(tape.chunk_capacity())) {
  using Array = Eigen::Array<Scalar, lanes, 1>;
  using Lane = Eigen::Map<Array>;
  static_cast<void>(tape.first_writer(logits));
  Operation operation;
  operation.prepare = [this] {
    if (std::ssize(labels_) >= tape_.images()) return;
    throw ShapeError("labels of " + std::to_string(labels_.size()) + " images for a batch of " +
                     std::to_string(tape_.images()));
  };
  operation.forward.each([this, &logits](Index chunk, Index) {
    const Index images = std::min<Index>(lanes, tape_.images() - chunk * lanes);
    Scalar *z = logits.values(chunk), *gradient = logits.gradients(chunk);
    Array largest = Lane(z), sum = Array::Zero();
    std::array<Index, lanes> found{};
    for (Index k = 0; k < classes_; ++k) {
      for (int lane = 0; lane < lanes; ++lane) {
        if (z[k * lanes + lane] > largest[lane])
          largest[lane] = z[k * lanes + lane], found[size(lane)] = k;
      }
    }
    for (Index k = 0; k < classes_; ++k) {
      Lane own(gradient + k * lanes);
      own = (Lane(z + k * lanes) - largest).exp();
      sum += own;
    }
    for (Index k = 0; k < classes_; ++k) Lane(gradient + k * lanes) /= sum;
    const Array logs = sum.log();
    double loss = 0;
    Index correct = 0;
    for (int lane = 0; lane < images; ++lane) {
      const Index label = labels_[size(chunk * lanes + lane)], at = label * lanes + lane;
      loss += static_cast<double>(logs[lane] - (z[at] - largest[lane]));
      correct += found[size(lane)] == label;
      gradient[at] -= 1;
    }
    losses_[size(chunk)] = loss;
    corrects_[size(chunk)] = correct;
    const auto share = weight_ / static_cast<Scalar>(tape_.images());
    Row<Scalar> mask = tape_.mask(chunk);
    const Array factor = Lane(mask.image.data()) * share;
    for (Index k = 0; k < classes_; ++k) Lane(gradient + k * lanes) *= factor;
  });
  operation.forward.then([this] {
    loss_ = 0, correct_ = 0;
    for (Index chunk = 0; chunk < tape_.chunks(); ++chunk) {
      loss_ += losses_[size(chunk)];
      correct_ += corrects_[size(chunk)];
    }
    loss_ /= static_cast<double>(tape_.images());
  });
  tape.record(std::move(operation));
}

template <class Scalar>
void CrossEntropy<Scalar>::set_labels(std::span<const std::uint8_t> labels) {
  if (std::ssize(labels) > tape_.capacity()) {
    throw ShapeError(std::to_string(labels.size()) + " labels for a batch of at most " +
                     std::to_string(tape_.capacity()));
  }
  for (Index image = 0; image < std::ssize(labels); ++image) {
    const Index label = labels[size(image)];
    if (label < classes_) continue;
    throw ShapeError("label " + std::to_string(label) + " of image " + std::to_string(image) +
                     ", but there are " + std::to_string(classes_) + " classes");
  }
  labels_.assign(labels.begin(), labels.end());
}

#define TRAINING_INSTANTIATE(Scalar)                                                              \
  template void record_source(Tape<Scalar>&, Maps<Scalar>&, std::function<void(Index, Scalar*)>); \
  template Maps<Scalar>& convolution(Tape<Scalar>&, Maps<Scalar>&, const ConvShape<2>&,           \
                                     Weights<Scalar>);                                            \
  template Maps<Scalar>& linear(Tape<Scalar>&, Maps<Scalar>&, const ConvShape<0>&,                \
                                Weights<Scalar>);                                                 \
  template Maps<Scalar>& batch_norm(Tape<Scalar>&, Maps<Scalar>&, NormTensors<Scalar>,            \
                                    const concertina::Padding<2>&);                               \
  template void relu(Tape<Scalar>&, Maps<Scalar>&);                                               \
  template Maps<Scalar>& max_pool(Tape<Scalar>&, Maps<Scalar>&);                                  \
  template Maps<Scalar>& average_pool(Tape<Scalar>&, Maps<Scalar>&,                               \
                                      const concertina::PerAxis<2>&);                             \
  template Maps<Scalar>& detached(Tape<Scalar>&, Maps<Scalar>&);                                  \
  template Maps<Scalar>& add(Tape<Scalar>&, std::vector<Maps<Scalar>*>);                          \
  template class CrossEntropy<Scalar>;
TRAINING_INSTANTIATE(float)
TRAINING_INSTANTIATE(double)
#undef TRAINING_INSTANTIATE

}  // namespace training
