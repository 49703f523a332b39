// Tiles of int8 products with NEON's dot product of signed bytes: codes of activations are kept less 128.
#pragma once

#include "neon_dot.hpp"

namespace llmc {
namespace {

struct Int8NeonDot : NeonDot {
  static constexpr int rows = 5, registers = 4;
  static constexpr bool sums_in_16_bits = false;
  using Code = int8_t;
  static constexpr int32_t code_shift = 128;

  static Floats min(Floats a, Floats b) { return vminq_f32(a, b); }  // of NaN and another: NaN
  using NeonDot::max;
  static Floats max(Floats a, Floats b) { return vmaxq_f32(a, b); }
  static Ints splat_ints(int32_t v) { return vdupq_n_s32(v); }
  static Ints load_ints(const int32_t* v) { return vld1q_s32(v); }
  static Ints min(Ints a, Ints b) { return vminq_s32(a, b); }
  static Ints add(Ints a, Ints b) { return vaddq_s32(a, b); }

  static void store_codes(Code* to, Ints v) { store_bytes(to, v); }
  static int8x16_t four_codes(const Code* at) { return vreinterpretq_s8_s32(splat_four(at)); }
  static int8x16_t load_codes(const int8_t* at) { return vld1q_s8(at); }
  static Ints dot(Ints sum, int8x16_t a, int8x16_t w) { return vdotq_s32(sum, a, w); }
  static Ints dot_twice(Ints sum, int8x16_t a, int8x16_t w, int8x16_t b, int8x16_t v) { return dot(dot(sum, a, w), b, v); }
};

}  // namespace
}  // namespace llmc
