#include "int8_weight.hpp"

#include <cstdlib>

#include "no_memory.hpp"

namespace llmc {
namespace {

struct Kept {
  void* memory = nullptr;
  int64_t bytes = 0;
  ~Kept() { std::free(memory); }
};

}  // namespace

void free_int8(Int8Weight* w) {
  if (!w) return;
  void* const parts[] = {w->codes_memory, w->sums,       w->scale,       w->bias,
                         w->spills,       w->spill_four, w->spill_codes, w->doubled};
  for (void* part : parts) std::free(part);
  std::free(w);
}

void* int8_scratch(int64_t bytes) {
  static thread_local Kept own;
  if (bytes > own.bytes) {
    std::free(own.memory);
    own.memory = std::malloc(static_cast<size_t>(bytes));
    own.bytes = own.memory ? bytes : 0;
    if (!own.memory) throw NoMemory{};
  }
  return own.memory;
}

}  // namespace llmc
