// Many rows of activations by a packed matrix: the codes of some outputs are unpacked once, into a panel, and meet all
// rows from there. Takes any number of bits, groups of any size, and rows of any length.
//
// A panel holds two vectors of outputs. Inputs are walked in spans, none of which leaves its group; a span is cut into
// quads of inputs, filled up with zeros. A quad of a vector of outputs is one vector of codes: four bytes for each
// output. So a quad of activations, repeated in all lanes, meets it, and no lanes are ever added to one another.
//
// Four bytes of codes of 8, 4 or 2 bits are moved to their place as they are, and give as many quads as a byte has codes
// (`fields`): the first codes of the four bytes, then the second ones. Activations are arranged alike. Others are
// unpacked to bytes before.
#pragma once

#include "activations.hpp"
#include "packed_matrix.hpp"
#include "scales.hpp"
#include "scratch.hpp"

namespace llmc {
namespace {

// The longest span; longer groups have several.
constexpr int64_t kLongest = 512;
// Quads that are unpacked at a time: with as many of the activations they stay in the nearest cache.
constexpr int64_t kQuads = 128;

struct Spans {
  int64_t columns, size, span, in_group, quads, count;

  explicit Spans(const PackedMatrix& a) : columns(a.columns), size(a.groups > 1 ? a.size : a.columns) {
    span = size < kLongest ? size : kLongest;
    in_group = (size + span - 1) / span;
    quads = (span + 3) / 4;
    count = 0;
    for (int64_t left = columns; left > 0; left -= size) count += ((left < size ? left : size) + span - 1) / span;
  }
  int64_t group(int64_t i) const { return i / in_group; }
  int64_t begin(int64_t i) const { return i / in_group * size + i % in_group * span; }
  int64_t length(int64_t i) const {
    const int64_t start = begin(i), stop = (group(i) + 1) * size, end = stop < columns ? stop : columns;
    return end - start < span ? end - start : span;
  }
  // Numbers of a row of activations, in quads. Bytes of them are an odd number of cache lines: rows of a tile would
  // fall on the same places of the cache otherwise.
  int64_t stride() const { return ((count * quads * 4 + 63) / 64 | 1) * 64; }
};

// Quads that four bytes of codes give; 0 where codes are unpacked before.
inline int fields_of(const PackedMatrix& a, const Spans& spans) {
  const int fields = a.bits == 8 ? 1 : a.bits == 4 ? 2 : a.bits == 2 ? 4 : 0;
  // Neither spans nor groups may begin within four bytes.
  const bool whole = fields && spans.span % (4 * fields) == 0 && (a.groups == 1 || spans.size % (4 * fields) == 0);
  return whole ? fields : 0;
}

// The bytes of eight inputs: the even ones, then the odd ones.
inline uint64_t evens_first(uint64_t word) {
  const auto every_other = [](uint64_t x) {
    x &= 0x00FF00FF00FF00FF;
    x = (x | x >> 8) & 0x0000FFFF0000FFFF;
    return (x | x >> 16) & 0xFFFFFFFF;
  };
  return every_other(word) | every_other(word >> 8) << 32;
}

// Moves the codes of a span to their quads: those that share four bytes of codes of the matrix with their like.
template <int fields>
void arrange_span(const int8_t* from, int64_t length, int8_t* quads) {
  constexpr int64_t block = 4 * fields;
  int64_t k = 0;
  for (; k + block <= length; k += block) {
    if constexpr (fields == 2) {
      uint64_t word;
      memcpy(&word, from + k, sizeof word);
      word = evens_first(word);
      memcpy(quads + k, &word, sizeof word);
    } else {
      for (int f = 0; f < fields; ++f)
        for (int i = 0; i < 4; ++i) quads[k + f * 4 + i] = from[k + i * fields + f];
    }
  }
  for (int64_t rest = 0; k + rest < length; ++rest) quads[k + rest % fields * 4 + rest / fields] = from[k + rest];
}

// Moves the codes of a row of activations to their quads; the rest of `to` is zero already.
inline void arrange_codes(const Spans& spans, int fields, const int8_t* from, int8_t* to) {
  for (int64_t i = 0; i < spans.count; ++i) {
    const int8_t* own = from + spans.begin(i);
    int8_t* quads = to + i * spans.quads * 4;
    const int64_t length = spans.length(i);
    if (fields == 4)
      arrange_span<4>(own, length, quads);
    else if (fields == 2)
      arrange_span<2>(own, length, quads);
    else
      memcpy(quads, own, length);
  }
}

// Moves a row of activations that are no codes to its spans, in their own order.
inline void arrange_floats(const Spans& spans, const float* from, float* to) {
  for (int64_t i = 0; i < spans.count; ++i)
    memcpy(to + i * spans.quads * 4, from + spans.begin(i), spans.length(i) * sizeof(float));
}

// The outputs of a panel, unpacked.
template <class Set>
struct CodePanel {
  static constexpr int outputs = 2 * Set::lanes;
  // Quads behind the last one that are written too.
  static constexpr int64_t beyond = 4 * Set::lanes;

  const PackedMatrix& a;
  const uint8_t* steps;  // what codes are replaced by, or null
  const Spans spans;
  const int fields;
  const int64_t stride;  // of `rows`
  Scratch<uint8_t> rows;       // codes, unpacked unless there are `fields`
  const uint8_t* source;       // they, or the matrix itself
  int64_t source_stride;
  Scratch<float> scale, middle;  // (groups, outputs), and room for a vector of groups more
  Scratch<uint8_t> quads;  // (quads, outputs, 4) of a block of spans
  RowGrid<Set> grid;

  CodePanel(const PackedMatrix& matrix, const uint8_t* replaced, int bias)
      : a(matrix), steps(replaced), spans(matrix), fields(fields_of(matrix, spans)), stride(padded(matrix.columns)),
        rows(stride * outputs), source(rows), source_stride(stride), scale((a.groups + Set::lanes) * outputs),
        middle((a.groups + Set::lanes) * outputs), quads((kQuads + spans.quads + beyond) * outputs * 4),
        grid(matrix, outputs, bias) {
    turn_grid(grid.middle_of(0), middle);
  }

  // Behind a row there is room for what is read beyond its last quad.
  static int64_t padded(int64_t columns) { return (columns + 8 * Set::lanes + 63) / 64 * 64; }

  // How many spans are unpacked at a time.
  int64_t block() const { return spans.quads < kQuads ? kQuads / spans.quads : 1; }

  // Reads the outputs from `first` on; those behind the last one stay what they were, and nobody asks for them.
  void load(int64_t first) {
    // What is read beyond the last row has to be there.
    const int64_t beyond = stride - a.columns;
    const bool in_place = fields && (first + outputs) * a.code_bytes + beyond <= a.rows * a.code_bytes;
    source = in_place ? a.codes + first * a.code_bytes : rows;
    source_stride = in_place ? a.code_bytes : stride;
    for (int r = 0; r < outputs && first + r < a.rows; ++r) {
      const uint8_t* codes = a.codes + (first + r) * a.code_bytes;
      if (!fields)
        unpack_row<Set>(codes, a.bits, a.columns, rows + r * stride);
      else if (!in_place)
        memcpy(rows + r * stride, codes, a.code_bytes);
      grid.load(a, first + r, r);
    }
    turn_grid(grid.scale_of(0), scale);
    if (a.zero) turn_grid(grid.middle_of(0), middle);
  }

  // Calls f(each, quad, half, word) for spans [begin, end): words hold four bytes of codes of one vector of outputs, those
  // of as many quads as a byte has codes (`each`, a constant), the first of which is `quad`, counted from `begin` on.
  // Behind the end of a span there are words of what follows, `beyond` quads at most.
  template <class F>
  LLMC_INLINED void each_word(int64_t begin, int64_t end, F f) const {
    const bool together = spans.span % 4 == 0 && spans.size % spans.span == 0;
    for (int64_t i = begin; i < end; i = together ? end : i + 1) {
      const int64_t column = spans.begin(i);
      const int64_t inputs = together ? spans.begin(end - 1) + spans.length(end - 1) - column : spans.length(i);
      const int64_t count = (inputs + 3) / 4, to = (i - begin) * spans.quads;
      if (fields == 4)
        turn<4>(column, count, to, f);
      else if (fields == 2)
        turn<2>(column, count, to, f);
      else
        turn<1>(column, count, to, f);
    }
  }

  // Brings spans [begin, end) into `quads`. What lies behind the end of a span meets zeros.
  void transpose(int64_t begin, int64_t end) {
    const auto table = steps ? Set::load_table(steps) : Set::zero_ints();
    each_word(begin, end, [&](auto each, int64_t quad, int half, typename Set::Ints word) LLMC_INLINE {
      constexpr int codes = decltype(each)::value;
      for (int f = 0; f < codes; ++f) {
        auto own = Set::template byte_field<8 / codes>(word, f);
        if (steps) own = Set::look_up(table, own);
        Set::store(static_cast<void*>(quads + ((quad + f) * 2 + half) * Set::lanes * 4), own);
      }
    });
  }

 private:
  // From (outputs, groups) to (groups, outputs).
  void turn_grid(const float* from, float* to) {
    const int64_t apart = grid.scale_of(1) - grid.scale_of(0);
    for (int64_t g = 0; g < a.groups; g += Set::lanes) {
      for (int64_t h = 0; h < outputs; h += Set::lanes) {
        typename Set::Ints turned[Set::lanes];
        Set::transpose(reinterpret_cast<const uint8_t*>(from + h * apart + g), apart * 4, turned);
        for (int i = 0; i < Set::lanes; ++i) Set::store(static_cast<void*>(to + (g + i) * outputs + h), turned[i]);
      }
    }
  }

  template <int each, class F>
  LLMC_INLINED void turn(int64_t column, int64_t count, int64_t to, F f) const {
    for (int64_t q = 0; q < count; q += each * Set::lanes) {
      for (int half = 0; half < 2; ++half) {
        typename Set::Ints turned[Set::lanes];
        const uint8_t* const from = source + half * Set::lanes * source_stride + (column + q * 4) / each;
        // Where they are read in place, those of the next panel are fetched.
        for (int i = 0; i < Set::lanes; ++i) Set::prefetch(from + (outputs + i) * source_stride);
        Set::transpose(from, source_stride, turned);
        for (int i = 0; i < Set::lanes; ++i)
          f(std::integral_constant<int, each>(), to + q + i * each, half, turned[i]);
      }
    }
  }
};

// Writes the outputs of a panel from `first` on.
template <class Set>
void finish(const PackedMatrix& a, const float* totals, int64_t rows, const float* unit, const float* bias, float* y,
            int64_t first) {
  constexpr int outputs = CodePanel<Set>::outputs;
  const int64_t count = first + outputs < a.rows ? outputs : a.rows - first;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t r = 0; r < count; ++r)
      y[m * a.rows + first + r] = totals[m * outputs + r] * (unit ? unit[m] : 1.0F) + (bias ? bias[first + r] : 0.0F);
}

// -- in whole numbers

// Rows of activations as codes in quads.
struct CodedRows {
  const int8_t* codes;  // (rows, stride)
  const float* sums;    // (rows, spans)
  const float* unit;
  int64_t stride, spans;
};

// Adds spans [begin, end) to `totals` (rows, outputs) of `rows` rows of activations from m on.
template <class Set, bool large, int rows>
void add_spans(const CodePanel<Set>& panel, const CodedRows& x, int64_t m0, int64_t begin, int64_t end, float* totals) {
  // Quads whose products a 16-bit sum holds.
  constexpr int64_t depth = large ? 1 : 8;
  constexpr int lanes = Set::lanes;
  const Spans& spans = panel.spans;
  const uint8_t* codes = panel.quads;
  const int8_t* other[rows];
  for (int m = 0; m < rows; ++m) other[m] = x.codes + (m0 + m) * x.stride + begin * spans.quads * 4;
  for (int64_t i = begin; i < end; ++i) {
    typename Set::Ints sums[rows][2];
    for (int m = 0; m < rows; ++m) sums[m][0] = sums[m][1] = Set::zero_ints();
    for (int64_t q = 0; q < spans.quads;) {
      typename Set::Partial parts[rows][2];
      for (int m = 0; m < rows; ++m) parts[m][0] = parts[m][1] = Set::zero_partial();
      for (const int64_t stop = q + depth < spans.quads ? q + depth : spans.quads; q < stop; ++q) {
        const auto low = Set::load(static_cast<const void*>(codes));
        const auto high = Set::load(static_cast<const void*>(codes + 4 * lanes));
        codes += 8 * lanes;
        for (int m = 0; m < rows; ++m) {
          const auto four = Set::splat_four(other[m] + q * 4);
          parts[m][0] = Set::template mac<large>(parts[m][0], low, four);
          parts[m][1] = Set::template mac<large>(parts[m][1], high, four);
        }
      }
      for (int m = 0; m < rows; ++m)
        for (int h = 0; h < 2; ++h) sums[m][h] = Set::fold(sums[m][h], parts[m][h]);
    }
    const int64_t at = spans.group(i) * CodePanel<Set>::outputs;
    for (int m = 0; m < rows; ++m) {
      other[m] += spans.quads * 4;
      const auto all = Set::splat(x.sums[(m0 + m) * x.spans + i]);
      for (int h = 0; h < 2; ++h) {
        float* total = totals + (m0 + m) * CodePanel<Set>::outputs + h * lanes;
        const auto own = Set::fnma(Set::load(panel.middle + at + h * lanes), all, Set::to_floats(sums[m][h]));
        Set::store(total, Set::fma(own, Set::load(panel.scale + at + h * lanes), Set::load(total)));
      }
    }
  }
}

// The same of all `rows` rows of activations, by tiles, which take spans whole.
template <class Set>
void add_spans_by_tiles(const CodePanel<Set>& panel, const CodedRows& x, int64_t rows, int64_t begin, int64_t end,
                        float* totals) {
  constexpr int64_t outputs = CodePanel<Set>::outputs, wide = 2 * Set::Session::side;
  static_assert(outputs == wide, "a product has as many outputs as a panel");
  // So many spans are summed up before their sums are scaled: a total is read and written once for all of them.
  constexpr int64_t together = 4;
  alignas(64) int32_t sums[together][wide * wide];
  const int64_t quads = panel.spans.quads;
  for (int64_t m0 = 0; m0 < rows; m0 += wide) {
    const int64_t own = rows - m0 < wide ? rows - m0 : wide;
    const uint8_t* codes = panel.quads;
    const auto sum = [&](int64_t i, int32_t* to) {
      Set::Session::template multiply<true>(x.codes + m0 * x.stride + i * quads * 4, x.stride, own, codes, outputs * 4,
                                            quads, 0, to);
      codes += quads * outputs * 4;
    };
    const auto scale_all = [&](auto count, int64_t i) {
      constexpr int spans = decltype(count)::value;
      for (int64_t h = 0; h < outputs; h += Set::lanes) {
        typename Set::Floats scale[spans], middle[spans];
        for (int s = 0; s < spans; ++s) {
          const int64_t at = panel.spans.group(i + s) * outputs + h;
          scale[s] = Set::load(panel.scale + at), middle[s] = Set::load(panel.middle + at);
        }
        for (int64_t m = 0; m < own; ++m) {
          float* const total = totals + (m0 + m) * outputs + h;
          auto all = Set::load(total);
          for (int s = 0; s < spans; ++s) {
            const auto whole = Set::to_floats(Set::load(static_cast<const void*>(sums[s] + m * wide + h)));
            all = Set::fma(Set::fnma(middle[s], Set::splat(x.sums[(m0 + m) * x.spans + i + s]), whole), scale[s], all);
          }
          Set::store(total, all);
        }
      }
    };
    int64_t i = begin;
    for (; i + together <= end; i += together) {
      for (int s = 0; s < together; ++s) sum(i + s, sums[s]);
      scale_all(std::integral_constant<int, together>(), i);
    }
    for (; i < end; ++i) {
      sum(i, sums[0]);
      scale_all(std::integral_constant<int, 1>(), i);
    }
  }
}

// -- in floats

// The weights of a block of spans, (inputs, outputs), without a rounding.
template <class Set>
void decode(const CodePanel<Set>& panel, int64_t begin, int64_t end, float* weights) {
  constexpr int lanes = Set::lanes;
  const PackedMatrix& a = panel.a;
  const uint8_t* codes = panel.quads;
  // Inputs that four bytes of codes give, and those of a quad lie `apart`.
  const int64_t apart = panel.fields > 1 ? panel.fields : 1, quads = panel.spans.quads;
  for (int64_t i = begin; i < end; ++i, weights += quads * 8 * lanes) {
    const int64_t at = panel.spans.group(i) * CodePanel<Set>::outputs;
    for (int64_t q = 0; q < quads; ++q) {
      float* const first = weights + (q / apart * 4 * apart + q % apart) * 2 * lanes;
      for (int h = 0; h < 2; ++h, codes += 4 * lanes) {
        const auto four = Set::load(static_cast<const void*>(codes));
        const auto scale = Set::load(panel.scale + at + h * lanes), middle = Set::load(panel.middle + at + h * lanes);
        for (int j = 0; j < 4; ++j) {
          const auto code = Set::template lane_field<8>(four, j);
          const auto step = a.levels ? Set::look_up(a.levels, code) : Set::sub(Set::to_floats(code), middle);
          Set::store(first + (j * apart * 2 + h) * lanes, Set::mul(step, scale));
        }
      }
    }
  }
}

// Adds `count` inputs to `totals` (rows, outputs) of `rows` rows of activations.
template <class Set, int rows>
void add_inputs(const float* weights, const float* x, int64_t stride, int64_t count, float* totals) {
  constexpr int lanes = Set::lanes;
  typename Set::Floats sums[rows][2];
  for (int m = 0; m < rows; ++m)
    for (int h = 0; h < 2; ++h) sums[m][h] = Set::zero_floats();
  for (int64_t k = 0; k < count; ++k, weights += 2 * lanes) {
    const auto low = Set::load(weights), high = Set::load(weights + lanes);
    for (int m = 0; m < rows; ++m) {
      const auto one = Set::splat(x[m * stride + k]);
      sums[m][0] = Set::fma(low, one, sums[m][0]);
      sums[m][1] = Set::fma(high, one, sums[m][1]);
    }
  }
  for (int m = 0; m < rows; ++m)
    for (int h = 0; h < 2; ++h) {
      float* const total = totals + (m * 2 + h) * lanes;
      Set::store(total, Set::fma(sums[m][h], Set::splat(1), Set::load(total)));
    }
}

}  // namespace
}  // namespace llmc
