// SPDX-License-Identifier: Apache-2.0
#include "trained_network.hpp"

#include <string>

namespace cifar {

using concertina::FormatError;

bool is_double(const concertina::io::Safetensors& file) {
  const char* const last = options_of(file).is_resnet() ? "fc.weight" : "fc2.weight";
  return file.tensor(last).dtype == concertina::io::Dtype::F64;
}

void require_data(const concertina::io::Safetensors& file, const Dataset& data) {
  const Index classes = options_of(file).classes;
  const auto normalization = normalization_of(file);
  if (normalization && *normalization != Normalization{data.mean, data.deviation}) {
    throw FormatError(file.origin +
                      ": the network was trained on images normalised otherwise than "
                      "those of the data set " +
                      data.name + "; name its own with --data and --dataset");
  }
  if (classes == data.classes) return;
  throw FormatError(file.origin + ": a network of " + std::to_string(classes) +
                    " classes; the data set " + data.name + " has " + std::to_string(data.classes));
}

ContractionCheck check_contraction(const concertina::io::Safetensors& file, const Dataset& data,
                                   ThreadPool& pool) {
  require_data(file, data);
  ContractionCheck check;
  check.expanded = with_network(file, pool, [&](auto& network) {
    check.network = network.contract();
    check.expanded_parameters = network.parameter_count();
    return tested(network, data, file.origin);
  });
  check.network.origin = file.origin + ", contracted";
  check.compact = with_network(tensors_of(check.network), pool, [&](auto& network) {
    check.compact_parameters = network.parameter_count();
    return tested(network, data, check.network.origin);
  });
  return check;
}

}  // namespace cifar
