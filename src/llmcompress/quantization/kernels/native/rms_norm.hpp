// RMSNorm: rows divided by the root of the mean of their squares.
#pragma once

#include <math.h>

#include <cstdint>

#include "activations.hpp"
#include "parallel.hpp"

namespace llmc {
namespace {

template <class Set>
float sum_of_squares(const float* x, int64_t count) {
  // Independent sums, since each has to wait for its last step.
  constexpr int sums = 4;
  typename Set::Floats total[sums];
  for (auto& own : total) own = Set::zero_floats();
  int64_t k = 0;
  for (; k + sums * Set::lanes <= count; k += sums * Set::lanes) {
    for (int i = 0; i < sums; ++i) {
      const auto own = Set::load(x + k + i * Set::lanes);
      total[i] = Set::fma(own, own, total[i]);
    }
  }
  float sum = 0;
  for (const auto& own : total) sum += Set::sum(own);
  for (; k < count; ++k) sum += x[k] * x[k];
  return sum;
}

// y (rows, columns) = x / sqrt(mean(x * x) + epsilon) * weight, row by row.
template <class Set>
void rms_norm(const float* x, const float* weight, int64_t rows, int64_t columns, float epsilon, float* y,
              int64_t threads) {
  parallel_for(rows, 1 + kFewFloats / columns, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* const from = x + row * columns;
      float* const to = y + row * columns;
      const float factor = 1 / sqrtf(sum_of_squares<Set>(from, columns) / static_cast<float>(columns) + epsilon);
      const auto all = Set::splat(factor);
      int64_t k = 0;
      for (; k + Set::lanes <= columns; k += Set::lanes)
        Set::store(to + k, Set::mul(Set::mul(Set::load(from + k), all), Set::load(weight + k)));
      for (; k < columns; ++k) to[k] = from[k] * factor * weight[k];
    }
  });
}

}  // namespace
}  // namespace llmc
