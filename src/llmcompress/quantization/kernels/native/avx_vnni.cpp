#include "avx_vnni.hpp"

#include "kernels.hpp"

namespace llmc {

const Table avx_vnni_table = kernels_of<AvxVnni>();

}  // namespace llmc
