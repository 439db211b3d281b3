// SmallNet with its convolutions expanded as CL, trained at the compact network's price: a whole
// program around the autograd. The step is forward, backward, update; before each, the expanded
// layers are contracted, and after it the compact network's gradients are pulled back to them.
//
//     train [FOLDER]: CIFAR-10's binary version there; without it, images generated here
//
// SPDX-License-Identifier: Apache-2.0
#include "text.hpp"
#include "training/contractions.hpp"
#include "training/data.hpp"
#include "training/operations.hpp"
#include "training/optimizer.hpp"

#include <concertina/expand.hpp>
#include <concertina/random.hpp>

#include <algorithm>
#include <cmath>
#include <iostream>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

using namespace training;
using concertina::ConvShape;

namespace {

/// A network is what it records on the tape: its parameters, then its operations from the images to
/// the loss. Nothing is computed before tape.forward().
struct SmallNet {
  Tape<float>& tape;
  Maps<float>& images = tape.maps(colours, side, side, false);
  std::vector<Trained<float>> parameters = {};
  std::mt19937_64 generator{1};

  Tensor<float>& tensor(std::vector<Index> extents, double bound) {
    Tensor<float>& made = tape.tensor("", std::move(extents));
    for (float& element : made.value) {
      element = static_cast<float>(concertina::random_uniform(generator, bound));
    }
    parameters.push_back({&made});
    return made;
  }

  /// A layer's parameters, within PyTorch's bound of 1 / sqrt(fan in).
  template <int Rank>
  Weights<float> layer(const ConvShape<Rank>& shape) {
    const double fan_in = static_cast<double>(shape.in * numel(shape.kernel_size));
    Tensor<float>& weight = tensor(weight_extents(shape), 1 / std::sqrt(fan_in));
    return {&weight, shape.bias ? &tensor({shape.out}, 1 / std::sqrt(fan_in)) : nullptr};
  }

  NormTensors<float> norm(Index channels) {
    NormTensors<float> norm{&tensor({channels}, 0), &tensor({channels}, 0),
                            &tape.tensor("", {channels}), &tape.tensor("", {channels})};
    for (Tensor<float>* ones : {norm.weight, norm.running_var}) std::ranges::fill(ones->value, 1.F);
    return norm;
  }

  Maps<float>& record(Contractions<float>& contractions, Index classes) {
    Maps<float>* x = &images;
    for (const Index out : {8, 16, 32}) {
      const ConvShape<2> compact{
          .out = out, .in = x->channels, .kernel_size = 5, .padding = 2, .bias = true};
      Chain<float, 2> expanded{expand_cl(compact, {.rate = 4}), {}};  // this line expands,
      for (const auto& each : expanded.shapes) expanded.layers.push_back(layer(each));
      const auto [weights, shape] = contractions.add(expanded);  // and this one contracts
      x = &batch_norm(tape, convolution(tape, *x, shape, weights), norm(out));
      relu(tape, *x);
      x = &max_pool(tape, *x);
    }
    const ConvShape<0> fc1{.out = 64, .in = x->numbers(), .bias = true},
        fc2{.out = classes, .in = 64, .bias = true};
    x = &linear(tape, *x, fc1, layer(fc1));
    relu(tape, *x);
    return linear(tape, *x, fc2, layer(fc2));
  }
};

int train(const Dataset& data) {
  constexpr Index batch = 128, epochs = 4;
  constexpr double rate = 0.01, momentum = 0.9;
  ThreadPool pool(std::max<Index>(1, std::thread::hardware_concurrency()));
  Tape<float> tape(batch, pool);
  SmallNet network{tape};
  std::span<const std::uint32_t> which;  // the images of the batch
  const Images* from = &data.train;
  const Augmentation* augmentation = nullptr;
  record_source<float>(tape, network.images, [&](Index chunk, float* to) {
    const auto first = static_cast<std::size_t>(chunk * lanes);
    const auto count = std::min<std::size_t>(lanes, which.size() - first);
    load_images<float, lanes>(data, *from, which.subspan(first, count), augmentation, to);
  });
  Contractions<float> contractions(tape);
  CrossEntropy<float> loss(tape, network.record(contractions, data.classes));
  Sgd<float> optimizer(tape, network.parameters, momentum);

  const auto each_batch = [&](const Images& images, const std::vector<std::uint32_t>& order,
                              const auto& use) {
    from = &images;
    Index correct = 0;
    for (std::size_t first = 0; first < order.size(); first += which.size()) {
      which = std::span(order).subspan(first, std::min<std::size_t>(batch, order.size() - first));
      std::vector<std::uint8_t> labels;
      for (const std::uint32_t image : which) labels.push_back(images.labels[image]);
      loss.set_labels(labels);
      use();
      correct += loss.correct();
    }
    return static_cast<double>(correct) / static_cast<double>(order.size());
  };
  double accuracy = 0;
  for (Index epoch = 1; epoch <= epochs; ++epoch) {
    const Augmentation drawn{.seed = 1, .epoch = epoch};
    augmentation = &drawn;
    each_batch(data.train, epoch_order(data.train.count(), 1, epoch), [&] {
      tape.forward(std::ssize(which), true);  // a step: forward,
      tape.backward();                        // backward,
      optimizer.step(rate);                   // update
    });
    augmentation = nullptr;
    std::vector<std::uint32_t> all(static_cast<std::size_t>(data.test.count()));
    std::iota(all.begin(), all.end(), 0U);
    accuracy = each_batch(data.test, all, [&] { tape.forward(std::ssize(which), false); });
    std::cout << "epoch " << epoch << ", test accuracy " << tool::fixed(100 * accuracy, 1) << "%\n";
  }
  const bool learnt = accuracy > 3.0 / static_cast<double>(data.classes);  // three times chance
  return learnt ? tool::ok : tool::failed;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::string_view argument = argc > 1 ? argv[1] : "";
    if (argument == "--help") {
      std::cout
          << "Usage: train [FOLDER]\n\n"
             "Trains SmallNet on the files of CIFAR-10 in a folder, or on generated images.\n";
      return tool::finish("train", tool::ok);
    }
    if (argc > 2) throw tool::UsageError("more than one folder");
    return tool::finish("train", train(argc == 2 ? read_dataset(argv[1], "cifar10")
                                                 : generated_dataset(10, 4000, 500, 1)));
  } catch (...) {
    return tool::report_error("train");
  }
}
