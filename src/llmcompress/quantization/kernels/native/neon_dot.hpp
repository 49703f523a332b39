// The trait of NEON with the dot product of bytes; that of AVX2 says what each function is for.
#pragma once

#include <arm_neon.h>
#include <string.h>

#include <cstdint>

#include "unrolled.hpp"
#include "untiled.hpp"

namespace llmc {
namespace {

struct NeonDot : Untiled {
  // The dot product is of signed bytes: codes of 8 bits are moved to where those are.
  static constexpr int lanes = 4, byte_limit = 127, bias = 128;
  using Floats = float32x4_t;
  using Ints = int32x4_t;
  using Partial = int32x4_t;

  static uint8x16_t bytes(Ints v) { return vreinterpretq_u8_s32(v); }
  static Ints ints(uint8x16_t v) { return vreinterpretq_s32_u8(v); }

  static Ints zero_ints() { return vdupq_n_s32(0); }
  static Floats zero_floats() { return vdupq_n_f32(0); }
  static Floats splat(float x) { return vdupq_n_f32(x); }
  static Floats load(const float* x) { return vld1q_f32(x); }
  static Ints load(const void* x) { return ints(vld1q_u8(static_cast<const uint8_t*>(x))); }
  LLMC_INLINED static void prefetch(const void* x) {
#if !defined(_MSC_VER)
    __builtin_prefetch(x);
#endif
  }
  static void store(void* to, Ints v) { vst1q_u8(static_cast<uint8_t*>(to), bytes(v)); }
  static void store(float* to, Floats v) { vst1q_f32(to, v); }
  static Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
  static Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats fnma(Floats a, Floats b, Floats c) { return vfmsq_f32(c, a, b); }
  static Floats to_floats(Ints v) { return vcvtq_f32_s32(v); }
  static void store_eight(float* to, uint64_t bytes, float unit, float bias) {
    const uint16x8_t words = vmovl_u8(vcreate_u8(bytes));
    const Floats low = vcvtq_f32_u32(vmovl_u16(vget_low_u16(words)));
    const Floats high = vcvtq_f32_u32(vmovl_u16(vget_high_u16(words)));
    store(to, sub(mul(low, splat(unit)), splat(bias)));
    store(to + 4, sub(mul(high, splat(unit)), splat(bias)));
  }
  static Floats load_halves(const uint16_t* x) {
    return vcvt_f32_f16(vld1_f16(reinterpret_cast<const float16_t*>(x)));
  }

  static Ints max(Ints a, Ints b) { return vmaxq_s32(a, b); }
  static Ints magnitude_bits(Floats x) { return vandq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32(0x7FFFFFFF)); }
  static Ints round(Floats x) { return vcvtnq_s32_f32(x); }
  static void store_bytes(int8_t* to, Ints v) {
    const int16x4_t words = vqmovn_s32(v);
    const int8x8_t narrow = vqmovn_s16(vcombine_s16(words, words));
    memcpy(to, &narrow, 4);
  }

  template <int width>
  static Ints byte_field(Ints v, int f) {
    if constexpr (width == 8) return v;
    const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(-width * f));
    return ints(vandq_u8(vshlq_u8(bytes(v), shift), vdupq_n_u8((1 << width) - 1)));
  }
  template <int width>
  static Ints lane_field(Ints v, int j) {
    const uint32x4_t moved = vshlq_u32(vreinterpretq_u32_s32(v), vdupq_n_s32(-width * j));
    return vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32((1U << width) - 1)));
  }
  static Ints load_table(const uint8_t* sixteen) { return load(static_cast<const void*>(sixteen)); }
  static Ints look_up(Ints table, Ints codes) { return ints(vqtbl1q_u8(bytes(table), bytes(codes))); }
  static Floats look_up(const float* sixteen, Ints codes) {
    int32_t at[4];
    vst1q_s32(at, codes);
    const float values[4] = {sixteen[at[0]], sixteen[at[1]], sixteen[at[2]], sixteen[at[3]]};
    return vld1q_f32(values);
  }
  static int64_t unpack_nibbles(const uint8_t* row, int64_t count, uint8_t* codes) {
    int64_t k = 0;
    for (; k + 32 <= count; k += 32) {
      const uint8x16_t v = vld1q_u8(row + k / 2);
      const uint8x16_t even = vandq_u8(v, vdupq_n_u8(15)), odd = vshrq_n_u8(v, 4);
      vst1q_u8(codes + k, vzip1q_u8(even, odd));
      vst1q_u8(codes + k + 16, vzip2q_u8(even, odd));
    }
    return k;
  }
  static int64_t unpack_odd(const uint8_t*, int64_t, int64_t, int64_t, uint8_t*) { return 0; }
  static uint64_t deposit(uint64_t word, uint64_t, int64_t bits) {
    uint64_t codes = 0;
    for (int i = 0; i < 8; ++i) codes |= (word >> (i * bits) & ((uint64_t{1} << bits) - 1)) << (8 * i);
    return codes;
  }

  static Partial zero_partial() { return vdupq_n_s32(0); }
  template <bool large>
  static Partial mac(Partial sum, Ints codes, Ints x) {
    const uint8x16_t own = large ? veorq_u8(bytes(codes), vdupq_n_u8(128)) : bytes(codes);
    return vdotq_s32(sum, vreinterpretq_s8_u8(own), vreinterpretq_s8_s32(x));
  }
  static Ints fold(Ints sum, Partial part) { return vaddq_s32(sum, part); }
  static Ints splat_four(const int8_t* x) {
    int32_t four;
    memcpy(&four, x, sizeof four);
    return vdupq_n_s32(four);
  }

  static Floats gather(const float* near, Ints places) {
    int32_t at[4];
    vst1q_s32(at, places);
    const float values[4] = {near[at[0]], near[at[1]], near[at[2]], near[at[3]]};
    return vld1q_f32(values);
  }
  static float sum(Floats v) { return vaddvq_f32(v); }
  static void transpose(const uint8_t* rows, int64_t stride, Ints* out) {
    int32_t turned[4][4];
    for (int r = 0; r < 4; ++r)
      for (int i = 0; i < 4; ++i) memcpy(&turned[i][r], rows + r * stride + 4 * i, 4);
    for (int i = 0; i < 4; ++i) out[i] = vld1q_s32(turned[i]);
  }
};

}  // namespace
}  // namespace llmc
