// The expanded layers of the paper's networks, as chains for a plan.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/contraction.hpp>

#include <string>
#include <vector>

namespace concertina::benchmarks {

struct NamedChains {
  std::string name;
  std::vector<cuda::Chain> chains;
};

/// SmallNet with kernel 7, its convolutions alone and with its first fully connected layer; the
/// first and the depthwise layers of MobileNet; AlexNet's layers of kernels 11 and 5; a layer of
/// U-Net's widest. All at r = 4.
std::vector<NamedChains> networks();

/// Whether results are what contract<double>() makes of the layers, but for some rounding: tensors
/// in the order of a plan's.
bool are_contracted(const std::vector<cuda::Chain>& chains,
                    const std::vector<std::vector<float>>& layers,
                    const std::vector<std::vector<float>>& results);

}  // namespace concertina::benchmarks
