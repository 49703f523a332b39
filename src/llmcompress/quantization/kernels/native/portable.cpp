#include "int8_portable.hpp"
#include "kernels.hpp"

namespace llmc {

const Table portable_table = kernels_of<Portable, Int8Portable>();

}  // namespace llmc
