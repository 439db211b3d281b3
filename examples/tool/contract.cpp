// concertina contract: one layer from a file's chain.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "contraction.hpp"

#include <concertina/contract.hpp>

#include <Eigen/Core>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iostream>

namespace tool {
namespace {

using concertina::Conv;
using concertina::io::Dtype;

/// The dtype to write: what the option says, otherwise the layers', and F32 for those with 16 bits.
Dtype output_dtype(const std::string& option, Dtype layers) {
  for (const Dtype dtype : {Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16}) {
    if (option == name_of(dtype)) return dtype;
  }
  if (!option.empty()) {
    throw UsageError("--dtype: " + in_quotes(option) + " is none of F64, F32, F16, BF16");
  }
  return layers == Dtype::F64 ? Dtype::F64 : Dtype::F32;
}

/// Adds the numbers as To. They are rounded to the computation's scalar before, so F16 and BF16
/// round twice.
template <class To, class Scalar>
void add(concertina::io::Safetensors& file, const std::string& name, std::vector<Index> shape,
         std::span<const Scalar> numbers) {
  std::vector<To> values;
  values.reserve(numbers.size());
  for (const Scalar number : numbers) {
    values.push_back(static_cast<To>(number));
    if (!std::isfinite(static_cast<double>(values.back()))) {
      throw concertina::Error(file.origin + ": the contracted " + name + " is not finite in " +
                              std::string(name_of(*concertina::io::dtype_of<To>())) +
                              "; check the layers' numbers, or name a --dtype of larger range");
    }
  }
  file.add(name, std::move(shape), values);
}

template <class Scalar, int Rank>
concertina::io::Safetensors file_of(const Conv<Scalar, Rank>& layer, Dtype dtype,
                                    const std::string& origin) {
  concertina::io::Safetensors file{.origin = origin,
                                   .metadata = {{"conv", geometry_json(layer.geometry()).dump()}},
                                   .tensors = {}};
  std::vector<Index> shape{layer.shape().out, layer.shape().in / layer.geometry().groups};
  shape.insert(shape.end(), layer.shape().kernel.begin(), layer.shape().kernel.end());
  const auto add_all = [&]<class To>(To) {
    add<To>(file, "weight", shape, layer.weight());
    if (layer.shape().bias) add<To>(file, "bias", {layer.shape().out}, layer.bias());
  };
  switch (dtype) {
    case Dtype::F64: add_all(double{}); break;
    case Dtype::F32: add_all(float{}); break;
    case Dtype::F16: add_all(Eigen::half{}); break;
    default: add_all(Eigen::bfloat16{}); break;
  }
  return file;
}

/// Where the contraction is exact, in words. Throws InexactError where that is less than what was
/// asked for.
template <class Scalar, int Rank>
std::string judge_border(const Layers<Scalar, Rank>& layers, const ContractOptions& options) {
  const auto refuse = [&](const concertina::Exactness<Rank>& found, const std::string& where) {
    throw concertina::InexactError(
        options.in + ": no single layer equals this chain at " + where + ": " + found.reason +
        "; the first " + to_string(found.start) + " and the last " + to_string(found.end) +
        " outputs of each axis differ. Pad the first layer instead, or accept a result for one "
        "size with "
        "--input-size, or one that is right in the interior with --interior");
  };
  if (!options.input_size.empty()) {
    const auto size = parse_input_size<Rank>(options.input_size);
    const auto found = concertina::exactness(layers, size);
    if (!found) refuse(found, "input size " + to_string(size));
    return "exact at input size " + to_string(size);
  }
  const auto found = concertina::exactness(layers);
  if (found) return "exact";
  if (!options.interior) refuse(found, "every input size");
  return "interior only: the first " + to_string(found.start) + " and the last " +
         to_string(found.end) + " outputs of each axis differ";
}

template <class Scalar, int Rank>
ExitCode contract(const DescribedChain& chain, const Layers<Scalar, Rank>& layers, Dtype dtype,
                  const ContractOptions& options) {
  require_modest(concertina::shapes(layers), options.in);
  const std::string border = judge_border(layers, options);
  Progress progress;
  progress.show("contracting " + options.in);
  const Conv<Scalar, Rank> layer = contracted(layers);
  const auto file = file_of(layer, dtype, options.out.empty() ? options.in : options.out);
  if (!options.out.empty()) concertina::io::write_safetensors(options.out, file);
  progress.clear();
  const Index before = parameters(layers), after = parameters(layer.shape());
  if (options.json) {
    std::cout << nlohmann::json{{"file", options.in},
                                {"layers", layers.size()},
                                {"contracted", to_string(layer.shape())},
                                {"conv", geometry_json(layer.geometry())},
                                {"dtype", name_of(dtype)},
                                {"exact", border.starts_with("exact")},
                                {"border", border},
                                {"parameters", {{"before", before}, {"after", after}}},
                                {"written", options.out.empty() ? nlohmann::json()
                                                                : nlohmann::json(options.out)}}
                     .dump(2)
              << '\n';
  } else {
    std::cout << options.in << ": " << counted(std::ssize(layers), "layer") << " ("
              << name_of(chain.dtype) << ") -> " << to_string(layer.shape()) << ", " << border
              << "; " << grouped(before) << " -> " << grouped(after) << " parameters; "
              << (options.out.empty() ? "nothing written, name a file with -o"
                                      : "wrote " + options.out)
              << " (" << name_of(dtype) << ")\n";
  }
  return ok;
}

}  // namespace

ExitCode contract(const ContractOptions& options) {
  std::error_code ignored;
  if (!options.out.empty() && std::filesystem::equivalent(options.in, options.out, ignored)) {
    throw UsageError("-o: " + in_quotes(options.out) +
                     " is the input, which would be lost; name another file");
  }
  if (options.interior && !options.input_size.empty()) {
    throw UsageError(
        "--interior and --input-size exclude each other: what is exact at a size needs no leave");
  }
  output_dtype(options.dtype, Dtype::F32);
  const DescribedChain chain = read_chain(
      options.in, options.chain, options.dtype == "F64" ? Precision::full : Precision::of_layers);
  const Dtype dtype = output_dtype(options.dtype, chain.dtype);
  return std::visit([&](const auto& layers) { return contract(chain, layers, dtype, options); },
                    chain.layers);
}

}  // namespace tool
