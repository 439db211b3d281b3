// How the parts of an expression are joined.
// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace concertina {

/// How the parts of an expression make one map.
enum class Join {
  none,            ///< a leaf
  chain,           ///< one after another, the first part first
  sum,             ///< all on the same input, outputs added
  concat_outputs,  ///< all on the same input, outputs side by side along the channels
  concat_inputs,   ///< each on channels of its own, outputs added
  direct_sum       ///< each on channels of its own, outputs side by side
};

}  // namespace concertina
