// Our own exponential functions and sines against the C library's, which are right to the last bit or nearly so.
#include <cmath>
#include <random>

#include "checks.hpp"
#include "runtime/elementary.hpp"

using namespace paceline;

void test_elementary() {
  const auto near = [](double got, double expected, double tolerance) {
    return std::fabs(got - expected) <= tolerance;
  };
  std::mt19937 random(3);
  const auto between = [&](double low, double high) { return low + (high - low) * double(random()) / 4294967296.0; };
  for (int i = 0; i < 20000; ++i) {
    const double x = between(-100, 100), raised = std::exp(x);
    check(near(elementary::exp(x), raised, 4e-16 * raised), "elementary", "exp");
    const double theta = between(2, 1e7), y = between(-1, 1), power = std::pow(theta, y);
    check(near(elementary::pow(theta, y), power, 8e-15 * power), "elementary", "pow");
    const double angle = std::ldexp(between(-1, 1), int(random() % 31));
    check(near(elementary::cos(angle), std::cos(angle), 3e-16), "elementary", "cos");
    check(near(elementary::sin(angle), std::sin(angle), 3e-16), "elementary", "sin");
  }
  check(elementary::exp(0) == 1 && elementary::cos(0) == 1 && elementary::sin(0) == 0, "elementary", "at 0");
}
