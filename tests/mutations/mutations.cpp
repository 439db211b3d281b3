// Planted errors: contractions changed in one of many ways, which the proofs must find, and right
// ones computed in many orders, which they must not refuse. What is wrong is judged on its own: by
// the difference from plain loops in long double, against four times the rounding of the sums.
// SPDX-License-Identifier: Apache-2.0
#include "errors.hpp"
#include "expressions.hpp"
#include "orders.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace concertina::mutations {
namespace {

// ---- the library, by scalar and rank -----------------------------------------------------------

/// What is proved.
struct Subject {
  Expression expression;  ///< with transposed layers its dense form
  std::vector<std::pair<std::string, Kernel>> contractions;  ///< by the library
  std::function<Verification(const Kernel&, std::uint64_t seed)> verify;
};

/// None where the scalar has no transposed layers.
template <class Scalar, int Rank>
std::optional<Subject> subject(const Parts& parts) {
  const auto narrow = [](const Kernel& layer) {
    return converted<Scalar, Rank>(ConvView<const double, 3>(layer));
  };
  const auto wide = [](const Conv<Scalar, Rank>& layer) {
    return converted<double, 3>(ConvView<const Scalar, Rank>(layer));
  };
  const auto is_transposed = [](const Part& part) { return part.index() == 1; };
  if (std::ranges::none_of(parts, is_transposed)) {
    std::vector<Expression> layers;
    for (const Part& part : parts) layers.push_back(std::get<Expression>(part));
    const auto e = converted<Scalar, Rank>(chain(layers));
    Subject result{
        converted<double, 3>(e),
        {{"contracted", wide(contract(e, interior_only))}},
        [=](const Kernel& f, std::uint64_t seed) { return verify(e, narrow(f), {.seed = seed}); }};
    if constexpr (!std::is_same_v<Scalar, double>) {
      result.contractions.emplace_back("in double", wide(contract<double>(e, interior_only)));
    }
    return result;
  }
  if constexpr (Rank > 0 && std::is_floating_point_v<Scalar>) {
    using Product = TransposedExpr<Scalar, Rank>;
    std::optional<Product> e;
    for (const Part& part : parts) {
      const auto* f = std::get_if<Transposed<double, 3>>(&part);
      const Product next =
          f ? Product(transposed(narrow(f->layer()), converted<Scalar, double>(f->bias())))
            : Product(converted<Scalar, Rank>(std::get<Expression>(part)));
      e = e ? next * *e : next;
    }
    return Subject{converted<double, 3>(e->dense()),
                   {{"contracted", wide(detail::to_dense(contract(*e, interior_only)))}},
                   [=](const Kernel& f, std::uint64_t seed) {
                     const Conv<Scalar, Rank> dense = narrow(f);
                     PerAxis<Rank> stride = e->stride();
                     for (int axis = 0; axis < Rank; ++axis) {
                       stride[axis] *= dense.shape().stride[axis];
                     }
                     const ConvView<const Scalar, Rank> view(dense);
                     return verify(*e, detail::from_dense(view, stride), {.seed = seed});
                   }};
  }
  return {};
}

struct Numbers {
  const char* name;
  int rank;
  std::optional<Subject> (*subject)(const Parts&);
  double (*round)(double);
  long double computed, stored;  ///< unit roundoff of what contracts, and of the scalar
  long double subnormal;         ///< the smallest of the scalar
  double range;                  ///< its exponents, for each of float's
};

template <class Scalar, int Rank>
Numbers numbers(const char* name) {
  return {name,
          Rank,
          subject<Scalar, Rank>,
          [](double x) { return static_cast<double>(convert<Scalar>(x)); },
          detail::unit_roundoff<detail::AccumulatorOf<void, Scalar>>(),
          detail::unit_roundoff<Scalar>(),
          detail::smallest_subnormal<Scalar>(),
          std::numeric_limits<Scalar>::max_exponent / 128.0};
}

/// Every element as the scalar stores it.
Kernel rounded(Kernel layer, const Numbers& numbers) {
  for (double& x : layer.weight()) x = numbers.round(x);
  for (double& x : layer.bias()) x = numbers.round(x);
  return layer;
}

// ---- the judge ---------------------------------------------------------------------------------

/// Elements in long double: the exact ones, and what sums are off by, four times.
class Judge {
 public:
  Judge(const Expression& expression, const Numbers& numbers, Rng& rng) {
    Index sums = 0;
    expression.tree().for_each_leaf([&](const Leaf& leaf) {
      const Shape shape = leaf.shape();
      const Index own = leaf.channel_map() ? 8 : 1;  // of a batch norm
      sums += shape.in / shape.groups * numel(shape.kernel_size) + 1 + own;
    });
    const long double relative =
        4 * (2 * static_cast<long double>(sums) * numbers.computed + numbers.stored);
    using C = Contractor<long double>;
    const auto exact = C({}, false, rng)(expression.tree()),
               size = C({}, true, rng)(expression.tree());
    for (std::size_t i = 0; i < exact.list.size(); ++i) {
      elements_[exact.list[i].first] = {exact.list[i].second,
                                        relative * size.list[i].second + 4 * numbers.subnormal};
    }
  }

  /// Whether an element of the layer differs, or one that it lacks is not zero.
  bool differs(const Kernel& f) const {
    std::size_t wrong = 0, lacking = 0;
    for (const auto& [at, element] : elements_) {
      lacking += std::abs(element.first) > element.second;
    }
    for_each_element(f, [&](const Place& at, double x) {
      const auto found = elements_.find(at);
      const auto [exact, allowed] = found == elements_.end() ? Element{} : found->second;
      wrong += !(std::abs(static_cast<long double>(x) - exact) <= allowed);
      lacking -= std::abs(exact) > allowed;
    });
    return wrong + lacking > 0;
  }

 private:
  using Element = std::pair<long double, long double>;  // and what is allowed
  std::map<Place, Element> elements_;
};

// ---- right layers ------------------------------------------------------------------------------

struct Right {
  const char* name;
  Order order;
  bool wider = false;     ///< than the library's accumulator
  bool enlarged = false;  ///< by zeros around it
};
using O = Order;
constexpr Right rights[] = {
    {"from the left", {O::from_the_left, O::forwards, O::one_by_one}},
    {"from the right", {O::from_the_right, O::backwards, O::one_by_one}},
    {"fused", {O::anywhere, O::forwards, O::fused}},
    {"shuffled", {O::anywhere, O::shuffled, O::one_by_one}},
    {"shuffled and fused", {O::anywhere, O::shuffled, O::fused}},
    {"pairwise", {O::anywhere, O::shuffled, O::pairwise}},
    {"largest first", {O::anywhere, O::largest_first, O::one_by_one}},
    {"smallest first", {O::anywhere, O::smallest_first, O::fused}},
    {"in a wider scalar", {O::anywhere, O::shuffled, O::fused}, true},
    {"with zeros around it", {O::anywhere, O::shuffled, O::one_by_one}, false, true}};

Kernel computed(const Right& right, const Subject& subject, const Numbers& numbers, Rng& rng) {
  Shape shape = subject.contractions.front().second.shape();
  for (int axis = 0; axis < numbers.rank && right.enlarged; ++axis) {
    shape.kernel_size[axis] += 2;
    shape.padding.start[axis] += shape.dilation[axis];
    shape.padding.end[axis] += shape.dilation[axis];
  }
  const bool in_double = numbers.computed == detail::unit_roundoff<double>();
  const auto compute = in_double && right.wider   ? in_order<long double>
                       : in_double != right.wider ? in_order<double>
                                                  : in_order<float>;
  return rounded(compute(subject.expression, shape, right.order, rng), numbers);
}

// ---- trying them -------------------------------------------------------------------------------

/// Of orders and of kinds of errors each expression at each scale tries one in so many, in turn.
constexpr std::size_t order_step = 5, error_step = 31;

struct Tally {
  std::size_t wrong = 0, accepted = 0, within = 0, right = 0, refused = 0;
  std::map<std::string, std::size_t> expressions, errors, orders;
};

void try_all(const Numbers& numbers, const std::vector<std::pair<std::string, Change>>& changes,
             Tally& tally) {
  std::set<std::string> seen;
  for (std::size_t s = 0; s < std::size(scales); ++s) {
    Rng rng(s + 1);
    std::size_t n = 0;
    for (const Parts& parts : expressions(numbers.rank, rng)) {
      const auto subject = numbers.subject(scaled(parts, scales[s], numbers.range));
      if (!subject) continue;
      const std::string form = to_string(Form(subject->expression));
      if (!seen.insert(std::to_string(s) + form).second) continue;  // without axes some are alike
      if (s == 0) ++tally.expressions[numbers.name];
      ++n;
      const auto complain = [&](const char* what, const std::string& kind, const auto& found) {
        std::cout << what << ": " << kind << ", scale " << scales[s].name << ", " << numbers.name
                  << ' ' << form << '\n'
                  << found;
      };
      const Judge judge(subject->expression, numbers, rng);
      auto layers = subject->contractions;
      for (std::size_t o = (n + s) % order_step; o < std::size(rights); o += order_step) {
        layers.emplace_back(rights[o].name, computed(rights[o], *subject, numbers, rng));
      }
      const Kernel& contracted = layers.front().second;
      std::set<std::vector<double>> distinct;
      for (const auto& [kind, layer] : layers) {
        std::vector<double> elements(layer.weight().begin(), layer.weight().end());
        elements.insert(elements.end(), layer.bias().begin(), layer.bias().end());
        if (!distinct.insert(elements).second) continue;
        if (judge.differs(layer)) throw VerificationError(kind + " is not right: " + form);
        ++tally.right;
        ++tally.orders[kind];
        const Verification found = subject->verify(layer, rng());
        if (found) continue;
        ++tally.refused;
        complain("REFUSED", kind, found);
      }
      for (std::size_t k = (n + s) % error_step; k < changes.size(); k += error_step) {
        const auto& [kind, change] = changes[k];
        std::optional<Kernel> mutant = change({contracted, subject->expression, numbers.rank}, rng);
        if (!mutant) continue;
        *mutant = rounded(std::move(*mutant), numbers);
        if (mutant->shape() == contracted.shape() && !judge.differs(*mutant)) {
          ++tally.within;
          continue;
        }
        ++tally.wrong;
        ++tally.errors[kind];
        const Verification found = subject->verify(*mutant, 1);
        if (!found) continue;
        ++tally.accepted;
        complain("ACCEPTED", kind, found);
      }
    }
  }
}

}  // namespace
}  // namespace concertina::mutations

int main() try {
  using namespace concertina::mutations;
  const auto changes = kinds();
  Tally tally;
  for (const Numbers& each :
       {numbers<float, 0>("float, rank 0"), numbers<float, 1>("float, rank 1"),
        numbers<float, 2>("float, rank 2"), numbers<float, 3>("float, rank 3"),
        numbers<double, 0>("double, rank 0"), numbers<double, 1>("double, rank 1"),
        numbers<double, 2>("double, rank 2"), numbers<double, 3>("double, rank 3"),
        numbers<Eigen::half, 1>("half, rank 1"), numbers<Eigen::bfloat16, 2>("bfloat16, rank 2")}) {
    try_all(each, changes, tally);
  }
  const auto print = [](const char* what, const std::map<std::string, std::size_t>& counts) {
    std::cout << what;
    const char* between = ": ";
    for (const auto& [name, count] : counts) {
      std::cout << between << name << ' ' << count;
      between = ", ";
    }
    std::cout << '\n';
  };
  print("expressions", tally.expressions);
  print("errors", tally.errors);
  print("right", tally.orders);
  std::size_t all = 0;
  for (const auto& [name, count] : tally.expressions) all += count;
  std::cout << tally.errors.size() << " kinds of errors on " << all << " expressions at "
            << std::size(scales) << " scales: wrong accepted " << tally.accepted << " of "
            << tally.wrong << " (" << tally.within
            << " more were no errors, or within four times the bound), right refused "
            << tally.refused << " of " << tally.right << " distinct\n";
  return tally.accepted + tally.refused == 0 ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << "mutations: " << error.what() << '\n';
  return 2;
}
