#include "int8_weight.hpp"

#include <cstdlib>

namespace llmc {

void free_int8(Int8Weight* w) {
  if (!w) return;
  void* const parts[] = {w->codes_memory, w->sums,       w->scale,       w->bias,
                         w->spills,       w->spill_four, w->spill_codes, w->doubled};
  for (void* part : parts) std::free(part);
  std::free(w);
}

}  // namespace llmc
