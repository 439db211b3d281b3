// Tables beside the paper's.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/results_table.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <catch2/catch.hpp>

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

namespace cifar {
namespace {

using Catch::Matchers::Contains;
using concertina::test::message_of;
namespace fs = std::filesystem;

Experiment row(const std::string& setting = "none") {
  return {.table = "S1",
          .dataset = "CIFAR-10",
          .model = "SmallNet",
          .setting = setting,
          .kernel = 7,
          .rate = {},
          .published = {{"top1", 78.0, 0.5}}};
}

Outcome outcome(double best, bool contracted = true) {
  return {
      .best_test = best, .last_test = best - 0.25, .last_train = 0.75, .contracted = contracted};
}

std::string line_of(const std::vector<Outcome>& outcomes, const Budget& budget = {}) {
  const std::string text = results_table({{row(), outcomes}}, budget, "cifar").markdown;
  const auto from = text.find("| CIFAR-10");
  return text.substr(from, text.find('\n', from) - from);
}

TEST_CASE("means, deviations and measures are those of the definition", "[cifar]") {
  const std::vector<Outcome> three = {outcome(0.75), outcome(0.8125), outcome(0.875)};
  CHECK(measured(three, "top1").mean == Approx(81.25));
  CHECK(measured(three, "top1").deviation.value() == Approx(6.25));  // n - 1
  CHECK(measured(three, "best_test_error").mean == Approx(18.75));
  CHECK(measured(three, "last_test_error").mean == Approx(43.75));
  CHECK(measured(three, "train_error").mean == Approx(25));
  CHECK_FALSE(measured({outcome(0.5)}, "top1").deviation);
  CHECK(measured({}, "top1").seeds == 0);
  CHECK_THAT(message_of<concertina::Error>([&] { measured(three, "top5"); }), Contains("top1"));
}

TEST_CASE("differences beyond three deviations are marked", "[cifar]") {
  CHECK(line_of({outcome(0.7675), outcome(0.7725)}) ==
        "| CIFAR-10 | 7 | SmallNet | none | 1 | best test accuracy | 2 | 150 | 77.00 ± 0.35 | "
        "78.00 ± 0.50 | -1.00 | yes | yes |");
  CHECK_THAT(line_of({outcome(0.795)}),
             Contains("| 1 | 150 | 79.50 | 78.00 ± 0.50 | +1.50 | yes |"));
  CHECK_THAT(line_of({outcome(0.7951)}), Contains("+1.51 | **no**, +3.0 |"));
  CHECK_THAT(line_of({outcome(0.76)}), Contains("-2.00 | **no**, -4.0 |"));
  // Two seeds of deviation 0.5: three of both are 2.12.
  const double half = 0.005 / std::sqrt(2);
  CHECK_THAT(line_of({outcome(0.801 - half), outcome(0.801 + half)}),
             Contains("80.10 ± 0.50 | 78.00 ± 0.50 | +2.10 | yes |"));
  CHECK_THAT(line_of({outcome(0.8015 - half), outcome(0.8015 + half)}),
             Contains("+2.15 | **no**, +3.0 |"));
  CHECK_THAT(line_of({outcome(0.78)}, {.uniform_norms = true}), Contains("| none | 0 to 1 | best"));
  CHECK_THAT(line_of({outcome(0.76)}, {.epochs = 10}),
             Contains("| 10 | 76.00") && Contains("| other budget |"));
  CHECK_THAT(line_of({outcome(0.78), outcome(0.78, false)}), Contains("| yes | no |"));
}

TEST_CASE("a row with a teacher says which, and rows without trainings are counted", "[cifar]") {
  const Budget budget{.teacher_width = 8, .teacher_epochs = 12};
  const Table table =
      results_table({{row("KD"), {outcome(0.78)}}, {row(), {}}, {row(), {outcome(0.78)}}}, budget,
                    "cifar --table S1");
  CHECK_THAT(table.markdown,
             Contains("| KD | 1 | best test accuracy | 1 | 150 (teacher of width 8: 12) "
                      "| 78.00 | 78.00 ± 0.50 | +0.00 | other budget |") &&
                 Contains("| none | 1 | best test accuracy | 1 | 150 | 78.00 |") &&
                 Contains("1 row of the table without a training") &&
                 Contains("`cifar --table S1`"));
  CHECK_THAT(table.csv,
             Contains("\nS1,CIFAR-10,7,SmallNet,,KD,ones,top1,1,150,8,12,78.00,,78.00,0.50,"
                      "+0.00,+0.00,other budget,yes\n") &&
                 Contains("none,ones,top1,1,150,,,78.00,,78.00,0.50,+0.00,+0.00,yes,yes\n"));
}

TEST_CASE("a training's outcome is in its folder, once it has ended", "[cifar]") {
  const fs::path folder =
      fs::temp_directory_path() / ("cifar_results_table_" + std::to_string(getpid()));
  fs::create_directories(folder);
  CHECK_FALSE(outcome_of(folder, 2));
  {
    CsvLog log(folder / "log.csv", {});
    log.add({.epoch = 1, .train_accuracy = 0.25, .test_accuracy = 0.75});
    CHECK_FALSE(outcome_of(folder, 2));
    log.add({.epoch = 2, .train_accuracy = 0.5, .test_accuracy = 0.625});
  }
  const auto found = outcome_of(folder, 2);
  REQUIRE(found);
  CHECK(found->best_test == 0.75);
  CHECK(found->last_test == 0.625);
  CHECK(found->last_train == 0.5);
  CHECK_FALSE(found->contracted);
  CHECK(found->epochs.size() == 2);
  std::ofstream(folder / "compact.onnx") << "";
  CHECK(outcome_of(folder, 2)->contracted);
  fs::remove_all(folder);
}

TEST_CASE("finished trainings are read from a file", "[cifar]") {
  const fs::path path =
      fs::temp_directory_path() / ("cifar_trainings_" + std::to_string(getpid()) + ".csv");
  const std::string header =
      "training,seed,epochs,best,best_epoch,last,train_error,contracted,seconds,commit,machine\n";
  const auto read = [&](const std::string& text) {
    std::ofstream(path) << text;
    return read_trainings(path);
  };
  const auto refusal = [&](const std::string& text) {
    return message_of<concertina::FormatError>([&] { read(text); });
  };
  const std::string line = "cifar10-k3-compact,2,150,74.5,131,74,27,yes,127,fa1cee1,AMD EPYC\n";
  const auto found = read(header + line + "cifar10-k3-cl-r4,1,10,50,,,,,,,\n");
  REQUIRE(found.size() == 2);
  const Outcome& compact = found.at("cifar10-k3-compact-e150-s2");
  CHECK(compact.best_test == Approx(0.745));
  CHECK(compact.last_test == Approx(0.74));
  CHECK(compact.last_train == Approx(0.73));
  CHECK(compact.contracted);
  const Outcome& partial = found.at("cifar10-k3-cl-r4-e10-s1");
  CHECK_FALSE(partial.contracted);
  CHECK(measured({compact, partial}, "top1").seeds == 2);
  CHECK(measured({compact, partial}, "train_error").seeds == 1);
  CHECK(measured({compact, partial}, "train_error").mean == Approx(27));
  CHECK(measured({partial}, "train_error").seeds == 0);
  const auto again = read(header + line + "cifar10-k3-compact,2,150,75,,,,yes,,,\n");
  CHECK(again.at("cifar10-k3-compact-e150-s2").best_test == 0.75);  // the last counts

  CHECK_THAT(refusal("training,seed\n"), Contains("line 1: expected \"training,"));
  CHECK_THAT(refusal(header + "cifar10-k3-compact,2\n"), Contains("line 2: 2 fields"));
  CHECK_THAT(refusal(header + line + "a,b,150,74,,,,,,,\n"),
             Contains("line 3: \"b\" is no whole number from 0"));
  CHECK_THAT(refusal(header + "a,1,150,174,,,,,,,\n"), Contains("\"174\" is not from 0 to 100"));
  CHECK_THAT(refusal(header + "a,-1,150,74,,,,,,,\n"), Contains("\"-1\" is no whole number"));
  CHECK_THAT(refusal(header + "a,1,0,74,,,,,,,\n"), Contains("\"0\" is no whole number from 1"));
  CHECK_THAT(refusal(header + "a,1,150,74,151,,,,,,\n"), Contains("from 1 to 150"));
  CHECK_THAT(refusal(header + "a,1,150,74,,75,,,,,\n"), Contains("the last accuracy is above"));
  CHECK_THAT(refusal(header + "a,1,150,74,,,,maybe,,,\n"), Contains("not \"maybe\""));
  CHECK_THAT(refusal(header + "a,1,150,74,,,,,nan,,\n"), Contains("\"nan\" are no seconds"));
  CHECK_THAT(refusal(header + line.substr(0, 40)), Contains("line 2: the line does not end"));
  CHECK_THROWS_AS(read_trainings(path.string() + ".none"), concertina::IoError);
  fs::remove(path);
}

}  // namespace
}  // namespace cifar
