// The trait of AVX-VNNI: AVX2, with the dot product of bytes, which adds four products in 32 bits at once.
#pragma once

#include "avx2.hpp"

namespace llmc {
namespace {

struct AvxVnni : Avx2 {
  static constexpr int byte_limit = 127;

  template <bool large>
  static Partial mac(Partial sum, Ints codes, Ints x) {
    return _mm256_dpbusd_avx_epi32(sum, codes, x);
  }
  static Ints fold(Ints sum, Partial part) { return _mm256_add_epi32(sum, part); }
};

}  // namespace
}  // namespace llmc
