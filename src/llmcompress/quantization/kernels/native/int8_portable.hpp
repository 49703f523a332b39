// Tiles of int8 products in plain C++.
#pragma once

#include <string.h>

#include "portable.hpp"

namespace llmc {
namespace {

struct Int8Portable : Portable {
  static constexpr int rows = 2, registers = 1;
  static constexpr bool sums_in_16_bits = false;
  using Code = uint8_t;
  static constexpr int32_t code_shift = 0;
  struct Four {
    uint8_t at[4];
  };
  struct Codes {
    int8_t at[4 * lanes];
  };

  static Floats min(const Floats& a, const Floats& b) {  // of NaN and another: the second
    return each<Floats>([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
  }
  using Portable::max;
  static Floats max(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
  }
  // Rounded once, as the instructions do, but for sums within 2^-53 of the middle of two floats.
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) {
      const double product = static_cast<double>(a.at[i]) * static_cast<double>(b.at[i]);
      return static_cast<float>(product + static_cast<double>(c.at[i]));
    });
  }
  static Ints splat_ints(int32_t v) {
    return each<Ints>([=](int) { return v; });
  }
  static Ints load_ints(const int32_t* v) { return load(static_cast<const void*>(v)); }
  static Ints min(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.at[i] < b.at[i] ? a.at[i] : b.at[i]; });
  }
  static Ints add(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.at[i] + b.at[i]; });
  }

  static void store_codes(Code* to, const Ints& v) {
    for (int i = 0; i < lanes; ++i) to[i] = static_cast<Code>(v.at[i] < 0 ? 0 : v.at[i] > 255 ? 255 : v.at[i]);
  }
  static Four four_codes(const Code* at) {
    Four four;
    memcpy(four.at, at, sizeof four.at);
    return four;
  }
  static Codes load_codes(const int8_t* at) {
    Codes codes;
    memcpy(codes.at, at, sizeof codes.at);
    return codes;
  }
  static Ints dot(const Ints& sum, const Four& a, const Codes& w) {
    return each<Ints>([&](int i) {
      int32_t own = sum.at[i];
      for (int k = 0; k < 4; ++k) own += a.at[k] * w.at[4 * i + k];
      return own;
    });
  }
  static Ints dot_twice(const Ints& sum, const Four& a, const Codes& w, const Four& b, const Codes& v) {
    return dot(dot(sum, a, w), b, v);
  }
};

}  // namespace
}  // namespace llmc
