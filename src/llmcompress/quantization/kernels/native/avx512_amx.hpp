// The trait of AVX-512 with AMX.
#pragma once

#include "amx.hpp"
#include "avx512_vnni.hpp"

namespace llmc {
namespace {

struct Avx512Amx : Avx512Vnni {
  static constexpr bool tiled = true;
  static constexpr int64_t depth = Amx::side, beyond = Amx::side - 1;
  using Session = Amx;

  static int64_t depth_of(int64_t fours) { return fours % 16 == 0 ? 16 : fours % 8 == 0 ? 8 : 0; }
};

}  // namespace
}  // namespace llmc
