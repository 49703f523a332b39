// The trait of NEON with the dot product of bytes.
#pragma once

#include <arm_neon.h>
#include <string.h>

#include <cstdint>

namespace llmc {
namespace {

struct NeonDot {
  static constexpr int lanes = 4;
  using Floats = float32x4_t;
  using Ints = int32x4_t;

  static Ints zero_ints() { return vdupq_n_s32(0); }
  static Floats splat(float x) { return vdupq_n_f32(x); }
  static Floats load(const float* x) { return vld1q_f32(x); }
  static void store(int32_t* to, Ints v) { vst1q_s32(to, v); }
  static Ints max(Ints a, Ints b) { return vmaxq_s32(a, b); }
  static Ints magnitude_bits(Floats x) { return vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7FFFFFFF)); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Ints round(Floats x) { return vcvtnq_s32_f32(x); }
  static void store_bytes(int8_t* to, Ints v) {
    const int16x4_t words = vqmovn_s32(v);
    const int8x8_t bytes = vqmovn_s16(vcombine_s16(words, words));
    memcpy(to, &bytes, 4);
  }
};

}  // namespace
}  // namespace llmc
