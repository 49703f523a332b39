// The trait of AVX-512 with VNNI; that of AVX2 says what each function is for.
#pragma once

#include <immintrin.h>
#include <string.h>

#include <cstdint>

#include "unpack_by_32.hpp"
#include "unrolled.hpp"
#include "untiled.hpp"

namespace llmc {
namespace {

struct Avx512Vnni : Untiled {
  static constexpr int lanes = 16, byte_limit = 127, bias = 0;
  using Floats = __m512;
  using Ints = __m512i;
  using Partial = __m512i;

  static Ints zero_ints() { return _mm512_setzero_si512(); }
  static Floats zero_floats() { return _mm512_setzero_ps(); }
  static Floats splat(float x) { return _mm512_set1_ps(x); }
  static Floats load(const float* x) { return _mm512_loadu_ps(x); }
  static Ints load(const void* x) { return _mm512_loadu_si512(x); }
  LLMC_INLINED static void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }
  static void store(void* to, Ints v) { _mm512_storeu_si512(to, v); }
  static void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
  static Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
  static void store_eight(float* to, uint64_t bytes, float unit, float bias) {
    const __m256 codes = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(bytes))));
    _mm256_storeu_ps(to, _mm256_sub_ps(_mm256_mul_ps(codes, _mm256_set1_ps(unit)), _mm256_set1_ps(bias)));
  }
  static Floats load_halves(const uint16_t* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }

  static Ints max(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  static Ints magnitude_bits(Floats x) {
    return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7FFFFFFF));
  }
  static Ints round(Floats x) { return _mm512_cvtps_epi32(x); }
  static void store_bytes(int8_t* to, Ints v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(v));
  }

  template <int width>
  static Ints byte_field(Ints v, int f) {
    if constexpr (width == 8) return v;
    return _mm512_and_si512(_mm512_srli_epi16(v, width * f), _mm512_set1_epi8((1 << width) - 1));
  }
  template <int width>
  static Ints lane_field(Ints v, int j) {
    return _mm512_and_si512(_mm512_srli_epi32(v, width * j), _mm512_set1_epi32((1 << width) - 1));
  }
  static Ints load_table(const uint8_t* sixteen) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)));
  }
  static Ints look_up(Ints table, Ints codes) { return _mm512_shuffle_epi8(table, codes); }
  static Floats look_up(const float* sixteen, Ints codes) { return _mm512_permutexvar_ps(codes, load(sixteen)); }
  static int64_t unpack_nibbles(const uint8_t* row, int64_t count, uint8_t* codes) {
    int64_t k = 0;
    for (; k + 64 <= count; k += 64) {
      // Each byte in 16 bits: the low nibble stays where it is, the high one moves up into the byte beside.
      const Ints wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + k / 2)));
      const Ints both = _mm512_or_si512(wide, _mm512_slli_epi16(wide, 4));
      store(static_cast<void*>(codes + k), _mm512_and_si512(both, _mm512_set1_epi8(15)));
    }
    return k;
  }
  static int64_t unpack_odd(const uint8_t* row, int64_t bits, int64_t count, int64_t bytes, uint8_t* codes) {
    return unpack_by_32(row, bits, count, bytes, codes);
  }
  static uint64_t deposit(uint64_t word, uint64_t places, int64_t) { return _pdep_u64(word, places); }

  static Partial zero_partial() { return _mm512_setzero_si512(); }
  template <bool large>
  static Partial mac(Partial sum, Ints codes, Ints x) {
    return _mm512_dpbusd_epi32(sum, codes, x);
  }
  static Ints fold(Ints sum, Partial part) { return _mm512_add_epi32(sum, part); }
  static Ints splat_four(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
  }

  static Floats gather(const float* near, Ints places) { return _mm512_permutexvar_ps(places, load(near)); }
  static float sum(Floats v) { return _mm512_reduce_add_ps(v); }
  static void transpose(const uint8_t* rows, int64_t stride, Ints* out) {
    Ints r[lanes], t[lanes];
    for (int i = 0; i < lanes; ++i) r[i] = load(static_cast<const void*>(rows + i * stride));
    for (int i = 0; i < lanes; i += 2) {
      t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    // Of four rows each, lane i of every quarter.
    for (int i = 0; i < lanes; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      const Ints low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x44), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xEE);
      const Ints next = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x44);
      const Ints last = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xEE);
      out[i] = _mm512_shuffle_i32x4(low, next, 0x88);
      out[i + 4] = _mm512_shuffle_i32x4(low, next, 0xDD);
      out[i + 8] = _mm512_shuffle_i32x4(high, last, 0x88);
      out[i + 12] = _mm512_shuffle_i32x4(high, last, 0xDD);
    }
  }
};

}  // namespace
}  // namespace llmc
