#include "int8_neon_dot.hpp"
#include "kernels.hpp"

namespace llmc {

const Table neon_dot_table = kernels_of<NeonDot, Int8NeonDot>();

}  // namespace llmc
