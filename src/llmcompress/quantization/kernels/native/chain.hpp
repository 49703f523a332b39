// Steps that follow one another over the same rows, in one call: what a caller in Python would spend longer on calling
// than on computing.
#pragma once

#include <cstdint>

#include "table.hpp"

namespace llmc {

// The numbers are those that `chain.py` passes.
enum class Op : int64_t { int8, packed, activate, add, multiply, rms_norm, layer_norm, rotate };

// Same order in `chain.py`. What an operation has no use for is 0.
struct Step {
  int64_t op;
  int64_t from, with, to;  // buffers; `to` may be one of the others where numbers do not meet
  int64_t also;            // a buffer: the sines, where `with` has the cosines
  const void* weight;      // an Int8Weight, a PackedMatrix, or the weight of a norm
  const float* bias;       // of a packed product or a LayerNorm
  int64_t option;          // the grain of int8; whether a packed product is exact; which activation function; for
                           // norms and rotations the columns of a head, of which a row has several
  int64_t levels, zero;    // of int8
  float unit;              // of int8; a norm's epsilon
  float offset;            // of an RMSNorm: what is added to its weight
};

// Buffers of (rows, width) floats: those from outside first, then those that live for a part of the rows.
struct Buffers {
  float* const* outside;
  int64_t from_outside;
  const int64_t* widths;
  int64_t count;
  int64_t part;  // rows that all steps are run on before the next: what lies between them stays in the cache
};

// Throws NoMemory.
void run_chain(const Table& table, const Step* steps, int64_t count, const Buffers& buffers, int64_t rows,
               int64_t threads);

}  // namespace llmc
