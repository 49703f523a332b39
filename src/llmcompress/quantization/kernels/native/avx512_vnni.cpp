#include "int8_avx512_vnni.hpp"
#include "kernels.hpp"

namespace llmc {

const Table avx512_vnni_table = kernels_of<Avx512Vnni, Int8Avx512Vnni>();

}  // namespace llmc
