// Memory for the length of a call.
#pragma once

#include <stdlib.h>

#include <cstdint>

#include "no_memory.hpp"

namespace llmc {
namespace {

// An array of plain numbers, each of its parts at the start of a cache line if `parts` are multiples of one.
template <class T>
class Scratch {
 public:
  // Zeroed, so that what is read beyond the last number is a number. Throws NoMemory.
  explicit Scratch(int64_t size) : whole_(static_cast<char*>(calloc(size * sizeof(T) + kLine, 1))) {
    if (!whole_) throw NoMemory{};
    const auto past = reinterpret_cast<uintptr_t>(whole_) % kLine;
    start_ = reinterpret_cast<T*>(whole_ + (kLine - past) % kLine);
  }
  ~Scratch() { free(whole_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  operator T*() { return start_; }
  operator const T*() const { return start_; }

 private:
  static constexpr uintptr_t kLine = 64;
  char* whole_;
  T* start_;
};

}  // namespace
}  // namespace llmc
