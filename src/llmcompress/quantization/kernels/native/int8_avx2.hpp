// Tiles of int8 products with AVX2: pairs of bytes are multiplied into 16 bits, so activations have 7 bits.
#pragma once

#include "avx2.hpp"

namespace llmc {
namespace {

struct Int8Avx2 : Avx2 {
  static constexpr int rows = 5, registers = 2;
  static constexpr bool sums_in_16_bits = true;
  using Code = uint8_t;
  static constexpr int32_t code_shift = 0;

  static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }  // of NaN and another: the second
  using Avx2::max;
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Ints splat_ints(int32_t v) { return _mm256_set1_epi32(v); }
  static Ints load_ints(const int32_t* v) { return load(static_cast<const void*>(v)); }
  static Ints min(Ints a, Ints b) { return _mm256_min_epi32(a, b); }
  static Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }

  static void store_codes(Code* to, Ints v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }
  static __m256i four_codes(const Code* at) { return splat_four(reinterpret_cast<const int8_t*>(at)); }
  static __m256i load_codes(const int8_t* at) { return load(static_cast<const void*>(at)); }
  static Ints dot(Ints sum, __m256i a, __m256i w) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, w), _mm256_set1_epi16(1)));
  }
  static Ints dot_twice(Ints sum, __m256i a, __m256i w, __m256i b, __m256i v) {
    const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(a, w), _mm256_maddubs_epi16(b, v));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(both, _mm256_set1_epi16(1)));
  }
};

}  // namespace
}  // namespace llmc
