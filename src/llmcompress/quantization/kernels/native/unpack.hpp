// Codes of 2 to 8 bits as bytes.
#pragma once

#include <string.h>

#include <cstdint>

#include "unrolled.hpp"

namespace llmc {
namespace {

// Eight codes of at most 8 bits, the first at the lowest byte, from `left` bytes or more: no byte beyond is read.
template <class Set>
LLMC_INLINED uint64_t eight_codes(const uint8_t* from, int64_t bits, int64_t left) {
  uint64_t word = 0;
  // Of a length that is known, which is two instructions and not a call.
  if (left >= 8)
    memcpy(&word, from, 8);
  else
    memcpy(&word, from, left);
  return Set::deposit(word, ((uint64_t{1} << bits) - 1) * 0x0101010101010101, bits);
}

// Writes `count` codes of a row. Reads no byte beyond the last code's; writes up to 7 bytes more than `count`.
template <class Set>
void unpack_row(const uint8_t* row, int64_t bits, int64_t count, uint8_t* codes) {
  if (bits == 8) {
    memcpy(codes, row, count);
    return;
  }
  const int64_t bytes = (count * bits + 7) / 8;
  int64_t done = bits == 4 ? Set::unpack_nibbles(row, count, codes) : Set::unpack_odd(row, bits, count, bytes, codes);
  // Eight codes are `bits` bytes, which a word holds.
  for (; done < count; done += 8) {
    const int64_t at = done / 8 * bits;
    const uint64_t word = eight_codes<Set>(row + at, bits, bytes - at);
    memcpy(codes + done, &word, 8);
  }
}

}  // namespace
}  // namespace llmc
