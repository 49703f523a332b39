// The trait of AVX2, with FMA and F16C.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace llmc {
namespace {

struct Avx2 {
  static constexpr int lanes = 8;
  using Floats = __m256;
  using Ints = __m256i;

  static Ints zero_ints() { return _mm256_setzero_si256(); }
  static Floats splat(float x) { return _mm256_set1_ps(x); }
  static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  static void store(int32_t* to, Ints v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  static Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
  static Ints magnitude_bits(Floats x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
  }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Ints round(Floats x) { return _mm256_cvtps_epi32(x); }
  static void store_bytes(int8_t* to, Ints v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }
};

}  // namespace
}  // namespace llmc
