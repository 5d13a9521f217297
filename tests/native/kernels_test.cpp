// Every kernel of every instruction set this processor has, against plain loops in double. For machines without Python,
// such as the emulated Arm of .ci/arm; where there is Python, tests/backends/cpu says more.
//
// Prints one line an instruction set, `neon: 1234 checks passed`, and exits with 1 if a check failed.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <stdexcept>

#include "checks.hpp"
#include "fixtures.hpp"
#include "kernels/kernels.hpp"

using namespace paceline;

namespace {

struct Packed {
  MatrixView view;
  Memory memory;

  Packed(Format format, int64_t rows, int64_t cols) : view(format, rows, cols), memory(view.bytes()) {
    std::memset(memory.get(), 0, size_t(view.bytes()));
    view.data = memory.get();
  }
};

// Columns of very different size, so that a scale taken from the wrong group shows.
Floats columns_of_all_sizes(Random& random, int64_t rows, int64_t cols) {
  Floats x = random.floats(rows * cols), size(static_cast<size_t>(cols));
  for (float& s : size) s = std::pow(10.0f, float(random.integer(-3, 2)));
  for (size_t i = 0; i < x.size(); ++i) x[i] *= size[i % size_t(cols)];
  return x;
}

Packed random_matrix(Random& random, Format format, int64_t rows, int64_t cols) {
  Packed matrix(format, rows, cols);
  if (!traits(format).plain() && !traits(traits(format).element).write) {  // nothing is quantised to it
    randomise(matrix.view, matrix.memory.get(), uint64_t(random.integer(0, 1 << 20)));
    return matrix;
  }
  pack_rows(matrix.view, matrix.memory.get(), Element::f32, columns_of_all_sizes(random, rows, cols).data(), 0, rows);
  return matrix;
}

// Headers whose scales are one and whose factors are -1, 0 or 1, or 0 or 1 where there are minima.
void set_scales(Random& random, const FormatTraits& t, uint8_t* header, int64_t bytes, int64_t halves) {
  const int least = traits(t.element).has_min ? 0 : -1, one = t.header == Header::power ? 0x3f80 : 0x3c00;
  for (int64_t i = 0; i < bytes; ++i)
    header[i] = uint8_t(i >= 2 * halves ? random.integer(least, 1) : i % 2 ? one >> 8 : one);
}

// Quantised weights of all bytes, the extreme ones above all, and scales of whole numbers: products are integers.
Packed integer_matrix(Random& random, Format format, int64_t rows, int64_t cols) {
  Packed matrix(format, rows, cols);
  const FormatTraits& t = traits(format);
  for (int64_t i = 0; i < matrix.view.bytes(); ++i) {
    const int byte = random.integer(0, 767);
    matrix.memory.get()[i] = uint8_t(byte < 256 ? byte : byte < 512 ? 0 : 255);
  }
  const bool factors = t.super_bytes() != 0;
  const int64_t halves = factors ? 0 : t.header == Header::group_scales ? kPanel : t.header_bytes() / 2;
  uint8_t* p = matrix.memory.get();
  for (int64_t panel = 0; panel < matrix.view.panels(); ++panel)
    for (int64_t k = 0; k < matrix.view.padded_cols; k += t.block_cols(), p += t.block_bytes()) {
      if (factors && k % kSuper == 0) set_scales(random, t, p, t.super_bytes(), 2 * kPanel), p += t.super_bytes();
      set_scales(random, t, p, t.header_bytes(), halves);
    }
  return matrix;
}

// Integers of which every group of 32 has one of magnitude 127: they are quantised to themselves.
Floats integer_rows(Random& random, int64_t rows, int64_t cols) {
  Floats x(static_cast<size_t>(rows * cols));
  for (int64_t i = 0; i < rows * cols; ++i)
    x[size_t(i)] = i % cols % kGroup == 0 || random.integer(0, 1) ? (random.integer(0, 1) ? 127.0f : -127.0f)
                                                                  : float(random.integer(-127, 127));
  return x;
}

// Rows of activations in the layout of the kernels, and their memory.
struct Activations {
  ActView view;
  Memory data, words;

  // For products with the matrix.
  Activations(const MatrixView& matrix, int64_t rows)
      : view{traits(matrix.format).act(), lanes_for(rows), matrix.padded_cols, nullptr, nullptr},
        data(tiles(rows) * view.tile_bytes()), words(tiles(rows) * view.groups() * view.lanes * kGroupWords * 4) {
    view.data = data.get();
    view.words = reinterpret_cast<uint32_t*>(words.get());
  }
  int64_t tiles(int64_t rows) const { return round_up(rows, view.lanes) / view.lanes; }
};

Floats times(const Kernels& kernels, const MatrixView& matrix, const float* x, int64_t rows) {
  const Activations act(matrix, rows);
  for (int64_t r = 0; r < rows; ++r)
    kernels.pack_activations(act.view, r, x + r * matrix.cols, matrix.cols, 0, act.view.groups());
  Floats out(size_t(rows * matrix.padded_rows()), kNaN);
  for (int64_t unit = 0; unit < matrix.units(); ++unit)
    kernels.matmul(matrix, act.view, rows, unit, unit + 1, out.data(), matrix.padded_rows());
  return out;
}

bool quantised(Format format) { return traits(format).act() == ActFormat::int8; }

// What the kernels make of a row of activations, as values: what they see is rounded to the format's grid.
std::vector<double> on_grid(Format format, const float* x, int64_t n) {
  std::vector<double> out(x, x + n);
  if (format == Format::bf16)
    for (int64_t i = 0; i < n; ++i) out[size_t(i)] = bf16_to_float(float_to_bf16(x[i]));
  for (int64_t first = 0; quantised(format) && first < n; first += kGroup) {
    const int64_t last = std::min<int64_t>(first + kGroup, n);
    float top = 0;
    for (int64_t i = first; i < last; ++i) top = std::max(top, std::fabs(x[i]));
    const float inverse = top > 1e-30f ? 127.0f / top : 0.0f, scale = top / 127.0f;
    for (int64_t i = first; i < last; ++i) out[size_t(i)] = double(std::nearbyint(x[i] * inverse)) * double(scale);
  }
  return out;
}

// out [rows][ld] against sums in double; `tolerance` is relative to the sum of the terms' magnitudes.
bool is_product(const MatrixView& matrix, const float* x, int64_t rows, const Floats& out, double tolerance) {
  Floats w(static_cast<size_t>(matrix.cols));
  const bool minima = traits(traits(matrix.format).element).has_min;  // a weight's terms may cancel each other
  bool ok = true;
  std::vector<std::vector<double>> a;
  for (int64_t r = 0; r < rows; ++r) a.push_back(on_grid(matrix.format, x + r * matrix.cols, matrix.cols));
  for (int64_t i = 0; i < matrix.rows; ++i) {
    unpack_row(matrix, i, w.data());
    std::vector<double> top(w.size() / kGroup + 1, 0.0);
    for (size_t k = 0; k < w.size(); ++k) top[k / kGroup] = std::max(top[k / kGroup], 2.0 * std::fabs(w[k]));
    for (int64_t r = 0; r < rows; ++r) {
      double sum = 0, size = 0;
      for (size_t k = 0; k < w.size(); ++k) {
        sum += a[size_t(r)][k] * w[k];
        size += std::fabs(a[size_t(r)][k]) * (minima ? top[k / kGroup] : std::fabs(w[k]));
      }
      ok = ok && near(out[size_t(r * matrix.padded_rows() + i)], sum, tolerance * size);
    }
  }
  return ok;
}

// Rows below, at and above what a kernel takes: against the reference, and each row the same, bit for bit, whatever the
// batch.
void test_products(const Kernels& kernels, Format format, int64_t rows, int64_t cols) {
  const std::string what = std::string(traits(format).name) + " " + std::to_string(rows) + " x " + std::to_string(cols);
  constexpr int64_t most = 75;
  Random random(unsigned(rows * 1000 + cols));
  const Packed matrix = random_matrix(random, format, rows, cols);
  const Floats x = columns_of_all_sizes(random, most, cols);
  const Floats all = times(kernels, matrix.view, x.data(), most);
  check(is_product(matrix.view, x.data(), most, all, 2e-6), kernels.name, what + ": product");
  for (int64_t m : {1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 16, 17, 64, 65, 74}) {
    const int64_t first = most - m;  // other lanes of other tiles
    const Floats begin = times(kernels, matrix.view, x.data(), m);
    const Floats end = times(kernels, matrix.view, &x[size_t(first * cols)], m);
    check(same(begin.data(), all.data(), begin.size()), kernels.name, what + ": first rows alone");
    check(same(end.data(), &all[size_t(first * matrix.view.padded_rows())], end.size()), kernels.name,
          what + ": last rows alone");
  }
  if (!quantised(format)) return;
  const Packed integers = integer_matrix(random, format, rows, cols);
  const Floats q = integer_rows(random, most, cols);
  check(is_product(integers.view, q.data(), most, times(kernels, integers.view, q.data(), most), 0), kernels.name,
        what + ": integer sums");
}

// Activations packed for another format or width are refused, by the gate and by what it multiplies.
void test_misfits(const Kernels& kernels, Format format, Format other, int64_t cols) {
  constexpr int64_t rows = 2, inner = 32;
  const Packed matrix(format, inner, 64);
  const Activations act(matrix.view, rows), given(MatrixView(other, 16, cols), rows);
  const Activations out(MatrixView(Format::f32, 16, inner), rows);
  const Floats zeros(128, 0.0f);
  for (const ActView& a : {act.view, given.view})
    for (int64_t r = 0; r < rows; ++r) kernels.pack_activations(a, r, zeros.data(), a.padded_cols, 0, a.groups());
  Floats y(size_t(rows * inner), 0.0f);
  const bool fits = traits(format).act() == traits(other).act() && cols == 64;
  const auto check_call = [&](const auto& call) {
    bool refused = false;
    try {
      call();
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    const std::string what = std::string(traits(format).name) + " with activations for " + traits(other).name;
    check(refused == !fits, kernels.name, what);
  };
  check_call([&] { kernels.matmul(matrix.view, given.view, rows, 0, 1, y.data(), inner); });
  check_call([&] { kernels.gated(matrix.view, given.view, {nullptr, {}, y.data(), inner}, rows, 0, 1, out.view); });
  check_call([&] { kernels.gated(matrix.view, act.view, {&matrix.view, given.view}, rows, 0, 1, out.view); });
}

double gelu(double x) { return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// Whether row `r` of two sets of activations is packed the same.
bool same_row(const Activations& a, const Activations& b, int64_t r) {
  const int lanes = a.view.lanes;
  const ActView x = a.view.tile(r / lanes), y = b.view.tile(r / lanes);
  bool ok = true;
  for (int64_t i = r % lanes; i < x.padded_cols / lane_columns(x.format) * lanes; i += lanes)
    ok = ok && std::memcmp(x.data + i * 4, y.data + i * 4, 4) == 0;
  for (int64_t i = r % lanes; x.format == ActFormat::int8 && i < kGroupWords * x.groups() * lanes; i += lanes)
    ok = ok && x.words[i] == y.words[i];
  return ok;
}

void test_gated(const Kernels& kernels, Format format, int64_t inner, int64_t cols) {
  const std::string what = std::string(traits(format).name) + " gelu times up";
  constexpr int64_t rows = 70;
  Random random(unsigned(inner + cols));
  const Packed gate = random_matrix(random, Format::f32, inner, cols);
  const Packed up = random_matrix(random, Format::bf16, inner, cols);
  const Floats x = random.floats(rows * cols, 0.1f);
  const Floats a = times(kernels, gate.view, x.data(), rows), b = times(kernels, up.view, x.data(), rows);
  const Activations act(gate.view, rows);
  for (int64_t r = 0; r < rows; ++r)
    kernels.pack_activations(act.view, r, &x[size_t(r * cols)], cols, 0, act.view.groups());
  const Activations up_act(up.view, rows);
  for (int64_t r = 0; r < rows; ++r)
    kernels.pack_activations(up_act.view, r, &x[size_t(r * cols)], cols, 0, up_act.view.groups());
  const int64_t ld = gate.view.padded_rows(), units = gate.view.units();
  const MatrixView next(format, 16, inner), floats(Format::f32, 16, inner);
  const Activations plain(floats, rows), want(next, rows), two(next, rows), one(next, rows);
  const GateFactor product{&up.view, up_act.view}, given{nullptr, {}, b.data(), ld};
  kernels.gated(gate.view, act.view, product, rows, 0, units, plain.view);
  kernels.gated(gate.view, act.view, product, rows, 0, units, two.view);
  kernels.gated(gate.view, act.view, given, rows, 0, units, one.view);
  bool exact = true;
  for (int64_t r = 0; r < rows; ++r) {
    Floats row(static_cast<size_t>(inner));
    for (int64_t i = 0; i < inner; ++i) {
      const double product = gelu(a[size_t(r * ld + i)]) * b[size_t(r * ld + i)];
      std::memcpy(&row[size_t(i)], plain.view.tile(r / kTile).data + (i * kTile + r % kTile) * 4, 4);
      exact = exact && near(row[size_t(i)], product, 2e-6 * (std::fabs(product) + 1e-6));
    }
    kernels.pack_activations(want.view, r, row.data(), inner, 0, want.view.groups());
    check(same_row(two, want, r), kernels.name, what + ", packed");
    check(same_row(one, want, r), kernels.name, what + " of before, packed");
  }
  check(exact, kernels.name, what);
}

void test_rows(const Kernels& kernels, int64_t n) {
  Random random{unsigned(n)};
  const int64_t padded = round_up(n, 16);
  const Floats weight = random.floats(padded), y = random.floats(padded), logits = random.floats(padded, 100);
  Floats x = random.floats(padded, 3), out(size_t(padded), kNaN);
  std::fill(x.begin() + n, x.end(), 0.0f);
  double squares = 0;
  for (float v : x) squares += double(v) * v;
  const double inverse = 1 / std::sqrt(squares / double(n) + 1e-6);
  const auto each = [&](const std::function<double(size_t)>& exact, const Floats& got, const char* what) {
    bool ok = true;
    for (size_t i = 0; i < size_t(n); ++i) ok = ok && near(got[i], exact(i), 1e-6 * (1 + std::fabs(exact(i))));
    check(ok, kernels.name, std::string(what) + " of " + std::to_string(n));
  };
  kernels.rms_norm(x.data(), weight.data(), n, 1e-6f, out.data());
  each([&](size_t i) { return x[i] * inverse * weight[i]; }, out, "norm");
  kernels.rms_norm(x.data(), nullptr, n, 1e-6f, out.data());
  each([&](size_t i) { return x[i] * inverse; }, out, "norm without weight");
  out = x;
  kernels.add_scaled(out.data(), y.data(), n, 0.7f);
  each([&](size_t i) { return (double(x[i]) + y[i]) * 0.7f; }, out, "scaled sum");
  out = x;
  kernels.axpy(out.data(), y.data(), n, -0.3f);
  each([&](size_t i) { return x[i] + double(-0.3f) * y[i]; }, out, "axpy");
  out = logits;
  kernels.softcap(out.data(), padded, 30);
  bool ok = true;
  for (size_t i = 0; i < size_t(padded); ++i) ok = ok && near(out[i], 30 * std::tanh(logits[i] / 30.0), 1e-5);
  check(ok, kernels.name, "soft cap of " + std::to_string(n));
}

void test_rope(const Kernels& kernels, int64_t n, int64_t pairs) {
  Random random{unsigned(n + pairs)};
  const Floats x = random.floats(n), angle = random.floats(pairs, 3);
  Floats cos, sin, out = x;
  for (float a : angle) cos.push_back(std::cos(a)), sin.push_back(std::sin(a));
  kernels.rope(out.data(), n, cos.data(), sin.data(), pairs);
  bool ok = true;
  for (int64_t i = 0; i < n / 2; ++i) {
    const double c = i < pairs ? cos[size_t(i)] : 1, s = i < pairs ? sin[size_t(i)] : 0;
    const double a = x[size_t(i)], b = x[size_t(i + n / 2)];
    ok = ok && near(out[size_t(i)], a * c - b * s, 1e-6) && near(out[size_t(i + n / 2)], b * c + a * s, 1e-6);
  }
  check(ok, kernels.name, "rotation of " + std::to_string(n));
}

void test_arg_max(const Kernels& kernels, int64_t n) {
  Random random{unsigned(n)};
  Floats x = random.floats(n, 8.9f);
  for (int64_t again : {n - 1, n / 2, n / 3}) {  // the same largest value at lower and lower places
    x[size_t(again)] = 9;
    double total = 0;
    for (float v : x) total += std::exp(double(v) - 9);
    float probability = kNaN;
    const int64_t index = kernels.arg_max(x.data(), n, &probability);
    check(index == again && near(probability, 1 / total, 1e-6), kernels.name, "arg max of " + std::to_string(n));
  }
}

void test_checksum(const Kernels& kernels, int64_t n) {
  Memory memory(n);
  Random random{unsigned(n)};
  for (int64_t i = 0; i < n; ++i) memory.get()[i] = uint8_t(random.integer(0, 255));
  std::vector<uint32_t> hash(128, 0x811c9dc5u);
  for (int64_t i = 0; i < n; i += 4) {
    uint32_t word;
    std::memcpy(&word, memory.get() + i, 4);
    uint32_t& h = hash[size_t(i / 4 % 128)];
    h = (h + word) * 0x9e3779b1u;
  }
  uint32_t total = uint32_t(n);
  for (uint32_t h : hash) total = (total ^ h) * 0x01000193u;
  check(kernels.checksum(memory.get(), n) == total, kernels.name, "checksum");
  memory.get()[random.integer(0, int(n) - 1)] ^= 1;
  check(kernels.checksum(memory.get(), n) != total, kernels.name, "checksum of damaged bytes");
}

// a x + y is rounded once: cases around the middle between two floats, subnormal ones, and any bits.
void test_fused(const Kernels& kernels) {
  Random random(5);
  const auto any_bits = [&] {
    const uint32_t bits = uint32_t(random.integer(0, 0xffff)) << 16 | uint32_t(random.integer(0, 0xffff));
    return std::bit_cast<float>(bits);
  };
  for (int round = 0; round < 2000; ++round) {
    Floats x(16), y(16);
    float a = any_bits();
    for (size_t i = 0; i < 16; ++i) x[i] = any_bits(), y[i] = any_bits();
    if (round % 2) {  // the product's and the addend's last bits overlap a little
      a = 1 + float(random.integer(0, 4095)) / 4096;
      const int exponent = random.integer(0, 3) ? 0 : -140;
      for (size_t i = 0; i < 16; ++i) {
        x[i] = std::ldexp(1 + float(random.integer(0, 4095)) / 4096, exponent - random.integer(20, 55));
        y[i] = std::ldexp(float(random.integer(-255, 255)), exponent);
      }
    }
    Floats expected(16);
    for (size_t i = 0; i < 16; ++i) expected[i] = std::fma(x[i], a, y[i]);
    kernels.axpy(y.data(), x.data(), 16, a);
    for (size_t i = 0; i < 16; ++i)
      check(same(&y[i], &expected[i], 1) || (std::isnan(y[i]) && std::isnan(expected[i])), kernels.name, "fused");
  }
}

// Samples from logits that integers give exactly: the tokens of decode/sampler.py, folded into one number.
void test_sampler(const Kernels& kernels) {
  Floats x(1000);
  for (uint32_t i = 0; i < 1000; ++i) x[i] = float(int32_t(i * 2654435761u >> 8) - (1 << 23)) / float(1 << 21);
  struct Case {
    SamplingParams params;
    uint32_t tokens;
  };
  constexpr float off = std::numeric_limits<float>::infinity();
  const Case cases[] = {{{1.0f, 0, 1.0, off, 1}, 0xc6aae000u},
                        {{0.7f, 64, 0.95, off, 2}, 0xea72ff18u},
                        {{1.5f, 0, 0.9, off, 3}, 0xc428757au},
                        {{1.0f, 0, 1.0, 2.3025851249694824f, 0x500000007u}, 0x6fd148bau},
                        {{2.0f, 20, 0.5, 1.2039728164672852f, 4}, 0xc850caf7u}};
  for (const Case& c : cases) {
    uint32_t tokens = 0;
    for (uint32_t position = 0; position < 50; ++position) {
      tokens = tokens * 31 + uint32_t(kernels.sample({x.data(), nullptr, 1000}, c.params, position, false).token);
    }
    check(tokens == c.tokens, kernels.name, "sampled tokens");
  }
}

void test_isa(const Kernels& kernels) {
  for (int f = 0; f < kFormatCount; ++f) {
    const Format format = Format(f);
    for (int64_t rows : {1, 17, 70})
      for (int64_t cols : {1, 31, 64, 200, 513, 1100}) test_products(kernels, format, rows, cols);
    for (int other = 0; other < kFormatCount; ++other)
      for (int64_t cols : {64, 128}) test_misfits(kernels, format, Format(other), cols);
    test_gated(kernels, format, 72, 50);
    test_gated(kernels, format, 128, 64);
  }
  test_attention(kernels);
  for (int64_t n : {16, 40, 256, 1000}) test_rows(kernels, n);
  for (int64_t pairs : {1, 7, 16, 32}) test_rope(kernels, 64, pairs);
  for (int64_t n : {3, 15, 16, 17, 33, 1000}) test_arg_max(kernels, n);
  for (int64_t n : {512, 1024, 5120}) test_checksum(kernels, n);
  test_fused(kernels);
  test_sampler(kernels);
}

}  // namespace

int main() {
  int failed = 0;
  for (const std::string& isa : usable_isas()) {
    test_isa(select_kernels(isa));
    report(isa.c_str(), failed);
  }
  test_elementary();
  report("elementary functions", failed);
  test_thread_pool();
  test_failing_runs();
  report("thread pool", failed);
  return failed ? 1 : 0;
}
