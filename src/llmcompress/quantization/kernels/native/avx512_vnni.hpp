// The trait of AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace llmc {
namespace {

struct Avx512Vnni {
  static constexpr int lanes = 16;
  using Floats = __m512;
  using Ints = __m512i;

  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static Floats splat(float x) { return _mm512_set1_ps(x); }
  static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  static void store(int32_t* to, Ints v) { _mm512_storeu_si512(to, v); }
  static Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  static Ints magnitude_bits(Floats x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
  }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Ints round(Floats x) { return _mm512_cvtps_epi32(x); }
  static void store_bytes(int8_t* to, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(v));
  }
};

}  // namespace
}  // namespace llmc
