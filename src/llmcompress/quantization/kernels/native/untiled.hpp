// What a set says that multiplies row by row; sets that have tiles of many rows say otherwise.
#pragma once

#include <cstdint>

namespace llmc {
namespace {

struct Untiled {
  static constexpr bool tiled = false;
  // Fours of int8 inputs that are multiplied at once, and rows behind the last one that are read.
  static constexpr int64_t depth = 2, beyond = 0;
  // How many of `fours` a tile takes at a time, so that they come out even; 0 where they do not.
  static int64_t depth_of(int64_t) { return 0; }
  // What a thread holds while it multiplies by tiles of that depth.
  struct Session {
    explicit Session(int64_t) {}
  };
};

}  // namespace
}  // namespace llmc
