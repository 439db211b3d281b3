// The checks of one file.
// SPDX-License-Identifier: Apache-2.0
#include "proofs.hpp"

#include "contraction.hpp"

#include <algorithm>
#include <cmath>
#include <span>

namespace tool {

using concertina::Conv;
using concertina::ConvShape;
using concertina::Exactness;
using concertina::FeatureMap;
using concertina::MapShape;
using concertina::PerAxis;
using concertina::Report;
using concertina::io::Dtype;

namespace {

constexpr std::size_t structure_limit = std::size_t{256} << 20;
constexpr Index most_numbers = Index{1} << 27;  // in one feature map
constexpr Index most_padding = 4096;  // of layers after the first, whose borders are followed

/// Throws SizeError for metadata that would make the proofs run for hours: the library's are made
/// for layers.
template <int Rank>
void require_provable(const std::vector<ConvShape<Rank>>& layers, const std::string& file) {
  for (const ConvShape<Rank>& layer : layers) {
    for (int axis = 0; axis < Rank; ++axis) {
      const auto& padding = layer.geometry.padding;
      const auto sides = {padding.start[axis], padding.end[axis]};
      if (std::ranges::any_of(sides,
                              [](Index p) { return p < -most_padding || p > most_padding; })) {
        throw concertina::SizeError(file + ": a padding of " + to_string(padding.start) + ":" +
                                    to_string(padding.end) + " (" + to_string(layer) +
                                    ") is too large to verify; at most " +
                                    std::to_string(most_padding) + " is supported");
      }
    }
  }
}

/// Throws SizeError where a map on the way would not be modest.
template <int Rank>
void require_modest_maps(const std::vector<ConvShape<Rank>>& layers, MapShape<Rank> map,
                         const std::string& file) {
  for (std::size_t l = 0; l <= layers.size(); ++l) {
    if (element_count(map) > most_numbers) {
      throw concertina::SizeError(file + ": the map before layer " + std::to_string(l + 1) +
                                  " has " + std::to_string(element_count(map)) +
                                  " numbers, more than the " + std::to_string(most_numbers) +
                                  " that are applied");
    }
    if (l == layers.size()) break;
    map = {.batch = map.batch, .channels = layers[l].out, .size = output_size(layers[l], map.size)};
  }
}

/// Bytes of the sparse matrices that prove_structure multiplies, twice: values and absolute values.
template <int Rank>
Index structure_bytes(const std::vector<ConvShape<Rank>>& layers, PerAxis<Rank> size) {
  constexpr Index entry = sizeof(long double) + sizeof(int);
  Index entries = 0;
  PerAxis<Rank> map = size;
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const auto product = concertina::product_shape<Rank>(std::span(layers).first(l + 1));
    for (const Index more : {concertina::detail::toeplitz_entries(layers[l], map),
                             concertina::detail::toeplitz_entries(product, size)}) {
      entries = concertina::detail::checked_add(entries, more, "structure");
    }
    map = output_size(layers[l], map);
  }
  return concertina::detail::checked_multiply(2 * entry, entries, "structure");
}

/// Unit roundoff and smallest subnormal number of what a tensor was computed in.
struct Rounding {
  long double unit, subnormal;
};

Rounding rounding_of(const concertina::io::Safetensors& file, const std::string& name) {
  using namespace concertina::detail;
  const Dtype dtype = file.tensor(name).dtype;
  switch (dtype) {
    case Dtype::F64: return {unit_roundoff<double>(), smallest_subnormal<double>()};
    case Dtype::F32: return {unit_roundoff<float>(), smallest_subnormal<float>()};
    case Dtype::F16: return {unit_roundoff<Eigen::half>(), std::ldexp(1.0L, -24)};
    case Dtype::BF16: return {unit_roundoff<Eigen::bfloat16>(), std::ldexp(1.0L, -133)};
    default:
      throw concertina::FormatError(file.origin + ": tensor " + in_quotes(name) + " is " +
                                    std::string(name_of(dtype)) +
                                    ", where floating-point numbers are expected");
  }
}

/// A tensor [batch, channels, spatial...].
template <class Ref, int Rank>
FeatureMap<Ref, Rank> read_map(const concertina::io::Safetensors& file, const std::string& name) {
  const auto& shape = file.tensor(name).shape;
  if (shape.size() != static_cast<std::size_t>(Rank) + 2) {
    throw concertina::FormatError(
        file.origin + ": tensor " + in_quotes(name) + " has " + std::to_string(shape.size()) +
        " axes, expected batch, channels and " + std::to_string(Rank) + " spatial ones");
  }
  MapShape<Rank> map{.batch = shape[0], .channels = shape[1]};
  for (int axis = 0; axis < Rank; ++axis)
    map.size[axis] = shape[static_cast<std::size_t>(axis) + 2];
  return {map, file.values<Ref>(name)};
}

template <class Scalar, int Rank>
class Prover {
 public:
  Prover(const DescribedChain& chain, const Layers<Scalar, Rank>& layers, Progress& progress)
      : file_(chain.file),
        description_(chain.description),
        layers_(layers),
        shapes_(concertina::shapes(layers)),
        progress_(progress) {}

  FileProof prove() {
    require_modest(shapes_, file_.origin);
    require_provable(shapes_, file_.origin);
    const Conv<Scalar, Rank> contraction = step("contracting", [&] { return contracted(layers_); });
    proof_.layers = std::ssize(layers_);
    proof_.contracted = to_string(contraction.shape());
    library_proofs(contraction);
    for (const ExpectedLayer& expected : description_.expected) compare_expected(expected);
    judge_border();
    if (file_.contains("input")) compare_outputs(contraction);
    return std::move(proof_);
  }

 private:
  using Ref = concertina::detail::Reference<Scalar>;

  template <class Do>
  auto step(const std::string& what, Do&& work) {
    progress_.show(file_.origin + ": " + what);
    return work();
  }

  void library_proofs(const Conv<Scalar, Rank>& contraction) {
    const PerAxis<Rank> size = concertina::smallest_input(concertina::form(layers_));
    require_modest_maps(shapes_, MapShape<Rank>{.channels = shapes_.front().in, .size = size},
                        file_.origin);
    add(step("algebra", [&] { return prove_algebra(layers_, contraction); }));
    add(step("rounding", [&] {
      return concertina::prove_rounding<Accumulator<Scalar>>(layers_, contraction);
    }));
    std::string skipped;
    try {
      const Index bytes = structure_bytes(shapes_, size);
      if (static_cast<std::size_t>(bytes) > structure_limit) {
        skipped = "its matrices take " + std::to_string(bytes >> 20) + " MiB, more than " +
                  std::to_string(structure_limit >> 20);
      }
    } catch (const concertina::SizeError& error) {
      skipped = error.what();
    }
    if (!skipped.empty()) return skip("structure", skipped);
    add(step("structure", [&] {
      return concertina::prove_structure<Accumulator<Scalar>>(layers_, contraction, size);
    }));
  }

  void compare_expected(const ExpectedLayer& expected) {
    const std::span<const Conv<Scalar, Rank>> part =
        std::span(layers_).subspan(expected.first, expected.last - expected.first + 1);
    LayerDescription description = expected.layer;
    if (!expected.has_geometry) {
      const auto geometry = concertina::product_shape<Rank>(concertina::shapes(part)).geometry;
      const auto list = [](const PerAxis<Rank>& values) {
        return std::vector<Index>(values.begin(), values.end());
      };
      description.stride = list(geometry.stride);
      description.padding = list(geometry.padding.start);
      description.padding_end = list(geometry.padding.end);
      description.dilation = list(geometry.dilation);
      description.groups = geometry.groups;
    }
    for (const char* suffix : {"weight", "bias"}) {
      const std::string name = description.tensor(suffix);
      if (!file_.contains(name)) continue;
      if (rounding_of(file_, name).unit > concertina::detail::unit_roundoff<Scalar>()) {
        throw concertina::FormatError(
            file_.origin + ": tensor " + in_quotes(name) + " is " +
            std::string(name_of(file_.tensor(name).dtype)) +
            ", coarser than the layers' arithmetic; store what is expected as F32 or F64");
      }
    }
    const auto layer = read_layer<Scalar, Rank>(file_, description);
    // The file's kernel was computed in its own precision.
    Report report = step(description.name, [&] { return concertina::prove_rounding(part, layer); });
    report.proof = description.name;
    add(std::move(report));
  }

  void judge_border() {
    const Exactness<Rank> everywhere = concertina::exactness(layers_);
    Exactness<Rank> found = everywhere;
    std::string size;
    if (!everywhere && file_.contains("input")) {
      const PerAxis<Rank> input = read_map<Ref, Rank>(file_, "input").shape().size;
      found = concertina::exactness(layers_, input);
      size = " at " + to_string(input);
    }
    proof_.exact = found.exact();
    proof_.border = "exact" + size;
    if (!proof_.exact) {
      proof_.border = "interior" + size + " (border " + to_string(found.start) + ":" +
                      to_string(found.end) + ")";
    }
    if (!description_.exact) return;
    Report report{.proof = "exact", .compared = 1};
    if (*description_.exact != proof_.exact) {
      report.failure = std::string("the file says ") +
                       (*description_.exact ? "everywhere" : "interior") + ", the shapes say " +
                       proof_.border;
    }
    add(std::move(report));
  }

  void compare_outputs(const Conv<Scalar, Rank>& contraction) {
    FeatureMap<Ref, Rank> x = read_map<Ref, Rank>(file_, "input");
    if (x.shape().channels != shapes_.front().in) {
      throw concertina::FormatError(
          file_.origin + R"(: tensor "input" has )" + std::to_string(x.shape().channels) +
          " channels, the first layer reads " + std::to_string(shapes_.front().in));
    }
    if (!file_.contains("output") && !file_.contains("output.contracted")) return;
    require_modest_maps(shapes_, x.shape(), file_.origin);
    progress_.show(file_.origin + ": outputs");
    const Conv<Ref, Rank> size = concertina::detail::contract_by_definition<Ref>(
        concertina::detail::tree_of(layers_, "verify"), concertina::detail::Part::magnitude);
    const FeatureMap<Ref, Rank> y = contraction.template cast<Ref>()(x);
    largest_input_ = 1;
    for (Ref& number : x.values()) {
      number = std::abs(number);
      largest_input_ = std::max(largest_input_, static_cast<long double>(number));
    }
    const FeatureMap<Ref, Rank> magnitude = size(x);

    const auto reads = [](const ConvShape<Rank>& shape) {  // terms of one output, the bias included
      return shape.in / shape.geometry.groups * volume(shape.kernel) + 1;
    };
    Index layer_by_layer = 0;
    for (const ConvShape<Rank>& shape : shapes_) layer_by_layer += reads(shape);
    const Index apply = reads(contraction.shape());
    const Index terms = concertina::detail::terms<Rank>(shapes_).bias;
    const Exactness<Rank> border = concertina::exactness(layers_, x.shape().size);
    compare_output("output", y, magnitude, border, {layer_by_layer}, terms, apply);
    compare_output("output.contracted", y, magnitude, {}, {terms, apply}, terms, apply);
  }

  /// Both sides are near the exact map of the stored layers, whose terms' absolute values sum to
  /// `magnitude`:
  ///   ours    the contraction, off by gamma_terms(u_A) and one rounding to Scalar, applied in Ref:
  ///   gamma_apply(u_Ref) theirs  computed in the precision of their tensor, gamma_n for each
  ///   stage; n counts additions in any order
  /// Relative errors compound as (1 + e1)(1 + e2) - 1. Underflow loses at most a subnormal number
  /// in each term, which the layers and the input then scale.
  void compare_output(const std::string& name, const FeatureMap<Ref, Rank>& y,
                      const FeatureMap<Ref, Rank>& magnitude, const Exactness<Rank>& border,
                      const std::vector<Index>& stages, Index terms, Index apply) {
    if (!file_.contains(name)) return;
    using concertina::detail::gamma, concertina::detail::unit_roundoff;
    const Rounding theirs = rounding_of(file_, name);
    const FeatureMap<Ref, Rank> given = read_map<Ref, Rank>(file_, name);
    if (given.shape() != y.shape()) {
      throw concertina::FormatError(file_.origin + ": tensor " + in_quotes(name) + " has " +
                                    std::to_string(given.shape().channels) + " channels of size " +
                                    to_string(given.shape().size) + ", the chain writes " +
                                    std::to_string(y.shape().channels) + " of size " +
                                    to_string(y.shape().size));
    }
    long double relative = 0, lost = 0, inflation = 1;
    try {
      const long double u_ref = unit_roundoff<Ref>();
      long double their_growth = 1;
      Index count = terms + apply;
      // Half precision is a storage: sums are float's, and each stage is rounded once to the
      // tensor's.
      const long double u_sum = std::min(theirs.unit, unit_roundoff<float>());
      const long double u_store = theirs.unit > u_sum ? theirs.unit : 0;
      for (const Index n : stages) {
        their_growth *= (1 + gamma(n, u_sum)) * (1 + u_store);
        count += n;
      }
      const long double our_growth = (1 + gamma(terms, unit_roundoff<Accumulator<Scalar>>())) *
                                     (1 + unit_roundoff<Scalar>()) * (1 + gamma(apply, u_ref));
      relative = (their_growth - 1) + (our_growth - 1);
      inflation = 1 / (1 - gamma(terms + apply, u_ref));
      const long double scale =
          concertina::detail::scale_bound(concertina::detail::tree_of(layers_, "verify")) *
          largest_input_;
      lost = 2 * static_cast<long double>(count) * scale *
             (theirs.subnormal + concertina::detail::smallest_subnormal<Scalar>());
    } catch (const concertina::VerificationError& error) {
      return skip(name, error.what());
    }

    Report report{.proof = name};
    std::size_t at = 0;
    const MapShape<Rank>& shape = y.shape();
    for (Index n = 0; n < shape.batch; ++n) {
      for (Index channel = 0; channel < shape.channels; ++channel) {
        concertina::detail::for_each_position(shape.size, [&](const PerAxis<Rank>& position) {
          const std::size_t i = at++;
          if (!concertina::detail::off_border(position, shape.size, border)) return;
          ++report.compared;
          const auto ours = static_cast<long double>(y.values()[i]),
                     found = static_cast<long double>(given.values()[i]);
          const long double error = std::abs(ours - found);
          const long double bound =
              relative * inflation * static_cast<long double>(magnitude.values()[i]) + lost;
          report.ulps = std::max(report.ulps, error / concertina::detail::ulp<Scalar>(found));
          const bool within = error <= bound;  // false for NaN
          if (!report.failure.empty()) return;
          const bool worse = report.worst.empty() || error * report.bound > report.error * bound;
          if (within && (error == 0 || !worse)) return;
          report.worst = name + "[" + std::to_string(n) + "][" + std::to_string(channel) + "]" +
                         (Rank > 0 ? " at " + to_string(position) : "");
          report.error = error;
          report.bound = bound;
          if (!within)
            report.failure =
                report.worst + " is off by " + brief(error) + ", allowed is " + brief(bound);
        });
      }
    }
    if (report.compared == 0) return skip(name, "the border covers the whole map");
    add(std::move(report));
  }

  void add(Report report) { proof_.findings.push_back({std::move(report), ""}); }
  void skip(const std::string& name, const std::string& why) {
    proof_.findings.push_back({Report{.proof = name}, why});
  }

  const concertina::io::Safetensors& file_;
  const ChainDescription& description_;
  const Layers<Scalar, Rank>& layers_;
  std::vector<ConvShape<Rank>> shapes_;
  Progress& progress_;
  FileProof proof_;
  long double largest_input_ = 1;
};

}  // namespace

bool FileProof::holds() const { return std::ranges::all_of(findings, &Finding::holds); }

const Finding& FileProof::finding(const std::string& name) const {
  return *std::ranges::find(findings, name,
                            [](const Finding& finding) { return finding.report.proof; });
}

FileProof prove(const DescribedChain& chain, Progress& progress) {
  return std::visit(
      [&]<class Scalar, int Rank>(const std::vector<Conv<Scalar, Rank>>& layers) {
        return Prover<Scalar, Rank>(chain, layers, progress).prove();
      },
      chain.layers);
}

}  // namespace tool
