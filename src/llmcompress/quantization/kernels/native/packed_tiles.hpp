// Many rows of activations by a packed matrix, for sets that multiply tiles of bfloat16: weights are decoded with their
// scales, so that sums run over whole rows, and small groups cost little more than large ones. Codes of activations are
// whole in bfloat16; weights are rounded to 8 significant bits, a tenth of what coding the activations costs.
//
// A tile takes weights as they lie, a row for each output, and activations in pairs of inputs. A vector of 32 words of
// codes, `per` codes in each, gives `per` vectors of 32 weights: the first codes of all words, then the second ones.
// Activations are arranged alike. Sixteen words never leave their group, so a table of the group's sixteen weights, made
// once, is all that a code has to be looked up in.
#pragma once

#include "activations.hpp"
#include "packed_matrix.hpp"
#include "parallel.hpp"
#include "scales.hpp"
#include "scratch.hpp"
#include "unpack.hpp"
#include "unrolled.hpp"

namespace llmc {
namespace {

// Inputs whose weights are decoded at a time: they stay in the nearest cache while all rows of activations pass by.
constexpr int64_t kTileInputs = 256;
// Weights of a tile's row; words of a vector of codes.
constexpr int kWords = 32;

// How a matrix falls into words: of codes of 4 and 2 bits as they are, of others unpacked to bytes before.
struct Words {
  int per;        // codes in each; 0 where sixteen words would leave their group
  bool unpacked;

  explicit Words(const PackedMatrix& a) : per(0), unpacked(false) {
    const auto fits = [&](int codes) { return a.groups == 1 || a.size % (16 * codes) == 0; };
    if (a.bits == 4) per = fits(2) ? 2 : 0;
    if (a.bits == 2) per = fits(8) ? 8 : fits(4) ? 4 : 0;
    unpacked = !per;
    if (unpacked) per = fits(1) ? 1 : 0;
  }
};

// The weights of vectors [begin, end) of a row, in bfloat16.
template <class Set, int width, int per, bool few>
void decode_row(const PackedMatrix& a, const uint8_t* codes, const float* sixteen, const float* scale,
                const float* middle, int64_t begin, int64_t end, uint16_t* to) {
  const auto levels = Set::load(sixteen);
  const auto halves = Set::halves();
  const int64_t in_group = a.groups == 1 ? 2 * end : a.size / (16 * per);
  int64_t group = 2 * begin / in_group, left = in_group - 2 * begin % in_group;
  constexpr int64_t bytes = kWords * per * width / 8;
  const uint8_t* const next = codes + 2 * Set::Session::side * a.code_bytes;
  for (int64_t v = begin; v < end; ++v) {
    Set::prefetch_far(next + v * bytes);
    typename Set::Floats factor[2], zero[2];
    for (int h = 0; h < 2; ++h) {
      factor[h] = Set::splat(scale[group]);
      zero[h] = a.levels ? Set::zero_floats() : Set::splat(middle[group]);
      if (--left == 0) left = in_group, ++group;
    }
    if constexpr (few) {
      const auto table = Set::pairs(Set::mul(Set::sub(levels, zero[0]), factor[0]),
                                    Set::mul(Set::sub(levels, zero[1]), factor[1]));
      const auto words = per * width == 16 ? Set::load(static_cast<const void*>(codes + v * 64))
                                           : Set::load_wide(codes + v * 32);
      unrolled<per>([&](auto n) LLMC_INLINE {
        Set::store(static_cast<void*>(to + ((v - begin) * per + n) * kWords),
                   Set::template look_up_words<width * decltype(n)::value>(table, words, halves));
      });
    } else {
      const auto half = [&](int h) LLMC_INLINE {
        return Set::mul(Set::sub(Set::load_bytes(codes + v * 32 + h * 16), zero[h]), factor[h]);
      };
      Set::store(static_cast<void*>(to + (v - begin) * kWords), Set::pairs(half(0), half(1)));
    }
  }
}

// Arranges the codes of a row of activations in bfloat16; the rest of `to` is zero already.
inline void arrange_bfloats(const int8_t* codes, int64_t columns, int per, uint16_t* to) {
  const auto whole = [](int8_t code) {
    const auto value = static_cast<float>(code);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return static_cast<uint16_t>(bits >> 16);
  };
  const int64_t vector = kWords * per;
  int64_t k = 0;
  for (; k + vector <= columns; k += vector)
    for (int n = 0; n < per; ++n)
      for (int w = 0; w < kWords; ++w) to[k + n * kWords + w] = whole(codes[k + w * per + n]);
  for (int64_t rest = 0; k + rest < columns; ++rest) to[k + rest % per * kWords + rest / per] = whole(codes[k + rest]);
}

// Rows of activations as tiles take them: (blocks of 16 rows, pairs of inputs, 16 rows, 2).
template <class Set>
class TiledRows {
 public:
  static constexpr int64_t side = Set::Session::side;

  TiledRows(const PackedMatrix& a, int per, int64_t steps, const float* x, int64_t rows, int64_t threads)
      : blocks_((rows + side - 1) / side), bytes_(steps * side * 64), codes_(blocks_ * bytes_), unit_(blocks_ * side) {
    parallel_for(blocks_, 1 + kFewFloats / (side * a.columns + 1), threads, [&](int64_t begin, int64_t end) {
      // Longer than a row by one cache line: else rows fall on the same places of the cache.
      const int64_t stride = steps * kWords + kWords;
      Scratch<int8_t> linear(a.columns);
      Scratch<uint16_t> own(side * stride);
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t m = 0; m < side && block * side + m < rows; ++m) {
          const int64_t row = block * side + m;
          unit_[row] = code_row<Set>(x + row * a.columns, a.columns, Set::byte_limit, linear);
          arrange_bfloats(linear, a.columns, per, own + m * stride);
        }
        for (int64_t s = 0; s < steps; ++s) {
          typename Set::Ints turned[side];
          Set::transpose(reinterpret_cast<const uint8_t*>(own + s * kWords), stride * 2, turned);
          uint8_t* const to = codes_ + block * bytes_ + s * side * 64;
          for (int i = 0; i < side; ++i) Set::store(static_cast<void*>(to + i * 64), turned[i]);
        }
      }
    });
  }

  const uint8_t* block(int64_t number) const { return codes_ + number * bytes_; }
  const float* unit() const { return unit_; }
  int64_t blocks() const { return blocks_; }
  int64_t block_bytes() const { return bytes_; }

 private:
  int64_t blocks_, bytes_;
  Scratch<uint8_t> codes_;
  Scratch<float> unit_;
};

// Writes 16 outputs from `first` on, of the rows of a block: totals are (outputs, rows), a row `stride` floats long.
template <class Set>
void finish_tile(const PackedMatrix& a, const float* totals, int64_t stride, int64_t rows, const float* unit,
                 const float* bias, float* y, int64_t first) {
  typename Set::Ints turned[Set::lanes];
  Set::transpose(reinterpret_cast<const uint8_t*>(totals), stride * sizeof(float), turned);
  const int64_t left = a.rows - first;
  const auto added = bias ? Set::load_some(bias + first, left) : Set::zero_floats();
  for (int64_t m = 0; m < rows; ++m)
    Set::store_some(y + m * a.rows + first, Set::fma(Set::as_floats(turned[m]), Set::splat(unit[m]), added), left);
}

template <class Set, int width, int per, bool few>
void by_tiles(const PackedMatrix& a, bool unpacked, const float* x, int64_t rows, const float* bias, float* y,
              int64_t threads) {
  using Tiles = typename Set::Session;
  constexpr int64_t side = Tiles::side, outputs = 2 * side, bytes = kWords * per * width / 8;
  const int64_t vectors = (a.columns + kWords * per - 1) / (kWords * per), block = kTileInputs / (kWords * per);
  const TiledRows<Set> input(a, per, vectors * per, x, rows, threads);
  const int64_t panels = (a.rows + outputs - 1) / outputs, size = a.rows * a.code_bytes, read = vectors * bytes;
  // Of codes of 2 bits the next one is read too, and must not count.
  float sixteen[16];
  for (int i = 0; i < 16; ++i) sixteen[i] = a.levels ? a.levels[i] : static_cast<float>(width == 2 ? i & 3 : i);
  parallel_for(panels, share(panels, threads, 1), threads, [&](int64_t begin, int64_t end) {
    RowGrid<Set> grid(a, outputs, 0);
    // Of rows that are unpacked, or behind which there is nothing to read.
    Scratch<uint8_t> own(outputs * (read + 8));
    // Longer by one cache line: else rows fall on the same places of the cache.
    constexpr int64_t stride = kTileInputs + kWords;
    Scratch<uint16_t> weights(outputs * stride);
    const int64_t length = input.blocks() * side + side;
    Scratch<float> totals(outputs * length);
    const uint8_t* codes[outputs] = {};
    const Tiles tiles;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t first = p * outputs, count = first + outputs < a.rows ? outputs : a.rows - first;
      for (int64_t r = 0; r < count; ++r) {
        const int64_t at = (first + r) * a.code_bytes;
        const bool whole = !unpacked && at + read <= size;
        codes[r] = whole ? a.codes + at : own + r * (read + 8);
        if (unpacked)
          unpack_row<Set>(a.codes + at, a.bits, a.columns, own + r * (read + 8));
        else if (!whole)
          memcpy(own + r * (read + 8), a.codes + at, size - at);
        grid.load(a, first + r, static_cast<int>(r));
      }
      memset(totals, 0, outputs * length * sizeof(float));
      for (int64_t v = 0; v < vectors; v += block) {
        const int64_t stop = v + block < vectors ? v + block : vectors;
        for (int64_t r = 0; r < count; ++r)
          decode_row<Set, width, per, few>(a, codes[r], sixteen, grid.scale_of(r), grid.middle_of(r), v, stop,
                                           weights + r * stride);
        for (int64_t b = 0; b < input.blocks(); b += 2) {
          const int64_t beside = b + 1 < input.blocks() ? input.block_bytes() : 0;
          Tiles::add(weights, stride * 2, input.block(b) + v * per * side * 64, beside, (stop - v) * per,
                     totals + b * side, length);
        }
      }
      for (int64_t b = 0; b < input.blocks(); ++b) {
        const int64_t m = b * side, left = rows - m < side ? rows - m : side;
        for (int64_t r = 0; r < count; r += side)
          finish_tile<Set>(a, totals + r * length + m, length, left, input.unit() + m, bias, y + m * a.rows, first + r);
      }
    }
  });
}

// Whether tiles can multiply the matrix.
inline bool suits_tiles(const PackedMatrix& a) { return Words(a).per > 0; }

template <class Set>
void by_tiles(const PackedMatrix& a, const float* x, int64_t rows, const float* bias, float* y, int64_t threads) {
  const Words words(a);
  if (words.unpacked)
    return a.bits <= 4 ? by_tiles<Set, 8, 1, true>(a, true, x, rows, bias, y, threads)
                       : by_tiles<Set, 8, 1, false>(a, true, x, rows, bias, y, threads);
  if (a.bits == 4) return by_tiles<Set, 4, 2, true>(a, false, x, rows, bias, y, threads);
  return words.per == 8 ? by_tiles<Set, 2, 8, true>(a, false, x, rows, bias, y, threads)
                        : by_tiles<Set, 2, 4, true>(a, false, x, rows, bias, y, threads);
}

}  // namespace
}  // namespace llmc
