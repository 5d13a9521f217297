// The arithmetic of one batch row, compiled once for each instruction set and chosen at run time.
//
// Nothing here depends on how many rows a batch has or how many threads run: every output is summed by one thread in
// one fixed order, so a row's result is bitwise the same in every batch.
#pragma once

#include <string>
#include <vector>

#include "formats/cache_view.hpp"
#include "formats/formats.hpp"
#include "kernels/sampler.hpp"

namespace paceline {

// What a gate multiplies: the product of a second matrix of the gate's shape, or given numbers [rows][ld].
struct GateFactor {
  const MatrixView* up = nullptr;
  ActView up_act;  // the gate's rows, packed for `up`
  const float* given = nullptr;
  int64_t ld = 0;
};

constexpr int64_t kTileQueries = 48;  // most queries of a tile
constexpr int64_t kStretchRows = 64;  // positions whose values are read for all queries of a tile before the next ones

// Positions that a row of the batch sees.
struct Span {
  int64_t first, last;
};

// Rows of one slot, times query heads that share a K/V head: what attends to a head of a cache together.
struct QueryTile {
  int rows = 0, heads = 0;
  const Span* spans = nullptr;  // [rows]
  int64_t begin = 0, end = 0;   // positions of all spans, rounded to whole blocks
  const float* q = nullptr;     // [rows][heads][head_dim], a row every q_ld floats
  float* out = nullptr;         // likewise
  int64_t q_ld = 0, out_ld = 0;
  float* scores = nullptr;  // [queries][width]: scores, then weights of positions from `begin` on

  int64_t queries() const { return int64_t(rows) * heads; }
  int64_t width() const { return end - begin; }
  const float* query(int64_t j, int64_t dim) const { return q + j / heads * q_ld + j % heads * dim; }
  float* out_row(int64_t j, int64_t dim) const { return out + j / heads * out_ld + j % heads * dim; }
};

struct Kernels {
  const char* name;

  // Pack groups [begin, end) of columns of row x [n] into lane `row % lanes` of its tile of `act`; columns past n are
  // zeros.
  void (*pack_activations)(const ActView& act, int64_t row, const float* x, int64_t n, int64_t begin, int64_t end);

  // out [rows][ld]: out[r][u kUnit ..] = W a_r for units u in [begin, end). ld covers whole panels.
  // Throws std::invalid_argument if `act` is packed for another format or width; so does `gated`.
  void (*matmul)(const MatrixView& w, const ActView& act, int64_t rows, int64_t begin, int64_t end, float* out,
                 int64_t ld);

  // gelu(gate a_r) * factor, packed into `out` for the next matrix.
  void (*gated)(const MatrixView& gate, const ActView& act, const GateFactor& factor, int64_t rows, int64_t begin,
                int64_t end, const ActView& out);

  // out = x / rms(x) * weight (weight may be null); n is a multiple of 16 or the rows are padded with zeros.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);

  // x = (x + y) * scale.
  void (*add_scaled)(float* x, const float* y, int64_t n, float scale);

  // y += a * x.
  void (*axpy)(float* y, const float* x, int64_t n, float a);

  // Rotate pairs (i, i + n / 2) for i < pairs.
  void (*rope)(float* x, int64_t n, const float* cos, const float* sin, int64_t pairs);

  // Write one key and one value row of a head at `position`.
  void (*append)(const CacheView& cache, int64_t head, int64_t position, const float* key, const float* value);

  // Attention of a tile of queries to a head, in three steps that may each be divided among threads: scores of blocks
  // [begin, end) of its positions, the softmax of queries [begin, end), and panels [begin, end) of sixteen columns of the
  // weighted sums of values. `scratch` holds kStretchRows * head_dim floats.
  void (*score)(const CacheView& cache, int64_t head, const QueryTile& tile, int64_t begin, int64_t end,
                float* scratch);
  void (*softmax)(const QueryTile& tile, int64_t begin, int64_t end);
  void (*mix)(const CacheView& cache, int64_t head, const QueryTile& tile, int64_t begin, int64_t end, float* scratch);

  // x = cap * tanh(x / cap); n is a multiple of 16.
  void (*softcap)(float* x, int64_t n, float cap);

  // Index of the largest value (the lowest such index), and its softmax probability among the n unless that is null.
  int64_t (*arg_max)(const float* x, int64_t n, float* probability);

  // A check value of `n` bytes, n a multiple of 512, at the speed of memory; it finds damage, not forgery.
  uint32_t (*checksum)(const uint8_t* data, int64_t n);

  // The token at an absolute position, for a temperature above 0. `probability` is computed only on request, else 0.
  Sampled (*sample)(const Logits& logits, const SamplingParams& params, uint32_t position, bool probability);

  // The multiply-adds of `steps` operands of this format by several rows, done in registers as fast as they go: what a
  // matrix kernel could do at best.
  int64_t (*dot_peak)(Format format, int64_t steps);
};

// The kernels of `isa`, or of the best instruction set this processor has if it is empty.
// Throws std::invalid_argument if it is unknown, not compiled in, or not supported by the processor.
const Kernels& select_kernels(const std::string& isa);

// Names of the instruction sets that work here, best first.
std::vector<std::string> usable_isas();

}  // namespace paceline
