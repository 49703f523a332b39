// Tiles of AMX: 16 rows of 64 bytes each, multiplied by 16 fours of inputs of 16 outputs, 16,384 products at once.
#pragma once

#include <immintrin.h>
#include <string.h>

#include <cstdint>

// The number of a tile is a part of the instruction: no function can be given it.
#define LLMC_TILE_DOT(sum, rows, outputs)                                 \
  do {                                                                    \
    if constexpr (is_signed) _tile_dpbsud(sum, rows, outputs);            \
    else _tile_dpbusd(sum, rows, outputs);                                \
  } while (false)

namespace llmc {
namespace {

struct Amx {
  // Rows and outputs of a tile of sums, and fours of inputs that one product covers at most.
  static constexpr int64_t side = 16;

  // Tiles 0 to 3 are sums, 4 and 5 rows of codes, 6 and 7 outputs; a product covers `depth` fours of inputs. A thread
  // that holds tiles is dearer to switch away from, so they last as long as a loop does.
  explicit Amx(int64_t depth) {
    alignas(64) uint8_t shape[64] = {};
    shape[0] = 1;
    for (int t = 0; t < 8; ++t) {
      const auto bytes = static_cast<uint16_t>(t == 4 || t == 5 ? 4 * depth : 64);
      memcpy(shape + 16 + 2 * t, &bytes, sizeof bytes);
      shape[48 + t] = static_cast<uint8_t>(t < 6 ? side : depth);
    }
    _tile_loadconfig(shape);
  }
  ~Amx() { _tile_release(); }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;

  // Sums of up to 32 rows of codes, `stride` bytes apart, by 32 outputs: whole numbers (32 or 16, 32), of which the
  // latter half is left out where `rows` is 16 or fewer. A four of the outputs lies `four_bytes` behind the one before
  // it. `fours` is a multiple of `depth`. What lies `ahead` bytes behind the outputs' codes is fetched, if that is not
  // 0. One side is signed: `is_signed` is that of the activations.
  template <bool is_signed>
  static void multiply(const void* codes, int64_t stride, int64_t rows, const void* outputs, int64_t four_bytes,
                       int64_t fours, int64_t depth, int64_t ahead, int32_t* sums) {
    const auto* a = static_cast<const char*>(codes);
    const auto* b = static_cast<const char*>(outputs);
    const int64_t step = depth * four_bytes;
    const bool both = rows > side;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t four = 0; four < fours; four += depth, a += 4 * depth, b += step) {
      if (ahead) {
        for (int64_t f = 0; f < depth; ++f) {
          _mm_prefetch(b + ahead + f * four_bytes, _MM_HINT_T0);
          _mm_prefetch(b + ahead + f * four_bytes + 64, _MM_HINT_T0);
        }
      }
      _tile_loadd(6, b, four_bytes);
      _tile_loadd(7, b + 64, four_bytes);
      _tile_loadd(4, a, stride);
      LLMC_TILE_DOT(0, 4, 6);
      LLMC_TILE_DOT(1, 4, 7);
      if (!both) continue;
      _tile_loadd(5, a + side * stride, stride);
      LLMC_TILE_DOT(2, 5, 6);
      LLMC_TILE_DOT(3, 5, 7);
    }
    constexpr int64_t row = 2 * side * static_cast<int64_t>(sizeof(int32_t));
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + side, row);
    if (!both) return;
    _tile_stored(2, sums + 2 * side * side, row);
    _tile_stored(3, sums + 2 * side * side + side, row);
  }
};

}  // namespace
}  // namespace llmc
