// Figures, drawn by gnuplot.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/plot.hpp"  // first: the header must stand alone

#include "cifar/landscape.hpp"
#include "cifar/text_file.hpp"
#include "support.hpp"

#include <catch2/catch.hpp>

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

using namespace cifar;
using Catch::Matchers::Contains;
using concertina::test::message_of;
namespace fs = std::filesystem;

namespace {

struct Folder {
  fs::path path = fs::temp_directory_path() / ("cifar plot's " + std::to_string(getpid()));
  Folder() { fs::create_directories(path); }
  ~Folder() { fs::remove_all(path); }
};

std::string contents(const fs::path& path) { return read_text(path, 1 << 24, "a figure"); }

/// What both formats begin with, and that something is in them.
void check_drawn(const fs::path& folder, const std::string& name) {
  CHECK_THAT(contents(folder / (name + ".svg")), Contains("<svg") && Contains("</svg>"));
  const std::string png = contents(folder / (name + ".png"));
  CHECK(png.substr(1, 3) == "PNG");
  CHECK(png.size() > 5000);
}

std::vector<Line> lines() {
  std::vector<Line> result;
  for (int l = 0; l < 2; ++l) {
    Line line{.title = l == 0 ? "SmallNet" : "ExpandNet-CL", .epochs = {}};
    for (Index epoch = 1; epoch <= 3; ++epoch) {
      const double accuracy = 0.25 * static_cast<double>(epoch) - 0.125 * l;
      line.epochs.push_back({.epoch = epoch,
                             .train_accuracy = accuracy,
                             .test_accuracy = accuracy - 0.0625,
                             .min_similarity = -0.5 + accuracy});
    }
    line.similarities = {-0.5, 0.25 * l, 0.5};
    result.push_back(std::move(line));
  }
  return result;
}

}  // namespace

TEST_CASE("a training is drawn from its numbers", "[cifar]") {
  const Folder folder;
  plot_training(folder.path, "figure", "CIFAR-10's", lines());
  CHECK(contents(folder.path / "figure-curves.csv") ==
        "epoch,SmallNet training error,ExpandNet-CL training error,SmallNet test error,"
        "ExpandNet-CL test error,SmallNet least similarity,ExpandNet-CL least similarity\n"
        "1,75,87.5,81.25,93.75,-0.25,-0.375\n"
        "2,50,62.5,56.25,68.75,0,-0.125\n"
        "3,25,37.5,31.25,43.75,0.25,0.125\n");
  CHECK_THAT(contents(folder.path / "figure-density.csv"),
             Contains("cosine,SmallNet,ExpandNet-CL\n-0.6,"));
  check_drawn(folder.path, "figure");
  CHECK_THAT(contents(folder.path / "figure.svg"), Contains("ExpandNet-CL"));

  auto without = lines();
  for (Line& line : without) line.similarities.clear();
  plot_training(folder.path, "short", "CIFAR-10", without);
  check_drawn(folder.path, "short");
  CHECK_FALSE(fs::exists(folder.path / "short-density.csv"));
  without[1].epochs.pop_back();
  CHECK_THAT(message_of<concertina::ShapeError>(
                 [&] { plot_training(folder.path, "short", "CIFAR-10", without); }),
             Contains("ExpandNet-CL") && Contains("2 epochs"));
}

TEST_CASE("landscapes are drawn side by side", "[cifar]") {
  const Folder folder;
  const Landscape hill{{-1, 0, 1}, {3, 2, 3, 2, 1, 2, 3, 2, 3}};
  write_landscape(folder.path / "a.csv", hill);
  CHECK(contents(folder.path / "a.csv")
            .starts_with("first,second,loss\n-1,-1,3\n0,-1,2\n1,-1,3\n\n"));
  write_landscape(folder.path / "b.csv", hill);
  plot_landscapes(folder.path, "figure", "CIFAR-10",
                  {{"SmallNet", "a.csv", 1, 3}, {"CL", "b.csv", 1, 3}});
  check_drawn(folder.path, "figure");
}

TEST_CASE("without gnuplot the numbers are there, and a word of advice", "[cifar]") {
  const Folder folder;
  const std::string path = std::getenv("PATH");
  fs::create_symlink("/bin/sh", folder.path / "sh");  // a shell, and nothing else
  setenv("PATH", folder.path.c_str(), 1);
  const std::string message = message_of<concertina::Error>(
      [&] { plot_training(folder.path, "figure", "CIFAR-10", lines()); });
  setenv("PATH", path.c_str(), 1);
  CHECK_THAT(message, Contains("gnuplot is missing") && Contains("apt install gnuplot-nox") &&
                          Contains("figure.gp"));
  CHECK(fs::exists(folder.path / "figure-curves.csv"));
  CHECK(fs::exists(folder.path / "figure.gp"));
}

TEST_CASE("labels keep their distance, and move as little as may be", "[cifar]") {
  CHECK(spread_labels({1, 5, 3}, 1) == std::vector<double>{1, 5, 3});
  CHECK(spread_labels({2, 2}, 1) == std::vector<double>{1.5, 2.5});
  CHECK(spread_labels({4, 4, 4}, 2) == std::vector<double>{2, 4, 6});
  CHECK(spread_labels({0, 10, 0.5, 1}, 1) == std::vector<double>{-0.5, 10, 0.5, 1.5});
  CHECK(spread_labels({}, 1).empty());
}
