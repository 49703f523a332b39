// Tiles of int8 products with AMX; few rows are multiplied as AVX-512 does it.
#pragma once

#include "avx512_amx.hpp"
#include "int8_avx512_vnni.hpp"
#include "int8_weight.hpp"
#include "unrolled.hpp"

namespace llmc {
namespace {

struct Int8Avx512Amx : Int8Avx512Vnni {
  static constexpr bool tiled = Avx512Amx::tiled;
  static constexpr int64_t depth = Avx512Amx::depth, beyond = Avx512Amx::beyond;
  // Every processor with AMX has 2 MiB of second-level cache a core.
  static constexpr int64_t block_bytes = 1 << 20;
  // From so many rows on a tile is worth it, though it is not full.
  static constexpr int64_t few = 8;
  // So many bytes of codes are fetched before they are multiplied.
  static constexpr int64_t ahead = 2 * depth * 4 * registers * lanes;
  using Session = Amx;

  // What `multiply_panel` is to do of `count` rows; behind them there are so many that the last tile is full.
  template <class Panel, class Rows>
  static void multiply(const Int8Weight& w, const Panel& panel, const Rows& rows, int64_t count) {
    constexpr int64_t wide = 2 * Amx::side, four_bytes = 4 * Panel::width;
    alignas(64) int32_t sums[wide * wide];
    static_assert(Panel::width == 4 * Amx::side, "a wide product has as many outputs as a panel");
    if (count <= Amx::side) {
      Amx::multiply_wide(rows.codes, rows.stride, panel.codes, w.fours, ahead, sums);
      return finish<Panel::width / lanes>(w, panel.base, panel.number * Panel::width, sums, rows, 0, count);
    }
    for (int64_t column = 0; column < Panel::width; column += wide) {
      const int64_t output = panel.number * Panel::width + column;
      if (output >= w.outputs) return;
      for (int64_t row = 0; row < count; row += wide) {
        const int64_t own = count - row < wide ? count - row : wide;
        // Codes of weights come from afar once, for the first rows.
        Amx::multiply<false>(rows.codes + row * rows.stride, rows.stride, own, panel.codes + 4 * column, four_bytes,
                             w.fours, row == 0 ? ahead : 0, sums);
        finish<wide / lanes>(w, panel.base + column, output, sums, rows, row, own);
      }
    }
  }

 private:
  // Scales what was summed up for `count` rows from `first` on, and `vectors` of outputs: those of a row one behind the
  // other, as they lie in memory.
  template <int vectors, class Rows>
  static void finish(const Int8Weight& w, const int32_t* base, int64_t output, const int32_t* sums, const Rows& rows,
                     int64_t first, int64_t count) {
    const int64_t left = w.outputs - output;
    Ints zero[vectors];
    Floats scale[vectors], bias[vectors];
    unrolled<vectors>([&](auto v) LLMC_INLINE {
      zero[v] = load_ints(base + v * lanes);
      scale[v] = load(w.scale + output + v * lanes), bias[v] = load(w.bias + output + v * lanes);
    });
    float* y = rows.y + first * w.outputs + output;
    for (int64_t m = 0; m < count; ++m, sums += vectors * lanes, y += w.outputs) {
      const Floats unit = splat(rows.unit[first + m]);
      unrolled<vectors>([&](auto v) LLMC_INLINE {
        const Floats whole = to_floats(add(load_ints(sums + v * lanes), zero[v]));
        if (left > v * lanes)
          Avx512Amx::store_some(y + v * lanes, fma(whole, mul(unit, scale[v]), bias[v]), left - v * lanes);
      });
    }
  }
};

}  // namespace
}  // namespace llmc
