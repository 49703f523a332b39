// Scales of a row as floats, and the codes that stand for 0.0 in its groups.
#pragma once

#include "packed_matrix.hpp"
#include "scratch.hpp"
#include "unpack.hpp"
#include "unrolled.hpp"

namespace llmc {
namespace {

// What the groups of some rows have besides codes; each row's array is longer than there are groups, and zero there.
template <class Set>
class RowGrid {
 public:
  // `bias` is taken off each middle, for sets that take it off each code.
  RowGrid(const PackedMatrix& a, int rows, int bias)
      : length_((a.groups + 3 * Set::lanes) / Set::lanes * Set::lanes), scale_(rows * length_),
        middle_(rows * length_), bias_(static_cast<float>(bias)) {
    for (int r = 0; r < rows; ++r)
      for (int64_t g = 0; g < a.groups; ++g) middle_[r * length_ + g] = a.middle - bias_;
  }

  // Reads a row of the matrix, as row r of these.
  void load(const PackedMatrix& a, int64_t row, int r);
  const float* scale_of(int r) const { return scale_ + r * length_; }
  const float* middle_of(int r) const { return middle_ + r * length_; }

 private:
  const int64_t length_;
  Scratch<float> scale_, middle_;
  const float bias_;
};

template <class Set>
LLMC_INLINED void load_scales(const PackedMatrix& a, int64_t row, float* to) {
  const int64_t groups = a.groups, at = row * groups;
  int64_t g = 0;
  if (a.scale_kind == kFloat) {
    memcpy(to, static_cast<const float*>(a.scale) + at, groups * sizeof(float));
    return;
  }
  const auto* from = static_cast<const uint16_t*>(a.scale) + at;
  if (a.scale_kind == kHalf) {
    for (; g + Set::lanes <= groups; g += Set::lanes) Set::store(to + g, Set::load_halves(from + g));
    if (g == groups) return;
    uint16_t last[Set::lanes] = {};
    float floats[Set::lanes];
    memcpy(last, from + g, (groups - g) * sizeof *last);
    Set::store(floats, Set::load_halves(last));
    memcpy(to + g, floats, (groups - g) * sizeof *floats);
    return;
  }
  for (; g < groups; ++g) {
    const uint32_t bits = static_cast<uint32_t>(from[g]) << 16;
    memcpy(to + g, &bits, sizeof bits);
  }
}

template <class Set>
LLMC_INLINED void RowGrid<Set>::load(const PackedMatrix& a, int64_t row, int r) {
  load_scales<Set>(a, row, scale_ + r * length_);
  if (!a.zero) return;
  float* to = middle_ + r * length_;
  const uint8_t* zero = a.zero + row * a.zero_bytes;
  // Of rows behind this one too, so that only at the end of the matrix there are fewer than a word holds.
  const int64_t left = (a.rows - row) * a.zero_bytes;
  // What is written behind the groups meets scales that are zero.
  for (int64_t g = 0; g < a.groups; g += 8) {
    const int64_t at = g / 8 * a.zero_bits;
    Set::store_eight(to + g, eight_codes<Set>(zero + at, a.zero_bits, left - at), a.zero_unit, bias_);
  }
}

}  // namespace
}  // namespace llmc
