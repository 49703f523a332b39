// LayerNorm and RMSNorm: rows divided by the root of the mean of their squares, LayerNorm's less their mean before.
#pragma once

#include <math.h>

#include <cstdint>

#include "activations.hpp"
#include "parallel.hpp"

namespace llmc {
namespace {

// Independent sums, since each has to wait for its last step.
constexpr int kSums = 4;

template <class Set>
float sum_of(const float* x, int64_t count) {
  typename Set::Floats total[kSums];
  for (auto& own : total) own = Set::zero_floats();
  const auto one = Set::splat(1);
  int64_t k = 0;
  for (; k + kSums * Set::lanes <= count; k += kSums * Set::lanes) {
    for (int i = 0; i < kSums; ++i) total[i] = Set::fma(Set::load(x + k + i * Set::lanes), one, total[i]);
  }
  float sum = 0;
  for (const auto& own : total) sum += Set::sum(own);
  for (; k < count; ++k) sum += x[k];
  return sum;
}

// Of what x has beyond `center`.
template <class Set>
float sum_of_squares(const float* x, int64_t count, float center) {
  typename Set::Floats total[kSums];
  for (auto& own : total) own = Set::zero_floats();
  const auto middle = Set::splat(center);
  int64_t k = 0;
  for (; k + kSums * Set::lanes <= count; k += kSums * Set::lanes) {
    for (int i = 0; i < kSums; ++i) {
      const auto own = Set::sub(Set::load(x + k + i * Set::lanes), middle);
      total[i] = Set::fma(own, own, total[i]);
    }
  }
  float sum = 0;
  for (const auto& own : total) sum += Set::sum(own);
  for (; k < count; ++k) sum += (x[k] - center) * (x[k] - center);
  return sum;
}

// y (rows, columns) = x / sqrt(mean(x * x) + epsilon) * (weight + offset), row by row.
template <class Set>
void rms_norm(const float* x, const float* weight, float offset, int64_t rows, int64_t columns, float epsilon, float* y,
              int64_t threads) {
  parallel_for(rows, 1 + kFewFloats / columns, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* const from = x + row * columns;
      float* const to = y + row * columns;
      const float factor = 1 / sqrtf(sum_of_squares<Set>(from, columns, 0) / static_cast<float>(columns) + epsilon);
      const auto all = Set::splat(factor), one = Set::splat(1), more = Set::splat(offset);
      int64_t k = 0;
      for (; k + Set::lanes <= columns; k += Set::lanes) {
        const auto own = Set::fma(Set::load(weight + k), one, more);
        Set::store(to + k, Set::mul(Set::mul(Set::load(from + k), all), own));
      }
      for (; k < columns; ++k) to[k] = from[k] * factor * (weight[k] + offset);
    }
  });
}

// y (rows, columns) = (x - mean) / sqrt(variance + epsilon) * weight + bias, row by row.
template <class Set>
void layer_norm(const float* x, const float* weight, const float* bias, int64_t rows, int64_t columns, float epsilon,
                float* y, int64_t threads) {
  parallel_for(rows, 1 + kFewFloats / columns, threads, [&](int64_t begin, int64_t end) {
    const float count = static_cast<float>(columns);
    for (int64_t row = begin; row < end; ++row) {
      const float* const from = x + row * columns;
      float* const to = y + row * columns;
      const float mean = sum_of<Set>(from, columns) / count;
      const float factor = 1 / sqrtf(sum_of_squares<Set>(from, columns, mean) / count + epsilon);
      const auto middle = Set::splat(mean), all = Set::splat(factor);
      int64_t k = 0;
      for (; k + Set::lanes <= columns; k += Set::lanes) {
        const auto own = Set::mul(Set::sub(Set::load(from + k), middle), all);
        Set::store(to + k, Set::fma(own, Set::load(weight + k), Set::load(bias + k)));
      }
      for (; k < columns; ++k) to[k] = (from[k] - mean) * factor * weight[k] + bias[k];
    }
  });
}

}  // namespace
}  // namespace llmc
