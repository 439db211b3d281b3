// How large images are, and which part of one an epoch sees: a function of seed, epoch and image,
// the same on the host and on a device.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <concertina/cuda/block.hpp>  // CONCERTINA_HOST_DEVICE
#include <concertina/shape.hpp>       // Index

#include <cstdint>

namespace training {

using concertina::Index;

inline constexpr Index colours = 3;
inline constexpr Index side = 32;  // rows, and pixels of a row
inline constexpr Index image_size = colours * side * side;

namespace detail {

/// A bijection whose output looks random: the step of SplitMix64.
CONCERTINA_HOST_DEVICE constexpr std::uint64_t mixed(std::uint64_t bits) {
  bits += 0x9e3779b97f4a7c15U;
  bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9U;
  bits = (bits ^ bits >> 27) * 0x94d049bb133111ebU;
  return bits ^ bits >> 31;
}

/// Purposes draw from different streams: an order must say nothing about the crops.
enum class Stream : std::uint64_t { order = 1, crop = 2, corrupted_order = 3, label = 4 };

CONCERTINA_HOST_DEVICE constexpr std::uint64_t key(Stream stream, std::uint64_t seed, Index epoch) {
  return mixed(mixed(mixed(static_cast<std::uint64_t>(stream)) ^ seed) ^
               static_cast<std::uint64_t>(epoch));
}

}  // namespace detail

/// What determines, with an image's index, its crop and flip. An interrupted training goes on as if
/// it had not been, with no generator to save.
struct Augmentation {
  std::uint64_t seed = 0;
  Index epoch = 0;
};

inline constexpr Index crop_border = 4;  ///< black pixels around an image

/// 32 by 32 pixels of an image framed by 4 black ones, then perhaps mirrored.
struct Crop {
  Index top = crop_border, left = crop_border;  ///< 0 .. 8; at 4, 4 the image itself
  bool flip = false;                            ///< left and right change places

  friend bool operator==(const Crop&, const Crop&) = default;
};

/// The crop of image `index` of the training set, all 162 as probable.
/// Source    SplitMix64 as a counter-based hash: Steele, Lea, Flood, OOPSLA 2014
CONCERTINA_HOST_DEVICE inline Crop crop_of(const Augmentation& augmentation, std::uint32_t index) {
  const std::uint64_t bits = detail::mixed(
      detail::key(detail::Stream::crop, augmentation.seed, augmentation.epoch) ^ index);
  constexpr std::uint64_t positions = 2 * crop_border + 1;
  // 2^32 is no multiple of 162: some crops are more probable than others, by 4e-8 of themselves.
  const std::uint64_t draw = ((bits >> 32) * (2 * positions * positions)) >> 32;
  return {.top = static_cast<Index>(draw / 2 / positions),
          .left = static_cast<Index>(draw / 2 % positions),
          .flip = draw % 2 == 1};
}

}  // namespace training
