// What of expand_networks takes longest to compile, beside the rest instead of in it.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/expand.hpp>

#include <random>
#include <vector>

namespace concertina {

template std::vector<Conv<float, 0>> preserve(const Conv<float, 0>&,
                                              const std::vector<ConvShape<0>>&, std::mt19937_64&,
                                              Ends);
template std::vector<Conv<float, 2>> preserve(const Conv<float, 2>&,
                                              const std::vector<ConvShape<2>>&, std::mt19937_64&,
                                              Ends);

}  // namespace concertina
