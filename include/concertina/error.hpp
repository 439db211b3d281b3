// What the library throws: one type per kind of mistake, each message with the numbers.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <stdexcept>

namespace concertina {

/// Everything that the library throws derives from this, except std::bad_alloc.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Channels, groups, kernels, strides or buffer lengths that do not fit together.
struct ShapeError : Error {
  using Error::Error;
};

/// A size that overflows, or that exceeds a memory limit; thrown before anything is allocated.
struct SizeError : Error {
  using Error::Error;
};

/// Numbers for which a layer is undefined: a variance that is not positive, a factor that is not
/// finite.
struct NumericalError : Error {
  using Error::Error;
};

/// An expression that no single zero-padded layer equals at the border; the message has the widths.
struct InexactError : Error {
  using Error::Error;
};

/// A matrix that is not the Toeplitz matrix of a layer of the stated shape; the message has the
/// entry.
struct NotToeplitzError : Error {
  using Error::Error;
};

/// A kernel that an expansion of the requested widths cannot represent; the message has the
/// residual.
struct ExpansionError : Error {
  using Error::Error;
};

/// A check that is meaningless for its input: too many terms for the precision, too small a field.
struct VerificationError : Error {
  using Error::Error;
};

/// A file whose contents break its format; the message has the file, the tensor or the offset.
struct FormatError : Error {
  using Error::Error;
};

/// A file that cannot be opened, read or written.
struct IoError : Error {
  using Error::Error;
};

}  // namespace concertina
