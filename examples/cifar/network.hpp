// The networks of the paper's CIFAR experiments: SmallNet and its deeper form, compact and
// expanded, and ResNet-18, their teacher.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/accelerator.hpp"
#include "text.hpp"
#include "training/contractions.hpp"
#include "training/operations.hpp"

#include <concertina/conv.hpp>
#include <concertina/error.hpp>
#include <concertina/io/onnx.hpp>
#include <concertina/io/safetensors.hpp>
#include <concertina/shape.hpp>

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace cifar {

using namespace training;

/// Throws Error naming an option, its value and the choices where it does not hold.
template <class Value>
void require_option(bool holds, const char* option, const Value& value,
                    const std::string& choices) {
  if (holds) return;
  std::ostringstream text;
  text << option << ' ' << value << "; " << choices;
  throw concertina::Error(text.str());
}

/// How an expanded layer is computed.
enum class Compute {
  automatic,   ///< each as contracted where its counts say that this is cheaper, otherwise layered
  contracted,  ///< contracted to one layer before each batch, gradients pulled back after it
  layered,     ///< layer by layer, as a framework would
  nonlinear    ///< layer by layer with a ReLU between; its weights may initialise the linear form
};

extern const tool::Names<Compute> compute_names;

/// The models: compact, fc, cl, cl+fc, ck, ck+fc; acnet, repvgg, mobileone, dbb, cl+norms;
/// resnet18.
const std::vector<std::string>& model_names();

struct NetworkOptions {
  std::string model = "compact";
  Index kernel = 7;
  double rate = 4;   ///< of the expansion
  Index blocks = 3;  ///< convolutions: 3 is SmallNet, 4 the deeper network of Section A.4
  Index width = 64;  ///< channels of resnet18's first stage; of the others nothing
  Index classes = 10;
  Compute compute = Compute::contracted;
  bool norms = true;  ///< false where batch norms have been contracted into the convolutions

  /// Throws Error naming the option and its choices where there is no such network.
  void validate() const;

  bool is_resnet() const { return model == "resnet18"; }
  /// Branches with batch norms in the place of each convolution and its norm.
  bool is_block() const;
  bool is_expanded() const { return model != "compact" && !is_block() && !is_resnet(); }

  friend bool operator==(const NetworkOptions&, const NetworkOptions&) = default;
};

/// What a file's metadata say of its network; of a file without any that holds torchvision's
/// tensors of a ResNet-18, what their shapes say.
/// Throws  FormatError naming the file where they do not describe one
NetworkOptions options_of(const concertina::io::Safetensors& file);

/// Whether such a network contracts to a compact one: not nonlinear counterparts, nor resnet18.
bool contracts(const NetworkOptions& options);

/// How pixels in 0 .. 1 become what the network reads, for each colour: (pixel - mean) / deviation.
struct Normalization {
  std::array<double, 3> mean{}, deviation{};

  friend bool operator==(const Normalization&, const Normalization&) = default;
};

/// Convolutions of 8, 16, 32 (and 64) channels, each with a batch norm, a ReLU and a 2x2 max pool;
/// then fully connected layers of 64 numbers and of the classes.
///
/// Kernel 3 has no padding in SmallNet; otherwise paddings keep the size. The first convolution's
/// expansion keeps 3 channels in its first layer, 3->3->8r->8 as published, not 3->3r->8r->8. All
/// padding stands on the first layer of an expansion, so its contraction is exact at the border.
/// Tensors are named as in PyTorch: conv1.weight, or conv1.0.weight to conv1.2.weight; conv1_bn.*,
/// fc1.*, fc2.*. Branches of blocks have their own norms, conv1.square_bn of conv1.square: ACNet's
/// square, vertical and horizontal; RepVGG's dense and point; MobileOne's dense0 to dense3 and
/// scale; DBB's origin, point, reduce and spatial, before_pool and the norm pool_bn; of cl+norms,
/// CL with a norm after each layer, 0 to 2. DBB's inner norms pad as
/// concertina::DiverseBranchBlock's.
///
/// Or ResNet-18 as it is usual on CIFAR: a first convolution of kernel 3, and no pool after it.
/// Tensors are named as in torchvision, layer1.0.conv1.weight and so on.
/// Source  Guo, Alvarez, Salzmann, ExpandNets, NeurIPS 2020, supplement A; ACNet, ICCV 2019;
///         RepVGG, CVPR 2021; DBB, CVPR 2021; MobileOne, CVPR 2023;
///         He et al., "Deep residual learning for image recognition", CVPR 2016
template <class Scalar>
class Network {
 public:
  /// For batches of up to `capacity` images. With a detached classifier, the last layer learns from
  /// the features and they do not from it.
  /// Throws  as options.validate()
  Network(const NetworkOptions& options, Index capacity, ThreadPool& pool,
          bool detached_classifier = false)
      : Network(options, capacity, pool, detached_classifier, nullptr) {}

  /// That of a file, with its numbers. Each tensor is looked for before memory is taken for it, so
  /// that what the metadata promise costs no more than the file has.
  /// Throws  as options_of() and load()
  Network(const concertina::io::Safetensors& file, Index capacity, ThreadPool& pool)
      : Network(options_of(file), capacity, pool, false, &file) {
    load(file);
  }

  Network(const Network&) = delete;
  Network& operator=(const Network&) = delete;

  /// PyTorch's default initialisation: uniform within 1 / sqrt(fan in), batch norms the identity;
  /// or their weights uniform in 0 .. 1, as in PyTorch before 1.2.
  void initialize(std::uint64_t seed, bool uniform_norms = false);

  /// All named tensors, and metadata that describe the network to this program.
  concertina::io::Safetensors save() const;

  /// The same as a model, whose initializers are the tensors, to the bit. Of normalised images it
  /// reads pixels: uint8 [N, 3, 32, 32]. A batch norm's eps is 1e-5 as a float, ONNX's type for it.
  concertina::onnx::Model model() const;

  /// The numbers of a file with the same tensors, widened where it is of a narrower dtype; others
  /// in it are left alone.
  /// Throws  FormatError naming file and tensor where one is missing, of another shape or a wider dtype
  void load(const concertina::io::Safetensors& file);

  /// The compact network that this one contracts to, as model() would give it. Accumulated in
  /// double (long double for double) and rounded once.
  /// Throws  Error where there is none: nonlinear counterparts, resnet18
  concertina::onnx::Model contract() const;

  /// Fills a chunk of the batch's images, [3][32][32][lane], at the start of forward.
  void set_source(std::function<void(Index chunk, Scalar* to)> source) {
    source_ = std::move(source);
  }

  /// What the images were normalised by, for files to say; load() takes it from one that does.
  void set_normalization(const Normalization& normalization) { normalization_ = normalization; }

  /// As given; Compute::automatic only where it chose differently for some expansions than others.
  const NetworkOptions& options() const { return options_; }

  /// The expansions that are computed contracted, and those that are not.
  const std::vector<std::string>& contracted() const { return contracted_names_; }
  const std::vector<std::string>& layered() const { return layered_names_; }

  Tape<Scalar>& tape() { return tape_; }
  CrossEntropy<Scalar>& loss() { return *loss_; }
  Maps<Scalar>& features() { return *features_; }  ///< what the last layer reads
  Maps<Scalar>& logits() { return *logits_; }

  /// What is trained.
  const std::vector<Tensor<Scalar>*>& parameters() const { return parameters_; }
  Index parameter_count() const;

  /// The parameters of the network that is computed: a contraction in the place of its layers.
  /// After a pass back, their gradients are those of a compact network with these numbers.
  const std::vector<Tensor<Scalar>*>& computed_parameters() const { return computed_; }

  /// What batch norms learn of the images: running means and variances.
  const std::vector<Tensor<Scalar>*>& statistics() const { return statistics_; }

  /// The network on a device's tape, from the images to features and logits.
  using Map = typename cuda::Recorder<Scalar>::Map;
  std::pair<Map, Map> record(cuda::Recorder<Scalar>& on, Map images) const;

  /// Decays the contractions of expanded layers (see Contractions), and says which parameters are
  /// in them.
  /// Throws  Error unless expansions are contracted
  std::vector<const Tensor<Scalar>*> decay_contractions(double decay);

 private:
  Network(const NetworkOptions& options, Index capacity, ThreadPool& pool, bool detached_classifier,
          const concertina::io::Safetensors* file);

  /// A tensor of the tape; if the network is a file's, one that this has.
  Tensor<Scalar>& make_tensor(const std::string& name, const std::vector<Index>& shape);

  /// A layer: the shapes that it expands into, one for none.
  template <int Rank>
  struct Layer {
    Chain<Scalar, Rank> chain;
    std::pair<Weights<Scalar>, concertina::ConvShape<Rank>> contraction = {};
  };
  struct Normed {
    Layer<2> conv;  // of a pool without weights
    NormTensors<Scalar> norm;
    concertina::Padding<2> margin = 0;
  };
  struct Block {
    std::vector<Layer<2>> conv = {};  // one, or none where there are branches
    std::vector<NormTensors<Scalar>> norm = {};
    std::vector<std::vector<Normed>> branches = {};  // each the first applied first
    bool contracts = false;                          // branches are computed as one convolution
  };

  /// The layer reads maps of this size; it says for Compute::automatic what is cheaper.
  template <int Rank>
  Layer<Rank> make_layer(const std::string& name, std::vector<concertina::ConvShape<Rank>> chain,
                         const concertina::PerAxis<Rank>& size = {});
  NormTensors<Scalar> make_norm(const std::string& name, Index channels);
  void make_smallnet();
  NormedBranches<Scalar> normed(const Block& block) const;
  void make_block(const std::string& name, const concertina::ConvShape<2>& shape, Index size);
  void make_resnet();

  /// What layers make of a map: on the tape, on a device's, in a model's graph.
  template <class On, int Rank>
  typename On::Map apply(On& on, const Layer<Rank>& layer, typename On::Map x) const;
  template <class On>
  typename On::Map apply(On& on, const Block& block, typename On::Map x) const;
  template <class On>
  typename On::Map apply_to_last(On& on, typename On::Map x) const;  // but the last layer
  /// Features and logits.
  template <class On>
  auto heads(On& on, typename On::Map images) const
      -> std::pair<typename On::Map, typename On::Map>;

  NetworkOptions options_;
  const concertina::io::Safetensors* file_;  // while it is made
  Tape<Scalar> tape_;
  Contractions<Scalar> contractions_;
  bool detached_classifier_;
  std::vector<Block> blocks_;
  std::vector<Layer<0>> linear_;  // fc1, fc2; of resnet18 fc
  std::vector<Tensor<Scalar>*> parameters_, computed_, statistics_, norm_weights_;
  std::vector<const Tensor<Scalar>*> contracted_;  // those of parameters_ in contractions
  std::vector<std::string> contracted_names_, layered_names_;  // of expansions
  std::vector<std::pair<Tensor<Scalar>*, double>> uniform_;    // initialised within this bound
  std::vector<Tensor<Scalar>*> identities_;                    // of 1x1, where they begin
  std::function<void(Index, Scalar*)> source_;
  std::optional<Normalization> normalization_;
  std::unique_ptr<CrossEntropy<Scalar>> loss_;
  Maps<Scalar>*features_ = nullptr, *logits_ = nullptr;
};

/// A network's file, an ONNX model (*.onnx) or safetensors, by its named tensors: those of a model
/// are its initializers. Its graph is not looked at: what the tensors mean, the metadata say.
/// Throws  FormatError, IoError as read_model and read_safetensors; FormatError naming the tensor
///         that has NaN, infinity or a negative variance
concertina::io::Safetensors read_network(const std::filesystem::path& path);
concertina::io::Safetensors tensors_of(const concertina::onnx::Model& model);

std::optional<Normalization> normalization_of(const concertina::io::Safetensors& file);

}  // namespace cifar
