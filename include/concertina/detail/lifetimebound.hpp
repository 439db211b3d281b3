// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Warns where what a view shows dies before it; Clang alone can.
#if defined(__has_cpp_attribute) && __has_cpp_attribute(clang::lifetimebound)
#define CONCERTINA_LIFETIMEBOUND [[clang::lifetimebound]]
#else
#define CONCERTINA_LIFETIMEBOUND
#endif
