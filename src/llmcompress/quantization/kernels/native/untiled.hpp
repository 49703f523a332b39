// What a set says that multiplies row by row; sets that have tiles of many rows say otherwise.
#pragma once

#include <cstdint>

namespace llmc {
namespace {

struct Untiled {
  static constexpr bool tiled = false;
  // Whether `fma` rounds once.
  static constexpr bool fused = true;
  // Fours of int8 inputs that are multiplied at once, and rows behind the last one that are read.
  static constexpr int64_t depth = 2, beyond = 0;
  // Of activations' codes, for which the second-level cache has room.
  static constexpr int64_t block_bytes = 192 << 10;
  // What a thread holds while it multiplies by tiles.
  struct Session {
    Session() {}
  };
};

}  // namespace
}  // namespace llmc
