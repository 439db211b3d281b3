// The whole library but moments.hpp, io/ and cuda/.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/batch_norm.hpp>
#include <concertina/blocks.hpp>
#include <concertina/channel_map.hpp>
#include <concertina/contract.hpp>
#include <concertina/conv.hpp>
#include <concertina/error.hpp>
#include <concertina/exactness.hpp>
#include <concertina/expand.hpp>
#include <concertina/expression.hpp>
#include <concertina/feature_map.hpp>
#include <concertina/form.hpp>
#include <concertina/join.hpp>
#include <concertina/layers.hpp>
#include <concertina/modular.hpp>
#include <concertina/parallel.hpp>
#include <concertina/random.hpp>
#include <concertina/scalar.hpp>
#include <concertina/shape.hpp>
#include <concertina/threads.hpp>
#include <concertina/toeplitz.hpp>
#include <concertina/transposed.hpp>
#include <concertina/verify.hpp>
#include <concertina/version.hpp>
