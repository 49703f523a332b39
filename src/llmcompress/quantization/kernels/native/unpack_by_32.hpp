// Codes of any width below 8 as bytes, with what AVX2 has; AVX-512 has it too.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace llmc {
namespace {

// Thirty-two codes at a time, of any width below 8. Each lies in a word of two bytes: multiplied to the upper one, it
// is moved down. Reads no byte of a row's `bytes` and beyond.
inline int64_t unpack_by_32(const uint8_t* row, int64_t bits, int64_t count, int64_t bytes, uint8_t* codes) {
  uint8_t place[2][32];
  uint16_t factor[16];
  for (int i = 0; i < 32; ++i) {
    const int64_t word = i / 2 % 8;
    for (int half = 0; half < 2; ++half) place[half][i] = static_cast<uint8_t>((half * 8 + word) * bits / 8 + i % 2);
    factor[i / 2] = static_cast<uint16_t>(1 << (8 - word * bits % 8));
  }
  const auto read = [](const void* at) { return _mm256_loadu_si256(static_cast<const __m256i*>(at)); };
  const __m256i first = read(place[0]), second = read(place[1]), factors = read(factor);
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << bits) - 1));
  int64_t k = 0;
  for (; k + 32 <= count && (k / 8 + 2) * bits + 16 <= bytes; k += 32) {
    const auto* at = reinterpret_cast<const __m128i*>(row + k / 8 * bits);
    const auto* next = reinterpret_cast<const __m128i*>(row + (k / 8 + 2) * bits);
    const __m256i v = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(at)), _mm_loadu_si128(next), 1);
    const __m256i a = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(v, first), factors), 8);
    const __m256i b = _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(v, second), factors), 8);
    const __m256i both = _mm256_and_si256(_mm256_packus_epi16(a, b), mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + k), both);
  }
  return k;
}

}  // namespace
}  // namespace llmc
