#include "int8_avx512_amx.hpp"
#include "kernels.hpp"

namespace llmc {

const Table avx512_amx_table = kernels_of<Avx512Amx, Int8Avx512Amx>();

}  // namespace llmc
