// A matrix of few bits as it lies in a folder and in memory: `PackedMatrix` of Python, as pointers.
#pragma once

#include <cstdint>

namespace llmc {

enum ScaleKind : int64_t { kFloat, kHalf, kBfloat };

// Same order in `packed_product.py`. A code stands for (code - middle) * scale, or levels[code] * scale with a codebook.
struct PackedMatrix {
  const uint8_t* codes;    // rows of `code_bytes`: a little-endian stream of `bits` a code
  const void* scale;       // (rows, groups)
  const uint8_t* zero;     // rows of `zero_bytes`, of `zero_bits` a code; null where `middle` is the same for all
  const float* levels;     // 16, or null
  const uint8_t* steps;    // 16 whole numbers below 128, the levels on an even grid: (step - middle) * unit; or null
  int64_t rows, columns, bits, code_bytes;
  int64_t groups, size;    // of a row; columns in a group
  int64_t scale_kind;
  int64_t zero_bits, zero_bytes;
  float zero_unit;         // a zero point times this is the code that stands for 0.0
  float middle;            // that code, where no zero points are stored
  float unit;              // of a step, with a codebook; else 1
};

}  // namespace llmc
