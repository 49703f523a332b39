// The trait of AVX2, with FMA and F16C.
#pragma once

#include <immintrin.h>
#include <string.h>

#include <cstdint>

#include "unrolled.hpp"
#include "unpack_by_32.hpp"
#include "untiled.hpp"

namespace llmc {
namespace {

struct Avx2 : Untiled {
  // 32-bit numbers in a vector.
  static constexpr int lanes = 8;
  // The largest code of an activation that may meet codes of 8 bits: pairs of products are added in 16 bits.
  static constexpr int byte_limit = 63;
  // Taken off codes of 8 bits by `mac`.
  static constexpr int bias = 0;
  using Floats = __m256;
  using Ints = __m256i;
  // Sums in 16 bits: of 8 products with codes of 4 bits and fewer, of one with larger ones.
  using Partial = __m256i;

  static Ints zero_ints() { return _mm256_setzero_si256(); }
  static Floats zero_floats() { return _mm256_setzero_ps(); }
  static Floats splat(float x) { return _mm256_set1_ps(x); }
  static Floats load(const float* x) { return _mm256_loadu_ps(x); }
  static Ints load(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
  LLMC_INLINED static void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }
  static void store(void* to, Ints v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
  static void store(float* to, Floats v) { _mm256_storeu_ps(to, v); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
  static Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
  // Writes eight bytes, the lowest first, as floats times `unit`, less `bias`.
  static void store_eight(float* to, uint64_t bytes, float unit, float bias) {
    const Floats codes = to_floats(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes))));
    store(to, sub(mul(codes, splat(unit)), splat(bias)));
  }
  static Floats load_halves(const uint16_t* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }

  // -- activations
  static Ints max(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
  static Ints magnitude_bits(Floats x) {
    return _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7FFFFFFF));
  }
  static Ints round(Floats x) { return _mm256_cvtps_epi32(x); }
  static void store_bytes(int8_t* to, Ints v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }

  // -- codes
  // Field f of every byte, and field j of every lane.
  template <int width>
  static Ints byte_field(Ints v, int f) {
    if constexpr (width == 8) return v;
    return _mm256_and_si256(_mm256_srli_epi16(v, width * f), _mm256_set1_epi8((1 << width) - 1));
  }
  template <int width>
  static Ints lane_field(Ints v, int j) {
    return _mm256_and_si256(_mm256_srli_epi32(v, width * j), _mm256_set1_epi32((1 << width) - 1));
  }
  static Ints load_table(const uint8_t* sixteen) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
  }
  static Ints look_up(Ints table, Ints codes) { return _mm256_shuffle_epi8(table, codes); }
  static Floats look_up(const float* sixteen, Ints codes) {
    const Floats low = _mm256_permutevar8x32_ps(load(sixteen), codes);
    const Floats high = _mm256_permutevar8x32_ps(load(sixteen + 8), codes);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
  }
  static int64_t unpack_nibbles(const uint8_t* row, int64_t count, uint8_t* codes) {
    const __m128i mask = _mm_set1_epi8(15);
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + k / 2));
      const __m128i even = _mm_and_si128(v, mask), odd = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k), _mm_unpacklo_epi8(even, odd));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + k + 16), _mm_unpackhi_epi8(even, odd));
    }
    return k;
  }

  static int64_t unpack_odd(const uint8_t* row, int64_t bits, int64_t count, int64_t bytes, uint8_t* codes) {
    return unpack_by_32(row, bits, count, bytes, codes);
  }
  static uint64_t deposit(uint64_t word, uint64_t places, int64_t) { return _pdep_u64(word, places); }

  // -- products of bytes
  static Partial zero_partial() { return _mm256_setzero_si256(); }
  template <bool large>
  static Partial mac(Partial sum, Ints codes, Ints x) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, x));
  }
  static Ints fold(Ints sum, Partial part) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
  static Ints splat_four(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
  }

  // -- across lanes
  static Floats gather(const float* near, Ints places) { return _mm256_permutevar8x32_ps(load(near), places); }
  static float sum(Floats v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  // Lanes of eight rows: out[i] has lane i of each.
  static void transpose(const uint8_t* rows, int64_t stride, Ints* out) {
    Floats r[8], t[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_castsi256_ps(load(rows + i * stride));
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      out[i] = _mm256_castps_si256(_mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
      out[i + 4] = _mm256_castps_si256(_mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
  }
};

}  // namespace
}  // namespace llmc
