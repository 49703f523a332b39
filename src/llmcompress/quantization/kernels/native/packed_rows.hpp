// Few rows of activations by a packed matrix, straight from its bytes: each output is a dot product along its row, whose
// groups fill vectors or divide them. At one row of 8, 4 or 2 bits this reads memory and little else; codes of other
// bits are unpacked to bytes, row by row.
//
// A vector of codes has `width` bits a code, so 32 / width codes in each lane. Activations lie in the order in which
// codes leave a vector: of those of one vector the bytes of field 0, then of field 1; as floats likewise by lanes. What
// a lane sums up belongs to one group, so a group's scale meets it there and lanes are added up once a row, at its end.
#pragma once

#include "activations.hpp"
#include "packed_matrix.hpp"
#include "scales.hpp"
#include "scratch.hpp"
#include "unrolled.hpp"

namespace llmc {
namespace {

template <class Set>
constexpr int64_t kBytes = 4 * Set::lanes;
// So many rows of codes are fetched beforehand: the next outputs' ones.
constexpr int64_t kRowsAhead = 4;

template <class Set>
int64_t codes_a_vector(int64_t width) {
  return Set::lanes * 32 / width;
}

// The bits of a code in vectors: those it is stored in, or a byte.
inline int64_t width_of(const PackedMatrix& a) { return a.bits == 4 || a.bits == 2 ? a.bits : 8; }

// Whether these kernels can read the matrix.
template <class Set>
bool suits_rows(const PackedMatrix& a) {
  const int64_t whole = codes_a_vector<Set>(width_of(a)), lane = 32 / width_of(a);
  // The products of a group are added in 32 bits.
  if (a.columns > (1 << 16) && (a.groups == 1 || a.size > (1 << 16))) return false;
  return a.groups == 1 || a.size % whole == 0 || (whole % a.size == 0 && a.size % lane == 0);
}

// How a row falls into vectors.
struct Walk {
  int64_t vectors;  // of a row
  int64_t group;    // vectors in a group; 0: several groups in a vector
  int64_t groups;   // in a vector, else 1
  int64_t ahead;    // how far behind codes those lie that are fetched beforehand
};

template <class Set>
Walk walk_of(const PackedMatrix& a) {
  const int64_t whole = codes_a_vector<Set>(width_of(a)), vectors = (a.columns + whole - 1) / whole;
  const int64_t ahead = width_of(a) == a.bits ? kRowsAhead * a.code_bytes : 0;
  if (a.groups == 1) return {vectors, vectors, 1, ahead};
  if (a.size % whole == 0) return {vectors, a.size / whole, 1, ahead};
  return {vectors, 0, whole / a.size, ahead};
}

// Moves the `columns` numbers of a row to where the codes of a vector meet them; the rest of `to` is zero already.
template <class Set, int width, class T>
void arrange(const T* from, int64_t columns, T* to) {
  constexpr int fields = (sizeof(T) == 1 ? 8 : 32) / width, places = sizeof(T) == 1 ? kBytes<Set> : Set::lanes;
  constexpr int whole = fields * places;
  int64_t k = 0;
  for (; k + whole <= columns; k += whole)
    for (int f = 0; f < fields; ++f)
      for (int i = 0; i < places; ++i) to[k + f * places + i] = from[k + i * fields + f];
  for (int64_t rest = 0; k + rest < columns; ++rest) to[k + rest % fields * places + rest / fields] = from[k + rest];
}

// Rows of activations as codes. `sums` are theirs by group, in arrays that are longer and zero there.
template <int rows>
struct CodedInput {
  const int8_t* codes[rows];
  const float* sums[rows];
  const float* unit;

  float finish(float value, int m, float bias) const { return value * unit[m] + bias; }
};

// Rows of activations as they are.
template <int rows>
struct FloatInput {
  const float* floats[rows];

  float finish(float value, int, float bias) const { return value + bias; }
};

// Adds up in whole numbers; codes are taken as they are, or as steps of a codebook.
template <class Set, int width, bool lookup>
struct WholeSums {
  using Ints = typename Set::Ints;
  using Partial = typename Set::Partial;
  static constexpr bool large = width == 8, singly = large || lookup;
  static constexpr int fields = 8 / width;
  // Vectors whose products a 16-bit sum holds.
  static constexpr int64_t depth = 4;
  template <int rows>
  using Input = CodedInput<rows>;

  Ints table;

  explicit WholeSums(const PackedMatrix& a) {
    if constexpr (lookup) table = Set::load_table(a.steps);
  }

  // What vectors [v, end) give each output and row of activations.
  // `ahead` is how far behind these codes those lie that are fetched beforehand: a row is too short for the processor to
  // see where reading goes on.
  template <int outputs, int rows>
  LLMC_INLINED void add(const uint8_t* const (&codes)[outputs], const int8_t* const (&x)[rows], int64_t ahead,
                        int64_t v, int64_t end, Ints (&sums)[outputs][rows]) const {
    Partial parts[outputs][rows];
    unrolled<outputs, rows>([&](auto r, auto m) LLMC_INLINE { parts[r][m] = Set::zero_partial(); });
    for (; v < end; ++v) {
      unrolled<outputs>([&](auto r) LLMC_INLINE {
        const uint8_t* at = codes[r] + v * kBytes<Set>;
        const Ints packed = Set::load(static_cast<const void*>(at));
        Set::prefetch(at + ahead);
        unrolled<fields>([&](auto f) LLMC_INLINE {
          Ints own = Set::template byte_field<width>(packed, f);
          if constexpr (lookup) own = Set::look_up(table, own);
          unrolled<rows>([&](auto m) LLMC_INLINE {
            const Ints other = Set::load(static_cast<const void*>(x[m] + (v * fields + f) * kBytes<Set>));
            if constexpr (singly)
              sums[r][m] = Set::fold(sums[r][m], Set::template mac<large>(Set::zero_partial(), own, other));
            else
              parts[r][m] = Set::template mac<large>(parts[r][m], own, other);
          });
        });
      });
    }
    if constexpr (!singly)
      unrolled<outputs, rows>([&](auto r, auto m) LLMC_INLINE { sums[r][m] = Set::fold(sums[r][m], parts[r][m]); });
  }

  template <bool within, int outputs, int rows>
  LLMC_INLINED void run(const PackedMatrix& a, const Walk& walk, const uint8_t* const (&codes)[outputs],
                        const RowGrid<Set>& grid, Ints places, const Input<rows>& input,
                        typename Set::Floats (&totals)[outputs][rows]) const {
    const float *scale[outputs], *middle[outputs];
    unrolled<outputs>([&](auto r) LLMC_INLINE { scale[r] = grid.scale_of(r), middle[r] = grid.middle_of(r); });
    const int8_t* x[rows];
    unrolled<rows>([&](auto m) LLMC_INLINE { x[m] = input.codes[m]; });
    // Of its own, so that it stays in registers.
    typename Set::Floats all[outputs][rows];
    unrolled<outputs, rows>([&](auto r, auto m) LLMC_INLINE { all[r][m] = Set::zero_floats(); });
    const auto scaled = [&](int64_t g, const Ints(&sums)[outputs][rows]) LLMC_INLINE {
      unrolled<outputs>([&](auto r) LLMC_INLINE {
        const auto own = within ? Set::gather(scale[r] + g, places) : Set::splat(scale[r][g]);
        unrolled<rows>([&](auto m) LLMC_INLINE { all[r][m] = Set::fma(Set::to_floats(sums[r][m]), own, all[r][m]); });
      });
    };
    const int64_t vectors = walk.vectors, in_group = walk.group, in_vector = walk.groups;
    const int64_t ahead = walk.ahead;
    if (within || in_group == 1) {
      for (int64_t v = 0; v < vectors; ++v) {
        Ints sums[outputs][rows];
        nothing(sums);
        add(codes, x, ahead, v, v + 1, sums);
        scaled(within ? v * in_vector : v, sums);
      }
    } else {
      for (int64_t v = 0, g = 0; v < vectors; ++g) {
        Ints sums[outputs][rows];
        nothing(sums);
        const int64_t end = v + in_group < vectors ? v + in_group : vectors;
        for (; v + depth <= end; v += depth) add(codes, x, ahead, v, v + depth, sums);
        for (; v < end; ++v) add(codes, x, ahead, v, v + 1, sums);
        scaled(g, sums);
      }
    }
    for (int64_t g = 0; g < a.groups; g += Set::lanes) {
      unrolled<outputs>([&](auto r) LLMC_INLINE {
        const auto own = Set::mul(Set::load(scale[r] + g), Set::load(middle[r] + g));
        unrolled<rows>([&](auto m) LLMC_INLINE {
          all[r][m] = Set::fnma(own, Set::load(input.sums[m] + g), all[r][m]);
        });
      });
    }
    unrolled<outputs, rows>([&](auto r, auto m) LLMC_INLINE { totals[r][m] = all[r][m]; });
  }

 private:
  template <int outputs, int rows>
  LLMC_INLINED static void nothing(Ints (&sums)[outputs][rows]) {
    unrolled<outputs, rows>([&](auto r, auto m) LLMC_INLINE { sums[r][m] = Set::zero_ints(); });
  }
};

// Adds up in floats, with weights that are decoded without a rounding.
template <class Set, int width>
struct FloatSums {
  using Ints = typename Set::Ints;
  using Floats = typename Set::Floats;
  static constexpr bool large = false;
  static constexpr int fields = 32 / width;
  template <int rows>
  using Input = FloatInput<rows>;

  explicit FloatSums(const PackedMatrix&) {}

  template <bool within, int outputs, int rows>
  LLMC_INLINED void run(const PackedMatrix&, const Walk& walk, const uint8_t* const (&codes)[outputs],
                        const RowGrid<Set>& grid, Ints places, const Input<rows>& input,
                        Floats (&totals)[outputs][rows]) const {
    const float *scale[outputs], *middle[outputs];
    unrolled<outputs>([&](auto r) LLMC_INLINE { scale[r] = grid.scale_of(r), middle[r] = grid.middle_of(r); });
    const float* x[rows];
    unrolled<rows>([&](auto m) LLMC_INLINE { x[m] = input.floats[m]; });
    Floats all[outputs][rows];
    unrolled<outputs, rows>([&](auto r, auto m) LLMC_INLINE { all[r][m] = Set::zero_floats(); });
    const int64_t vectors = walk.vectors, in_group = within ? 1 : walk.group, in_vector = walk.groups;
    const int64_t ahead = walk.ahead;
    for (int64_t v = 0, g = 0; v < vectors; g += in_vector) {
      Floats sums[outputs][rows], zero[outputs];
      unrolled<outputs>([&](auto r) LLMC_INLINE {
        zero[r] = within ? Set::gather(middle[r] + g, places) : Set::splat(middle[r][g]);
        unrolled<rows>([&](auto m) LLMC_INLINE { sums[r][m] = Set::zero_floats(); });
      });
      for (const int64_t end = v + in_group < vectors ? v + in_group : vectors; v < end; ++v) {
        unrolled<outputs>([&](auto r) LLMC_INLINE {
          const uint8_t* at = codes[r] + v * kBytes<Set>;
          const Ints packed = Set::load(static_cast<const void*>(at));
          Set::prefetch(at + ahead);
          unrolled<fields>([&](auto j) LLMC_INLINE {
            const Ints code = Set::template lane_field<width>(packed, j);
            const Floats weight = Set::sub(Set::to_floats(code), zero[r]);
            unrolled<rows>([&](auto m) LLMC_INLINE {
              sums[r][m] = Set::fma(weight, Set::load(x[m] + (v * fields + j) * Set::lanes), sums[r][m]);
            });
          });
        });
      }
      unrolled<outputs>([&](auto r) LLMC_INLINE {
        const Floats own = within ? Set::gather(scale[r] + g, places) : Set::splat(scale[r][g]);
        unrolled<rows>([&](auto m) LLMC_INLINE { all[r][m] = Set::fma(sums[r][m], own, all[r][m]); });
      });
    }
    unrolled<outputs, rows>([&](auto r, auto m) LLMC_INLINE { totals[r][m] = all[r][m]; });
  }
};

// The codes of some rows as whole vectors: what follows a row meets zeros, but behind the last row there is nothing.
template <class Set, int rows>
class WholeRows {
 public:
  WholeRows(const PackedMatrix& a, const Walk& walk)
      : a_(a), unpacked_(width_of(a) != a.bits), read_(walk.vectors * kBytes<Set>), size_(a.rows * a.code_bytes),
        own_(rows * (read_ + 8)) {}

  // Row r, which is number i of those asked for together.
  const uint8_t* row(int64_t r, int i) {
    const int64_t at = r * a_.code_bytes;
    const uint8_t* const codes = a_.codes + at;
    uint8_t* const own = own_ + i * (read_ + 8);
    if (unpacked_) {
      for (int64_t line = 0; line < a_.code_bytes; line += 64) Set::prefetch(codes + kRowsAhead * a_.code_bytes + line);
      unpack_row<Set>(codes, a_.bits, a_.columns, own);
      return own;
    }
    if (at + read_ <= size_) return codes;
    memcpy(own, codes, size_ - at < read_ ? size_ - at : read_);
    return own;
  }

 private:
  const PackedMatrix& a_;
  const bool unpacked_;
  const int64_t read_, size_;
  Scratch<uint8_t> own_;
};

// Outputs [begin, end) of `rows` rows of activations; y is (rows, a.rows). `within`: a vector has several groups.
template <class Set, class Sums, bool within, int rows>
void row_products(const PackedMatrix& a, const typename Sums::template Input<rows>& x, const float* bias, float* y,
                  int64_t begin, int64_t end) {
  // Some outputs at a time read the activations once, and are independent sums.
  constexpr int outputs = 4 / rows;
  const Walk walk = walk_of<Set>(a);
  const Sums kernel(a);
  int32_t group_of[Set::lanes];
  for (int i = 0; i < Set::lanes; ++i) group_of[i] = static_cast<int32_t>(walk.groups * i / Set::lanes);
  const auto places = Set::load(static_cast<const void*>(group_of));
  WholeRows<Set, outputs> codes(a, walk);
  RowGrid<Set> grid(a, outputs, Sums::large ? Set::bias : 0);
  for (int64_t first = begin; first < end; first += outputs) {
    const uint8_t* own[outputs];
    for (int r = 0; r < outputs; ++r) {
      // The last ones may be fewer: then one is computed again.
      const int64_t output = first + r < end ? first + r : end - 1;
      own[r] = codes.row(output, r);
      grid.load(a, output, r);
    }
    typename Set::Floats totals[outputs][rows];
    kernel.template run<within, outputs, rows>(a, walk, own, grid, places, x, totals);
    unrolled<outputs, rows>([&](auto r, auto m) LLMC_INLINE {
      if (first + r < end)
        y[m * a.rows + first + r] = x.finish(Set::sum(totals[r][m]), m, bias ? bias[first + r] : 0.0F);
    });
  }
}

}  // namespace
}  // namespace llmc
