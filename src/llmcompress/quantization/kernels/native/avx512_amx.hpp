// The trait of AVX-512 with AMX, whose tiles take whole numbers and bfloat16.
#pragma once

#include "amx.hpp"
#include "avx512_vnni.hpp"

namespace llmc {
namespace {

struct Avx512Amx : Avx512Vnni {
  static constexpr bool tiled = true;
  static constexpr int64_t depth = Amx::side, beyond = Amx::side - 1;
  using Session = Amx;

  // Sixty-four codes at a time, of any width below 8: eight codes' bytes go to eight bytes, and each code to its own.
  static int64_t unpack_odd(const uint8_t* row, int64_t bits, int64_t count, int64_t bytes, uint8_t* codes) {
    uint8_t place[64], shift[64];
    for (int i = 0; i < 64; ++i) {
      place[i] = static_cast<uint8_t>(i / 8 * bits + (i % 8 < bits ? i % 8 : 0));
      shift[i] = static_cast<uint8_t>(i % 8 * bits);
    }
    const Ints places = load(static_cast<const void*>(place)), shifts = load(static_cast<const void*>(shift));
    const Ints mask = _mm512_set1_epi8(static_cast<char>((1 << bits) - 1));
    int64_t k = 0;
    for (; k + 64 <= count && k / 8 * bits + 64 <= bytes; k += 64) {
      const Ints eights = _mm512_permutexvar_epi8(places, load(static_cast<const void*>(row + k / 8 * bits)));
      store(static_cast<void*>(codes + k), _mm512_and_si512(_mm512_multishift_epi64_epi8(shifts, eights), mask));
    }
    return k;
  }
  static Floats as_floats(Ints v) { return _mm512_castsi512_ps(v); }
  static Floats load_bytes(const uint8_t* x) {
    return to_floats(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
  }
  // To the second-level cache.
  static void prefetch_far(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T1); }
  // 32 bytes as words.
  static Ints load_wide(const uint8_t* x) {
    return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  // Of a vector its first `count`.
  static Floats load_some(const float* x, int64_t count) { return _mm512_maskz_loadu_ps(first(count), x); }
  static void store_some(float* to, Floats v, int64_t count) { _mm512_mask_storeu_ps(to, first(count), v); }
  // Two vectors in bfloat16, one behind the other.
  static Ints pairs(Floats low, Floats high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }
  // What the four bits from `place` on choose in each word: of sixteen words in the first half, of sixteen others in the
  // second.
  template <int place>
  static Ints look_up_words(Ints table, Ints words, Ints halves) {
    // The lowest five bits count, of which the fifth tells the half: (words & 15) | halves.
    constexpr int choose = (0xF0 & 0xCC) | 0xAA;
    const Ints own = _mm512_ternarylogic_epi32(_mm512_srli_epi16(words, place), _mm512_set1_epi16(15), halves, choose);
    return _mm512_permutexvar_epi16(own, table);
  }
  static Ints halves() { return _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1); }

 private:
  static __mmask16 first(int64_t count) { return static_cast<__mmask16>(count < lanes ? (1U << count) - 1 : 0xFFFF); }
};

}  // namespace
}  // namespace llmc
