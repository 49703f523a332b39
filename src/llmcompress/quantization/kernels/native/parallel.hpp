// Loops over the threads that torch has: the OpenMP runtime is the one torch has loaded, told once by the loader.
#pragma once

#include <cstdint>
#include <type_traits>

#include "no_memory.hpp"

namespace llmc {

// Returns whether there was memory.
using Body = bool (*)(void* context, int64_t begin, int64_t end);

// Calls body on ranges of at most `grain` items that together are [0, items), on at most `threads` threads: the runtime
// is asked for either all of them or none, since libgomp ends the threads that a smaller team leaves out. Returns whether
// all of them had memory; where one had none, not all ranges are done.
bool parallel_ranges(int64_t items, int64_t grain, int64_t threads, Body body, void* context);

// Throws NoMemory where the body does, on whatever thread.
template <class F>
void parallel_for(int64_t items, int64_t grain, int64_t threads, F&& f) {
  using Plain = std::remove_reference_t<F>;
  const Body body = [](void* context, int64_t begin, int64_t end) {
    try {
      (*static_cast<Plain*>(context))(begin, end);
    } catch (const NoMemory&) {
      return false;
    }
    return true;
  };
  if (!parallel_ranges(items, grain, threads, body, const_cast<void*>(static_cast<const void*>(&f)))) throw NoMemory{};
}

namespace {

// Items of a turn, where each thread takes several turns: the last one to end keeps nobody waiting for long.
inline int64_t share(int64_t items, int64_t threads, int64_t least) {
  constexpr int64_t turns = 6;
  const int64_t own = items / (threads * turns);
  return own > least ? own : least;
}

}  // namespace
}  // namespace llmc
