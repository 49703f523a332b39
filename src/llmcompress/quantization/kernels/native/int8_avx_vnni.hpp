// Tiles of int8 products with AVX-VNNI: fours of bytes are multiplied and summed in 32 bits at once.
#pragma once

#include "avx_vnni.hpp"
#include "int8_avx2.hpp"

namespace llmc {
namespace {

struct Int8AvxVnni : Int8Avx2 {
  static constexpr int rows = 6;
  static constexpr bool sums_in_16_bits = false;

  static Ints dot(Ints sum, __m256i a, __m256i w) { return _mm256_dpbusd_avx_epi32(sum, a, w); }
  static Ints dot_twice(Ints sum, __m256i a, __m256i w, __m256i b, __m256i v) { return dot(dot(sum, a, w), b, v); }
};

}  // namespace
}  // namespace llmc
