#include "kept.hpp"

#include <cstdlib>

#include "no_memory.hpp"

namespace llmc {
namespace {

struct Memory {
  void* start = nullptr;
  int64_t bytes = 0;
  ~Memory() { std::free(start); }
};

}  // namespace

void* kept_memory(Kept what, int64_t bytes) {
  static thread_local Memory all[2];
  Memory& own = all[static_cast<int>(what)];
  if (bytes > own.bytes) {
    std::free(own.start);
    own.start = std::malloc(static_cast<size_t>(bytes));
    own.bytes = own.start ? bytes : 0;
    if (!own.start) throw NoMemory{};
  }
  return own.start;
}

}  // namespace llmc
