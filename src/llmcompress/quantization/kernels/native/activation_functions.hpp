// GELU and SiLU. Each is x times a gate of x that goes from 0 to 1, and so (x + |x| s(|x|)) / 2 with a curve s that goes
// from 0 to 1: of large |x| the result is exactly x or 0.
//
// The curves are quotients of polynomials, within 5e-7: those of Eigen's erf and tanh for floats.
#pragma once

#include <string.h>

#include <cstdint>

#include "activations.hpp"
#include "parallel.hpp"

namespace llmc {
namespace {

// The numbers are those that `between.py` passes.
enum class Gate : int64_t { gelu = 0, gelu_tanh = 1, silu = 2 };

template <class Set, int count>
typename Set::Floats polynomial(typename Set::Floats z, const float (&factors)[count]) {
  auto sum = Set::splat(factors[0]);
  for (int i = 1; i < count; ++i) sum = Set::fma(sum, z, Set::splat(factors[i]));
  return sum;
}

// A curve that comes within rounding of 1 at `nearly` and is 1 at `end`; a is not negative.
template <class Set, int above, int below>
typename Set::Floats curve(typename Set::Floats a, float nearly, float end, const float (&over)[above],
                           const float (&under)[below]) {
  a = Set::min(a, Set::splat(end));
  const auto z = Set::mul(a, a);
  const auto value = Set::div(Set::mul(a, polynomial<Set>(z, over)), polynomial<Set>(z, under));
  // What is rounded to a little less than 1 would be multiplied by any |x|.
  const auto past = Set::max(Set::sub(a, Set::splat(nearly)), Set::splat(0));
  return Set::min(Set::fma(past, Set::splat(1e-5F), value), Set::splat(1));
}

template <class Set>
typename Set::Floats erf_of(typename Set::Floats a) {
  return curve<Set>(a, 3.8F, 4.0F,
                    {-2.72614225801306e-10F, 2.77068142495902e-08F, -2.10102402082508e-06F, -5.69250639462346e-05F,
                     -7.34990630326855e-04F, -2.95459980854025e-03F, -1.60960333262415e-02F},
                    {-1.45660718464996e-05F, -2.13374055278905e-04F, -1.68282697438203e-03F, -7.37332916720468e-03F,
                     -1.42647390514189e-02F});
}

template <class Set>
typename Set::Floats tanh_of(typename Set::Floats a) {
  return curve<Set>(a, 7.8F, 7.90531111F,
                    {-2.76076847742355e-16F, 2.00018790482477e-13F, -8.60467152213735e-11F, 5.12229709037114e-08F,
                     1.48572235717979e-05F, 6.37261928875436e-04F, 4.89352455891786e-03F},
                    {1.19825839466702e-06F, 1.18534705686654e-04F, 2.26843463243900e-03F, 4.89352518554385e-03F});
}

template <class Set, Gate gate>
typename Set::Floats gated(typename Set::Floats x) {
  const auto half = Set::splat(0.5F), a = Set::max(Set::sub(Set::splat(0), x), x);
  typename Set::Floats s;
  if constexpr (gate == Gate::gelu) {
    s = erf_of<Set>(Set::mul(a, Set::splat(0.70710678118654752F)));
  } else if constexpr (gate == Gate::gelu_tanh) {
    const auto square = Set::mul(a, a), cubic = Set::fma(square, Set::splat(0.044715F), Set::splat(1));
    s = tanh_of<Set>(Set::mul(Set::mul(a, Set::splat(0.79788456080286536F)), cubic));
  } else {
    s = tanh_of<Set>(Set::mul(a, half));
  }
  // Halves before the sum: that of two large numbers is no number any more.
  return Set::fma(Set::mul(half, a), s, Set::mul(half, x));
}

template <class Set, Gate gate>
void activate_range(const float* x, int64_t count, float* y) {
  int64_t k = 0;
  for (; k + Set::lanes <= count; k += Set::lanes) Set::store(y + k, gated<Set, gate>(Set::load(x + k)));
  if (k == count) return;
  float rest[Set::lanes] = {};
  const size_t bytes = static_cast<size_t>(count - k) * sizeof(float);
  memcpy(rest, x + k, bytes);
  Set::store(rest, gated<Set, gate>(Set::load(rest)));
  memcpy(y + k, rest, bytes);
}

// y = gate(x), both `count` floats.
template <class Set>
void activate(int64_t gate, const float* x, int64_t count, float* y, int64_t threads) {
  parallel_for(count, kFewFloats, threads, [&](int64_t begin, int64_t end) {
    const auto run = gate == static_cast<int64_t>(Gate::gelu)        ? activate_range<Set, Gate::gelu>
                     : gate == static_cast<int64_t>(Gate::gelu_tanh) ? activate_range<Set, Gate::gelu_tanh>
                                                                     : activate_range<Set, Gate::silu>;
    run(x + begin, end - begin, y + begin);
  });
}

}  // namespace
}  // namespace llmc
