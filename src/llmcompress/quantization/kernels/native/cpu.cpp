#include "cpu.hpp"

#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define LLMC_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace llmc::cpu {

#if LLMC_X86

namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers identify(uint32_t leaf, uint32_t part) {
  Registers r;
#if defined(_MSC_VER)
  int values[4];
  __cpuid(values, 0);
  if (static_cast<uint32_t>(values[0]) < leaf) return r;
  __cpuidex(values, static_cast<int>(leaf), static_cast<int>(part));
  r = {static_cast<uint32_t>(values[0]), static_cast<uint32_t>(values[1]), static_cast<uint32_t>(values[2]),
       static_cast<uint32_t>(values[3])};
#else
  if (!__get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d)) return {};
#endif
  return r;
}

bool bit(uint32_t word, int place) { return word >> place & 1; }

// The registers that the operating system keeps over a switch of threads: without these an instruction traps.
bool saves(uint64_t state) {
  if (!bit(identify(1, 0).c, 27)) return false;
#if defined(_MSC_VER)
  const uint64_t saved = _xgetbv(0);
#else
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const uint64_t saved = static_cast<uint64_t>(high) << 32 | low;
#endif
  return (saved & state) == state;
}

}  // namespace

bool has_avx2() {
  const auto basic = identify(1, 0);
  const bool fma = bit(basic.c, 12), f16c = bit(basic.c, 29);
  const auto extended = identify(7, 0);
  return saves(0x6) && fma && f16c && bit(extended.b, 5) && bit(extended.b, 8);
}

bool has_avx_vnni() { return has_avx2() && bit(identify(7, 1).a, 4); }

bool has_avx512_vnni() {
  const auto extended = identify(7, 0);
  const bool f = bit(extended.b, 16), dq = bit(extended.b, 17), bw = bit(extended.b, 30), vl = bit(extended.b, 31);
  return saves(0xE6) && has_avx2() && f && dq && bw && vl && bit(extended.c, 11);
}

// Linux gives a process the room for tiles on request only, without which the first one ends it.
bool has_avx512_amx() {
#if defined(__linux__)
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  const auto extended = identify(7, 0);
  const bool tile = bit(extended.d, 24), int8 = bit(extended.d, 25), tile_bf16 = bit(extended.d, 22);
  const bool bf16 = bit(identify(7, 1).a, 5), vbmi = bit(extended.c, 1);
  return has_avx512_vnni() && saves(0x60000) && tile && int8 && tile_bf16 && bf16 && vbmi &&
         syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

bool has_neon_dot() { return false; }

#else

bool has_avx2() { return false; }
bool has_avx_vnni() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512_amx() { return false; }

bool has_neon_dot() {
#if defined(__aarch64__) && defined(__linux__)
  return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__aarch64__) && defined(__APPLE__)
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &value, &size, nullptr, 0) == 0 && value;
#else
  return false;
#endif
}

#endif

}  // namespace llmc::cpu
