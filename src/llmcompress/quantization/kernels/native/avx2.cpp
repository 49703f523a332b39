#include "int8_avx2.hpp"
#include "kernels.hpp"

namespace llmc {

const Table avx2_table = kernels_of<Avx2, Int8Avx2>();

}  // namespace llmc
