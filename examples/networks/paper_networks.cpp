// Networks, layer by layer.
// SPDX-License-Identifier: Apache-2.0
#include "paper_networks.hpp"

#include "onnx/builder.hpp"
#include "text.hpp"

#include <algorithm>
#include <utility>

namespace tool {
namespace {

using concertina::ConvShape;

ConvShape<2> square(Index out, Index kernel, Index stride = 1, Index groups = 1) {
  return {
      .out = out, .kernel_size = kernel, .stride = stride, .padding = kernel / 2, .groups = groups};
}

ConvShape<2> with_bias(ConvShape<2> shape) {
  shape.bias = true;
  return shape;
}

/// A network of images with three channels, any number of them.
Builder network(const std::string& name, Index height, Index width) {
  return {name, onnx::DataType::float32, {unknown, 3, height, width}};
}

/// Square windows.
Builder& max_pool(Builder& net, Index kernel, Index stride, Index padding = 0) {
  return net.max_pool({kernel, kernel}, {stride, stride}, {padding, padding});
}

/// Names NAME.0, NAME.1, ... as those of the parts of a torch.nn.Sequential, which counts
/// activations too.
class Sequential {
 public:
  Sequential(Builder& net, std::string name) : net_(net), name_(std::move(name) + ".") {}

  std::string next() { return name_ + std::to_string(count_++); }
  Sequential& conv(const ConvShape<2>& shape, Builder& (Builder::*activation)()) {
    conv(shape);
    (net_.*activation)();
    ++count_;
    return *this;
  }
  /// Without an activation.
  Sequential& conv(const ConvShape<2>& shape) {
    net_.conv(next(), shape);
    net_.batch_norm(next());
    return *this;
  }

 private:
  Builder& net_;
  std::string name_;
  int count_ = 0;
};

Architecture smallnet(Index kernel) {
  Builder net = network("smallnet" + std::to_string(kernel), 32, 32);
  for (int block = 1; block <= 3; ++block) {
    const std::string name = "conv" + std::to_string(block);
    ConvShape<2> shape = with_bias(square(Index{4} << block, kernel));
    if (kernel == 3) shape.padding = 0;
    max_pool(net.conv(name, shape).batch_norm(name + "_bn").relu(), 2, 2);
  }
  net.flatten().linear("fc1", 64).relu().linear("fc2", 10);
  const std::vector<std::string> convs = {"conv1", "conv2", "conv3"};
  Architecture result{
      .title = "SmallNet (" + std::to_string(kernel) + "x" + std::to_string(kernel) + ")",
      .model = net.finish(),
      .functional = true,
      .recipes = {{.strategy = "cl", .layers = convs, .narrow_first = true},
                  {.strategy = "fc", .layers = {"fc1"}}}};
  if (kernel > 3) {
    result.recipes.push_back({.strategy = "ck", .layers = convs, .narrow_first = true});
  }
  return result;
}

Architecture mobilenet() {
  Builder net = network("mobilenet", 224, 224);
  std::vector<std::string> expanded{"model.0.0"};
  Sequential(net, "model.0").conv(square(32, 3, 2), &Builder::relu);
  struct Block {
    Index out, stride;
  };
  constexpr Block blocks[] = {{64, 1},  {128, 2}, {128, 1}, {256, 2}, {256, 1},  {512, 2}, {512, 1},
                              {512, 1}, {512, 1}, {512, 1}, {512, 1}, {1024, 2}, {1024, 1}};
  for (const Block& block : blocks) {
    const std::string name = "model." + std::to_string(expanded.size());
    const Index in = net.channels();
    Sequential(net, name)
        .conv(square(in, 3, block.stride, in), &Builder::relu)
        .conv(square(block.out, 1), &Builder::relu);
    expanded.push_back(name + ".0");
  }
  // A module, which the paper's count sees; the means of the other networks are not.
  net.avg_pool({7, 7}, {7, 7}, {0, 0}).flatten().linear("fc", 1000);
  return {.title = "MobileNet",
          .model = net.finish(),
          .recipes = {{.strategy = "cl", .layers = expanded}}};
}

Architecture mobilenet_v2() {
  Builder net = network("mobilenetv2", 224, 224);
  std::vector<std::string> expanded{"features.0.0"};
  Sequential(net, "features.0").conv(square(32, 3, 2), &Builder::relu6);
  struct Stage {
    Index factor, out, repeats, stride;
  };
  constexpr Stage stages[] = {{1, 16, 1, 1}, {6, 24, 2, 2},  {6, 32, 3, 2}, {6, 64, 4, 2},
                              {6, 96, 3, 1}, {6, 160, 3, 2}, {6, 320, 1, 1}};
  int block = 1;
  for (const Stage& stage : stages) {
    for (Index repeat = 0; repeat < stage.repeats; ++repeat, ++block) {
      const Index in = net.channels(), hidden = in * stage.factor;
      const Index stride = repeat == 0 ? stage.stride : 1;
      const std::string name = "features." + std::to_string(block) + ".conv";
      Builder inner = net.branch();
      Sequential layers(inner, name);
      if (stage.factor > 1) layers.conv(square(hidden, 1), &Builder::relu6);
      layers.conv(square(hidden, 3, stride, hidden), &Builder::relu6).conv(square(stage.out, 1));
      if (stride == 2) expanded.push_back(name + ".3");
      // A sum of one branch is that branch.
      if (stride == 1 && in == stage.out) {
        net.sum({net.branch(), inner});
      } else {
        net.sum({inner});
      }
    }
  }
  Sequential(net, "features." + std::to_string(block)).conv(square(1280, 1), &Builder::relu6);
  net.global_avg_pool().linear("classifier.1", 1000);
  return {.title = "MobileNetV2",
          .model = net.finish(),
          .recipes = {{.strategy = "cl", .layers = expanded}}};
}

Architecture shufflenet_v2() {
  Builder net = network("shufflenetv2", 224, 224);
  std::vector<std::string> expanded{"conv1.0"};
  Sequential(net, "conv1").conv(square(24, 3, 2), &Builder::relu);
  max_pool(net, 3, 2, 1);
  struct Stage {
    int name;
    Index out;
    int units;
  };
  for (const Stage& stage : {Stage{2, 48, 4}, Stage{3, 96, 8}, Stage{4, 192, 4}}) {
    for (int unit = 0; unit < stage.units; ++unit) {
      const std::string name =
          "stage" + std::to_string(stage.name) + "." + std::to_string(unit) + ".branch";
      const Index half = stage.out / 2, stride = unit == 0 ? 2 : 1;
      Builder left = net.branch(), right = net.branch();
      if (unit == 0) {
        const Index in = net.channels();
        Sequential(left, name + "1")
            .conv(square(in, 3, 2, in))
            .conv(square(half, 1), &Builder::relu);
        expanded.push_back(name + "1.0");
      } else {
        left.channel_slice(0, half);
        right.channel_slice(half, stage.out);
      }
      Sequential(right, name + "2")
          .conv(square(half, 1), &Builder::relu)
          .conv(square(half, 3, stride, half))
          .conv(square(half, 1), &Builder::relu);
      expanded.push_back(name + "2.3");
      net.concat({left, right}).channel_shuffle(2);
    }
  }
  Sequential(net, "conv5").conv(square(1024, 1), &Builder::relu);
  net.global_avg_pool().linear("fc", 1000);
  return {.title = "ShuffleNetV2 0.5x",
          .model = net.finish(),
          .recipes = {{.strategy = "cl", .layers = expanded, .depthwise_middle = true}}};
}

Architecture yolo_lite() {
  Builder net = network("yololite", 608, 608);
  std::vector<std::string> expanded;
  for (const Index out : {16, 32, 64, 128, 128, 256}) {
    const std::string name = "conv" + std::to_string(expanded.size() + 1);
    net.conv(name, square(out, 3)).batch_norm(name + "_bn").leaky_relu(0.1F);
    if (out != 256) max_pool(net, 2, 2);
    expanded.push_back(name);
  }
  expanded.pop_back();
  net.conv("conv7", with_bias(square(125, 1)));
  return {.title = "YOLO-LITE",
          .model = net.finish(),
          .recipes = {{.strategy = "cl", .layers = expanded}}};
}

/// Two convolutions down, what lies below, and two up again; adds the names of those that expand.
void unet_level(Builder& net, Index width, int level, std::vector<std::string>& expanded) {
  const auto two = [&](const std::string& name) {
    for (const char* which : {".conv1", ".conv2"}) {
      net.conv(name + which, square(width, 3)).batch_norm(name + which + "_bn");
      net.relu();
    }
  };
  const std::string number = std::to_string(level), down = "down" + number;
  two(down);
  expanded.insert(expanded.end(), {down + ".conv1", down + ".conv2"});
  if (level == 5) return;
  Builder below = net.branch();
  max_pool(below, 2, 2);
  unet_level(below, 2 * width, level + 1, expanded);
  below.conv_transpose("up" + number + ".upsample", width, 2);
  net.concat({below, net.branch()});
  two("up" + number);
}

Architecture unet() {
  Builder net = network("unet", 1024, 2048);
  std::vector<std::string> expanded;
  unet_level(net, 32, 1, expanded);
  net.conv("classifier", with_bias(square(20, 1)));
  return {.title = "U-Net",
          .model = net.finish(),
          .recipes = {{.strategy = "cl", .layers = expanded, .inner_bias = true}}};
}

Architecture alexnet(Index last) {
  Builder net = network("alexnet" + std::to_string(last), 224, 224);
  ConvShape<2> first = with_bias(square(64, 11, 4));
  first.padding = 2;
  max_pool(net.conv("conv1", first).relu(), 3, 2);
  max_pool(net.conv("conv2", with_bias(square(192, 5))).relu(), 3, 2);
  net.conv("conv3", with_bias(square(384, 3))).relu();
  net.conv("conv4", with_bias(square(256, 3))).relu();
  net.conv("conv5", with_bias(square(last, 3))).relu();
  net.global_avg_pool().linear("fc", 1000);
  return {.title = "AlexNet " + std::to_string(last),
          .model = net.finish(),
          .recipes = {{.strategy = "ck", .layers = {"conv1", "conv2"}}}};
}

// ---- others' blocks

/// A convolution with a batch norm, NAME.conv and NAME.bn.
Builder normalised(const Builder& input, const std::string& name, const ConvShape<2>& shape) {
  Builder branch = input.branch();
  return branch.conv(name + ".conv", shape).batch_norm(name + ".bn");
}

/// Such branches side by side, NAME.0, NAME.1, ..., beside a batch norm of the input itself where
/// channels and size allow; then a ReLU.
void add_block(Builder& net, const std::string& name, const std::vector<ConvShape<2>>& branches) {
  std::vector<Builder> parts;
  for (const ConvShape<2>& shape : branches) {
    parts.push_back(normalised(net, name + "." + std::to_string(parts.size()), shape));
  }
  if (parts.front().dims() == net.dims()) {
    Builder identity = net.branch();
    parts.push_back(identity.batch_norm(name + ".identity"));
  }
  net.sum(parts).relu();
}

Architecture repvgg() {
  Builder net = network("repvgg", 32, 32);
  for (const Index width : {24, 48, 96}) {
    for (const Index block : {0, 1}) {
      const Index stride = block == 0 && width > 24 ? 2 : 1;
      add_block(net, "stage" + std::to_string(width / 24) + "." + std::to_string(block),
                {square(width, 3, stride), square(width, 1, stride)});
    }
  }
  net.global_avg_pool().linear("fc", 10);
  return {.title = "RepVGG, small", .model = net.finish()};
}

Architecture mobileone() {
  Builder net = network("mobileone", 32, 32);
  add_block(net, "stage0", {square(32, 3), square(32, 1)});
  constexpr std::size_t copies = 4;
  struct Block {
    Index out, stride;
  };
  int number = 1;
  for (const Block& block : {Block{64, 1}, Block{64, 1}, Block{128, 2}, Block{128, 1}}) {
    const std::string name = "stage" + std::to_string(number++);
    const Index in = net.channels();
    std::vector<ConvShape<2>> branches(copies, square(in, 3, block.stride, in));
    branches.push_back(square(in, 1, block.stride, in));
    add_block(net, name + ".depthwise", branches);
    add_block(net, name + ".pointwise", std::vector(copies, square(block.out, 1)));
  }
  net.global_avg_pool().linear("fc", 10);
  return {.title = "MobileOne, small", .model = net.finish()};
}

struct Entry {
  std::string name;
  Architecture (*make)();
};

const std::vector<Entry>& entries() {
  static const std::vector<Entry> all = {{"smallnet7", [] { return smallnet(7); }},
                                         {"smallnet3", [] { return smallnet(3); }},
                                         {"mobilenet", mobilenet},
                                         {"mobilenetv2", mobilenet_v2},
                                         {"shufflenetv2", shufflenet_v2},
                                         {"yololite", yolo_lite},
                                         {"unet", unet},
                                         {"alexnet128", [] { return alexnet(128); }},
                                         {"alexnet256", [] { return alexnet(256); }},
                                         {"alexnet512", [] { return alexnet(512); }},
                                         {"repvgg", repvgg},
                                         {"mobileone", mobileone}};
  return all;
}

}  // namespace

std::vector<std::string> paper_network_names() {
  std::vector<std::string> names;
  for (const Entry& entry : entries()) names.push_back(entry.name);
  return names;
}

Architecture paper_network(const std::string& name) {
  const auto found = std::ranges::find(entries(), name, &Entry::name);
  if (found == entries().end()) {
    throw UsageError("there is no network " + in_quotes(name) + "; there are " +
                     listed(paper_network_names()));
  }
  Architecture result = found->make();
  result.name = name;
  return result;
}

}  // namespace tool
