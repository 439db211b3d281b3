// The expanded layers of the paper's networks, as forms for a plan.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/plan.hpp>

#include <string>
#include <vector>

namespace concertina::benchmarks {

struct NamedForms {
  std::string name;
  std::vector<cuda::PlannedForm> forms;
};

/// SmallNet with kernel 7, its convolutions alone and with its first fully connected layer; the
/// first and the depthwise layers of MobileNet; AlexNet's layers of kernels 11 and 5; a layer of
/// U-Net's widest; all these at r = 4. Then 3x3 layers one after another, two or three.
std::vector<NamedForms> networks();

/// Whether results are the contractions in double, but for some rounding: tensors in the order of a
/// plan's.
bool are_contracted(const std::vector<cuda::PlannedForm>& forms,
                    const std::vector<std::vector<float>>& layers,
                    const std::vector<std::vector<float>>& results);

}  // namespace concertina::benchmarks
