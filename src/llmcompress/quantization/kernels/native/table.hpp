// The kernels of one instruction set. Each set is a translation unit of its own, compiled with its own flags; what it
// includes lies in an unnamed namespace or is a template over its trait, so that the linker never takes one set's code
// for another's. For the same reason it takes nothing inline from the standard library but constants.
#pragma once

#include <cstdint>

namespace llmc {

struct Int8Product;
struct Int8Weight;
struct Coding;
struct PackedMatrix;

struct Table {
  void (*code_rows)(const float* x, int64_t rows, int64_t columns, int64_t limit, int8_t* codes, float* unit,
                    int64_t threads);
  Int8Weight* (*pack_int8)(const int8_t* codes, const float* scale, const float* bias, int64_t outputs, int64_t inputs,
                           int64_t threads);
  void (*multiply_int8)(const Int8Product* products, int64_t count, const float* x, int64_t rows, Coding coding,
                        int64_t threads);
  void (*multiply_packed)(const PackedMatrix& a, const float* x, int64_t rows, const float* bias, float* y, bool exact,
                          int64_t threads);
  void (*activate)(int64_t gate, const float* x, int64_t count, float* y, int64_t threads);
  void (*combine)(bool product, const float* a, const float* b, int64_t count, float* y, int64_t threads);
  void (*rms_norm)(const float* x, const float* weight, float offset, int64_t rows, int64_t columns, float epsilon,
                   float* y, int64_t threads);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t rows, int64_t columns,
                     float epsilon, float* y, int64_t threads);
  void (*rotate)(const float* x, const float* cosines, const float* sines, int64_t rows, int64_t heads,
                 int64_t columns, float* y, int64_t threads);
  int64_t byte_limit;
};

extern const Table portable_table, avx2_table, avx_vnni_table, avx512_vnni_table, avx512_amx_table, neon_dot_table;

}  // namespace llmc
