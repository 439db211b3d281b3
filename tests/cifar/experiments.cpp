// The paper's rows as trainings.
// SPDX-License-Identifier: Apache-2.0
#include "cifar/experiments.hpp"  // first: the header must stand alone

#include "support.hpp"

#include <catch2/catch.hpp>

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>

namespace cifar {
namespace {

using Catch::Matchers::Contains;
using concertina::test::message_of;

const std::string header = "table,dataset,kernel,model,rate,setting,metric,mean,std\n";

struct File {
  std::filesystem::path path = std::filesystem::temp_directory_path() /
                               ("cifar_experiments_" + std::to_string(getpid()) + ".csv");
  explicit File(const std::string& text) { std::ofstream(path) << text; }
  ~File() { std::filesystem::remove(path); }
};

Experiment row_of(const std::string& line) {
  return read_experiments(File(header + line + "\n").path).at(0);
}

TEST_CASE("every published row is a training that there is", "[cifar]") {
  const auto rows = read_experiments(CONCERTINA_PAPER_ACCURACY);
  CHECK(rows.size() == 28 + 18 + 10 + 74 + 21 + 21 + 24);
  std::set<std::string> names;
  std::size_t numbers = 0;
  for (const Experiment& row : rows) {
    INFO(row.table << ' ' << row.name());
    CHECK(names.insert(row.table + row.name()).second);
    numbers += row.published.size();
    for (const Run& run : runs_of(row, 3, {})) {
      run.network.validate();
      run.recipe.validate();
      CHECK((run.network.is_resnet() || run.recipe.seed == 3));
    }
  }
  CHECK(numbers == 328);
}

TEST_CASE("a row says what is trained", "[cifar]") {
  const Budget budget{.epochs = 10, .teacher_width = 8, .teacher_epochs = 12};
  const auto plain =
      runs_of(row_of("S1,CIFAR-10,7,ExpandNet-CK+FC,4,none,top1,80.31,0.27"), 2, budget);
  REQUIRE(plain.size() == 1);
  CHECK(plain[0].name == "cifar10-k7-ck+fc-r4-e10-s2");
  CHECK(plain[0].dataset == "cifar10");
  CHECK(plain[0].network == NetworkOptions{.model = "ck+fc"});
  CHECK(plain[0].recipe.weight_decay == 0);
  CHECK(contracts(plain[0].network));

  const auto deeper = runs_of(row_of("S5,CIFAR-100,9,ExpandNet-CL,8,none,top1,48.85,0.42"), 1, {});
  REQUIRE(deeper.size() == 1);
  CHECK(deeper[0].name == "cifar100-deeper-k9-cl-r8-e150-s1");
  CHECK(deeper[0].network == NetworkOptions{.model = "cl", .kernel = 9, .rate = 8, .blocks = 4});
  CHECK(deeper[0].recipe.weight_decay == 5e-4);

  const auto transfer =
      runs_of(row_of("S4,CIFAR-10,3,ExpandNet-CL+FC+Init,4,Hint,top1,58.27,3.83"), 1, budget);
  REQUIRE(transfer.size() == 3);
  CHECK(transfer[0].network.compute == Compute::nonlinear);
  CHECK_FALSE(contracts(transfer[0].network));
  CHECK(transfer[0].recipe.transfer.method == Transfer::none);
  CHECK(transfer[1].network.width == 8);
  CHECK(transfer[1].recipe.epochs == 12);
  CHECK(transfer[1].name == "cifar10-resnet18-w8-e12-s1");
  CHECK(transfer[2].name == "cifar10-k3-cl+fc-r4-init-hint-w8-e12-e10-s1");
  CHECK(transfer[2].init == transfer[0].name);
  CHECK(transfer[2].teacher == transfer[1].name);
  CHECK(transfer[2].recipe.transfer.method == Transfer::hint);
  CHECK(transfer[2].recipe.adam);
  CHECK(transfer[2].recipe.learning_rate == 1e-4);
  const auto kd = runs_of(row_of("S1,CIFAR-10,7,SmallNet,,KD,top1,78.97,0.37"), 1, budget);
  REQUIRE(kd.size() == 2);
  CHECK_FALSE(kd[1].recipe.adam);

  CHECK(Budget().marks().empty());
  CHECK(budget.marks() == "-e10-w8-e12");
  const auto uniform = runs_of(row_of("S1,CIFAR-10,7,ExpandNet-CL,4,none,top1,78.47,0.2"), 1,
                               {.uniform_norms = true});
  CHECK(uniform[0].name == "cifar10-k7-cl-r4-uniform-e150-s1");
  CHECK(uniform[0].recipe.uniform_norms);

  const auto rows =
      read_experiments(File(header + "S7,CIFAR-10,7,SmallNet,,corrupted-20%,best_test_error,1,2\n"
                                     "S7,CIFAR-10,7,SmallNet,,corrupted-20%,train_error,3,4\n")
                           .path);
  REQUIRE(rows.size() == 1);
  CHECK(rows[0].name() == "cifar10-k7-compact-corrupted20");
  CHECK(rows[0].published.size() == 2);
  CHECK(runs_of(rows[0], 1, budget).back().recipe.corrupted == 0.2);
}

TEST_CASE("curves are trainings of their own", "[cifar]") {
  const auto titles = [](const std::vector<Curve>& curves) {
    std::vector<std::string> result;
    for (const Curve& curve : curves) result.push_back(curve.title);
    return result;
  };
  const auto behaviour = curves_of("S2", "cifar10", 3, 1, 150);
  CHECK(titles(behaviour) ==
        std::vector<std::string>{"SmallNet", "FC(Arora18)", "ExpandNet-CL", "ExpandNet-CL+FC"});
  CHECK(behaviour[2].run.name == "cifar10-k3-cl-r4-similarities-e150-s1");
  CHECK(behaviour[2].run.similarities == 100);
  CHECK(curves_of("S1", "cifar10", 7, 1, 150).size() == 6);
  const auto decays = curves_of("S4", "cifar10", 7, 1, 20);
  CHECK(titles(decays) ==
        std::vector<std::string>{"SmallNet", "FC(Arora18) product L2", "FC(Arora18) normal L2",
                                 "ExpandNet-CL product L2", "ExpandNet-CL normal L2"});
  std::set<std::string> names;
  for (const Curve& curve : decays) {
    CHECK(names.insert(curve.run.name).second);
    CHECK(curve.run.recipe.weight_decay == 5e-4);
    CHECK(curve.run.recipe.decay_products == (curve.title.find("product") != std::string::npos));
  }
  CHECK_THAT(message_of<concertina::Error>([] { curves_of("S9", "cifar10", 3, 1, 1); }),
             Contains("S4"));
}

TEST_CASE("rows that say nothing are refused with their line", "[cifar]") {
  const auto refusal = [](const std::string& text) {
    const File file(text);
    return message_of<concertina::FormatError>([&] { read_experiments(file.path); });
  };
  CHECK_THAT(refusal("epoch\n"), Contains("line 1") && Contains("table,dataset"));
  CHECK_THAT(refusal(header + "S1,CIFAR-10\n"), Contains("line 2: 2 fields"));
  CHECK_THAT(refusal(header + "S1,CIFAR-10,x,SmallNet,,none,top1,1,1\n"), Contains("numbers"));
  CHECK_THAT(refusal(header + "S1,CIFAR-9,7,SmallNet,,none,top1,1,1\n"),
             Contains("line 2") && Contains("CIFAR-9"));
  CHECK_THAT(refusal(header + "S1,CIFAR-10,7,BigNet,,none,top1,1,1\n"), Contains("BigNet"));
  CHECK_THAT(refusal(header + "S1,CIFAR-10,7,SmallNet,,osmosis,top1,1,1\n"), Contains("osmosis"));
  CHECK_THAT(refusal(header + "S1,CIFAR-10,7,SmallNet,,none,top5,1,1\n"),
             Contains("line 2") && Contains("top5") && Contains("train_error"));
  CHECK_THAT(refusal(header + "S1,CIFAR-10,7,SmallNet,,corrupted-%,top1,1,1\n"),
             Contains("corrupted-%"));
  CHECK(dataset_name("CIFAR-100") == "cifar100");
  CHECK(published_dataset("cifar10") == "CIFAR-10");
  CHECK_THAT(message_of<concertina::Error>([] { dataset_name("SVHN"); }), Contains("CIFAR-10"));
}

}  // namespace
}  // namespace cifar
