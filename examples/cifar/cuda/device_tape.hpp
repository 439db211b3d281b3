// The device's tape: operations recorded as block programs, on a backend that runs them: a device,
// or in tests the host.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "accelerator.hpp"
#include "convolution.hpp"
#include "operations.hpp"

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
/// - allocate<T>(count): a Buffer<T>, which owns numbers without a value, at data();
/// - upload(span, address): a copy from the host, after what the origin runs; done when it returns;
/// - download(address, span): a copy to the host, likewise;
/// - stream(rank): one more; the lower its rank, the earlier its programs have their turn, those of
///   rank 0 with the origin's;
/// - run(program, purpose, stream): runs it after what was run there before, and returns at once;
/// - wait(later, earlier): what will be run on `later` comes after what was run on `earlier`;
/// - Contraction<Scalar>(backend, form, stream): of an expanded layer, on a stream: forward(at)
/// sets
///   at.products, and backward(at) at.layer_gradients; the same programs each time;
/// - repeat(kind, launches): launches(), which runs programs and does nothing else; from the second
///   time on they may be those that were recorded for the kind. Other streams fork from the origin
///   by waiting for it, and are joined by its waiting for them;
/// - forget(): drops what was recorded, when it is done; throws nothing.
template <class B>
concept Backend = requires(B& backend, std::span<const float> from, std::span<float> to,
                           float* numbers, void (*launches)()) {
  {
    backend.template allocate<float>(Index{1})
  } -> std::same_as<typename B::template Buffer<float>>;
  { backend.template allocate<float>(Index{1}).data() } -> std::same_as<float*>;
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

/// A set of images on the device, and a pass over it in batches.
template <class Scalar>
struct Pass {
  const std::uint8_t *pixels, *labels;
  const std::uint32_t* order;
  Clock* clock;
  const Scalar* values;    ///< of normalized_values
  double* losses;          ///< [step]
  std::int32_t* corrects;  ///< [step]
  int batch;
  bool augmented;
  std::uint64_t seed;
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
    Value& y = add_value(colours, side, side, "images");
    y.differentiable = false;
    record(y, [this, &y](const Step& step) {
      const Pass<Scalar>& pass = step.pass;
      run(LoadImages<Scalar>{pass.pixels, pass.order, pass.clock, pass.values, y.numbers.data(),
                             step.images, pass.batch, pass.augmented, pass.seed},
          "images");
    });
    return last();
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
    Value& y = add_value(out, 1, 1, layer.name);
    y.is_linear = true;
    record(
        y,
        [this, &x, &y, &layer, in, out](const Step& step) {
          await_contraction(layer, step);
          run(linear<Scalar>(step.images, in, out, x.numbers.data(), layer.own.weight.data(),
                             layer.own.bias.data(), y.numbers.data(), y.relu),
              layer.name);
        },
        [this, &x, &y, &layer, in, out](const Step& step) {
          backend_.wait(layer.stream, Stream::origin);
          run(linear_weight_gradient<Scalar>(step.images, in, out, x.numbers.data(), y.gradient,
                                             layer.gradient.weight.data(),
                                             layer.gradient.bias.data()),
              layer.name + ", gradient", layer.stream);
          pull_back(layer, step.pass);
          add_gradient(x, step, [&](Scalar* to) {
            run(linear_input_gradient<Scalar>(step.images, in, out, y.gradient,
                                              layer.own.weight.data(), to,
                                              x.relu ? x.numbers.data() : nullptr),
                layer.name + ", gradient of its input");
          });
        });
    return last();
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
    return last();
  }
  Map relu(Map x) override {
    Value& y = held(x, [](const Value& each) { return each.window == 1; });
    y.relu = true;
    return y.index;
  }
  Map max_pool(Map x) override {
    Value& y = held(x, [](const Value& each) { return each.window == 1; });
    y.window = 2;
    return y.index;
  }
  /// A fully connected layer of equal weights, at each channel.
  Map mean_pool(Map from) override {
    Value& x = read(from);
    const int channels = x.size.channels, positions = x.size.positions();
    Value& y = add_value(channels, 1, 1, x.name);
    Buffer<Scalar>& shares = scratch_.emplace_back(allocate(positions));
    run(Fill<Scalar>{shares.data(), positions, Scalar(1) / static_cast<Scalar>(positions)},
        "the shares of a mean");
    record(
        y,
        [this, &x, &y, &shares, channels, positions](const Step& step) {
          run(linear<Scalar>(step.images * channels, positions, 1, x.numbers.data(), shares.data(),
                             nullptr, y.numbers.data()),
              x.name + ", mean");
        },
        [this, &x, &y, &shares, channels, positions](const Step& step) {
          add_gradient(x, step, [&](Scalar* to) {
            run(linear_input_gradient<Scalar>(step.images * channels, positions, 1, y.gradient,
                                              shares.data(), to),
                x.name + ", gradient of the mean");
          });
        });
    return last();
  }

  Map average_pool(Map, const concertina::PerAxis<2>&) override {
    throw concertina::ShapeError("a device computes no average pool but a mean of whole maps");
  }

  Map sum(const std::vector<Map>& branches) override {
    std::vector<Value*> from;
    for (const Map x : branches) from.push_back(&read(x));
    for (Value* x : from) x->reader = operations_.size();
    const MapSize size = from.front()->size;
    for (std::size_t i = 1; i < from.size(); ++i) {
      const bool again = std::find(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(i),
                                   from[i]) != from.begin() + static_cast<std::ptrdiff_t>(i);
      if (again || from[i]->size != size) {
        throw concertina::ShapeError("a device adds different maps of one size; " + from[i]->name +
                                     (again ? " is there twice" : " is of another"));
      }
    }
    Value& y = add_value(size.channels, size.height, size.width, from.front()->name);
    for (Value* x : from) x->summed = &y;
    record(
        y,
        [this, from, &y](const Step& step) {
          for (std::size_t i = 1; i < from.size(); ++i) {
            run(Sum<Scalar>{(i == 1 ? from.front() : &y)->numbers.data(), from[i]->numbers.data(),
                            y.numbers.data(), of_batch(y.size, step.images).numbers()},
                y.name + ", sum");
          }
        },
        [this, from, &y](const Step& step) {
          for (Value* x : from) {
            if (x->gradient == y.gradient) continue;
            add_gradient(*x, step, [&](Scalar* to) {
              run(Sum<Scalar>{y.gradient, nullptr, to, of_batch(y.size, step.images).numbers()},
                  y.name + ", gradient of a branch");
            });
          }
        });
    return last();
  }

  void loss(Map from, double weight) override {
    Value& x = read(from);
    const int classes = x.size.channels;
    record(x, [this, &x, classes, weight](const Step& step) {
      const Pass<Scalar>& pass = step.pass;
      run(CrossEntropy<Scalar>{x.numbers.data(), pass.labels, pass.order, pass.clock, pass.losses,
                               pass.corrects, step.training ? x.gradient : nullptr, step.images,
                               pass.batch, classes, static_cast<Scalar>(weight)},
          "the loss");
    });
  }

  Map detached(Map from) override {
    Value& x = read(from, false);
    Value& y = add_value(x.size.channels, x.size.height, x.size.width, x.name);
    y.differentiable = false;
    record(y, [this, &x, &y](const Step& step) {
      run(Sum<Scalar>{x.numbers.data(), nullptr, y.numbers.data(),
                      of_batch(y.size, step.images).numbers()},
          x.name + ", a copy");
    });
    return last();
  }

  void begin(Part part) override { part_ = part; }

  /// What the loss gives the logits, and this adds.
  void distill(Map logits, Map from, double temperature, double weight) override {
    Value &x = read(logits), &teacher = read(from);
    require_alike("distillation", x, teacher);
    record(x, [=, this, &x, &teacher](const Step& step) {
      if (!step.training) return;
      const auto t = static_cast<Scalar>(temperature);
      run(Distill<Scalar>{x.numbers.data(), teacher.numbers.data(), x.gradient, step.images,
                          x.size.channels, t,
                          static_cast<Scalar>(weight) * t / static_cast<Scalar>(step.images)},
          "distillation");
    });
  }

  void hint(Map features, Map from) override {
    Value &x = read(features), &hint = read(from);
    require_alike("hint", x, hint);
    record(x, {}, [this, &x, &hint](const Step& step) {
      const Index count = of_batch(x.size, step.images).numbers();
      const auto pull = [&](Value& to, const Value& other) {
        add_gradient(to, step, [&](Scalar* gradient) {
          run(Sum<Scalar>{to.numbers.data(), other.numbers.data(), gradient, count, -1,
                          2 / static_cast<Scalar>(count)},
              to.name + ", gradient of the hint");
        });
      };
      pull(x, hint);
      pull(hint, x);
    });
  }

  void match_similarities(Map features, Map from) override {
    Value &x = read(features), &teacher = read(from);
    const Index images = capacity_, pairs = images * images;
    Buffer<Scalar>& own = scratch_.emplace_back(allocate(pairs));
    Buffer<Scalar>& given = scratch_.emplace_back(allocate(pairs));
    Buffer<Scalar>& weights = scratch_.emplace_back(allocate(pairs));
    slopes_ = backend_.template allocate<double>(pairs);
    record(x, {}, [this, &x, &teacher, &own, &given, &weights](const Step& step) {
      const auto gram = [&](const Value& of, Buffer<Scalar>& to) {
        const int numbers = static_cast<int>(of_batch(of.size, 1).numbers());
        run(Product<Scalar>{.left = {of.numbers.data(), numbers, 1},
                            .right = {of.numbers.data(), numbers, 1},
                            .result = to.data(),
                            .rows = step.images,
                            .columns = step.images,
                            .inner = numbers},
            of.name + ", inner products");
        return detail::Gram<Scalar>{to.data(), step.images};
      };
      const auto students = gram(x, own), teachers = gram(teacher, given);
      run(SimilaritySlopes<Scalar>{students, teachers, slopes_.data()}, "similarities");
      run(SimilarityWeights<Scalar>{students, slopes_.data(), weights.data()}, "similarities");
      add_gradient(x, step, [&](Scalar* to) {
        const int numbers = static_cast<int>(of_batch(x.size, 1).numbers());
        run(Product<Scalar>{.left = {weights.data(), step.images, 1},
                            .right = {x.numbers.data(), 1, numbers},
                            .result = to,
                            .rows = step.images,
                            .columns = numbers,
                            .inner = step.images},
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
    const auto value = [](auto* tensor) { return std::span(tensor->value); };
    download(parameters_, weights_, value);
    for (std::size_t s = 0; s < states.size(); ++s) {
      download(parameters_, states_[s], [&](const auto* tensor) { return states[s].at(tensor); });
    }
    download(running_, statistics_, value);
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
  using Buffer = typename B::template Buffer<T>;
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
    Scalar *weight_gradient = nullptr, *bias_gradient = nullptr;
    Buffer<double> sums{};
    Buffer<Scalar> batch{};
  };

  static constexpr std::size_t nobody = std::numeric_limits<std::size_t>::max();

  /// Maps of a batch. Those with a source are held back: the source's, normed, through a ReLU, and
  /// pooled in windows.
  struct Value {
    Map index;
    MapSize size;  // of a batch as large as there can be
    std::string name;
    Buffer<Scalar> numbers{}, own_gradient{};
    Scalar* gradient = nullptr;
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
    Weights<Scalar> weights;
    DeviceLayer<Scalar> own{}, gradient{};
    Stream stream{};
    Buffer<Scalar> workspace{};
    Index workspace_count = 0;
    Buffer<Scalar> framed{}, framed_gradient{};  // a kernel among zeros
    // of an expansion
    std::vector<Weights<Scalar>> layers{};
    std::optional<concertina::cuda::PlannedForm> form{};
    Index product_weights = 0, product_biases = 0, product_count = 0;
    Buffer<Scalar> product{}, product_gradient{};
    Layout::Range range{};  // where the parameters of its layers are
    Expansion<Scalar> at{};
    std::optional<typename B::template Contraction<Scalar>> contraction{};

    bool is_expanded() const { return form.has_value(); }
  };

  /// Tensors on the device, and as they are copied: at once.
  struct Packed {
    Buffer<Scalar> device{};
    std::vector<Scalar> host{};  // gaps are zero
  };
  struct Placed {
    Tensor<Scalar>* tensor;
    Index first;
  };

  // ---- recording

  Map last() const { return values_.size() - 1; }
  Value& add_value(Index channels, Index height, Index width, const std::string& name) {
    Value& value = hold(channels, height, width, name);
    value.numbers = allocate(value.size.numbers());
    return value;
  }
  Value& hold(Index channels, Index height, Index width, const std::string& name) {
    return values_.emplace_back(Value{.index = values_.size(),
                                      .size = {capacity_, static_cast<int>(channels),
                                               static_cast<int>(height), static_cast<int>(width)},
                                      .name = name,
                                      .frozen = part_ == Part::frozen,
                                      .differentiable = part_ != Part::frozen});
  }
  Value& hold(Value& source) {
    Value& value = hold(source.size.channels, source.size.height, source.size.width, source.name);
    value.source = &source;
    return value;
  }
  /// A value that is held back, to which more can be added; itself if it is such a one.
  template <class Fits>
  Value& held(Map x, Fits&& fits) {
    Value& value = values_[x];
    return value.source && value.readers == 0 && fits(value) ? value : hold(read(x));
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
    const Index own = of_batch(x.size, 1).numbers(), given = of_batch(teacher.size, 1).numbers();
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
      return detail::NormProgram<Scalar>{
          of_batch(x.size, step.images), x.numbers.data(), y.norm ? y.norm->norm : Norm<Scalar>{},
          y.relu ? Scalar(0) : -std::numeric_limits<Scalar>::infinity()};
    };
    record(
        y,
        [this, &y, program](const Step& step) {
          const auto norm = program(step);
          const bool training = step.training && !y.frozen;
          if (training && y.norm) run(NormMoments<Scalar>{norm}, y.name + ", moments");
          run(NormReluPool<Scalar, Size>{{norm}, y.numbers.data(), training}, y.name + ", pool");
        },
        [this, &x, &y, program](const Step& step) {
          const auto norm = program(step);
          if (y.norm) {
            run(NormReluPoolSums<Scalar, Size>{{norm}, y.gradient}, y.name + ", norm's sums");
          }
          add_gradient(x, step, [&](Scalar* to) {
            run(NormReluPoolGradient<Scalar, Size>{{norm},
                                                   y.gradient,
                                                   to,
                                                   y.norm ? y.norm->weight_gradient : nullptr,
                                                   y.norm ? y.norm->bias_gradient : nullptr},
                y.name + ", gradient of its maps");
          });
        });
  }

  /// Every so many positions along both axes, from the first.
  Map every(Map from, int stride) {
    if (stride == 1) return from;
    Value& x = read(from);
    const auto part = [stride](int all) { return (all + stride - 1) / stride; };
    Value& y = add_value(x.size.channels, part(x.size.height), part(x.size.width), x.name);
    const auto grid = [&x, &y, stride](const Step& step, const Scalar* source, Scalar* to,
                                       bool spread) {
      return Grid<Scalar>{source,
                          to,
                          Index{step.images} * x.size.channels,
                          y.size.height,
                          y.size.width,
                          x.size.height,
                          x.size.width,
                          0,
                          0,
                          stride,
                          spread};
    };
    record(
        y,
        [this, &x, &y, grid](const Step& step) {
          run(grid(step, x.numbers.data(), y.numbers.data(), false), x.name + ", stride");
        },
        [this, &x, &y, grid](const Step& step) {
          add_gradient(x, step, [&](Scalar* to) {
            run(grid(step, y.gradient, to, true), x.name + ", gradient of the stride");
          });
        });
    return last();
  }

  /// At stride 1. A kernel that is no square stands among zeros in one.
  Map convolve(Map from, const Shape<2>& shape, const Weights<Scalar>& weights,
               const Chain<Scalar, 2>& expansion) {
    Value& x = read(from);
    const auto number = [](Index value) { return static_cast<int>(value); };
    const int height = number(shape.kernel_size[0]), width = number(shape.kernel_size[1]),
              kernel = std::max(height, width),
              padding = number(shape.padding.start[0]) + (kernel - height) / 2;
    const bool framed = height != width;
    if (shape.padding.start != shape.padding.end || (kernel - height) % 2 != 0 ||
        (kernel - width) % 2 != 0 || padding != shape.padding.start[1] + (kernel - width) / 2) {
      throw concertina::ShapeError("a device computes no such convolution (" + to_string(shape) +
                                   "); its paddings are alike on all sides of a square kernel");
    }
    const ConvolutionShape conv = {.batch = capacity_,
                                   .in = number(shape.in),
                                   .out = number(shape.out),
                                   .height = x.size.height,
                                   .width = x.size.width,
                                   .kernel = kernel,
                                   .padding = padding};
    validate(conv);
    Layer& layer = add_layer(weights, shape, expansion);
    for (const int images : std::array{capacity_, rest_}) {
      if (images == 0) continue;
      const Index count = convolution_workspace<Scalar>(of_batch(conv, images));
      if (count > layer.workspace_count) layer.workspace_count = count;
    }
    layer.workspace = allocate(layer.workspace_count);
    if (framed) {
      layer.framed = allocate(conv.weights());
      layer.framed_gradient = allocate(conv.weights());
    }
    const auto frame = [=](const Scalar* source, Scalar* to, bool spread) {
      return Grid<Scalar>{source,
                          to,
                          shape.out * shape.in,
                          height,
                          width,
                          kernel,
                          kernel,
                          (kernel - height) / 2,
                          (kernel - width) / 2,
                          1,
                          spread};
    };
    const auto weight = [&layer, framed] {
      return framed ? layer.framed.data() : layer.own.weight.data();
    };
    Value& y = add_value(shape.out, conv.out_height(), conv.out_width(), layer.name);
    record(
        y,
        [=, this, &x, &y, &layer](const Step& step) {
          await_contraction(layer, step);
          if (framed) {
            run(frame(layer.own.weight.data(), layer.framed.data(), true), layer.name + ", frame");
          }
          convolution_forward<Scalar>({.shape = of_batch(conv, step.images),
                                       .from = x.numbers.data(),
                                       .weight = weight(),
                                       .bias = layer.own.bias.data(),
                                       .to = y.numbers.data()},
                                      runner(layer.name));
        },
        [=, this, &x, &y, &layer](const Step& step) {
          Scalar* const own = layer.gradient.weight.data();
          Scalar* const gradient = framed ? layer.framed_gradient.data() : own;
          backend_.wait(layer.stream, Stream::origin);
          convolution_weight_gradient<Scalar>({.shape = of_batch(conv, step.images),
                                               .x = x.numbers.data(),
                                               .dy = y.gradient,
                                               .workspace = layer.workspace.data(),
                                               .dw = gradient,
                                               .db = layer.gradient.bias.data()},
                                              runner(layer.name, layer.stream));
          if (framed) run(frame(gradient, own, false), layer.name + ", frame", layer.stream);
          pull_back(layer, step.pass);
          add_gradient(x, step, [&](Scalar* to) {
            convolution_input_gradient<Scalar>({.shape = of_batch(conv, step.images),
                                                .from = y.gradient,
                                                .weight = weight(),
                                                .to = to},
                                               runner(layer.name));
          });
        });
    return last();
  }

  template <int Rank>
  Layer& add_layer(const Weights<Scalar>& weights, const Shape<Rank>& shape,
                   const Chain<Scalar, Rank>& expansion) {
    const auto parent = [](const std::string& name) { return name.substr(0, name.rfind('.')); };
    const std::size_t rank = layers_.size();
    Layer& layer = layers_.emplace_back();
    layer.weights = weights;
    layer.frozen = part_ == Part::frozen;
    if (forked_ && !layer.frozen) layer.stream = backend_.stream(static_cast<int>(rank));
    if (expansion.layers.empty()) {
      layer.name = parent(weights.weight->name);
      add_tensors(weights, tensors_of_part());
      return layer;
    }
    layer.name = parent(parent(expansion.layers.front().weight->name));
    layer.layers = expansion.layers;
    for (const Weights<Scalar>& each : layer.layers) {
      if (layer.frozen) add_tensors(each, frozen_);
    }
    layer.form.emplace(expansion.shapes);
    layer.product_weights = weight_numel(shape);
    layer.product_biases = shape.bias ? shape.out : 0;
    return layer;
  }
  std::vector<Tensor<Scalar>*>& tensors_of_part() {
    return part_ == Part::trained ? own_ : part_ == Part::undecayed ? undecayed_ : frozen_;
  }
  static void add_tensors(const Weights<Scalar>& weights, std::vector<Tensor<Scalar>*>& to) {
    to.push_back(weights.weight);
    if (weights.bias) to.push_back(weights.bias);
  }

  // ---- where numbers are

  Buffer<Scalar> allocate(Index count) { return backend_.template allocate<Scalar>(count); }
  Packed pack(Index count) {
    return {allocate(count), std::vector<Scalar>(static_cast<std::size_t>(count))};
  }
  void zero_gaps(const Layout& layout, Scalar* numbers) {
    for (const auto& [first, count] : layout.gaps()) {
      run(Fill<Scalar>{numbers + first, count, Scalar(0)}, "a gap between tensors");
    }
  }

  /// Parameters of expansions lie together, so that they alone can descend.
  void place_tensors() {
    Layout layout, running;
    std::map<const Tensor<Scalar>*, Index> places;
    const auto place = [&](const std::vector<Tensor<Scalar>*>& tensors) {
      const Index first = layout.count();
      for (Tensor<Scalar>* tensor : tensors) {
        places[tensor] = layout.add(std::ssize(tensor->value));
        tensors_.push_back({tensor, places[tensor]});
      }
      return Layout::Range{first, layout.count() - first};
    };
    own_range_ = place(own_);
    undecayed_range_ = place(undecayed_);
    for (Layer& layer : layers_) {
      if (layer.frozen) continue;
      std::vector<Tensor<Scalar>*> tensors;
      for (const Weights<Scalar>& each : layer.layers) add_tensors(each, tensors);
      layer.range = place(tensors);
    }
    for (const BatchNorm& norm : norms_) {
      for (Tensor<Scalar>* tensor :
           std::array{norm.tensors.running_mean, norm.tensors.running_var}) {
        running_.push_back({tensor, running.add(std::ssize(tensor->value))});
      }
    }
    parameters_ = tensors_;
    for (int state = 0; state < (descent_.adam ? 2 : 1); ++state) {
      states_.push_back(pack(layout.count()));
    }
    gradients_ = allocate(layout.count());
    zero_gaps(layout, gradients_.data());  // those of the others are copied
    place(frozen_);
    weights_ = pack(layout.count());
    statistics_ = pack(running.count());
    const auto part = [&](const Tensor<Scalar>* tensor, Buffer<Scalar>& of) {
      return tensor ? std::span(of.data() + places.at(tensor), tensor->value.size())
                    : std::span<Scalar>();
    };
    const auto at = [&](const Weights<Scalar>& weights, Buffer<Scalar>& of) {
      return DeviceLayer<Scalar>{part(weights.weight, of), part(weights.bias, of)};
    };
    for (Layer& layer : layers_) {
      if (!layer.is_expanded()) {
        layer.own = at(layer.weights, weights_.device);
        if (!layer.frozen) layer.gradient = at(layer.weights, gradients_);
        continue;
      }
      layer.own = product(layer, layer.product);
      layer.gradient = product(layer, layer.product_gradient);
      for (const Weights<Scalar>& each : layer.layers) {
        const DeviceLayer<Scalar> numbers = at(each, weights_.device);
        layer.at.layers.push_back({numbers.weight, numbers.bias});
        if (!layer.frozen) layer.at.layer_gradients.push_back(at(each, gradients_));
      }
      layer.at.products = {layer.own};
      layer.at.product_gradients = {{layer.gradient.weight, layer.gradient.bias}};
      layer.contraction.emplace(backend_, *layer.form, layer.stream);
    }
    for (std::size_t n = 0; n < norms_.size(); ++n) {
      BatchNorm& each = norms_[n];
      const auto [weight, bias, mean, var] = each.tensors;
      const Index channels = std::ssize(weight->value);
      each.sums = backend_.template allocate<double>(Index{2} * Slices::most * channels);
      each.batch = allocate(Index{4} * channels);
      Scalar* const running_numbers = statistics_.device.data();
      each.norm = {part(weight, weights_.device).data(),
                   part(bias, weights_.device).data(),
                   running_numbers + running_[2 * n].first,
                   running_numbers + running_[2 * n + 1].first,
                   each.sums.data(),
                   each.batch.data()};
      if (std::ranges::find(frozen_, weight) != frozen_.end()) continue;
      each.weight_gradient = part(weight, gradients_).data();
      each.bias_gradient = part(bias, gradients_).data();
    }
  }
  DeviceLayer<Scalar> product(Layer& layer, Buffer<Scalar>& buffer) {
    Layout layout;
    const Index weight = layout.add(layer.product_weights), bias = layout.add(layer.product_biases);
    layer.product_count = layout.count();
    buffer = allocate(layout.count());
    zero_gaps(layout, buffer.data());
    const auto part = [&](Index first, Index count) {
      return count > 0 ? std::span(buffer.data() + first, static_cast<std::size_t>(count))
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
        value->own_gradient = allocate(value->size.numbers());
        value->gradient = value->own_gradient.data();
      }
    }
    shared_gradient_ = allocate(most);
    added_gradient_ = allocate(most_added);
    for (Value* value : sharing) value->gradient = shared_gradient_.data();
  }

  template <class Numbers>
  void upload(const std::vector<Placed>& tensors, Packed& to, Numbers&& numbers) {
    for (const auto& [tensor, first] : tensors) {
      std::ranges::copy(numbers(tensor), to.host.begin() + first);
    }
    backend_.upload(std::span<const Scalar>(to.host), to.device.data());
  }
  void upload_tensors() {
    const auto value = [](const auto* tensor) { return std::span(tensor->value); };
    upload(tensors_, weights_, value);
    upload(running_, statistics_, value);
  }
  template <class Numbers>
  void download(const std::vector<Placed>& tensors, Packed& from, Numbers&& numbers) {
    backend_.download(from.device.data(), std::span<Scalar>(from.host));
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
    write(added_gradient_.data());
    run(Sum<Scalar>{x.gradient, added_gradient_.data(), x.gradient,
                    of_batch(x.size, step.images).numbers()},
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
  static ConvolutionShape of_batch(ConvolutionShape shape, int images) {
    shape.batch = images;
    return shape;
  }
  static MapSize of_batch(MapSize size, int images) {
    size.images = images;
    return size;
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
      Scalar* const gradient = layer.product_gradient.data();
      run(Sum<Scalar>{gradient, layer.product.data(), gradient, layer.product_count, decay()},
          layer.name + ", the decay of its product", layer.stream);
    }
    layer.contraction->backward(layer.at);
    descend(layer.range, descent_.decay_products ? Scalar(0) : decay(), pass,
            layer.name + ", the descent", layer.stream);
  }
  void descend(const Layout::Range& range, Scalar decay, const Pass<Scalar>& pass,
               const std::string& purpose, Stream stream) {
    if (range.count == 0) return;
    Scalar* const weights = weights_.device.data() + range.first;
    const Scalar* const gradients = gradients_.data() + range.first;
    const auto state = [&](std::size_t s) { return states_[s].device.data() + range.first; };
    if (descent_.adam) {
      run(DescendByAdam<Scalar>{weights, gradients, state(0), state(1), pass.clock, range.count,
                                decay},
          purpose, stream);
    } else {
      run(Descend<Scalar>{weights, gradients, state(0), pass.clock, range.count,
                          static_cast<Scalar>(descent_.momentum), decay},
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
  std::vector<Placed> tensors_, parameters_, running_;     // all; those that are trained
  Layout::Range own_range_{}, undecayed_range_{};
  Packed weights_, statistics_;
  std::vector<Packed> states_;
  Buffer<Scalar> gradients_, shared_gradient_, added_gradient_;
  std::deque<Buffer<Scalar>> scratch_;
  Buffer<double> slopes_;
};

}  // namespace cifar::cuda
