// Codes of activations: one scale a row, as `int8.rounded_activations(x, "token")` has them.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "parallel.hpp"

namespace llmc {
namespace {

// Below this many floats a second thread costs more than it saves.
constexpr int64_t kFewFloats = 1 << 14;
constexpr float kTiny = 1.17549435e-38F;

// The largest magnitude of a row. Magnitudes are compared by their bits, by which NaN is larger than all else.
template <class Set>
float largest(const float* x, int64_t columns) {
  auto most = Set::zero_ints();
  int64_t k = 0;
  for (; k + Set::lanes <= columns; k += Set::lanes) most = Set::max(most, Set::magnitude_bits(Set::load(x + k)));
  int32_t bits[Set::lanes], top = 0;
  Set::store(bits, most);
  for (int32_t own : bits) top = own > top ? own : top;
  for (; k < columns; ++k) {
    int32_t own;
    memcpy(&own, x + k, sizeof own);
    own &= 0x7FFFFFFF;
    top = own > top ? own : top;
  }
  float value;
  memcpy(&value, &top, sizeof value);
  return value;
}

// Writes round(x / largest * limit), ties to even, and returns what one step is worth: NaN for a row that holds an
// infinity or NaN, whose codes are then 0.
template <class Set>
float code_row(const float* x, int64_t columns, int64_t limit, int8_t* codes) {
  float top = largest<Set>(x, columns);
  if (!(top < INFINITY)) {
    for (int64_t k = 0; k < columns; ++k) codes[k] = 0;
    return NAN;
  }
  top = top < kTiny ? kTiny : top;
  const float steps = static_cast<float>(limit);
  const auto divisor = Set::splat(top), factor = Set::splat(steps);
  int64_t k = 0;
  for (; k + Set::lanes <= columns; k += Set::lanes)
    Set::store_bytes(codes + k, Set::round(Set::mul(Set::div(Set::load(x + k), divisor), factor)));
  for (; k < columns; ++k) codes[k] = static_cast<int8_t>(nearbyintf(x[k] / top * steps));
  return top / steps;
}

float sum_of(const int8_t* codes, int64_t count) {
  int32_t sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += codes[k];
  return static_cast<float>(sum);
}

template <class Set>
void code_rows(const float* x, int64_t rows, int64_t columns, int64_t limit, int8_t* codes, float* unit,
               int64_t threads) {
  const int64_t grain = columns ? 1 + kFewFloats / columns : rows;
  parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      unit[row] = code_row<Set>(x + row * columns, columns, limit, codes + row * columns);
  });
}

}  // namespace
}  // namespace llmc
