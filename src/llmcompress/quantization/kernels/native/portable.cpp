#include "portable.hpp"

#include "kernels.hpp"

namespace llmc {

const Table portable_table = kernels_of<Portable>();

}  // namespace llmc
