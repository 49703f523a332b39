// The product of coded activations and an `Int8Weight`, by tiles that keep their sums in registers.
#pragma once

#include <stdint.h>

#include "int8_codes.hpp"
#include "int8_weight.hpp"
#include "kept.hpp"

#if defined(__clang__)
#define LLMC_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define LLMC_UNROLL _Pragma("GCC unroll 8")
#else
#define LLMC_UNROLL
#endif

namespace llmc {
namespace {

// So many rows are coded at a time that their codes stay in the third.
constexpr int64_t kCodesBytes = 4 << 20;
constexpr int64_t kCacheLine = 64;
// A tile that is alone with its panel fetches so many bytes ahead, from the next panel at last.
constexpr int64_t kAhead = 2048;
// Below this many products a second thread costs more than it saves.
constexpr int64_t kFewProducts = 1 << 18;
// Work is dealt out in so many parts a thread, lest one that is held up be waited for.
constexpr int64_t kParts = 4;

template <class Set>
struct Panel {
  static constexpr int width = Set::registers * Set::lanes;

  Panel(const Int8Weight& w, int64_t number, int32_t zero) : number(number), codes(w.codes + number * w.fours * width * 4) {
    // What the code of 0.0 adds to each sum is taken off before.
    for (int j = 0; j < width; ++j) base[j] = -zero * w.sums[number * width + j];
  }

  int64_t number;
  const int8_t* codes;
  int32_t base[width];
};

// Coded rows, and where their results go.
template <class Set>
struct Rows {
  const typename Set::Code* codes;
  int64_t stride;
  const float* unit;
  float* y;
};

// What a tile fetches while it is computed: a part of the memory from `at` on with every two fours.
struct Ahead {
  const int8_t* at;
  int64_t step;
};

// M rows of one panel. `Doubled`: two products are added in 16 bits, and spills after all others.
template <class Set, int M, bool Doubled>
void tile(const Int8Weight& w, const Panel<Set>& panel, const Rows<Set>& rows, Ahead ahead) {
  constexpr int N = Set::registers, width = Panel<Set>::width;
  typename Set::Ints sums[M][N];
  LLMC_UNROLL
  for (int m = 0; m < M; ++m) {
    LLMC_UNROLL
    for (int n = 0; n < N; ++n) sums[m][n] = Set::load_ints(panel.base + n * Set::lanes);
  }
  const int8_t* codes = panel.codes;
  const typename Set::Code* a = rows.codes;
  for (int64_t four = 0; four < w.fours; four += 2, codes += width * 8, a += 8, ahead.at += ahead.step) {
    for (int64_t line = 0; line < ahead.step; line += kCacheLine) Set::prefetch(ahead.at + line);
    LLMC_UNROLL
    for (int m = 0; m < M; ++m) {
      const auto first = Set::four_codes(a + m * rows.stride), second = Set::four_codes(a + m * rows.stride + 4);
      LLMC_UNROLL
      for (int n = 0; n < N; ++n) {
        const auto one = Set::load_codes(codes + n * Set::lanes * 4);
        const auto two = Set::load_codes(codes + (n * Set::lanes + width) * 4);
        sums[m][n] = Doubled ? Set::dot_twice(sums[m][n], first, one, second, two)
                             : Set::dot(Set::dot(sums[m][n], first, one), second, two);
      }
    }
  }
  for (int64_t s = w.spills[panel.number]; Doubled && s < w.spills[panel.number + 1]; ++s) {
    LLMC_UNROLL
    for (int m = 0; m < M; ++m) {
      const auto own = Set::four_codes(rows.codes + m * rows.stride + 4 * w.spill_four[s]);
      LLMC_UNROLL
      for (int n = 0; n < N; ++n)
        sums[m][n] = Set::dot(sums[m][n], own, Set::load_codes(w.spill_codes + (s * width + n * Set::lanes) * 4));
    }
  }
  const int64_t output = panel.number * width, left = w.outputs - output;
  LLMC_UNROLL
  for (int m = 0; m < M; ++m) {
    const auto unit = Set::splat(rows.unit[m]);
    float* const y = rows.y + m * w.outputs + output;
    float edge[width];
    float* const to = left < width ? edge : y;
    LLMC_UNROLL
    for (int n = 0; n < N; ++n) {
      const int64_t at = output + n * Set::lanes;
      const auto scale = Set::mul(unit, Set::load(w.scale + at));
      Set::store(to + n * Set::lanes, Set::fma(Set::to_floats(sums[m][n]), scale, Set::load(w.bias + at)));
    }
    for (int64_t j = 0; left < width && j < left; ++j) y[j] = edge[j];
  }
}

template <class Set, int M = Set::rows>
void tile_of(int64_t count, bool doubled, const Int8Weight& w, const Panel<Set>& panel, const Rows<Set>& rows,
             Ahead ahead) {
  if constexpr (M > 1) {
    if (count < M) return tile_of<Set, M - 1>(count, doubled, w, panel, rows, ahead);
  }
  // Sets that sum in 32 bits at once have one way only.
  if constexpr (Set::sums_in_16_bits) {
    if (!doubled) return tile<Set, M, false>(w, panel, rows, ahead);
  }
  tile<Set, M, true>(w, panel, rows, ahead);
}

// Multiplies coded rows by one panel, in tiles as equal as may be. Each fetches its share of the next panel.
template <class Set>
void multiply_panel(const Int8Weight& w, int64_t number, int32_t zero, Rows<Set> rows, int64_t count) {
  const Panel<Set> panel(w, number, zero);
  if constexpr (Set::tiled) {
    if (count >= Set::few) return Set::multiply(w, panel, rows, count);
  }
  const int64_t tiles = (count + Set::rows - 1) / Set::rows, panel_bytes = w.fours * Panel<Set>::width * 4;
  const int8_t* const next = panel.codes + (number + 1 < w.panels ? panel_bytes : 0);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t begin = t * count / tiles, end = (t + 1) * count / tiles;
    const Ahead ahead{tiles == 1 ? panel.codes + kAhead : next + t * panel_bytes / tiles,
                      2 * panel_bytes / tiles / w.fours};
    const Rows<Set> own{rows.codes + begin * rows.stride, rows.stride, rows.unit + begin, rows.y + begin * w.outputs};
    tile_of<Set>(end - begin, w.doubled[number] != 0, w, panel, own, ahead);
  }
}

// The y (rows, outputs) of each product of float32 x (rows, inputs); all have the same inputs. Throws NoMemory.
template <class Set>
void multiply_int8(const Int8Product* products, int64_t count, const float* x, int64_t rows, Coding coding,
                   int64_t threads) {
  using Code = typename Set::Code;
  const int64_t inputs = products[0].weight->inputs, fours = products[0].weight->fours;
  int64_t panels = 0, outputs = 0;
  for (int64_t p = 0; p < count; ++p) panels += products[p].weight->panels, outputs += products[p].weight->outputs;
  if (coding.grain == Grain::tensor) find_range<Set>(x, rows * inputs, threads, &coding);
  if (coding.grain == Grain::token) coding.zero = (coding.levels + 1) / 2;
  // A stride in whole cache lines, but no multiple of 1024: rows of a tile would fall on the same places of the cache.
  const int64_t lines = (fours * 4 + kCacheLine - 1) / kCacheLine;
  const int64_t stride = kCacheLine * (lines % 16 ? lines : lines + 1);
  const int64_t most = kCodesBytes / stride > Set::rows ? kCodesBytes / stride : Set::rows;
  const int64_t chunk = rows < most ? rows : most;
  const int64_t units = chunk * static_cast<int64_t>(sizeof(float));
  auto* const codes = static_cast<Code*>(kept_memory(Kept::codes, (chunk + Set::beyond) * stride + units));
  auto* const unit = reinterpret_cast<float*>(codes + (chunk + Set::beyond) * stride);
  for (int64_t done = 0; done < rows; done += chunk) {
    const int64_t own_rows = rows - done < chunk ? rows - done : chunk;
    const float* const from = x + done * inputs;
    parallel_for(own_rows, 1 + kFewFloats / inputs, threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        unit[row] = code_int8_row<Set>(from + row * inputs, inputs, coding, codes + row * stride);
    });
    // The codes of a block of rows stay in the second-level cache while all panels pass by.
    const int64_t fit = Set::block_bytes / stride > Set::rows ? Set::block_bytes / stride : Set::rows;
    const int64_t blocks = (own_rows + fit - 1) / fit, items = blocks * panels;
    const int64_t parts = own_rows * inputs * outputs < kFewProducts ? 1 : kParts * threads;
    parallel_for(items, (items + parts - 1) / parts, threads, [&](int64_t begin, int64_t end) {
      const typename Set::Session session;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t block = item / panels, first = block * own_rows / blocks, past = (block + 1) * own_rows / blocks;
        const Int8Product* product = products;
        int64_t panel = item % panels;
        for (; panel >= product->weight->panels; ++product) panel -= product->weight->panels;
        const Int8Weight& w = *product->weight;
        const Rows<Set> own{codes + first * stride, stride, unit + first, product->y + (done + first) * w.outputs};
        multiply_panel<Set>(w, panel, coding.zero - Set::code_shift, own, past - first);
      }
    });
  }
}

}  // namespace
}  // namespace llmc
