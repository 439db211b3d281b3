// The device's tape: operations recorded as block programs, on a backend that runs them: a device,
// or in tests the host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "accelerator.hpp"
#include "convolution.hpp"
#include "norm.hpp"
#include "operations.hpp"
#include "product.hpp"

#include <concertina/cuda/device_layer.hpp>
#include <concertina/cuda/plan.hpp>
#include <concertina/error.hpp>
#include <concertina/shape.hpp>

#include <algorithm>
#include <array>
#include <compare>
#include <concepts>
#include <cstddef>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace cifar::cuda {

/// Which programs a step runs: the same ones for the same kind.
struct StepKind {
  bool training;
  int images;

  friend auto operator<=>(const StepKind&, const StepKind&) = default;
};

/// Programs on a stream run one after another, those on different streams side by side.
enum class Stream : int { origin };

/// Where programs run and numbers lie:
/// - allocate<T>(count): numbers without a value, which are the backend's and stay as long as it;
/// - upload(span, address): a copy from the host, after what the origin runs; done when it returns;
/// - download(address, span): a copy to the host, likewise;
/// - stream(rank): one more; the lower its rank, the earlier its programs have their turn, those of
///   rank 0 with the origin's;
/// - run(program, purpose, stream): runs it after what was run there before, and returns at once;
/// - wait(later, earlier): what will be run on `later` comes after what was run on `earlier`;
/// - Contraction<Scalar>(backend, form, stream): of an expanded layer: forward(at) sets
///   at.products, and backward(at) at.layer_gradients; the same programs each time;
/// - repeat(kind, launches): launches(), which runs programs and does nothing else; from the second
///   time on they may be those that were recorded for the kind. Other streams fork from the origin
///   by waiting for it, and are joined by its waiting for them;
/// - forget(): drops what was recorded, when it is done; throws nothing.
template <class B>
concept Backend = requires(B& backend, std::span<const float> from, std::span<float> to,
                           float* numbers, void (*launches)()) {
  { backend.template allocate<float>(Index{1}) } -> std::same_as<float*>;
  backend.upload(from, numbers);
  backend.download(numbers, to);
  { backend.stream(0) } -> std::same_as<Stream>;
  backend.run(Fill<float>{}, "", Stream::origin);
  backend.wait(Stream::origin, Stream::origin);
  backend.repeat(StepKind{}, launches);
  backend.forget();
};

/// Where tensors lie in a buffer, one behind the other. Each starts at a multiple of 128 bytes, if
/// they are floats, for cuBLAS and wide loads. Programs for all numbers at once run over the gaps,
/// which are zero and remain so.
class Layout {
 public:
  static constexpr Index alignment = 32;  ///< numbers
  struct Range {
    Index first, count;
  };

  /// Returns  where the tensor starts
  Index add(Index numbers) {
    const Index first = count_, end = first + numbers;
    count_ = (end + alignment - 1) / alignment * alignment;
    if (count_ > end) gaps_.push_back({end, count_ - end});
    return first;
  }
  Index count() const { return count_; }  ///< numbers, with gaps
  const std::vector<Range>& gaps() const { return gaps_; }

 private:
  Index count_ = 0;
  std::vector<Range> gaps_;
};

/// Where the elements of an expanded layer are that its contraction reads and writes: those of its
/// layers, the first applied first, and of the one layer that they are.
template <class Scalar>
struct Expansion {
  std::vector<concertina::cuda::DeviceLayer<const Scalar>> layers, product_gradients;
  std::vector<concertina::cuda::DeviceLayer<Scalar>> products, layer_gradients;
};

/// What a network is on the device: tensors, gradients and velocities, and the programs of a step
/// on batches of up to `capacity` images.
///
/// A norm, a ReLU and a pool are held back until what they give is read, so that they are one
/// program; likewise a ReLU of what a fully connected layer gives and another reads.
///
/// Of a training's step, the origin has what all layers wait for: forward, and backward to the
/// layers' inputs. If `forked`, each layer has a stream for the rest: its contraction, the gradient
/// of its weights, that of its expansion, and the descent of the latter. Numbers are the same
/// either way.
template <class Scalar, Backend B>
class DeviceTape final : public Recorder<Scalar> {
 public:
  using typename Recorder<Scalar>::Map;
  template <int Rank>
  using Shape = concertina::ConvShape<Rank>;

  /// Batches have `capacity` images, or `rest`.
  DeviceTape(B& backend, const Descent& descent, int capacity, int rest, bool forked)
      : backend_(backend), descent_(descent), capacity_(capacity), rest_(rest), forked_(forked) {}
  DeviceTape(const DeviceTape&) = delete;
  DeviceTape& operator=(const DeviceTape&) = delete;

  // ---- recording

  Map images() override {
    Value& y = add_value({capacity_, colours, side, side}, "images");
    y.differentiable = false;
    record(y, [this, &y](const Step& step) {
      run(LoadImages<Scalar>{step.pass, y.numbers, step.images}, "images");
    });
    return y.index;
  }

  /// A stride is taken of what stride 1 gives, or of the maps that a pointwise layer reads.
  Map layer(Map x, const Shape<2>& shape, const Weights<Scalar>& weights,
            const Chain<Scalar, 2>& expansion) override {
    const int stride = static_cast<int>(shape.stride[0]);
    if (shape.stride[1] != stride || shape.dilation != 1 || shape.groups != 1) {
      throw concertina::ShapeError("a device computes no such convolution (" + to_string(shape) +
                                   "); its strides are alike, dilation and groups 1");
    }
    const bool pointwise =
        numel(shape.kernel_size) == 1 && shape.padding == concertina::Padding<2>(0);
    if (pointwise) x = every(x, stride);
    x = convolve(x, shape, weights, expansion);
    return pointwise ? x : every(x, stride);
  }

  Map layer(Map from, const Shape<0>& shape, const Weights<Scalar>& weights,
            const Chain<Scalar, 0>& expansion) override {
    Value& x = read_by_linear(from);
    Layer& layer = add_layer(weights, shape, expansion);
    const int in = static_cast<int>(shape.in), out = static_cast<int>(shape.out);
    Value& y = add_value({capacity_, out, 1, 1}, layer.name);
    y.is_linear = true;
    record(
        y,
        [=, this, &x, &y, &layer](const Step& step) {
          await_contraction(layer, step);
          const auto& [weight, bias] = layer.own;
          run(linear<Scalar>(step.images, in, out, x.numbers, weight.data(), bias.data(), y.numbers,
                             y.relu),
              layer.name);
        },
        [=, this, &x, &y, &layer](const Step& step) {
          backend_.wait(layer.stream, Stream::origin);
          const auto& [weight, bias] = layer.gradient;
          run(linear_weight_gradient<Scalar>(step.images, in, out, x.numbers, y.gradient,
                                             weight.data(), bias.data()),
              layer.name + ", gradient", layer.stream);
          pull_back(layer, step.pass);
          add_gradient(x, step, [&](Scalar* to) {
            run(linear_input_gradient<Scalar>(step.images, in, out, y.gradient,
                                              layer.own.weight.data(), to,
                                              x.relu ? x.numbers : nullptr),
                layer.name + ", gradient of its input");
          });
        });
    return y.index;
  }

  Map norm(Map x, const NormTensors<Scalar>& tensors,
           const concertina::Padding<2>& margin) override {
    if (margin != 0) {
      throw concertina::ShapeError("a device computes no batch norm that leaves a margin out");
    }
    Value& y = hold(read(x));
    y.norm = &norms_.emplace_back();
    y.norm->tensors = tensors;
    auto& list = tensors_of_part();
    list.insert(list.end(), {tensors.weight, tensors.bias});
    return y.index;
  }
  Map relu(Map x) override {
    Value& y = held(x);
    y.relu = true;
    return y.index;
  }
  Map max_pool(Map x) override {
    Value& y = held(x);
    y.window = 2;
    return y.index;
  }
  /// A fully connected layer of equal weights, at each channel.
  Map mean_pool(Map from) override {
    Value& x = read(from);
    const int channels = x.size.channels, positions = x.size.positions();
    Value& y = add_value({capacity_, channels, 1, 1}, x.name);
    Scalar* const shares = allocate(positions);
    run(Fill<Scalar>{{positions}, shares, Scalar(1) / static_cast<Scalar>(positions)},
        "the shares of a mean");
    record(
        y,
        [=, this, &x, &y](const Step& step) {
          run(linear<Scalar>(step.images * channels, positions, 1, x.numbers, shares, nullptr,
                             y.numbers),
              x.name + ", mean");
        },
        [=, this, &x, &y](const Step& step) {
          add_gradient(x, step, [&](Scalar* to) {
            run(linear_input_gradient<Scalar>(step.images * channels, positions, 1, y.gradient,
                                              shares, to),
                x.name + ", gradient of the mean");
          });
        });
    return y.index;
  }

  Map average_pool(Map, const concertina::PerAxis<2>&) override {
    throw concertina::ShapeError("a device computes no average pool but a mean of whole maps");
  }

  Map sum(const std::vector<Map>& branches) override {
    std::vector<Value*> from;
    for (const Map x : branches) from.push_back(&read(x));
    for (Value* x : from) x->reader = operations_.size();
    for (std::size_t i = 1; i < from.size(); ++i) {
      const bool again = std::ranges::count(from, from[i]) > 1;
      if (again || from[i]->size != from.front()->size) {
        throw concertina::ShapeError("a device adds different maps of one size; " + from[i]->name +
                                     (again ? " is there twice" : " is of another"));
      }
    }
    Value& y = add_value(from.front()->size, from.front()->name);
    for (Value* x : from) x->summed = &y;
    record(
        y,
        [this, from, &y](const Step& step) {
          for (std::size_t i = 1; i < from.size(); ++i) {
            const Value& before = i == 1 ? *from.front() : y;
            run(Sum<Scalar>{{count(y, step)}, before.numbers, from[i]->numbers, y.numbers},
                y.name + ", sum");
          }
        },
        [this, from, &y](const Step& step) {
          for (Value* x : from) {
            if (x->gradient == y.gradient) continue;
            add_gradient(*x, step, [&](Scalar* to) {
              run(Sum<Scalar>{{count(y, step)}, y.gradient, nullptr, to},
                  y.name + ", gradient of a branch");
            });
          }
        });
    return y.index;
  }

  void loss(Map from, double weight) override {
    Value& x = read(from);
    record(x, [this, &x, weight](const Step& step) {
      run(CrossEntropy<Scalar>{step.pass, x.numbers, step.training ? x.gradient : nullptr,
                               step.images, x.size.channels, static_cast<Scalar>(weight)},
          "the loss");
    });
  }

  Map detached(Map from) override {
    Value& x = read(from, false);
    Value& y = add_value(x.size, x.name);
    y.differentiable = false;
    record(y, [this, &x, &y](const Step& step) {
      run(Sum<Scalar>{{count(y, step)}, x.numbers, nullptr, y.numbers}, x.name + ", a copy");
    });
    return y.index;
  }

  void begin(Part part) override { part_ = part; }

  /// What the loss gives the logits, and this adds.
  void distill(Map logits, Map from, double temperature, double weight) override {
    Value &x = read(logits), &teacher = read(from);
    require_alike("distillation", x, teacher);
    record(x, [=, this, &x, &teacher](const Step& step) {
      if (!step.training) return;
      const auto t = static_cast<Scalar>(temperature);
      run(Distill<Scalar>{{step.images},
                          x.numbers,
                          teacher.numbers,
                          x.gradient,
                          x.size.channels,
                          t,
                          static_cast<Scalar>(weight) * t / static_cast<Scalar>(step.images)},
          "distillation");
    });
  }

  void hint(Map features, Map from) override {
    Value &x = read(features), &hint = read(from);
    require_alike("hint", x, hint);
    record(x, {}, [this, &x, &hint](const Step& step) {
      const auto pull = [&](Value& to, const Value& other) {
        const Index all = count(x, step);
        add_gradient(to, step, [&](Scalar* gradient) {
          run(
              Sum<Scalar>{
                  {all}, to.numbers, other.numbers, gradient, -1, 2 / static_cast<Scalar>(all)},
              to.name + ", gradient of the hint");
        });
      };
      pull(x, hint);
      pull(hint, x);
    });
  }

  void match_similarities(Map features, Map from) override {
    Value &x = read(features), &teacher = read(from);
    const Index pairs = Index{capacity_} * capacity_;
    Scalar *const own = allocate(pairs), *const given = allocate(pairs);
    Scalar* const weights = allocate(pairs);
    double* const slopes = allocate<double>(pairs);
    record(x, {}, [=, this, &x, &teacher](const Step& step) {
      const int images = step.images;
      const auto gram = [&](const Value& of, Scalar* to) {
        const Factor<Scalar> rows{of.numbers, of.size.of_image(), 1};
        run(Product<Scalar>{rows, rows, to, images, images, of.size.of_image()},
            of.name + ", inner products");
        return detail::Gram<Scalar>{to, images};
      };
      const auto students = gram(x, own), teachers = gram(teacher, given);
      run(SimilaritySlopes<Scalar>{students, teachers, slopes}, "similarities");
      run(SimilarityWeights<Scalar>{students, slopes, weights}, "similarities");
      add_gradient(x, step, [&](Scalar* to) {
        const int numbers = x.size.of_image();
        run(
            Product<Scalar>{
                {weights, images, 1}, {x.numbers, 1, numbers}, to, images, numbers, images},
            x.name + ", gradient of similarities");
      });
    });
  }

  void end() override {
    place_tensors();
    place_gradients();
  }

  // ---- what has been recorded

  /// Takes the numbers that steps change.
  void begin_epoch(const States<Scalar>& states) {
    upload_tensors();
    for (std::size_t s = 0; s < states.size(); ++s) {
      upload(parameters_, states_[s], [&](const auto* tensor) { return states[s].at(tensor); });
    }
  }
  /// Returns them.
  void end_epoch(const States<Scalar>& states) {
    download(parameters_, weights_, value_of);
    for (std::size_t s = 0; s < states.size(); ++s) {
      download(parameters_, states_[s], [&](const auto* tensor) { return states[s].at(tensor); });
    }
    download(running_, statistics_, value_of);
  }
  /// Takes all numbers but the states, and does what tests have in common: the contraction.
  void begin_tests() {
    upload_tensors();
    contract();
    for (const Layer& layer : layers_) join(layer, true);
  }

  /// One step of a training: forward, backward, update.
  void train(const Pass<Scalar>& pass, int images) {
    Step step{pass, images, true};
    contract();
    for (const Operation& each : operations_) {
      if (each.forward) each.forward(step);
    }
    for (step.operation = operations_.size(); step.operation-- > 0;) {
      const Operation& each = operations_[step.operation];
      if (each.backward) each.backward(step);
    }
    for (const Layer& layer : layers_) join(layer, false);
    descend(own_range_, decay(), pass, "the descent", Stream::origin);
    descend(undecayed_range_, Scalar(0), pass, "the descent without decay", Stream::origin);
    for (const Layer& layer : layers_) join(layer, true);
  }

  /// One step of a test: forward.
  void test(const Pass<Scalar>& pass, int images) {
    for (const Operation& each : operations_) {
      if (each.forward) each.forward({pass, images, false});
    }
  }

 private:
  template <class T>
  using DeviceLayer = concertina::cuda::DeviceLayer<T>;

  struct Step {
    const Pass<Scalar>& pass;
    int images;
    bool training;
    std::size_t operation = 0;  // of the pass back
  };
  struct Operation {
    std::function<void(const Step&)> forward, backward;
  };

  /// A batch norm, its numbers placed when all is recorded.
  struct BatchNorm {
    NormTensors<Scalar> tensors{};
    Norm<Scalar> norm{};
  };

  static constexpr std::size_t nobody = std::numeric_limits<std::size_t>::max();

  /// Maps of a batch. Those with a source are held back: the source's, normed, through a ReLU, and
  /// pooled in windows.
  struct Value {
    Map index;
    MapSize size;  // of a batch as large as there can be
    std::string name;
    Scalar *numbers = nullptr, *gradient = nullptr;
    Value* summed = nullptr;  // by this; where nothing else reads it, they have one gradient
    bool frozen = false, differentiable = true, is_linear = false, relu = false, pooled = false;
    std::size_t operation = 0;    // that writes it
    std::size_t reader = nobody;  // the last that gives it a gradient
    int readers = 0;
    Value* source = nullptr;
    bool in_source = false;  // a ReLU that its source has in it
    BatchNorm* norm = nullptr;
    int window = 1;
  };

  /// A layer's elements: its parameters, or the product of an expansion.
  struct Layer {
    std::string name;
    bool frozen = false;
    std::vector<Weights<Scalar>> layers{};  // itself, or those of an expansion
    DeviceLayer<Scalar> own{}, gradient{};
    Stream stream{};
    // of an expansion
    std::optional<concertina::cuda::PlannedForm> form{};
    Index product_weights = 0, product_biases = 0, product_count = 0;
    Layout::Range range{};  // where the parameters of its layers are
    Expansion<Scalar> at{};
    std::optional<typename B::template Contraction<Scalar>> contraction{};

    bool is_expanded() const { return form.has_value(); }
  };

  /// Tensors on the device, and as they are copied: at once.
  struct Packed {
    Scalar* device = nullptr;
    std::vector<Scalar> host{};  // gaps are zero
  };
  using Places = std::map<Tensor<Scalar>*, Index>;

  // ---- recording

  Value& hold(const MapSize& size, const std::string& name) {
    const bool frozen = part_ == Part::frozen;
    return values_.emplace_back(Value{.index = values_.size(),
                                      .size = size,
                                      .name = name,
                                      .frozen = frozen,
                                      .differentiable = !frozen});
  }
  Value& hold(Value& source) {
    Value& value = hold(source.size, source.name);
    value.source = &source;
    return value;
  }
  /// A value that is held back, to which a ReLU or a pool can be added; itself if it is such a one.
  Value& held(Map x) {
    Value& value = values_[x];
    return value.source && value.readers == 0 && value.window == 1 ? value : hold(read(x));
  }
  Value& add_value(const MapSize& size, const std::string& name) {
    Value& value = hold(size, name);
    value.numbers = allocate(size.numbers());
    return value;
  }

  void record(Value& written, std::function<void(const Step&)> forward,
              std::function<void(const Step&)> backward = {}) {
    written.operation = operations_.size();
    if (!written.frozen) {
      operations_.push_back({std::move(forward), std::move(backward)});
      return;
    }
    operations_.push_back({[forward = std::move(forward)](const Step& step) {
                             if (step.training) forward(step);
                           },
                           {}});
  }
  static void require_alike(const std::string& loss, const Value& x, const Value& teacher) {
    const int own = x.size.of_image(), given = teacher.size.of_image();
    if (own == given) return;
    throw concertina::ShapeError(loss + ": the student has " + std::to_string(own) +
                                 " numbers, the teacher " + std::to_string(given));
  }

  /// A value that the next operation reads: computed, if it was held back.
  Value& read(Map x, bool pulls = true) {
    Value& value = values_[x];
    if (value.in_source && value.frozen) return *value.source;  // a teacher's, without a gradient
    require_alone(value);
    if (value.source && value.readers == 0) settle(value);
    ++value.readers;
    if (pulls && part_ != Part::frozen) value.reader = operations_.size();
    return value;
  }
  /// Of a ReLU alone behind a fully connected layer, that layer's result, with the ReLU in it.
  Value& read_by_linear(Map x) {
    Value& value = values_[x];
    const bool alone = value.source && value.readers == 0 && !value.norm && value.window == 1;
    if (!alone || !value.source->is_linear || value.source->readers > 1 || value.source->relu) {
      return read(x);
    }
    value.in_source = true;
    value.source->relu = true;
    value.source->reader = operations_.size();
    return *value.source;
  }

  /// Where a ReLU became part of a layer, nothing reads what was before it.
  static void require_alone(const Value& x) {
    if (!x.is_linear || !x.relu) return;
    throw concertina::Error("a device has a ReLU of " + x.name + " in one place only");
  }

  void settle(Value& y) { y.window == 1 ? settle_with<1>(y) : settle_with<2>(y); }
  template <int Size>
  void settle_with(Value& y) {
    Value& x = *y.source;
    x.reader = operations_.size();
    require_alone(x);
    if (y.norm && !x.differentiable && !y.frozen) {
      throw concertina::Error("a device computes no batch norm of " + x.name);
    }
    x.pooled = Size > 1;
    y.size = y.size.pooled(Size);
    y.numbers = allocate(y.size.numbers());
    const auto program = [&x, &y](const Step& step) {
      return detail::NormProgram<Scalar, Size>{
          of_batch(x.size, step.images), x.numbers, y.norm ? y.norm->norm : Norm<Scalar>{},
          y.relu ? Scalar(0) : -std::numeric_limits<Scalar>::infinity()};
    };
    record(
        y,
        [this, &y, program](const Step& step) {
          const bool training = step.training && !y.frozen;
          if (training && y.norm) {
            run(NormMoments<Scalar, Size>{program(step)}, y.name + ", moments");
          }
          run(NormReluPool<Scalar, Size>{program(step), y.numbers, training}, y.name + ", pool");
        },
        [this, &x, &y, program](const Step& step) {
          if (y.norm) {
            run(NormReluPoolSums<Scalar, Size>{program(step), y.gradient},
                y.name + ", norm's sums");
          }
          add_gradient(x, step, [&](Scalar* to) {
            run(NormReluPoolGradient<Scalar, Size>{program(step), y.gradient, to},
                y.name + ", gradient of its maps");
          });
        });
  }

  /// Every so many positions along both axes, from the first.
  Map every(Map from, int stride) {
    if (stride == 1) return from;
    Value& x = read(from);
    const auto part = [stride](int all) { return (all + stride - 1) / stride; };
    const auto [_, channels, height, width] = x.size;
    Value& y = add_value({capacity_, channels, part(height), part(width)}, x.name);
    const auto grid = [&x, &y, stride](const Step& step) {
      return GridShape{Index{step.images} * x.size.channels,
                       y.size.height,
                       y.size.width,
                       x.size.height,
                       x.size.width,
                       stride};
    };
    record(
        y,
        [this, &x, &y, grid](const Step& step) {
          run(Grid<Scalar>(grid(step), x.numbers, y.numbers, false), x.name + ", stride");
        },
        [this, &x, &y, grid](const Step& step) {
          add_gradient(x, step, [&](Scalar* to) {
            run(Grid<Scalar>(grid(step), y.gradient, to, true),
                x.name + ", gradient of the stride");
          });
        });
    return y.index;
  }

  /// At stride 1. A kernel that is no square stands among zeros in one.
  Map convolve(Map from, const Shape<2>& shape, const Weights<Scalar>& weights,
               const Chain<Scalar, 2>& expansion) {
    Value& x = read(from);
    const auto number = [](Index value) { return static_cast<int>(value); };
    const int height = number(shape.kernel_size[0]), width = number(shape.kernel_size[1]),
              kernel = std::max(height, width),
              padding = number(shape.padding.start[0]) + (kernel - height) / 2;
    const bool is_framed = height != width;
    if (shape.padding.start != shape.padding.end || (kernel - height) % 2 != 0 ||
        (kernel - width) % 2 != 0 || padding != shape.padding.start[1] + (kernel - width) / 2) {
      throw concertina::ShapeError("a device computes no such convolution (" + to_string(shape) +
                                   "); its paddings are alike on all sides of a square kernel");
    }
    const int in = number(shape.in), out = number(shape.out);
    const ConvolutionShape conv{capacity_, in, out, x.size.height, x.size.width, kernel, padding};
    validate(conv);
    const auto of = [conv](int images) {
      ConvolutionShape with = conv;
      with.batch = images;
      return with;
    };
    Layer& layer = add_layer(weights, shape, expansion);
    Index most = convolution_workspace<Scalar>(conv);
    if (rest_ > 0) most = std::max(most, convolution_workspace<Scalar>(of(rest_)));
    Scalar* const workspace = allocate(most);
    Scalar* const framed = is_framed ? allocate(conv.weights()) : nullptr;
    Scalar* const framed_gradient = is_framed ? allocate(conv.weights()) : nullptr;
    const int top = (kernel - height) / 2, left = (kernel - width) / 2;
    const GridShape frame{Index{out} * in, height, width, kernel, kernel, 1, top, left};
    Value& y = add_value({capacity_, out, conv.out_height(), conv.out_width()}, layer.name);
    record(
        y,
        [=, this, &x, &y, &layer](const Step& step) {
          await_contraction(layer, step);
          const Scalar* const own = layer.own.weight.data();
          if (framed) run(Grid<Scalar>(frame, own, framed, true), layer.name + ", frame");
          convolution_forward<Scalar>(
              {of(step.images), x.numbers, framed ? framed : own, layer.own.bias.data(), y.numbers},
              runner(layer.name));
        },
        [=, this, &x, &y, &layer](const Step& step) {
          Scalar* const own = layer.gradient.weight.data();
          Scalar* const gradient = framed ? framed_gradient : own;
          backend_.wait(layer.stream, Stream::origin);
          convolution_weight_gradient<Scalar>({of(step.images), x.numbers, y.gradient, workspace,
                                               gradient, layer.gradient.bias.data()},
                                              runner(layer.name, layer.stream));
          if (framed) {
            run(Grid<Scalar>(frame, gradient, own, false), layer.name + ", frame", layer.stream);
          }
          pull_back(layer, step.pass);
          add_gradient(x, step, [&](Scalar* to) {
            const Scalar* const weight = framed ? framed : layer.own.weight.data();
            convolution_input_gradient<Scalar>({of(step.images), y.gradient, weight, nullptr, to},
                                               runner(layer.name));
          });
        });
    return y.index;
  }

  template <int Rank>
  Layer& add_layer(const Weights<Scalar>& weights, const Shape<Rank>& shape,
                   const Chain<Scalar, Rank>& expansion) {
    const auto parent = [](const std::string& name) { return name.substr(0, name.rfind('.')); };
    const std::size_t rank = layers_.size();
    Layer& layer = layers_.emplace_back();
    layer.frozen = part_ == Part::frozen;
    if (forked_ && !layer.frozen) layer.stream = backend_.stream(static_cast<int>(rank));
    const bool expanded = !expansion.layers.empty();
    layer.layers = expanded ? expansion.layers : std::vector{weights};
    layer.name = parent(layer.layers.front().weight->name);
    if (!expanded || layer.frozen) add_tensors(layer, tensors_of_part());
    if (!expanded) return layer;
    layer.name = parent(layer.name);
    layer.form.emplace(expansion.shapes);
    layer.product_weights = weight_numel(shape);
    layer.product_biases = shape.bias ? shape.out : 0;
    return layer;
  }
  std::vector<Tensor<Scalar>*>& tensors_of_part() {
    return part_ == Part::trained ? own_ : part_ == Part::undecayed ? undecayed_ : frozen_;
  }
  static void add_tensors(const Layer& layer, std::vector<Tensor<Scalar>*>& to) {
    for (const auto& [weight, bias] : layer.layers) {
      to.push_back(weight);
      if (bias) to.push_back(bias);
    }
  }

  // ---- where numbers are

  template <class T = Scalar>
  T* allocate(Index count) {
    return backend_.template allocate<T>(count);
  }
  Packed pack(Index count) {
    return {allocate(count), std::vector<Scalar>(static_cast<std::size_t>(count))};
  }
  void zero_gaps(const Layout& layout, Scalar* numbers) {
    for (const auto& [first, count] : layout.gaps()) {
      run(Fill<Scalar>{{count}, numbers + first, Scalar(0)}, "a gap between tensors");
    }
  }

  /// Parameters of expansions lie together, so that they alone can descend.
  void place_tensors() {
    Layout layout, running;
    const auto place = [&](const std::vector<Tensor<Scalar>*>& tensors) {
      const Index first = layout.count();
      for (Tensor<Scalar>* tensor : tensors) {
        tensors_[tensor] = layout.add(std::ssize(tensor->value));
      }
      return Layout::Range{first, layout.count() - first};
    };
    own_range_ = place(own_);
    undecayed_range_ = place(undecayed_);
    for (Layer& layer : layers_) {
      if (layer.frozen || !layer.is_expanded()) continue;
      std::vector<Tensor<Scalar>*> tensors;
      add_tensors(layer, tensors);
      layer.range = place(tensors);
    }
    for (const BatchNorm& norm : norms_) {
      const auto& [weight, bias, mean, var] = norm.tensors;
      for (Tensor<Scalar>* each : std::array{mean, var}) {
        running_[each] = running.add(std::ssize(each->value));
      }
    }
    parameters_ = tensors_;
    for (int state = 0; state < (descent_.adam ? 2 : 1); ++state) {
      states_.push_back(pack(layout.count()));
    }
    gradients_ = allocate(layout.count());
    zero_gaps(layout, gradients_);  // those of the others are copied
    place(frozen_);
    weights_ = pack(layout.count());
    statistics_ = pack(running.count());
    const auto part = [&](Tensor<Scalar>* tensor, Scalar* of) {
      return tensor ? std::span(of + tensors_.at(tensor), tensor->value.size())
                    : std::span<Scalar>();
    };
    const auto at = [&](const Weights<Scalar>& weights, Scalar* of) {
      return DeviceLayer<Scalar>{part(weights.weight, of), part(weights.bias, of)};
    };
    for (Layer& layer : layers_) {
      if (!layer.is_expanded()) {
        layer.own = at(layer.layers.front(), weights_.device);
        if (!layer.frozen) layer.gradient = at(layer.layers.front(), gradients_);
        continue;
      }
      layer.own = product(layer);
      layer.gradient = product(layer);
      for (const Weights<Scalar>& each : layer.layers) {
        const DeviceLayer<Scalar> numbers = at(each, weights_.device);
        layer.at.layers.push_back({numbers.weight, numbers.bias});
        if (!layer.frozen) layer.at.layer_gradients.push_back(at(each, gradients_));
      }
      layer.at.products = {layer.own};
      layer.at.product_gradients = {{layer.gradient.weight, layer.gradient.bias}};
      layer.contraction.emplace(backend_, *layer.form, layer.stream);
    }
    for (BatchNorm& each : norms_) {
      const auto& [weight, bias, mean, var] = each.tensors;
      const Index channels = std::ssize(weight->value);
      each.norm = {.weight = part(weight, weights_.device).data(),
                   .bias = part(bias, weights_.device).data(),
                   .running_mean = statistics_.device + running_.at(mean),
                   .running_var = statistics_.device + running_.at(var),
                   .sums = allocate<double>(Index{2} * Slices::most * channels),
                   .batch = allocate(Index{4} * channels)};
      if (std::ranges::find(frozen_, weight) != frozen_.end()) continue;
      each.norm.weight_gradient = part(weight, gradients_).data();
      each.norm.bias_gradient = part(bias, gradients_).data();
    }
  }
  /// Numbers for what a layer's expansion is contracted to.
  DeviceLayer<Scalar> product(Layer& layer) {
    Layout layout;
    const Index weight = layout.add(layer.product_weights), bias = layout.add(layer.product_biases);
    layer.product_count = layout.count();
    Scalar* const numbers = allocate(layout.count());
    zero_gaps(layout, numbers);
    const auto part = [&](Index first, Index count) {
      return count > 0 ? std::span(numbers + first, static_cast<std::size_t>(count))
                       : std::span<Scalar>();
    };
    return {part(weight, layer.product_weights), part(bias, layer.product_biases)};
  }

  /// Gradients that are read by the next program already, on the origin, have one place; not that
  /// of what is pooled, which would be written while that of the pool is read.
  void place_gradients() {
    Index most = 0, most_added = 0;
    std::vector<Value*> sharing;
    for (auto value = values_.rbegin(); value != values_.rend(); ++value) {
      if (!value->differentiable || value->readers == 0) continue;
      if (value->reader == nobody) {
        throw concertina::Error("nothing that reads " + value->name + " gives it a gradient");
      }
      if (value->readers > 1) most_added = std::max(most_added, value->size.numbers());
      if (value->summed && value->readers == 1) {
        value->gradient = value->summed->gradient;
      } else if (value->source && !value->pooled && value->reader == value->operation + 1 &&
                 value->readers == 1) {
        sharing.push_back(&*value);
        most = std::max(most, value->size.numbers());
      } else {
        value->gradient = allocate(value->size.numbers());
      }
    }
    added_gradient_ = allocate(most_added);
    Scalar* const shared = allocate(most);
    for (Value* value : sharing) value->gradient = shared;
  }

  template <class Numbers>
  void upload(const Places& tensors, Packed& to, Numbers&& numbers) {
    for (const auto& [tensor, first] : tensors) {
      std::ranges::copy(numbers(tensor), to.host.begin() + first);
    }
    backend_.upload(std::span<const Scalar>(to.host), to.device);
  }
  static constexpr auto value_of = [](Tensor<Scalar>* tensor) { return std::span(tensor->value); };
  void upload_tensors() {
    upload(tensors_, weights_, value_of);
    upload(running_, statistics_, value_of);
  }
  template <class Numbers>
  void download(const Places& tensors, Packed& from, Numbers&& numbers) {
    backend_.download(from.device, std::span<Scalar>(from.host));
    for (const auto& [tensor, first] : tensors) {
      const std::span<Scalar> to = numbers(tensor);
      std::copy_n(from.host.begin() + first, to.size(), to.begin());
    }
  }

  // ---- a step

  /// Calls write(to), which sets a gradient of x there, of the reader at hand: the last one that
  /// was recorded sets the whole, and the others are added.
  template <class Write>
  void add_gradient(Value& x, const Step& step, Write&& write) {
    if (!x.differentiable) return;
    if (step.operation == x.reader) return write(x.gradient);
    write(added_gradient_);
    run(Sum<Scalar>{{count(x, step)}, x.gradient, added_gradient_, x.gradient},
        x.name + ", sum of gradients");
  }

  template <class Program>
  void run(const Program& program, const std::string& purpose, Stream stream = Stream::origin) {
    backend_.run(program, purpose, stream);
  }
  auto runner(const std::string& name, Stream stream = Stream::origin) {
    return [this, &name, stream](const auto& program, const std::string& purpose) {
      this->run(program, name + ", " + purpose, stream);
    };
  }
  static MapSize of_batch(MapSize size, int images) {
    size.images = images;
    return size;
  }
  static Index count(const Value& x, const Step& step) {
    return of_batch(x.size, step.images).numbers();
  }
  Scalar decay() const { return static_cast<Scalar>(descent_.decay); }

  /// Sets what expanded layers are contracted to, on their streams.
  void contract() {
    for (Layer& layer : layers_) {
      if (!layer.is_expanded()) continue;
      backend_.wait(layer.stream, Stream::origin);
      layer.contraction->forward(layer.at);
    }
  }
  void join(const Layer& layer, bool expanded) {
    if (layer.is_expanded() == expanded) backend_.wait(Stream::origin, layer.stream);
  }
  void await_contraction(const Layer& layer, const Step& step) {
    if (step.training) join(layer, true);  // those of tests are done
  }

  /// Behind the gradient of an expanded layer's product: that of its expansion, which descends.
  void pull_back(Layer& layer, const Pass<Scalar>& pass) {
    if (!layer.is_expanded()) return;
    if (descent_.decay_products) {
      Scalar* const gradient = layer.gradient.weight.data();
      run(Sum<Scalar>{{layer.product_count}, gradient, layer.own.weight.data(), gradient, decay()},
          layer.name + ", the decay of its product", layer.stream);
    }
    layer.contraction->backward(layer.at);
    descend(layer.range, descent_.decay_products ? Scalar(0) : decay(), pass,
            layer.name + ", the descent", layer.stream);
  }
  void descend(const Layout::Range& range, Scalar decay, const Pass<Scalar>& pass,
               const std::string& purpose, Stream stream) {
    if (range.count == 0) return;
    Scalar* const weights = weights_.device + range.first;
    const Scalar* const gradients = gradients_ + range.first;
    const auto state = [&](std::size_t s) { return states_[s].device + range.first; };
    if (descent_.adam) {
      run(DescendByAdam<Scalar>{range.count, weights, gradients, state(0), state(1), pass.clock,
                                decay},
          purpose, stream);
    } else {
      run(Descend<Scalar>{{range.count},
                          weights,
                          gradients,
                          state(0),
                          pass.clock,
                          static_cast<Scalar>(descent_.momentum),
                          decay},
          purpose, stream);
    }
  }

  B& backend_;
  Descent descent_;
  int capacity_, rest_;
  bool forked_;
  Part part_ = Part::trained;
  std::deque<Value> values_;  // operations refer to them
  std::deque<Layer> layers_;
  std::deque<BatchNorm> norms_;
  std::vector<Operation> operations_;
  std::vector<Tensor<Scalar>*> own_, undecayed_, frozen_;  // of no expansion that is trained
  Places tensors_, parameters_, running_;                  // all; those that are trained
  Layout::Range own_range_{}, undecayed_range_{};
  Packed weights_, statistics_;
  std::vector<Packed> states_;
  Scalar *gradients_ = nullptr, *added_gradient_ = nullptr;
};

}  // namespace cifar::cuda
