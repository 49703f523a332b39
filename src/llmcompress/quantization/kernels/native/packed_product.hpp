// Products with a packed matrix: which way, and the share of each thread.
#pragma once

#include <type_traits>

#include "packed_panels.hpp"
#include "packed_rows.hpp"
#include "packed_tiles.hpp"
#include "parallel.hpp"

namespace llmc {
namespace {

// From so many rows of activations on, unpacking to panels is the faster way.
constexpr int64_t kPanels = 12;
// Rows of activations that share what is loaded of a matrix: as many as registers hold.
constexpr int kTile = 4;
// Of activations that pass by panels together, and the fewest rows of them for which panels are unpacked.
constexpr int64_t kPanelBytes = 1 << 20, kLeastRows = 64;
// Products of weights and activations, below which there is one thread.
constexpr int64_t kLittle = 1 << 17;

// Calls f with the number of rows of each tile as a constant, and its first row.
template <class F>
void in_tiles(int64_t rows, F f) {
  int64_t m = 0;
  for (; m + kTile <= rows; m += kTile) f(std::integral_constant<int, kTile>(), m);
  if (m + 2 <= rows) {
    f(std::integral_constant<int, 2>(), m);
    m += 2;
  }
  if (m < rows) f(std::integral_constant<int, 1>(), m);
}

// The largest code of an activation that meets codes of the matrix.
template <class Set>
int64_t limit_of(const PackedMatrix& a) {
  return a.bits == 8 ? Set::byte_limit : 127;
}

// -- from rows

template <class Set, int width, bool lookup>
void by_rows(const PackedMatrix& a, const float* x, int64_t rows, const float* bias, float* y, int64_t threads) {
  const Walk walk = walk_of<Set>(a);
  const bool within = walk.group == 0;
  const int64_t stride = walk.vectors * codes_a_vector<Set>(width), groups = a.groups + Set::lanes;
  Scratch<int8_t> linear(a.columns), codes(rows * stride);
  Scratch<float> sums(rows * groups), unit(rows);
  for (int64_t m = 0; m < rows; ++m) {
    unit[m] = a.unit * code_row<Set>(x + m * a.columns, a.columns, limit_of<Set>(a), linear);
    arrange<Set, width, int8_t>(linear, a.columns, codes + m * stride);
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t end = (g + 1) * a.size;
      sums[m * groups + g] = sum_of(linear + g * a.size, (end < a.columns ? end : a.columns) - g * a.size);
    }
  }
  parallel_for(a.rows, share(a.rows, threads, 16), threads, [&](int64_t begin, int64_t end) {
    in_tiles(rows, [&](auto count, int64_t m0) {
      constexpr int own = decltype(count)::value;
      CodedInput<own> input;
      for (int m = 0; m < own; ++m) {
        input.codes[m] = codes + (m0 + m) * stride;
        input.sums[m] = sums + (m0 + m) * groups;
      }
      input.unit = unit + m0;
      using Sums = WholeSums<Set, width, lookup>;
      float* to = y + m0 * a.rows;
      within ? row_products<Set, Sums, true, own>(a, input, bias, to, begin, end)
             : row_products<Set, Sums, false, own>(a, input, bias, to, begin, end);
    });
  });
}

template <class Set, int width>
void by_rows_exactly(const PackedMatrix& a, const float* x, int64_t rows, const float* bias, float* y,
                     int64_t threads) {
  const Walk walk = walk_of<Set>(a);
  const bool within = walk.group == 0;
  const int64_t stride = walk.vectors * codes_a_vector<Set>(width);
  Scratch<float> floats(rows * stride);
  for (int64_t m = 0; m < rows; ++m) arrange<Set, width, float>(x + m * a.columns, a.columns, floats + m * stride);
  parallel_for(a.rows, share(a.rows, threads, 16), threads, [&](int64_t begin, int64_t end) {
    in_tiles(rows, [&](auto count, int64_t m0) {
      constexpr int own = decltype(count)::value;
      FloatInput<own> input;
      for (int m = 0; m < own; ++m) input.floats[m] = floats + (m0 + m) * stride;
      using Sums = FloatSums<Set, width>;
      float* to = y + m0 * a.rows;
      within ? row_products<Set, Sums, true, own>(a, input, bias, to, begin, end)
             : row_products<Set, Sums, false, own>(a, input, bias, to, begin, end);
    });
  });
}

// -- from panels

// Whether spans are multiplied by tiles of whole numbers, for which groups are large enough: twice as many products at
// once as tiles of bfloat16 have, but the sums of each span are scaled. Activations are slow to arrange for 2 bits.
template <class Set>
bool whole_tiles(const PackedMatrix& a) {
  return a.bits != 2 && Spans(a).quads % Set::Session::side == 0;
}

template <class Set, bool large>
void by_panels(const PackedMatrix& a, const float* x, int64_t rows, const float* bias, float* y, int64_t threads) {
  const Spans spans(a);
  const int fields = fields_of(a, spans);
  const int64_t stride = spans.stride();
  Scratch<int8_t> codes((rows + Set::beyond) * stride);
  Scratch<float> sums(rows * spans.count), unit(rows);
  parallel_for(rows, 1 + kFewFloats / (a.columns + 1), threads, [&](int64_t begin, int64_t end) {
    Scratch<int8_t> linear(a.columns);
    for (int64_t m = begin; m < end; ++m) {
      unit[m] = a.unit * code_row<Set>(x + m * a.columns, a.columns, limit_of<Set>(a), linear);
      arrange_codes(spans, fields, linear, codes + m * stride);
      for (int64_t i = 0; i < spans.count; ++i)
        sums[m * spans.count + i] = sum_of(linear + spans.begin(i), spans.length(i));
    }
  });
  const CodedRows input{codes, sums, unit, stride, spans.count};
  bool by_tile = false;
  if constexpr (Set::tiled) by_tile = rows >= kPanels && whole_tiles<Set>(a);
  constexpr int64_t outputs = CodePanel<Set>::outputs;
  const int64_t panels = (a.rows + outputs - 1) / outputs;
  parallel_for(panels, share(panels, threads, 1), threads, [&](int64_t begin, int64_t end) {
    CodePanel<Set> panel(a, a.steps, large ? Set::bias : 0);
    Scratch<float> totals(rows * outputs);
    const typename Set::Session session;
    for (int64_t p = begin; p < end; ++p) {
      panel.load(p * outputs);
      memset(totals, 0, rows * outputs * sizeof(float));
      for (int64_t i = 0; i < spans.count; i += panel.block()) {
        const int64_t stop = i + panel.block() < spans.count ? i + panel.block() : spans.count;
        panel.transpose(i, stop);
        if constexpr (Set::tiled) {
          if (by_tile) {
            add_spans_by_tiles<Set>(panel, input, rows, i, stop, totals);
            continue;
          }
        }
        in_tiles(rows, [&](auto count, int64_t m) {
          add_spans<Set, large, decltype(count)::value>(panel, input, m, i, stop, totals);
        });
      }
      finish<Set>(a, totals, rows, unit, bias, y, p * outputs);
    }
  });
}

template <class Set>
void by_panels_exactly(const PackedMatrix& a, const float* x, int64_t rows, const float* bias, float* y,
                       int64_t threads) {
  const Spans spans(a);
  const int64_t stride = spans.stride();
  Scratch<float> floats(rows * stride);
  for (int64_t m = 0; m < rows; ++m) arrange_floats(spans, x + m * a.columns, floats + m * stride);
  constexpr int64_t outputs = CodePanel<Set>::outputs;
  const int64_t panels = (a.rows + outputs - 1) / outputs;
  parallel_for(panels, share(panels, threads, 1), threads, [&](int64_t begin, int64_t end) {
    CodePanel<Set> panel(a, nullptr, 0);
    Scratch<float> totals(rows * outputs), weights((kQuads + spans.quads) * 4 * outputs);
    for (int64_t p = begin; p < end; ++p) {
      panel.load(p * outputs);
      memset(totals, 0, rows * outputs * sizeof(float));
      for (int64_t i = 0; i < spans.count; i += panel.block()) {
        const int64_t stop = i + panel.block() < spans.count ? i + panel.block() : spans.count;
        panel.transpose(i, stop);
        decode(panel, i, stop, weights);
        const int64_t inputs = (stop - i) * spans.quads * 4;
        in_tiles(rows, [&](auto count, int64_t m) {
          const float* own = floats + m * stride + i * spans.quads * 4;
          add_inputs<Set, decltype(count)::value>(weights, own, stride, inputs, totals + m * outputs);
        });
      }
      finish<Set>(a, totals, rows, nullptr, bias, y, p * outputs);
    }
  });
}

// y (rows, a.rows) = x (rows, a.columns) . a^T + bias; with `exact` activations stay floats, else they are coded in
// 8 bits, one scale a row. Throws NoMemory.
template <class Set>
void multiply_packed(const PackedMatrix& a, const float* x, int64_t rows, const float* bias, float* y, bool exact,
                     int64_t threads) {
  if (rows == 0) return;
  // What takes some microseconds is not worth a second thread.
  if (rows * a.rows * a.columns < kLittle) threads = 1;
  // Codes that have to be unpacked are unpacked for each tile of rows anew.
  const int64_t few = width_of(a) == a.bits ? kPanels : kTile + 1;
  const bool from_rows = rows < few && suits_rows<Set>(a) && !(exact && (a.levels || a.bits == 2));
  if (!from_rows) {
    // The codes of so many rows stay in the second-level cache while all panels pass by.
    const int64_t fit = kPanelBytes / (2 * a.columns + 1), chunk = fit > kLeastRows ? fit : kLeastRows;
    if (rows > chunk) {
      for (int64_t m = 0; m < rows; m += chunk) {
        const int64_t own = rows - m < chunk ? rows - m : chunk;
        multiply_packed<Set>(a, x + m * a.columns, own, bias, y + m * a.rows, exact, threads);
      }
      return;
    }
    if (exact) return by_panels_exactly<Set>(a, x, rows, bias, y, threads);
    if constexpr (Set::tiled) {
      if (rows >= kPanels && !whole_tiles<Set>(a) && suits_tiles(a))
        return by_tiles<Set>(a, x, rows, bias, y, threads);
    }
    return a.bits > 4 || a.steps ? by_panels<Set, true>(a, x, rows, bias, y, threads)
                       : by_panels<Set, false>(a, x, rows, bias, y, threads);
  }
  if (width_of(a) == 8)
    return exact ? by_rows_exactly<Set, 8>(a, x, rows, bias, y, threads)
                 : by_rows<Set, 8, false>(a, x, rows, bias, y, threads);
  if (a.bits == 2) return by_rows<Set, 2, false>(a, x, rows, bias, y, threads);
  if (exact) return by_rows_exactly<Set, 4>(a, x, rows, bias, y, threads);
  a.steps ? by_rows<Set, 4, true>(a, x, rows, bias, y, threads)
          : by_rows<Set, 4, false>(a, x, rows, bias, y, threads);
}

}  // namespace
}  // namespace llmc
