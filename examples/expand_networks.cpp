// Expands each layer of two compact networks without changing what it computes, contracts it again,
// and proves it.
// SPDX-License-Identifier: Apache-2.0
//
//     expand_networks [examples/data/compact_networks.safetensors]
//
// A compact layer is replaced by several linear layers in a row, with four times its channels
// between (ExpandNets, NeurIPS 2020): they train better, and contract back into the one that ships.
// Here the expansion starts from the trained layer itself, so it is the same map from its first
// step on.
#include "networks/read_layer.hpp"
#include "text.hpp"

#include <concertina/expand.hpp>
#include <concertina/verify.hpp>

#include <chrono>
#include <iostream>
#include <random>

#ifndef CONCERTINA_EXAMPLES_DATA
#define CONCERTINA_EXAMPLES_DATA "examples/data"
#endif

namespace concertina {

extern template std::vector<Conv<float, 0>> preserve(const Conv<float, 0>&,
                                                     const std::vector<ConvShape<0>>&,
                                                     std::mt19937_64&, Ends);
extern template std::vector<Conv<float, 2>> preserve(const Conv<float, 2>&,
                                                     const std::vector<ConvShape<2>>&,
                                                     std::mt19937_64&, Ends);

}  // namespace concertina

namespace {

using concertina::Conv, concertina::ConvShape, concertina::Ends, concertina::Index;

class Table {
 public:
  /// Expands `layer` into `shapes`, contracts, and adds a row. Counts what fails.
  template <int Rank>
  void add(const std::string& name, const Conv<float, Rank>& layer, const std::string& expansion,
           const std::vector<ConvShape<Rank>>& shapes, Ends ends) {
    progress_.show(name + ", " + expansion);
    const auto expanded = concertina::preserve(layer, shapes, generator_, ends);
    const auto contracted =
        concertina::contract<double>(expanded);  // refuses what is not exact at the border
    const auto proofs = concertina::verify(expanded, layer);  // against the layer we began with
    const bool good =
        proofs && (contracted == layer || concertina::prove_rounding<double>(expanded, contracted));
    failures_ += good ? 0 : 1;
    for (const auto* report : {&proofs.algebra, &proofs.rounding, &proofs.structure}) {
      if (!*report)
        complaints_ +=
            name + ", " + expansion + ", " + report->proof + ": " + report->failure + '\n';
    }

    const Index before = tool::parameters(layer.shape());
    Index between = 0;
    for (const auto& each : expanded) between += tool::parameters(each.shape());
    before_ += before;
    expanded_ += between;
    rows_.push_back({name, to_string(layer.shape()), expansion,
                     ends == Ends::shift ? "shift" : "orthonormal", tool::grouped(before),
                     tool::grouped(between), tool::grouped(tool::parameters(contracted.shape())),
                     concertina::exactness(expanded) ? "yes" : "NO",
                     tool::brief(proofs.rounding.fraction()), tool::brief(proofs.rounding.ulps),
                     mark(proofs.algebra) + mark(proofs.rounding) + mark(proofs.structure)});
  }

  /// Prints everything; true if nothing failed.
  bool finish(double seconds) {
    progress_.clear();
    std::cout
        << tool::table(rows_) << complaints_
        << "error/bound, ulp: how far the expanded layers are from the original, as a "
           "fraction of what rounding\n"
           "explains, and in units in the last place of each element (many where it is nearly "
           "zero); 0 is the same\n"
           "to the last bit. proofs: a, r, s where the proofs of algebra, rounding and "
           "structure hold.\n\n"
        << (failures_ == 0 ? "All " : tool::grouped(failures_) + " of the ") << rows_.size() - 1
        << " expansions " << (failures_ == 0 ? "contract back to their layers: " : "FAIL: ")
        << tool::grouped(before_) << " parameters -> " << tool::grouped(expanded_)
        << " to train -> " << tool::grouped(before_) << " to ship; " << tool::brief(seconds)
        << " s\n";
    return failures_ == 0;
  }

 private:
  static std::string mark(const concertina::Report& report) {
    return report ? report.proof.substr(0, 1) : std::string("-");
  }

  tool::Progress progress_;
  std::mt19937_64 generator_{2020};
  std::vector<std::vector<std::string>> rows_{{"layer", "shape", "expansion", "ends", "parameters",
                                               "expanded", "contracted", "exact", "error/bound",
                                               "ulp", "proofs"}};
  Index before_ = 0, expanded_ = 0, failures_ = 0;
  std::string complaints_;
};

void expand_file(const std::string& path, Table& table) {
  const auto file = concertina::io::read_safetensors(path);
  const auto description = file.metadata.find("networks");
  if (description == file.metadata.end()) {
    throw concertina::FormatError(
        path + ": no metadata \"networks\"; examples/data/make_compact_networks.py writes it");
  }
  Ends ends = Ends::orthonormal;
  const auto alternate = [&ends] {
    return ends = ends == Ends::shift ? Ends::orthonormal : Ends::shift;
  };
  for (const auto& network : nlohmann::json::parse(description->second)) {
    for (const auto& node : network.at("layers")) {
      const tool::LayerDescription each = tool::parse_layer(node, path);
      if (each.linear) {
        const auto layer = tool::read_layer<float, 0>(file, each);
        table.add(each.name, layer, "FC", concertina::expand_fc(layer.shape()), alternate());
        continue;
      }
      const auto layer = tool::read_layer<float, 2>(file, each);
      const ConvShape<2>& shape = layer.shape();
      const bool depthwise = shape.groups > 1;
      table.add(each.name, layer, depthwise ? "depthwise CL" : "CL", concertina::expand_cl(shape),
                alternate());
      if (shape.kernel_size[0] > 3)
        table.add(each.name, layer, "CK", concertina::expand_ck(shape), alternate());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const auto begin = std::chrono::steady_clock::now();
    Table table;
    expand_file(argc > 1 ? argv[1] : CONCERTINA_EXAMPLES_DATA "/compact_networks.safetensors",
                table);
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
    return table.finish(taken.count()) ? tool::ok : tool::failed;
  } catch (...) {
    return tool::report_error();
  }
}
