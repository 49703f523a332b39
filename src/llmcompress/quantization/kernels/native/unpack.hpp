// Codes of 2 to 8 bits as bytes.
#pragma once

#include <string.h>

#include <cstdint>

namespace llmc {
namespace {

// Writes `count` codes of a row. Reads no byte beyond the last code's; writes up to 7 bytes more than `count`.
template <class Set>
void unpack_row(const uint8_t* row, int64_t bits, int64_t count, uint8_t* codes) {
  if (bits == 8) {
    memcpy(codes, row, count);
    return;
  }
  int64_t done = bits == 4 ? Set::unpack_nibbles(row, count, codes) : 0;
  const int64_t bytes = (count * bits + 7) / 8;
  const uint64_t places = ((uint64_t{1} << bits) - 1) * 0x0101010101010101;
  // Eight codes are `bits` bytes, which a word holds.
  for (; done < count; done += 8) {
    const int64_t at = done / 8 * bits;
    uint64_t word = 0;
    if (bytes - at >= 8)
      memcpy(&word, row + at, 8);
    else
      memcpy(&word, row + at, bytes - at);
    word = Set::deposit(word, places, bits);
    memcpy(codes + done, &word, 8);
  }
}

}  // namespace
}  // namespace llmc
