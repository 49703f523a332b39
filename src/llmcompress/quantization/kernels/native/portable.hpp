// The trait of an instruction set, in plain C++: what the others are measured against. Eight lanes, as AVX2 has, whose
// trait says what each function is for.
#pragma once

#include <math.h>
#include <string.h>

#include <cstdint>

#include "untiled.hpp"

namespace llmc {
namespace {

struct Portable : Untiled {
  static constexpr int lanes = 8, byte_limit = 127, bias = 0;
  static constexpr bool fused = false;
  struct Floats {
    float at[lanes];
  };
  struct Ints {
    int32_t at[lanes];
  };
  using Partial = Ints;

  template <class V, class F>
  static V each(F f) {
    V v;
    for (int i = 0; i < lanes; ++i) v.at[i] = f(i);
    return v;
  }
  template <class F>
  static Ints each_byte(F f) {
    uint8_t bytes[4 * lanes];
    for (int i = 0; i < 4 * lanes; ++i) bytes[i] = f(i);
    return load(static_cast<const void*>(bytes));
  }

  static Ints zero_ints() { return each<Ints>([](int) { return 0; }); }
  static Floats zero_floats() { return splat(0.0F); }
  static Floats splat(float x) { return each<Floats>([=](int) { return x; }); }
  static Floats load(const float* x) { return each<Floats>([=](int i) { return x[i]; }); }
  static Ints load(const void* x) {
    Ints v;
    memcpy(v.at, x, sizeof v.at);
    return v;
  }
  static void prefetch(const void*) {}
  static void store(void* to, const Ints& v) { memcpy(to, v.at, sizeof v.at); }
  static void store(float* to, const Floats& v) { memcpy(to, v.at, sizeof v.at); }
  static Floats mul(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.at[i] * b.at[i]; });
  }
  static Floats div(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.at[i] / b.at[i]; });
  }
  static Floats sub(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.at[i] - b.at[i]; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return a.at[i] * b.at[i] + c.at[i]; });
  }
  static Floats fnma(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return c.at[i] - a.at[i] * b.at[i]; });
  }
  static Floats to_floats(const Ints& v) {
    return each<Floats>([&](int i) { return static_cast<float>(v.at[i]); });
  }
  static void store_eight(float* to, uint64_t bytes, float unit, float bias) {
    for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(bytes >> (8 * i) & 255) * unit - bias;
  }
  static Floats load_halves(const uint16_t* x) {
    return each<Floats>([=](int i) { return of_half(x[i]); });
  }
  static float of_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, exponent = half >> 10 & 31, part = half & 1023;
    const float small = static_cast<float>(part) * 5.9604644775390625e-8F;  // 2^-24
    uint32_t bits = exponent == 31 ? 0x7F800000 | part << 13 : (exponent + 112) << 23 | part << 13;
    if (exponent == 0) memcpy(&bits, &small, sizeof bits);
    bits |= sign;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }

  static Ints max(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.at[i] > b.at[i] ? a.at[i] : b.at[i]; });
  }
  static Ints magnitude_bits(const Floats& x) {
    Ints bits;
    memcpy(&bits, &x, sizeof bits);
    return each<Ints>([&](int i) { return bits.at[i] & 0x7FFFFFFF; });
  }
  static Ints round(const Floats& x) {
    // What is not a number, or none that an integer holds, has no meaning in C++; processors give the least integer.
    return each<Ints>([&](int i) {
      const float whole = nearbyintf(x.at[i]);
      return whole >= -2147483648.0F && whole < 2147483648.0F ? static_cast<int32_t>(whole) : INT32_MIN;
    });
  }
  static void store_bytes(int8_t* to, const Ints& v) {
    for (int i = 0; i < lanes; ++i) to[i] = static_cast<int8_t>(v.at[i]);
  }

  static uint8_t byte(const Ints& v, int i) {
    uint8_t bytes[4 * lanes];
    memcpy(bytes, v.at, sizeof bytes);
    return bytes[i];
  }
  template <int width>
  static Ints byte_field(const Ints& v, int f) {
    return each_byte([&](int i) { return static_cast<uint8_t>(byte(v, i) >> (width * f) & ((1 << width) - 1)); });
  }
  template <int width>
  static Ints lane_field(const Ints& v, int j) {
    return each<Ints>([&](int i) {
      return static_cast<int32_t>(static_cast<uint32_t>(v.at[i]) >> (width * j) & ((1U << width) - 1));
    });
  }
  static Ints load_table(const uint8_t* sixteen) {
    return each_byte([=](int i) { return sixteen[i % 16]; });
  }
  static Ints look_up(const Ints& table, const Ints& codes) {
    return each_byte([&](int i) { return byte(table, byte(codes, i)); });
  }
  static Floats look_up(const float* sixteen, const Ints& codes) {
    return each<Floats>([&](int i) { return sixteen[codes.at[i]]; });
  }
  static int64_t unpack_nibbles(const uint8_t*, int64_t, uint8_t*) { return 0; }
  static int64_t unpack_odd(const uint8_t*, int64_t, int64_t, int64_t, uint8_t*) { return 0; }
  static uint64_t deposit(uint64_t word, uint64_t, int64_t bits) {
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) codes |= (word >> (i * bits) & ((uint64_t{1} << bits) - 1)) << (8 * i);
    return codes;
  }

  static Partial zero_partial() { return zero_ints(); }
  template <bool large>
  static Partial mac(const Partial& sum, const Ints& codes, const Ints& x) {
    return each<Ints>([&](int lane) {
      int32_t total = sum.at[lane];
      for (int i = 4 * lane; i < 4 * lane + 4; ++i) total += byte(codes, i) * static_cast<int8_t>(byte(x, i));
      return total;
    });
  }
  static Ints fold(const Ints& sum, const Partial& part) {
    return each<Ints>([&](int i) { return sum.at[i] + part.at[i]; });
  }
  static Ints splat_four(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return each<Ints>([=](int) { return four; });
  }

  static Floats gather(const float* near, const Ints& places) {
    return each<Floats>([&](int i) { return near[places.at[i]]; });
  }
  static float sum(const Floats& v) {
    float total = 0;
    for (float own : v.at) total += own;
    return total;
  }
  static void transpose(const uint8_t* rows, int64_t stride, Ints* out) {
    for (int i = 0; i < lanes; ++i)
      for (int r = 0; r < lanes; ++r) memcpy(&out[i].at[r], rows + r * stride + 4 * i, 4);
  }
};

}  // namespace
}  // namespace llmc
