// Rotary position embeddings (Su et al. 2021, "RoFormer", https://arxiv.org/abs/2104.09864), as Llama has them: the two
// halves of a head are turned against one another.
#pragma once

#include <cstdint>

#include "activations.hpp"
#include "parallel.hpp"

namespace llmc {
namespace {

// y (rows, heads, columns) = x * cosines + (-second half, first half) * sines, those (rows, columns); y is not x. Each
// sum is rounded as torch rounds it. The compiler makes vectors of it, with the flags of each set.
template <class Set>
void rotate(const float* x, const float* cosines, const float* sines, int64_t rows, int64_t heads, int64_t columns,
            float* y, int64_t threads) {
  const int64_t half = columns / 2;
  parallel_for(rows, 1 + kFewFloats / (heads * columns), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* const c = cosines + row * columns;
      const float* const s = sines + row * columns;
      for (int64_t head = row * heads; head < (row + 1) * heads; ++head) {
        const float* const from = x + head * columns;
        float* const to = y + head * columns;
        for (int64_t k = 0; k < half; ++k) to[k] = from[k] * c[k] + -from[half + k] * s[k];
        for (int64_t k = half; k < columns; ++k) to[k] = from[k] * c[k] + from[k - half] * s[k];
      }
    }
  });
}

}  // namespace
}  // namespace llmc
