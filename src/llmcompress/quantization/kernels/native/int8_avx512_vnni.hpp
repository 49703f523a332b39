// Tiles of int8 products with AVX-512 VNNI: fours of bytes are multiplied and summed in 32 bits at once.
#pragma once

#include "avx512_vnni.hpp"

namespace llmc {
namespace {

struct Int8Avx512Vnni : Avx512Vnni {
  static constexpr int rows = 6, registers = 4;
  static constexpr bool sums_in_16_bits = false;
  using Code = uint8_t;
  static constexpr int32_t code_shift = 0;

  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // of NaN and another: the second
  using Avx512Vnni::max;
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Ints splat_ints(int32_t v) { return _mm512_set1_epi32(v); }
  static Ints load_ints(const int32_t* v) { return load(static_cast<const void*>(v)); }
  static Ints min(Ints a, Ints b) { return _mm512_min_epi32(a, b); }
  static Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }

  static void store_codes(Code* to, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(_mm512_max_epi32(v, _mm512_setzero_si512())));
  }
  static __m512i four_codes(const Code* at) { return splat_four(reinterpret_cast<const int8_t*>(at)); }
  static __m512i load_codes(const int8_t* at) { return load(static_cast<const void*>(at)); }
  static Ints dot(Ints sum, __m512i a, __m512i w) { return _mm512_dpbusd_epi32(sum, a, w); }
  static Ints dot_twice(Ints sum, __m512i a, __m512i w, __m512i b, __m512i v) { return dot(dot(sum, a, w), b, v); }
};

}  // namespace
}  // namespace llmc
