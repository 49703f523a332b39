// Activations as codes from 0 to `levels`, the very ones of `int8.py`: one scale for all rows, one a row, or a stored one.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "activations.hpp"
#include "int8_weight.hpp"
#include "parallel.hpp"

namespace llmc {

namespace {

// The lowest and the highest value, 0 among them; both NaN where a value is not finite.
struct Ends {
  float low = 0, high = 0;

  void see(const Ends& other) {
    if (other.low < low || other.low != other.low) low = other.low;
    if (other.high > high || other.high != other.high) high = other.high;
  }
};

// Calls f(place, vector) on all of a row; the last vector has zeros past the end.
template <class Set, class F>
void each_vector(const float* x, int64_t columns, F f) {
  int64_t k = 0;
  for (; k + Set::lanes <= columns; k += Set::lanes) f(k, Set::load(x + k));
  if (k == columns) return;
  float rest[Set::lanes] = {};
  memcpy(rest, x + k, static_cast<size_t>(columns - k) * sizeof(float));
  f(k, Set::load(rest));
}

// 0, or NaN if one of the lanes is.
template <class Set>
float total(typename Set::Floats v) {
  float values[Set::lanes], sum = 0;
  Set::store(values, v);
  for (float value : values) sum += value;
  return sum;
}

template <class Set>
Ends ends_of(const float* x, int64_t count) {
  const auto none = Set::splat(0);
  auto low = none, high = none, odd = none;
  each_vector<Set>(x, count, [&](int64_t, typename Set::Floats v) {
    low = Set::min(low, v), high = Set::max(high, v);
    odd = Set::fma(v, none, odd);  // 0, and NaN from the first infinity or NaN on
  });
  if (total<Set>(odd) != 0) return {NAN, NAN};
  float lows[Set::lanes], highs[Set::lanes];
  Set::store(lows, low), Set::store(highs, high);
  Ends ends;
  for (int i = 0; i < Set::lanes; ++i) ends.see({lows[i], highs[i]});
  return ends;
}

// Finds the unit and the zero with which the codes cover all of `x`; the unit is NaN where a value is not finite.
template <class Set>
void find_range(const float* x, int64_t count, int64_t threads, Coding* coding) {
  constexpr int64_t most = 64;
  Ends parts[most], all;
  const int64_t wanted = count <= kFewFloats ? 1 : threads < most ? threads : most;
  const int64_t part = (count + wanted - 1) / wanted;
  parallel_for(wanted, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && i * part < count; ++i)
      parts[i] = ends_of<Set>(x + i * part, count - i * part < part ? count - i * part : part);
  });
  for (int64_t i = 0; i < wanted; ++i) all.see(parts[i]);
  const float levels = static_cast<float>(coding->levels), unit = (all.high - all.low) / levels;
  coding->unit = unit < kTiny ? kTiny : unit;
  const float zero = nearbyintf(-all.low / coding->unit);
  coding->zero = static_cast<int32_t>(zero >= levels ? levels : zero >= 0 ? zero : 0);  // 0 for NaN
}

// Codes a row, less `Set::code_shift`; returns what a step is worth, NaN for a row that has no codes.
template <class Set>
float code_int8_row(const float* x, int64_t columns, const Coding& coding, typename Set::Code* codes) {
  using Floats = typename Set::Floats;
  if (coding.grain == Grain::stored) {
    const auto none = Set::splat(0), most = Set::splat(static_cast<float>(coding.levels));
    const auto zero = Set::splat(static_cast<float>(coding.zero)), inverse = Set::splat(1 / coding.unit);
    const auto shift = Set::splat_ints(-Set::code_shift);
    auto odd = none;
    each_vector<Set>(x, columns, [&](int64_t k, Floats v) {
      const auto code = Set::min(most, Set::max(none, Set::fma(v, inverse, zero)));  // NaN stays, being the second
      odd = Set::fma(code, none, odd);
      Set::store_codes(codes + k, Set::add(Set::round(code), shift));
    });
    return total<Set>(odd) != 0 ? NAN : coding.unit;
  }
  const auto zero = Set::splat_ints(coding.zero - Set::code_shift);
  const auto most = Set::splat_ints(coding.levels - Set::code_shift);
  const auto write = [&](int64_t k, Floats steps) {
    Set::store_codes(codes + k, Set::min(Set::add(Set::round(steps), zero), most));
  };
  float unit = coding.unit, top = 0;
  if (coding.grain == Grain::token) {
    top = largest<Set>(x, columns);
    top = top < kTiny ? kTiny : top;
    unit = top < INFINITY ? top / static_cast<float>(coding.levels / 2) : NAN;
  }
  if (unit != unit) {
    memset(codes, coding.zero - Set::code_shift, static_cast<size_t>(columns));
  } else if (coding.grain == Grain::token) {
    const Quotients<Set> quotients(top);
    const auto steps = Set::splat(static_cast<float>(coding.levels / 2));
    each_vector<Set>(x, columns, [&](int64_t k, Floats v) { write(k, Set::mul(quotients.of(v), steps)); });
  } else {
    const auto inverse = Set::splat(1 / unit);
    each_vector<Set>(x, columns, [&](int64_t k, Floats v) { write(k, Set::mul(v, inverse)); });
  }
  return unit;
}

}  // namespace
}  // namespace llmc
