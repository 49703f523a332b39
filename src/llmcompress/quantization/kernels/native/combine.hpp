// Sums and products of two arrays, number by number.
#pragma once

#include <cstdint>

#include "activations.hpp"
#include "parallel.hpp"

namespace llmc {
namespace {

// y = a + b, or a * b; y may be one of them. The compiler makes vectors of it, with the flags of each set.
template <class Set>
void combine(bool product, const float* a, const float* b, int64_t count, float* y, int64_t threads) {
  parallel_for(count, kFewFloats, threads, [&](int64_t begin, int64_t end) {
    if (product) {
      for (int64_t k = begin; k < end; ++k) y[k] = a[k] * b[k];
    } else {
      for (int64_t k = begin; k < end; ++k) y[k] = a[k] + b[k];
    }
  });
}

}  // namespace
}  // namespace llmc
