// SPDX-License-Identifier: Apache-2.0
#include "onnx/layer_file.hpp"

#include "onnx/data_types.hpp"
#include "onnx/region_expression.hpp"

#include <concertina/contract.hpp>
#include <concertina/error.hpp>

#include <algorithm>
#include <string>

namespace tool {

namespace {

using concertina::io::Safetensors;

/// "s2p1x0"; what is the default is left out.
template <int Rank>
std::string geometry_text(const ConvShape<Rank>& shape, int rank) {
  std::string text;
  const auto add = [&](char letter, const PerAxis<Rank>& values, const PerAxis<Rank>& otherwise) {
    if (values == otherwise) return;
    const Dims axes(values.begin(), values.begin() + rank);
    const bool one = std::ranges::all_of(axes, [&](Index v) { return v == axes.front(); });
    text += letter;
    for (std::size_t i = 0; i < (one ? 1 : axes.size()); ++i)
      text += (i > 0 ? "x" : "") + std::to_string(axes[i]);
  };
  add('s', shape.stride, 1);
  add('p', shape.padding.start, 0);
  add('e', shape.padding.end, shape.padding.start);
  add('d', shape.dilation, 1);
  if (shape.groups > 1) text += "g" + std::to_string(shape.groups);
  return text;
}

template <class Stored>
void add(Safetensors& file, const char* name, const Dims& dims, std::span<const double> values) {
  file.add(name, dims, rounded<Stored>(values));
}

template <class Stored, int Rank>
Safetensors file_of(const Conv<double, Rank>& layer, int rank) {
  const ConvShape<Rank>& shape = layer.shape();
  Safetensors file;
  const std::string geometry = geometry_text(shape, rank);
  file.metadata["chain"] = geometry.empty() ? "" : ":" + geometry;
  Dims dims = {shape.out, shape.in / shape.groups};
  dims.insert(dims.end(), shape.kernel_size.begin(), shape.kernel_size.begin() + rank);
  add<Stored>(file, "weight", dims, layer.weight());
  if (shape.bias) add<Stored>(file, "bias", {shape.out}, layer.bias());
  return file;
}

/// Whether a map has numbers of its own, other than what is added to its result.
bool has_weight(const LinearNode& map) {
  switch (map.kind) {
    case Kind::conv:
    case Kind::conv_transpose:
    case Kind::linear:
    case Kind::batch_norm:
    case Kind::average_pool:
    case Kind::channel_select: return true;
    case Kind::channel_scale: return !map.scale.empty();
    default: return false;
  }
}

}  // namespace

std::optional<Safetensors> layer_file(const onnx::Model& model) {
  if (model.outputs.size() != 1) return std::nullopt;
  const Graph graph(model, {});
  const LinearGraph linear(graph);
  const auto none = [](int) { return false; };
  const auto all = segments_to(linear, graph.find(model.outputs.front().name), none);
  const Segments segments(all);
  if (segments.empty() || count_nodes(segments) != model.nodes.size()) return std::nullopt;
  const GraphTensor& source = graph[segments.back().from];
  std::size_t weights = 0;
  for (const Segment& segment : segments)
    weights += static_cast<std::size_t>(std::ranges::count_if(segment.maps, [](const auto* map) {
      return has_weight(*map) || map->operands.size() > 1;
    }));
  if (source.producer >= 0 || source.constant || weights != 1) return std::nullopt;

  const int axes = source.dims ? static_cast<int>(source.dims->size()) - 2 : 0;
  const int rank = std::max(rank_of(segments), axes);
  return with_expression({segments}, [&](auto type) -> std::optional<Safetensors> {
    using Expression = typename decltype(type)::type;
    if constexpr (std::same_as<Expression, Expr<double, Expression::Rank>>) try {
        const RegionExpression<Expression> region(graph, segments);
        const auto first = [&](int tensor) {
          return region.layouts()[tensor] == Layout::channels_first;
        };
        if (!first(segments.back().from) || !first(segments.front().to)) return std::nullopt;
        const auto layer = concertina::contract(*region);
        if (rank == 0 && layer.shape().groups > 1) return std::nullopt;
        return with_float(type_of(segments),
                          [&]<class Stored>(Stored) { return file_of<Stored>(layer, rank); });
      } catch (const NotLinear&) {
      } catch (const concertina::InexactError&) {  // it crops and pads again
      }
    return std::nullopt;
  });
}

}  // namespace tool
