// The trait of AVX-VNNI: AVX2, with the dot product of bytes.
#pragma once

#include "avx2.hpp"

namespace llmc {
namespace {

struct AvxVnni : Avx2 {};

}  // namespace
}  // namespace llmc
