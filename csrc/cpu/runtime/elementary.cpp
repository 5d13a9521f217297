#include "runtime/elementary.hpp"

#include <cmath>
#include <cstdint>
#include <limits>

namespace paceline::elementary {
namespace {

constexpr double kLn2High = 0x1.62e42fefa2p-1, kLn2Low = 0x1.9ef35793c7673p-41;  // products with exponents are exact

// log x = log m + e log 2 with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh((m - 1) / (m + 1)).
double log(double x) {
  int e;
  double m = std::frexp(x, &e);
  if (m < 0x1.6a09e667f3bcdp-1) m *= 2, e -= 1;
  const double s = (m - 1) / (m + 1), z = s * s;
  double series = 0;
  for (int n = 23; n >= 3; n -= 2) series = (series + 1.0 / n) * z;
  return e * kLn2High + (2 * s + (2 * s * series + e * kLn2Low));
}

// The Taylor series of cos (First = 0) or sin (First = 1) on [-pi / 4, pi / 4].
template <int First>
double series(double r) {
  const double z = r * r;
  double sum = 1;
  for (int n = 18 + First; n > First; n -= 2) sum = 1 - sum * z / (n * (n - 1));
  return First ? r * sum : sum;
}

// cos of x minus `quarters` quarter turns.
double cosine(double x, int64_t quarters) {
  // pi / 2 in parts of 23 bits, whose products with up to 30 bits are exact, and the rest
  constexpr double parts[] = {0x1.921fb4p+0, 0x1.4442dp-24, 0x1.846988p-48, 0x1.8cc51701b839ap-72};
  if (!(x > -0x1p40 && x < 0x1p40)) return std::numeric_limits<double>::quiet_NaN();
  const double turns = std::floor(x * 0x1.45f306dc9c883p-1 + 0.5);
  double r = x;
  for (double part : parts) r -= turns * part;
  switch ((int64_t(turns) - quarters) & 3) {
    case 0: return series<0>(r);
    case 1: return -series<1>(r);
    case 2: return -series<0>(r);
    default: return series<1>(r);
  }
}

}  // namespace

double exp(double x) {
  x = x > -700 ? (x < 700 ? x : 700) : -700;
  const double n = std::floor(x / (kLn2High + kLn2Low) + 0.5), r = (x - n * kLn2High) - n * kLn2Low;
  double sum = 1;
  for (int i = 16; i > 0; --i) sum = 1 + sum * r / i;
  return std::ldexp(sum, int(n));
}

double pow(double x, double y) { return exp(y * log(x)); }
double cos(double x) { return cosine(x, 0); }
double sin(double x) { return cosine(x, 1); }

}  // namespace paceline::elementary
