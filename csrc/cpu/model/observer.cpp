#include "model/observer.hpp"

#include <bit>
#include <cstring>

namespace paceline {
namespace {

// Column `col` of a lane of a tile; see ActView.
float value(const ActView& tile, int64_t lane, int64_t col) {
  const int64_t columns = lane_columns(tile.format);
  const uint8_t* p = tile.data + (col / columns * tile.lanes + lane) * 4 + col % columns * act_bytes(tile.format);
  if (tile.format == ActFormat::int8)
    return std::bit_cast<float>(tile.word(col / kGroup, kScale, lane)) * float(int8_t(*p));
  if (tile.format == ActFormat::bf16) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bf16_to_float(bits);
  }
  float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

}  // namespace

void Observer::add(const Matrix& matrix, const ActView& act, int64_t rows) {
  Seen& seen = seen_[&matrix];
  seen.squares.resize(size_t(matrix.view().cols));
  for (int64_t r = 0; r < rows; ++r) {
    const ActView tile = act.tile(r / act.lanes);
    for (int64_t col = 0; col < matrix.view().cols; ++col) {
      const double x = value(tile, r % act.lanes, col);
      seen.squares[size_t(col)] += x * x;
    }
  }
  seen.rows += rows;
}

Observer::Seen Observer::seen(const Matrix& matrix) const {
  const auto found = seen_.find(&matrix);
  return found != seen_.end() ? found->second : Seen{0, std::vector<double>(size_t(matrix.view().cols))};
}

}  // namespace paceline
