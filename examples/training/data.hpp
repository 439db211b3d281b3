// Images of 32 by 32 pixels in 3 colours: read from CIFAR's files or MNIST's, or generated, drawn
// in a random order, augmented, and laid side by side as the network reads them.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "crop.hpp"

#include <concertina/shape.hpp>  // Index

#include <array>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace training {

/// Images as their files hold them.
struct Images {
  std::vector<std::uint8_t> pixels;  ///< [image][3][32][32]: planes of red, green and blue
  std::vector<std::uint8_t> labels;  ///< [image]: its class

  Index count() const { return static_cast<Index>(labels.size()); }
};

struct Dataset {
  std::string name;  ///< cifar10, cifar100, mnist or generated
  Index classes = 0;
  Images train, test;
  std::array<double, 3> mean{}, deviation{};  ///< of the pixels in 0 .. 1, for each channel
  bool augmented = true;  ///< crops and mirrors of an image are of its class; not of digits
};

/// Reads cifar10 or cifar100 from the files of the "binary version": data_batch_1.bin to
/// data_batch_5.bin and test_batch.bin, or train.bin and test.bin with their fine labels; or mnist
/// from train-images-idx3-ubyte and its like, each digit in the middle of a larger image, in all
/// three colours. `folder` is the one that holds them, or the one in which the archive or
/// torchvision puts that. Files may have fewer records than the official ones.
/// Throws    IoError naming the path: a folder or a file is missing, is no regular file or cannot
///           be read; FormatError naming file, record and offset: no records, a part of one, a
///           class that there is not; SizeError for a file beyond 256 MiB;
///           concertina::Error for another name
/// Source    https://www.cs.toronto.edu/~kriz/cifar.html, http://yann.lecun.com/exdb/mnist
Dataset read_dataset(const std::filesystem::path& folder, const std::string& name);

/// A set that needs no download. The images of a class share two coloured gratings, and differ in
/// where these lie, in contrast, in brightness, in a third grating that says nothing, and in noise.
/// Image i is of class i % classes. Integer arithmetic only: equal arguments give equal pixels on
/// every platform.
/// Requires  2 to 256 classes, 1 to 100,000 images in either part, otherwise throws SizeError
Dataset generated_dataset(Index classes, Index train, Index test, std::uint64_t seed);

/// The order in which an epoch sees the images: a permutation of 0 .. count - 1, every one as
/// probable, determined by seed and epoch alone, the same on every platform.
/// Requires  count from 0 to 2^32 - 1, otherwise throws SizeError
std::vector<std::uint32_t> epoch_order(Index count, std::uint64_t seed, Index epoch);

/// Labels of which a share are drawn anew, every class as probable, the true one too: those of the
/// first images of a permutation. Determined by the seed alone, the same on every platform.
/// Requires  a share of 0 .. 1, otherwise throws Error
/// Source    Zhang et al., "Understanding deep learning requires rethinking generalization", 2017
std::vector<std::uint8_t> corrupted_labels(std::span<const std::uint8_t> labels, Index classes,
                                           double share, std::uint64_t seed);

/// Images side by side and normalised, (value / 255 - mean) / deviation of the channel, rounded
/// once.
/// Shapes    to[3][32][32][Lanes]; image which[lane] in its lane, zeros in lanes beyond which
/// Requires  at most Lanes indices, of images there are, otherwise throws ShapeError
/// Augments  if `augmentation` is given: crops, black where they leave the image, then mirrors
/// Cost      about 2 microseconds an image in float; no allocation
template <class Scalar, int Lanes>
void load_images(const Dataset& normalisation, const Images& images,
                 std::span<const std::uint32_t> which, const Augmentation* augmentation,
                 Scalar* to);

extern template void load_images<float, 16>(const Dataset&, const Images&,
                                            std::span<const std::uint32_t>, const Augmentation*,
                                            float*);
extern template void load_images<double, 16>(const Dataset&, const Images&,
                                             std::span<const std::uint32_t>, const Augmentation*,
                                             double*);

}  // namespace training
