// An int8 weight as the blocked product reads it: made once, of what the layer stores.
//
// Outputs are cut into panels of as many as a tile sums in registers. A panel holds its codes in fours of inputs: the
// first four inputs of its first output, the same four of its second, and so on, so that one load brings four inputs of
// as many outputs as a register has sums.
//
// AVX2 multiplies pairs of bytes into 16 bits. Two such products may be added before sums go on in 32 bits, a quarter
// less work, where the weights are small enough. From weights too large for it their excess is taken, and makes a four
// of its own (a spill) that is multiplied after all others. A panel of many such weights is summed pair by pair.
// (As fbgemm's `acc16` kernels: Khudia et al. 2021, "FBGEMM", https://arxiv.org/abs/2101.05615.)
#pragma once

#include <cstdint>

namespace llmc {

struct Int8Weight {
  int64_t outputs, inputs;
  int64_t width;         // outputs of a panel
  int64_t fours;         // of inputs, a multiple of those multiplied at once; what lies past the inputs is 0
  int64_t panels;        // outputs past the last are 0 too
  int8_t* codes;         // (panels, fours, width, 4), from the beginning of a cache line on
  int32_t* sums;         // (panels, width): of the codes of an output
  float* scale;          // (panels, width)
  float* bias;           // (panels, width); 0 where the layer has none
  int64_t* spills;       // (panels + 1): the number of the first spill of each panel
  int64_t* spill_four;   // (spills): which four it belongs to
  int8_t* spill_codes;   // (spills, width, 4)
  uint8_t* doubled;      // (panels): whether two products are added in 16 bits
  void* codes_memory;    // what the codes lie in
  int64_t bytes;         // of all of it
};

// What shares one scale; the numbers are those that `int8_native.py` passes.
enum class Grain : int64_t { tensor = 0, token = 1, stored = 2 };

struct Coding {
  Grain grain;
  int32_t levels;  // the largest code
  int32_t zero;    // the code of 0.0
  float unit;      // what one step is worth, where all rows share it
};

// A weight that activations are multiplied by, and where the result goes.
struct Int8Product {
  const Int8Weight* weight;
  float* y;
};

// Frees all of it; null is nothing.
void free_int8(Int8Weight* weight);

}  // namespace llmc
