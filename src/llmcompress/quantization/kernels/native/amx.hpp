// Tiles of AMX: 16 rows of 64 bytes each, multiplied by 16 outputs' as many bytes: four codes or two bfloat16 in a word,
// 16,384 products of whole numbers at once, or 8,192 of floats.
#pragma once

#include <immintrin.h>
#include <string.h>

#include <cstdint>

// The number of a tile is a part of the instruction: no function can be given it.
#define LLMC_TILE_DOT(sum, rows, outputs)                      \
  do {                                                         \
    if constexpr (is_signed) _tile_dpbsud(sum, rows, outputs); \
    else _tile_dpbusd(sum, rows, outputs);                     \
  } while (false)

namespace llmc {
namespace {

struct Amx {
  // Rows and outputs of a tile of sums, and words of inputs that one product covers at most.
  static constexpr int64_t side = 16;

  // Tiles 0 to 3 are sums, 4 and 5 rows of activations, 6 and 7 outputs. A thread that holds tiles is dearer to switch
  // away from, so they last as long as a loop does.
  Amx() {
    alignas(64) uint8_t shape[64] = {};
    shape[0] = 1;
    for (int t = 0; t < 8; ++t) {
      shape[16 + 2 * t] = 64;
      shape[48 + t] = side;
    }
    _tile_loadconfig(shape);
  }
  ~Amx() { _tile_release(); }
  Amx(const Amx&) = delete;
  Amx& operator=(const Amx&) = delete;

  // Sums of up to 32 rows of codes, `stride` bytes apart, by the codes of 32 outputs: (32 or 16, 32), of which the latter
  // half is left out where `rows` is 16 or fewer. Rows have a sign where `is_signed`, and outputs none, or the other way
  // round. A four of the outputs lies `four_bytes` behind the one before it; `fours` is a multiple of `side`. What lies
  // `ahead` bytes behind them is fetched, if that is not 0.
  template <bool is_signed>
  static void multiply(const void* codes, int64_t stride, int64_t rows, const void* outputs, int64_t four_bytes,
                       int64_t fours, int64_t ahead, int32_t* sums) {
    const auto* a = static_cast<const char*>(codes);
    const auto* b = static_cast<const char*>(outputs);
    const bool both = rows > side;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t four = 0; four < fours; four += side, a += 4 * side, b += side * four_bytes) {
      if (ahead) {
        for (int64_t f = 0; f < side; ++f) {
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

  // Sums of up to 16 rows of unsigned codes by 64 outputs, (16, 64), at the full depth. Four sums that do not wait for one
  // another keep the unit busy, as two do not. `fours` is a multiple of 16; fours of outputs lie 256 bytes apart.
  static void multiply_wide(const void* codes, int64_t stride, const void* outputs, int64_t fours, int64_t ahead,
                            int32_t* sums) {
    constexpr int64_t four_bytes = 4 * side * 4;
    const auto* a = static_cast<const char*>(codes);
    const auto* b = static_cast<const char*>(outputs);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t four = 0; four < fours; four += side, a += 4 * side, b += side * four_bytes) {
      for (int64_t line = 0; line < side * four_bytes; line += 64) _mm_prefetch(b + ahead + line, _MM_HINT_T0);
      _tile_loadd(4, a, stride);
      _tile_loadd(6, b, four_bytes);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, b + 64, four_bytes);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(6, b + 128, four_bytes);
      _tile_dpbusd(2, 4, 6);
      _tile_loadd(7, b + 192, four_bytes);
      _tile_dpbusd(3, 4, 7);
    }
    _tile_stored(0, sums, four_bytes);
    _tile_stored(1, sums + side, four_bytes);
    _tile_stored(2, sums + 2 * side, four_bytes);
    _tile_stored(3, sums + 3 * side, four_bytes);
  }

  // Adds to `sums`, rows `sums_stride` floats apart, the products of 32 rows of bfloat16, `stride` bytes apart, by 32
  // columns, the latter 16 of which lie `beside` bytes behind the former, or are left out where that is 0. Columns lie as
  // (pairs of inputs, 16, 2); a step is of 16 pairs.
  static void add(const void* rows, int64_t stride, const void* columns, int64_t beside, int64_t steps, float* sums,
                  int64_t sums_stride) {
    const auto* a = static_cast<const char*>(rows);
    const auto* b = static_cast<const char*>(columns);
    const int64_t apart = sums_stride * static_cast<int64_t>(sizeof(float));
    float* const below = sums + side * sums_stride;
    _tile_loadd(0, sums, apart);
    _tile_loadd(2, below, apart);
    if (beside) {
      _tile_loadd(1, sums + side, apart);
      _tile_loadd(3, below + side, apart);
    }
    for (int64_t step = 0; step < steps; ++step, a += 64, b += side * 64) {
      _tile_loadd(6, b, 64);
      _tile_loadd(4, a, stride);
      _tile_loadd(5, a + side * stride, stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if (!beside) continue;
      _tile_loadd(7, b + beside, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, apart);
    _tile_stored(2, below, apart);
    if (!beside) return;
    _tile_stored(1, sums + side, apart);
    _tile_stored(3, below + side, apart);
  }
};

}  // namespace
}  // namespace llmc
