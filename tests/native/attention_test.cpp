// Attention over the cache against plain loops in double.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "checks.hpp"
#include "fixtures.hpp"
#include "kernels/kernels.hpp"

using namespace paceline;

namespace {

// A cache of one layer in which positions 0 .. length - 1 were written in order.
struct Cache {
  CacheView view;
  Memory keys, values;

  Cache(const Kernels& kernels, CacheFormat format, int64_t ring, int64_t dim, const Floats& k, const Floats& v,
        int64_t length)
      : view{format, ring, dim, nullptr, nullptr}, keys(kHeads * ring * dim * 4), values(kHeads * ring * dim * 4) {
    view.keys = keys.get();
    view.values = values.get();
    for (int64_t p = 0; p < length; ++p)
      for (int64_t h = 0; h < kHeads; ++h)
        kernels.append(view, h, p, &k[size_t((p * kHeads + h) * dim)], &v[size_t((p * kHeads + h) * dim)]);
  }
  static constexpr int64_t kHeads = 2;  // of keys and values
};

// What a cache makes of rows of `dim` numbers.
Floats as_stored(CacheFormat format, Floats x, int64_t dim) {
  if (format == CacheFormat::bf16)
    for (float& v : x) v = bf16_to_float(float_to_bf16(v));
  if (format != CacheFormat::q8) return x;
  for (size_t row = 0; row < x.size(); row += size_t(dim))
    for (int64_t d = 0; d < dim; d += 32) {
      float* group = &x[row + size_t(d)];
      const int64_t n = std::min<int64_t>(32, dim - d);
      float top = 0;
      for (int64_t i = 0; i < n; ++i) top = std::max(top, std::fabs(group[i]));
      float scale = bf16_to_float(float_to_bf16(top / 127));
      if (scale < top / 127) scale = bf16_to_float(uint16_t(float_to_bf16(top / 127) + 1));
      for (int64_t i = 0; i < n; ++i) group[i] = scale > 0 ? std::nearbyint(group[i] * (1 / scale)) * scale : 0.0f;
    }
  return x;
}

// Softmax over a span of one head, in double. k, v [position][head][dim].
std::vector<double> attended(const Floats& k, const Floats& v, const float* q, int64_t head, int64_t dim, Span span) {
  const auto at = [&](const Floats& x, int64_t p, int64_t d) {
    return double(x[size_t((p * Cache::kHeads + head) * dim + d)]);
  };
  std::vector<double> weight(size_t(span.last - span.first + 1), 0.0), out(size_t(dim), 0.0);
  for (int64_t p = span.first; p <= span.last; ++p)
    for (int64_t d = 0; d < dim; ++d) weight[size_t(p - span.first)] += at(k, p, d) * q[d];
  const double top = *std::max_element(weight.begin(), weight.end());
  double total = 0;
  for (double& w : weight) total += w = std::exp(w - top);
  for (int64_t p = span.first; p <= span.last; ++p)
    for (int64_t d = 0; d < dim; ++d) out[size_t(d)] += weight[size_t(p - span.first)] / total * at(v, p, d);
  return out;
}

// Attention of rows [first, stop) to head 1; its steps are divided into `parts`. q [row][head][dim].
Floats attend(const Kernels& kernels, const CacheView& view, const Floats& q, const std::vector<Span>& spans,
              size_t first, size_t stop, int heads, int64_t parts) {
  const int64_t dim = view.head_dim, ld = heads * dim;
  QueryTile tile;
  tile.rows = int(stop - first), tile.heads = heads, tile.spans = &spans[first];
  tile.begin = spans[first].first, tile.end = 0;
  for (size_t r = first; r < stop; ++r) {
    tile.begin = std::min(tile.begin, spans[r].first / kBlockRows * kBlockRows);
    tile.end = std::max(tile.end, round_up(spans[r].last + 1, kBlockRows));
  }
  Floats out(size_t(tile.rows * ld), kNaN), scores(size_t(tile.queries() * tile.width()), kNaN);
  Floats scratch(size_t(kStretchRows * round_up(dim, 32)), kNaN);
  tile.q = &q[first * size_t(ld)], tile.q_ld = tile.out_ld = ld, tile.out = out.data(), tile.scores = scores.data();
  const auto each_part = [parts](int64_t n, const auto& step) {
    for (int64_t i = parts; i-- > 0;) step(n * i / parts, n * (i + 1) / parts);
  };
  each_part(tile.width() / kBlockRows,
            [&](int64_t b, int64_t e) { kernels.score(view, 1, tile, b, e, scratch.data()); });
  each_part(tile.queries(), [&](int64_t b, int64_t e) { kernels.softmax(tile, b, e); });
  each_part(dim / 16, [&](int64_t b, int64_t e) { kernels.mix(view, 1, tile, b, e, scratch.data()); });
  return out;
}

// Against plain loops; and the same bits in a ring, in tiles of any rows and heads, in steps that are divided, and if what
// follows a row is damaged.
void test_attention(const Kernels& kernels, CacheFormat format, int64_t dim, int heads) {
  constexpr const char* names[] = {"f32", "bf16", "q8"};
  const std::string what = std::string(names[size_t(format)]) + " attention of " + std::to_string(dim);
  constexpr int64_t length = 150, ring = 112, window = 90;
  Random random{unsigned(dim)};
  Floats k = random.floats(length * Cache::kHeads * dim), v = random.floats(length * Cache::kHeads * dim);
  std::vector<Span> spans;  // rows of a chunk of a prompt, with a window
  for (int64_t last = length - kTileQueries / heads; last < length; ++last) spans.push_back({last - window + 1, last});
  const size_t rows = spans.size(), row_size = size_t(heads * dim);
  const Floats q = random.floats(int64_t(rows * row_size));
  const Cache wrapped(kernels, format, ring, dim, k, v, length), whole(kernels, format, 160, dim, k, v, length);
  const Floats all = attend(kernels, wrapped.view, q, spans, 0, rows, heads, 1);
  const Floats held_k = as_stored(format, k, dim), held_v = as_stored(format, v, dim);
  bool ok = true;
  for (size_t j = 0; j < rows * size_t(heads); ++j) {
    const std::vector<double> want = attended(held_k, held_v, &q[j * size_t(dim)], 1, dim, spans[j / size_t(heads)]);
    for (size_t d = 0; d < size_t(dim); ++d) ok = ok && near(all[j * size_t(dim) + d], want[d], 4e-6);
  }
  check(ok, kernels.name, what);
  check(same(all.data(), attend(kernels, whole.view, q, spans, 0, rows, heads, 1).data(), all.size()), kernels.name,
        what + ": ring");
  for (int64_t parts : {2, 3, 5})
    check(same(all.data(), attend(kernels, wrapped.view, q, spans, 0, rows, heads, parts).data(), all.size()),
          kernels.name, what + ": divided");
  for (size_t step : {1, 3}) {
    ok = true;
    for (size_t r = 0; r < rows; r += step) {
      const size_t stop = std::min(r + step, rows);
      const Floats some = attend(kernels, whole.view, q, spans, r, stop, heads, 1);
      ok = ok && same(some.data(), &all[r * row_size], some.size());
    }
    check(ok, kernels.name, what + ": " + std::to_string(step) + " rows");
  }
  Floats first_heads;  // each row's first query alone
  for (size_t r = 0; r < rows; ++r)
    first_heads.insert(first_heads.end(), &q[r * row_size], &q[r * row_size + size_t(dim)]);
  const Floats single = attend(kernels, whole.view, first_heads, spans, 0, rows, 1, 1);
  ok = true;
  for (size_t r = 0; r < rows; ++r) ok = ok && same(&single[r * size_t(dim)], &all[r * row_size], size_t(dim));
  check(ok, kernels.name, what + ": one head");
  for (Floats* x : {&k, &v}) std::fill(x->end() - Cache::kHeads * dim, x->end(), kNaN);  // the last position
  const Cache damaged(kernels, format, 160, dim, k, v, length);
  const Floats before = attend(kernels, damaged.view, q, spans, 0, rows, heads, 1);
  check(same(before.data(), all.data(), (rows - 1) * row_size), kernels.name, what + ": damaged");
}

}  // namespace

void test_attention(const Kernels& kernels) {
  for (CacheFormat format : {CacheFormat::f32, CacheFormat::bf16, CacheFormat::q8})
    for (const auto& [dim, heads] : {std::pair{32, 4}, {80, 8}, {144, 5}, {256, 3}})
      test_attention(kernels, format, dim, heads);
}
