// The prime field's laws, its products against a second way to compute them, and Eigen's matrices
// over it.
// SPDX-License-Identifier: Apache-2.0
#include <concertina/modular.hpp>

#include "support.hpp"

#include <limits>
#include <sstream>
#include <type_traits>

namespace concertina::test {
namespace {

constexpr std::uint64_t mersenne = (std::uint64_t{1} << 61) - 1;
using Small = Modular<7>;
using Large = Modular<(std::uint64_t{1} << 62) - 57>;    // the largest prime below 2^62
using Largest = Modular<(std::uint64_t{1} << 63) - 25>;  // and below 2^63
static_assert(std::is_same_v<PrimeField, Modular<mersenne>>);

template <class Field>
bool is_field(Field a, Field b, Field c) {
  const Field zero = 0, one = 1;
  bool laws = a + b == b + a && a * b == b * a && (a + b) + c == a + (b + c) &&
              (a * b) * c == a * (b * c) && a * (b + c) == a * b + a * c && a + zero == a &&
              a * one == a && a * zero == zero && a - b == a + -b && a + -a == zero &&
              (a - b) + b == a;
  if (b != zero) laws = laws && b * b.inverse() == one && (a / b) * b == a;
  for (const Field number : {a + b, a - b, a * b, -a})
    laws = laws && number.value() < Field::modulus;
  return laws;
}

TEMPLATE_TEST_CASE("random numbers obey the laws of a field", "[modular]", PrimeField, Large,
                   Largest) {
  Rng rng(1);
  constexpr std::uint64_t p = TestType::modulus;
  std::vector<TestType> edges{0, 1, 2, p - 1, p - 2, p / 2, p / 2 + 1};
  for (const TestType a : edges) {
    for (const TestType b : edges) {
      for (const TestType c : edges) {
        if (!is_field(a, b, c)) FAIL_CHECK(a << ", " << b << ", " << c);
      }
    }
  }
  for (int n = 0; n < 2000; ++n) {
    const TestType a = rng(), b = rng(), c = rng();
    if (!is_field(a, b, c)) FAIL_CHECK(a << ", " << b << ", " << c);
  }
  CHECK(is_field<TestType>(3, 5, 7));  // the laws were looked at
  CHECK(TestType(3) != TestType(5));
}

TEST_CASE("every element of the field of seven", "[modular]") {
  for (int a = 0; a < 7; ++a) {
    for (int b = 0; b < 7; ++b) {
      CHECK((Small(a) + Small(b)).value() == static_cast<std::uint64_t>((a + b) % 7));
      CHECK((Small(a) - Small(b)).value() == static_cast<std::uint64_t>((a - b + 7) % 7));
      CHECK((Small(a) * Small(b)).value() == static_cast<std::uint64_t>(a * b % 7));
      CHECK((Small(a) == Small(b)) == (a == b));
      for (int c = 0; c < 7; ++c) CHECK(is_field(Small(a), Small(b), Small(c)));
    }
    CHECK((-Small(a)).value() == static_cast<std::uint64_t>((7 - a) % 7));
  }
  static_assert(Small(3) / Small(5) == Small(2));
  CHECK(Modular<2>(1) + Modular<2>(1) == Modular<2>(0));
  CHECK(Modular<2>(1).inverse() == Modular<2>(1));
}

TEST_CASE("a signed integer stands for its residue", "[modular]") {
  for (int n = -30; n <= 30; ++n) {
    int residue = n;
    while (residue < 0) residue += 7;
    CHECK(Small(n).value() == static_cast<std::uint64_t>(residue % 7));
    CHECK(Small(static_cast<signed char>(n)) == Small(n));
    CHECK(PrimeField(n) + PrimeField(-n) == PrimeField(0));
  }
  constexpr auto least = std::numeric_limits<std::int64_t>::min();
  constexpr auto most = std::numeric_limits<std::int64_t>::max();
  // 2^61 = 1 modulo 2^61 - 1, so 2^63 = 4; and 2^63 = 3 * 3074457345618258602 + 2 = 1 modulo 7.
  CHECK(PrimeField(least) == -PrimeField(4));
  CHECK(PrimeField(least).value() == mersenne - 4);
  CHECK(PrimeField(most).value() == 3);
  CHECK(Small(least).value() == 6);
  CHECK(Small(most).value() == 0);
  CHECK(Largest(least) == -Largest(25));
  CHECK(PrimeField(std::numeric_limits<std::uint64_t>::max()).value() == 7);
  CHECK(PrimeField(mersenne) == PrimeField(0));
  CHECK(PrimeField() == PrimeField(0));
  CHECK(PrimeField(true) == PrimeField(1));
}

TEST_CASE("both ways to multiply agree", "[modular]") {
  const std::uint64_t p = GENERATE(as<std::uint64_t>{}, mersenne, Large::modulus, Largest::modulus,
                                   7u, 2u, 4294967291u);
  std::vector<std::uint64_t> edges;
  for (const std::uint64_t edge : {std::uint64_t{0}, p - 1, p / 2, std::uint64_t{1} << 32}) {
    for (const std::uint64_t near : {edge - 1, edge, edge + 1}) {
      if (near < p) edges.push_back(near);
    }
  }
  for (const std::uint64_t a : edges) {
    for (const std::uint64_t b : edges) {
      CHECK(detail::multiply_modulo(a, b, p) == detail::multiply_modulo_portable(a, b, p));
    }
  }
  Rng rng(2);
  for (int n = 0; n < 20000; ++n) {
    const std::uint64_t a = rng() % p, b = rng() % p;
    const std::uint64_t product = detail::multiply_modulo(a, b, p);
    if (product != detail::multiply_modulo_portable(a, b, p) || product >= p) {
      FAIL_CHECK(a << " * " << b << " modulo " << p);
    }
  }
  CHECK(detail::multiply_modulo(p - 1, p - 1, p) == 1);
}

TEST_CASE("zero has no inverse", "[modular]") {
  CHECK_THAT(message_of<Error>([] { PrimeField(0).inverse(); }),
             Catch::Contains("zero has no inverse"));
  CHECK_THROWS_AS(PrimeField(3) / PrimeField(0), Error);
  CHECK_THROWS_AS(Small(14).inverse(), Error);
  CHECK(Small(3).inverse() == Small(5));
}

TEST_CASE("elements change in place, also by themselves, and print", "[modular]") {
  Small a = 3;
  a += 6;
  CHECK(a == Small(2));
  a -= 5;
  CHECK(a == Small(4));
  a *= a;
  CHECK(a == Small(2));
  a += a;
  CHECK(a == Small(4));
  a /= 2;
  CHECK(a == Small(2));
  a -= a;
  CHECK(a == Small(0));
  std::ostringstream out;
  out << PrimeField(-1);
  CHECK(out.str() == "2305843009213693950");
}

TEMPLATE_TEST_CASE("Eigen multiplies matrices over a field", "[modular]", PrimeField, Large) {
  using Matrix = Eigen::Matrix<TestType, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
  Rng rng(3);
  const auto random = [&](Index rows, Index columns) {
    Matrix matrix(rows, columns);
    for (Index i = 0; i < rows; ++i) {
      for (Index j = 0; j < columns; ++j) matrix(i, j) = rng();
    }
    return matrix;
  };
  for (const auto& [m, k, n] :
       {std::array<Index, 3>{1, 1, 1}, {2, 3, 4}, {5, 1, 2}, {33, 40, 29}}) {
    const Matrix a = random(m, k), b = random(k, n), c = random(m, n);
    Matrix product(m, n);
    for (Index i = 0; i < m; ++i) {
      for (Index j = 0; j < n; ++j) {
        for (Index l = 0; l < k; ++l) product(i, j) += a(i, l) * b(l, j);
      }
    }
    CHECK((a * b == product));
    CHECK((a * b + c == product + c));
    Matrix sum = c;
    sum.noalias() -= a * b;
    CHECK((sum == c - product));
  }
}

}  // namespace
}  // namespace concertina::test
