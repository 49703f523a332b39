// The trait of an instruction set, in plain C++: what the others are measured against. Eight lanes, as AVX2 has.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

namespace llmc {
namespace {

struct Portable {
  static constexpr int lanes = 8;
  struct Floats {
    float at[lanes];
  };
  struct Ints {
    int32_t at[lanes];
  };

  template <class V, class F>
  static V each(F f) {
    V v;
    for (int i = 0; i < lanes; ++i) v.at[i] = f(i);
    return v;
  }

  static Ints zero_ints() { return each<Ints>([](int) { return 0; }); }
  static Floats splat(float x) { return each<Floats>([=](int) { return x; }); }
  static Floats load(const float* x) { return each<Floats>([=](int i) { return x[i]; }); }
  static void store(int32_t* to, const Ints& v) { memcpy(to, v.at, sizeof v.at); }
  static Ints max(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
  }
  static Ints magnitude_bits(const Floats& x) {
    Ints bits;
    memcpy(&bits, &x, sizeof bits);
    return each<Ints>([&](int i) { return bits.at[i] & 0x7FFFFFFF; });
  }
  static Floats mul(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.at[i] * b.at[i]; });
  }
  static Floats div(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.at[i] / b.at[i]; });
  }
  static Ints round(const Floats& x) {
    return each<Ints>([&](int i) { return static_cast<int32_t>(nearbyintf(x.at[i])); });
  }
  static void store_bytes(int8_t* to, const Ints& v) {
    for (int i = 0; i < lanes; ++i) to[i] = static_cast<int8_t>(v.at[i]);
  }
};

}  // namespace
}  // namespace llmc
