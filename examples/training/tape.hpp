// The autograd: what a network computes, recorded once, replayed for every batch, and walked
// backwards for its gradient.
//
// An operation is recorded as stages. A stage works on each chunk of sixteen images, or, when all
// chunks are done, on the batch, such as the sums of a batch norm. Stages between two such sums run
// one after another on the same chunk, so that it stays in its core's cache.
// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "lanes.hpp"
#include "tensor.hpp"
#include "thread_pool.hpp"

#include <concertina/error.hpp>

#include <algorithm>
#include <cstddef>
#include <deque>
#include <functional>
#include <ranges>
#include <string>
#include <utility>
#include <vector>

namespace training {

/// Feature maps of a batch, and the gradient of the loss with respect to them.
///
/// Lanes of the last chunk beyond the batch are computed like any other, on whatever is in them;
/// their gradient is zero, so their numbers enter all sums as a multiple of zero. They change no
/// result, not by a bit, as long as they are finite: NaN and infinity times zero are NaN. What a
/// previous batch left there will do, and so do the zeros there at first.
/// Layout  [chunk][channel][y][x][lane]
template <class Scalar>
class Maps {
 public:
  Maps(Index chunks, Index channels_, Index height_, Index width_, bool differentiable_)
      : channels(channels_),
        height(height_),
        width(width_),
        differentiable(differentiable_),
        value_(static_cast<std::size_t>(chunks * numbers())),
        gradient_(differentiable ? value_.size() : 0) {}

  Index channels, height, width;
  bool differentiable;  ///< false for the images themselves
  Index readers = 0;    ///< operations that read them, but for a relu in place

  /// Numbers of one image, rows of a chunk.
  Index numbers() const { return channels * height * width; }

  Scalar* values(Index chunk) { return at(value_, chunk); }
  Scalar* gradients(Index chunk) { return at(gradient_, chunk); }

 private:
  Scalar* at(std::vector<Row<Scalar>>& rows, Index chunk) {
    return rows[static_cast<std::size_t>(chunk * numbers())].image.data();
  }

  std::vector<Row<Scalar>> value_, gradient_;
};

/// A part of an operation: one of these.
struct Stage {
  std::function<void(Index chunk, Index worker)> each =
      {};                             ///< after earlier ones of the same chunk
  std::function<void()> then = {};    ///< after all chunks of earlier ones, before later ones
  std::function<void()> beside = {};  ///< after all chunks, on one thread beside later ones
};

/// What an operation does in a pass, one stage after another.
class Stages {
 public:
  void each(std::function<void(Index chunk, Index worker)> work) {
    stages_.push_back({.each = std::move(work)});
  }
  void then(std::function<void()> work) { stages_.push_back({.then = std::move(work)}); }
  void beside(std::function<void()> work) { stages_.push_back({.beside = std::move(work)}); }

  auto begin() const { return stages_.begin(); }
  auto end() const { return stages_.end(); }

 private:
  std::vector<Stage> stages_;
};

struct Operation {
  std::function<void()> prepare = {};  ///< before the pass forward: what depends on tensors alone
  Stages forward = {}, backward = {};
  std::function<void()> last = {};  ///< after the pass back, with all threads
};

template <class Scalar>
class Tape {
 public:
  /// For batches of up to `capacity` images. The pool must outlive the tape.
  Tape(Index capacity, ThreadPool& pool)
      : pool_(pool), capacity_(capacity), chunks_((capacity + lanes - 1) / lanes) {}
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

  Maps<Scalar>& maps(Index channels, Index height, Index width, bool differentiable = true) {
    return maps_.emplace_back(chunks_, channels, height, width, differentiable);
  }
  Tensor<Scalar>& tensor(std::string name, std::vector<Index> shape) {
    Index count = 1;
    for (const Index extent : shape) count *= extent;
    return tensors_.emplace_back(
        Tensor<Scalar>{std::move(name),
                       std::move(shape),
                       std::vector<Scalar>(static_cast<std::size_t>(count)),
                       {}});
  }
  void record(Operation operation) { operations_.push_back(std::move(operation)); }

  /// Counts a reader of `maps`, and says in passes back whether it is the first to write their
  /// gradient, and so need not add: the last one that was recorded is.
  std::function<bool()> first_writer(Maps<Scalar>& maps) {
    const Index mine = ++maps.readers;
    return [&maps, mine] { return maps.readers == mine; };
  }

  /// Runs the recorded operations on the first `images` of the input maps' lanes.
  /// Throws  ShapeError unless 1 <= images <= capacity
  void forward(Index images, bool training) {
    if (images < 1 || images > capacity_) {
      throw concertina::ShapeError("a batch of " + std::to_string(images) + " images; 1 to " +
                                   std::to_string(capacity_) + " are possible");
    }
    images_ = images;
    training_ = training;
    for (Operation& operation : operations_) {
      if (operation.prepare) operation.prepare();
    }
    run(operations_, &Operation::forward);
  }

  /// After forward in training. Every tensor's gradient is then that of the loss.
  void backward() {
    const auto reversed = std::views::reverse(operations_);
    try {
      run(reversed, &Operation::backward);
    } catch (...) {
      pool_.wait();  // what runs beside refers to what the caller may end
      throw;
    }
    pool_.wait();
    for (const Operation& operation : reversed) {
      if (operation.last) operation.last();
    }
  }

  ThreadPool& pool() { return pool_; }
  Index images() const { return images_; }
  Index capacity() const { return capacity_; }
  Index chunk_capacity() const { return chunks_; }
  Index chunks() const { return (images_ + lanes - 1) / lanes; }
  bool training() const { return training_; }

  /// Counts changes of the tensors' values from outside, such as a step of the optimizer, so that
  /// what follows from them is computed only when it has to be.
  Index version() const { return version_; }
  void tensors_changed() { ++version_; }
  std::deque<Tensor<Scalar>>& tensors() { return tensors_; }

  /// 1 for lanes that hold an image, 0 for those of the last chunk that do not.
  Row<Scalar> mask(Index chunk) const {
    Row<Scalar> mask;
    for (int lane = 0; lane < lanes; ++lane) {
      mask.image[static_cast<std::size_t>(lane)] =
          chunk * lanes + lane < images_ ? Scalar(1) : Scalar(0);
    }
    return mask;
  }

  /// Memory that a stage may use while it works on a chunk; reserve what it needs when recording.
  void reserve_scratch(Index numbers) {
    scratch_.resize(static_cast<std::size_t>(pool_.size()));
    const auto rows = static_cast<std::size_t>((numbers + lanes - 1) / lanes);
    for (auto& each : scratch_) {
      if (each.size() < rows) each.resize(rows);
    }
  }
  Scalar* scratch(Index worker) {
    return scratch_[static_cast<std::size_t>(worker)].front().image.data();
  }

 private:
  template <class Operations>
  void run(const Operations& operations, Stages Operation::* pass) {
    std::vector<const Stage*> stages;
    for (const Operation& operation : operations) {
      for (const Stage& stage : operation.*pass) stages.push_back(&stage);
    }
    const auto has = [](auto kind) { return [=](const Stage* stage) { return !!(stage->*kind); }; };
    for (auto first = stages.begin(); first != stages.end();) {
      auto last = std::find_if(first, stages.end(), has(&Stage::then));
      if (std::any_of(first, last, has(&Stage::each))) {
        pool_.run(chunks(), [&](Index chunk, Index worker) {
          for (auto stage = first; stage != last; ++stage) {
            if ((*stage)->each) (*stage)->each(chunk, worker);
          }
        });
      }
      last = std::find_if(last, stages.end(), has(&Stage::each));
      for (; first != last; ++first) {
        if ((*first)->beside) pool_.submit((*first)->beside);
        if ((*first)->then) (*first)->then();
      }
    }
  }

  ThreadPool& pool_;
  Index capacity_, chunks_, images_ = 0, version_ = 0;
  bool training_ = false;
  std::deque<Maps<Scalar>> maps_;
  std::deque<Tensor<Scalar>> tensors_;
  std::vector<Operation> operations_;
  std::vector<std::vector<Row<Scalar>>> scratch_;
};

}  // namespace training
