// The plain C functions that the loader calls. A kernel takes the table of the instruction set that it shall run with.
#include <cstring>

#include "chain.hpp"
#include "cpu.hpp"
#include "export.hpp"
#include "int8_weight.hpp"
#include "no_memory.hpp"
#include "packed_matrix.hpp"
#include "table.hpp"

using llmc::Table;

namespace {

// Calls f; returns 0, or 1 where memory is short.
template <class F>
int32_t status_of(F f) {
  try {
    f();
  } catch (const llmc::NoMemory&) {
    return 1;
  }
  return 0;
}

}  // namespace

// What the library was built of; the loader takes no other than that of the sources beside it.
LLMC_EXPORT const char* llmc_sources() { return LLMC_SOURCES; }

// The kernels of an instruction set, or null where the compiler or the processor lacks it.
LLMC_EXPORT const Table* llmc_table(const char* set) {
  const auto is = [set](const char* name) { return std::strcmp(set, name) == 0; };
  if (is("portable")) return &llmc::portable_table;
#if defined(LLMC_AVX2)
  if (is("avx2") && llmc::cpu::has_avx2()) return &llmc::avx2_table;
#endif
#if defined(LLMC_AVX_VNNI)
  if (is("avx_vnni") && llmc::cpu::has_avx_vnni()) return &llmc::avx_vnni_table;
#endif
#if defined(LLMC_AVX512_AMX)
  if (is("avx512_amx") && llmc::cpu::has_avx512_amx()) return &llmc::avx512_amx_table;
#endif
#if defined(LLMC_AVX512_VNNI)
  if (is("avx512_vnni") && llmc::cpu::has_avx512_vnni()) return &llmc::avx512_vnni_table;
#endif
#if defined(LLMC_NEON_DOT)
  if (is("neon_dot") && llmc::cpu::has_neon_dot()) return &llmc::neon_dot_table;
#endif
  return nullptr;
}

LLMC_EXPORT void llmc_code_rows(const Table* table, const float* x, int64_t rows, int64_t columns, int64_t limit,
                                int8_t* codes, float* unit, int64_t threads) {
  table->code_rows(x, rows, columns, limit, codes, unit, threads);
}

LLMC_EXPORT llmc::Int8Weight* llmc_int8_pack(const Table* table, const int8_t* codes, const float* scale,
                                             const float* bias, int64_t outputs, int64_t inputs, int64_t threads) {
  return table->pack_int8(codes, scale, bias, outputs, inputs, threads);
}

LLMC_EXPORT void llmc_int8_free(llmc::Int8Weight* weight) { llmc::free_int8(weight); }

LLMC_EXPORT int64_t llmc_int8_bytes(const llmc::Int8Weight* weight) { return weight->bytes; }

// Returns 0, or 1 where memory is short.
LLMC_EXPORT int32_t llmc_int8_linear(const Table* table, const llmc::Int8Weight* weight, const float* x, int64_t rows,
                                     float* y, int64_t grain, int64_t levels, int64_t zero, float unit,
                                     int64_t threads) {
  const llmc::Coding coding{static_cast<llmc::Grain>(grain), static_cast<int32_t>(levels), static_cast<int32_t>(zero),
                            unit};
  const llmc::Int8Product product{weight, y};
  return status_of([&] { table->multiply_int8(&product, 1, x, rows, coding, threads); });
}

// Returns 0, or 1 where memory is short.
LLMC_EXPORT int32_t llmc_multiply_packed(const Table* table, const llmc::PackedMatrix* a, const float* x, int64_t rows,
                                         const float* bias, float* y, bool exact, int64_t threads) {
  return status_of([&] { table->multiply_packed(*a, x, rows, bias, y, exact, threads); });
}

LLMC_EXPORT void llmc_activate(const Table* table, int64_t gate, const float* x, int64_t count, float* y,
                               int64_t threads) {
  table->activate(gate, x, count, y, threads);
}

LLMC_EXPORT void llmc_rms_norm(const Table* table, const float* x, const float* weight, float offset, int64_t rows,
                               int64_t columns, float epsilon, float* y, int64_t threads) {
  table->rms_norm(x, weight, offset, rows, columns, epsilon, y, threads);
}

LLMC_EXPORT void llmc_layer_norm(const Table* table, const float* x, const float* weight, const float* bias,
                                 int64_t rows, int64_t columns, float epsilon, float* y, int64_t threads) {
  table->layer_norm(x, weight, bias, rows, columns, epsilon, y, threads);
}

// Returns 0, or 1 where memory is short.
LLMC_EXPORT int32_t llmc_run_chain(const Table* table, const llmc::Step* steps, int64_t count, float* const* outside,
                                   int64_t from_outside, const int64_t* widths, int64_t buffers, int64_t part,
                                   int64_t rows, int64_t threads) {
  const llmc::Buffers all{outside, from_outside, widths, buffers, part};
  return status_of([&] { llmc::run_chain(*table, steps, count, all, rows, threads); });
}

// The largest code of an activation that the set's kernels multiply by codes of 8 bits.
LLMC_EXPORT int64_t llmc_byte_limit(const Table* table) { return table->byte_limit; }
