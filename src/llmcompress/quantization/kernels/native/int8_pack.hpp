// Makes an `Int8Weight`.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "int8_weight.hpp"
#include "parallel.hpp"

namespace llmc {
namespace {

template <class T>
T* zeros(int64_t count, int64_t* bytes) {
  *bytes += count * static_cast<int64_t>(sizeof(T));
  return static_cast<T*>(calloc(static_cast<size_t>(count ? count : 1), sizeof(T)));
}

// Takes from `second` what could carry its products with those of `first` past 16 bits, in each half, first two inputs
// and last two: activations go up to 127, so positive and negative weights may each sum up to 258.
template <class Set>
bool take_excess(const int8_t* first, int8_t* second, int8_t* taken) {
  constexpr int most = 32767 / 127;
  bool any = false;
  for (int half = 0; half < 4; half += 2) {
    for (int sign = -1; sign <= 1; sign += 2) {
      int excess = -most;
      for (int i = half; i < half + 2; ++i) {
        if (first[i] * sign > 0) excess += first[i] * sign;
        if (second[i] * sign > 0) excess += second[i] * sign;
      }
      for (int i = half; i < half + 2 && excess > 0; ++i) {
        const int own = second[i] * sign, part = own < excess ? own : excess;
        if (part <= 0) continue;
        second[i] = static_cast<int8_t>(second[i] - sign * part);
        taken[i] = static_cast<int8_t>(sign * part);
        excess -= part;
        any = true;
      }
    }
  }
  return any;
}

// Counts the fours of a panel that weights must be taken from, and takes them where there is a place for them.
template <class Set>
int64_t spill(int8_t* codes, int64_t fours, int64_t* which, int8_t* spilled) {
  constexpr int64_t four_bytes = Set::registers * Set::lanes * 4;
  int64_t count = 0;
  for (int64_t four = 0; four < fours; four += 2) {
    int8_t* const first = codes + four * four_bytes;
    int8_t second[four_bytes], taken[four_bytes] = {};
    memcpy(second, first + four_bytes, four_bytes);
    bool any = false;
    for (int64_t j = 0; j < four_bytes; j += 4) any |= take_excess<Set>(first + j, second + j, taken + j);
    if (any && which) {
      which[count] = four + 1;
      memcpy(first + four_bytes, second, four_bytes);
      memcpy(spilled + count * four_bytes, taken, four_bytes);
    }
    count += any;
  }
  return count;
}

template <class Set>
void pack_panel(const int8_t* codes, const Int8Weight& w, int64_t panel) {
  constexpr int64_t width = Set::registers * Set::lanes;
  int8_t* const to = w.codes + panel * w.fours * width * 4;
  for (int64_t j = 0; j < width && panel * width + j < w.outputs; ++j) {
    const int8_t* const row = codes + (panel * width + j) * w.inputs;
    int32_t sum = 0;
    for (int64_t k = 0; k < w.inputs; ++k) {
      to[(k / 4 * width + j) * 4 + k % 4] = row[k];
      sum += row[k];
    }
    w.sums[panel * width + j] = sum;
  }
}

// Packs codes (outputs, inputs) with one scale an output; `bias` (outputs) may be null. Null where memory is short.
template <class Set>
Int8Weight* pack_int8(const int8_t* codes, const float* scale, const float* bias, int64_t outputs, int64_t inputs,
                      int64_t threads) {
  constexpr int64_t width = Set::registers * Set::lanes;
  int64_t bytes = 0;
  auto* const w = zeros<Int8Weight>(1, &bytes);
  if (!w) return nullptr;
  w->outputs = outputs, w->inputs = inputs, w->width = width;
  w->fours = (inputs + 4 * Set::depth - 1) / (4 * Set::depth) * Set::depth, w->panels = (outputs + width - 1) / width;
  const int64_t padded = w->panels * width, panel_bytes = w->fours * width * 4;
  w->codes_memory = zeros<int8_t>(w->panels * panel_bytes + 64, &bytes);
  w->codes = reinterpret_cast<int8_t*>((reinterpret_cast<uintptr_t>(w->codes_memory) + 63) / 64 * 64);
  w->sums = zeros<int32_t>(padded, &bytes);
  w->scale = zeros<float>(padded, &bytes);
  w->bias = zeros<float>(padded, &bytes);
  w->spills = zeros<int64_t>(w->panels + 1, &bytes);
  w->doubled = zeros<uint8_t>(w->panels, &bytes);
  if (!w->codes_memory || !w->sums || !w->scale || !w->bias || !w->spills || !w->doubled) return free_int8(w), nullptr;
  memcpy(w->scale, scale, static_cast<size_t>(outputs) * sizeof(float));
  if (bias) memcpy(w->bias, bias, static_cast<size_t>(outputs) * sizeof(float));
  parallel_for(w->panels, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      pack_panel<Set>(codes, *w, panel);
      const int64_t count =
          Set::sums_in_16_bits ? spill<Set>(w->codes + panel * panel_bytes, w->fours, nullptr, nullptr) : 0;
      // A spill costs two thirds of what the sum in 16 bits saves on two fours.
      w->doubled[panel] = count <= w->fours / 4;
      w->spills[panel + 1] = w->doubled[panel] ? count : 0;
    }
  });
  for (int64_t panel = 0; panel < w->panels; ++panel) w->spills[panel + 1] += w->spills[panel];
  const int64_t count = w->spills[w->panels];
  w->spill_four = zeros<int64_t>(count, &bytes);
  w->spill_codes = zeros<int8_t>(count * width * 4, &bytes);
  if (!w->spill_four || !w->spill_codes) return free_int8(w), nullptr;
  parallel_for(count ? w->panels : 0, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = w->spills[panel];
      if (w->spills[panel + 1] == first) continue;
      spill<Set>(w->codes + panel * panel_bytes, w->fours, w->spill_four + first, w->spill_codes + first * width * 4);
    }
  });
  w->bytes = bytes;
  return w;
}

}  // namespace
}  // namespace llmc
