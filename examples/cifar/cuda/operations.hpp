// The block programs that networks are made of, but for their convolutions: images, batch norm with
// the ReLU and the pool behind it, grids and sums of maps, fully connected layers, the loss, the
// descent. Maps are [image][channel][y][x].
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "descent.hpp"
#include "images.hpp"
#include "losses.hpp"
#include "maps.hpp"
#include "norm.hpp"
#include "product.hpp"
#include "program.hpp"
