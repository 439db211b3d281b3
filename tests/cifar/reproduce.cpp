// Running trainings that need one another.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/reproduce.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <catch2/catch.hpp>

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace cifar {
namespace {

using Catch::Matchers::Contains;
using concertina::test::message_of;
namespace fs = std::filesystem;

/// A folder with a few images of CIFAR-10.
struct Folder {
  fs::path path = fs::temp_directory_path() / ("cifar_reproduce_" + std::to_string(getpid()));
  Folder() {
    fs::create_directories(path / "data");
    for (const char* name : {"data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4",
                             "data_batch_5", "test_batch"}) {
      std::ofstream file(path / "data" / (std::string(name) + ".bin"), std::ios::binary);
      for (int image = 0; image < 20; ++image) {
        file.put(static_cast<char>(image % 10));
        for (int i = 0; i < 3072; ++i) file.put(static_cast<char>((image * 37 + i * 11) % 251));
      }
    }
  }
  ~Folder() { fs::remove_all(path); }
};

Run run(const std::string& name, double learning_rate = 0.01) {
  return {.name = name,
          .dataset = "cifar10",
          .network = {.model = "cl", .kernel = 3, .rate = 2},
          .recipe = {.epochs = 2, .batch = 32, .learning_rate = learning_rate}};
}

TEST_CASE("trainings run after those that they need, and without those that failed", "[cifar]") {
  const Folder folder;
  Run nonlinear = run("nonlinear"), linear = run("linear"), teacher = run("teacher"),
      student = run("student"), diverging = run("diverging", 1e30), dependent = run("dependent");
  nonlinear.network.compute = Compute::nonlinear;
  linear.init = "nonlinear";
  teacher.network = {.model = "resnet18", .width = 1};
  student.teacher = "teacher";
  student.recipe.transfer.method = Transfer::kd;
  dependent.init = "diverging";
  ReproduceOptions options{
      .data = folder.path / "data", .out = folder.path / "out", .jobs = 3, .command = "test"};
  const std::vector<Run> runs = {linear, student, dependent, nonlinear, diverging, teacher};
  const auto failures = run_trainings(runs, options);
  REQUIRE(failures.size() == 2);
  CHECK_THAT(failures[0], Contains("diverging: ") && Contains("not finite"));
  CHECK_THAT(failures[1], Contains("dependent: ") && Contains("needs one that failed"));
  const auto has = [&](const char* name, const char* file) {
    return fs::exists(options.out / "runs" / name / file);
  };
  for (const char* name : {"nonlinear", "linear", "teacher", "student"}) {
    INFO(name);
    CHECK(has(name, "best.onnx"));
  }
  CHECK(has("linear", "compact.onnx"));
  CHECK_FALSE(has("nonlinear", "compact.onnx"));
  CHECK_FALSE(has("teacher", "compact.onnx"));

  // Again: nothing is trained, and what is there is checked to be the same.
  const auto written = fs::last_write_time(options.out / "runs/linear/log.csv");
  CHECK(run_trainings({nonlinear, linear, teacher, student}, options).empty());
  CHECK(fs::last_write_time(options.out / "runs/linear/log.csv") == written);
  linear.recipe.seed = 9;
  const auto other = run_trainings({nonlinear, linear}, options);
  REQUIRE(other.size() == 1);
  CHECK_THAT(other[0], Contains("another training"));
  linear.recipe.seed = 1;
  fs::remove(options.out / "runs/linear/best.onnx");
  const auto missing = run_trainings({nonlinear, linear}, options);
  REQUIRE(missing.size() == 1);
  CHECK_THAT(missing[0], Contains("remove the folder"));
}

TEST_CASE("a folder where no trainings can be is refused", "[cifar]") {
  const Folder folder;
  std::ofstream(folder.path / "file") << "text";
  const ReproduceOptions options{
      .data = folder.path / "data", .out = folder.path / "file", .command = "test"};
  CHECK_THROWS_AS(run_trainings({run("any")}, options), concertina::IoError);
  CHECK_THROWS_AS(run_trainings({run("any")}, {.data = folder.path / "nowhere",
                                               .out = folder.path / "out",
                                               .command = "test"}),
                  concertina::IoError);
}

}  // namespace
}  // namespace cifar
