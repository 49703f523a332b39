#include "int8_avx_vnni.hpp"
#include "kernels.hpp"

namespace llmc {

const Table avx_vnni_table = kernels_of<AvxVnni, Int8AvxVnni>();

}  // namespace llmc
