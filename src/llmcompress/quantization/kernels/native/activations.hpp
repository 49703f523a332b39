// Codes of activations: one scale a row, as `int8.rounded_activations(x, "token")` has them.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "parallel.hpp"
#include "unrolled.hpp"

namespace llmc {
namespace {

// Below this many floats a second thread costs more than it saves.
constexpr int64_t kFewFloats = 1 << 14;
constexpr float kTiny = 1.17549435e-38F;

// The largest magnitude of a row. Magnitudes are compared by their bits, by which NaN is larger than all else.
template <class Set>
float largest(const float* x, int64_t columns) {
  // Several, that do not wait for one another.
  constexpr int chains = 4;
  typename Set::Ints parts[chains];
  for (auto& part : parts) part = Set::zero_ints();
  int64_t k = 0;
  for (; k + chains * Set::lanes <= columns; k += chains * Set::lanes)
    unrolled<chains>([&](auto c) LLMC_INLINE {
      parts[c] = Set::max(parts[c], Set::magnitude_bits(Set::load(x + k + c * Set::lanes)));
    });
  auto most = Set::max(Set::max(parts[0], parts[1]), Set::max(parts[2], parts[3]));
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

// Numbers divided by one and the same, rounded as a division rounds them: a product with the inverse, corrected twice by
// what it leaves of the number (Markstein 1990). A division takes as long as a dozen of these steps.
template <class Set>
class Quotients {
 public:
  // The divisor is positive and finite. Where it is very small or large, what is left may be too small for a float.
  explicit Quotients(float divisor)
      : divided_(!Set::fused || divisor < 0x1p-60F || divisor > 0x1p100F), divisor_(Set::splat(divisor)),
        inverse_(Set::splat(1 / divisor)) {}

  typename Set::Floats of(typename Set::Floats x) const {
    if (divided_) return Set::div(x, divisor_);
    auto quotient = Set::mul(x, inverse_);
    quotient = Set::fma(Set::fnma(quotient, divisor_, x), inverse_, quotient);
    return Set::fma(Set::fnma(quotient, divisor_, x), inverse_, quotient);
  }

 private:
  const bool divided_;
  const typename Set::Floats divisor_, inverse_;
};

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
  const Quotients<Set> quotients(top);
  const auto factor = Set::splat(steps);
  int64_t k = 0;
  for (; k + Set::lanes <= columns; k += Set::lanes)
    Set::store_bytes(codes + k, Set::round(Set::mul(quotients.of(Set::load(x + k)), factor)));
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
