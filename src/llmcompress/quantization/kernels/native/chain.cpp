#include "chain.hpp"

#include "int8_weight.hpp"
#include "kept.hpp"
#include "packed_matrix.hpp"

namespace llmc {
namespace {

int64_t width_of(const Buffers& buffers, int64_t begin, int64_t end) {
  int64_t width = 0;
  for (int64_t i = begin; i < end; ++i) width += buffers.widths[i];
  return width;
}

// Queries, keys and values.
constexpr int64_t kTogether = 3;

bool is_same_input(const Step& step, const Step& next) {
  return next.op == step.op && next.from == step.from && next.option == step.option && next.levels == step.levels &&
         next.zero == step.zero && next.unit == step.unit;
}

float* at(const Buffers& buffers, float* inside, int64_t number, int64_t row) {
  if (number < buffers.from_outside) return buffers.outside[number] + row * buffers.widths[number];
  return inside + width_of(buffers, buffers.from_outside, number) * buffers.part;
}

}  // namespace

void run_chain(const Table& table, const Step* steps, int64_t count, const Buffers& buffers, int64_t rows,
               int64_t threads) {
  // Parts as equal as may be: few rows that are left over would be multiplied in another way than the others.
  const int64_t parts = rows ? (rows + buffers.part - 1) / buffers.part : 0;
  const int64_t between = width_of(buffers, buffers.from_outside, buffers.count) * buffers.part;
  auto* const inside =
      static_cast<float*>(kept_memory(Kept::buffers, between * static_cast<int64_t>(sizeof(float))));
  for (int64_t number = 0; number < parts; ++number) {
    const int64_t row = number * rows / parts, own = (number + 1) * rows / parts - row;
    for (const Step* step = steps; step < steps + count; ++step) {
      const float* const from = at(buffers, inside, step->from, row);
      const float* const with = at(buffers, inside, step->with, row);
      float* const to = at(buffers, inside, step->to, row);
      const int64_t width = buffers.widths[step->from];
      switch (static_cast<Op>(step->op)) {
        case Op::int8: {
          const Coding coding{static_cast<Grain>(step->option), static_cast<int32_t>(step->levels),
                              static_cast<int32_t>(step->zero), step->unit};
          // Products of the same numbers follow one another: these are coded once, and the threads are called once.
          Int8Product products[kTogether];
          int64_t together = 0;
          do {
            products[together++] = {static_cast<const Int8Weight*>(step->weight), at(buffers, inside, step->to, row)};
          } while (together < kTogether && step + 1 < steps + count && is_same_input(*step, step[1]) && ++step);
          table.multiply_int8(products, together, from, own, coding, threads);
          break;
        }
        case Op::packed:
          table.multiply_packed(*static_cast<const PackedMatrix*>(step->weight), from, own, step->bias, to,
                                step->option != 0, threads);
          break;
        case Op::activate:
          table.activate(step->option, from, own * width, to, threads);
          break;
        case Op::add:
        case Op::multiply:
          table.combine(static_cast<Op>(step->op) == Op::multiply, from, with, own * width, to, threads);
          break;
        case Op::rms_norm:
          table.rms_norm(from, static_cast<const float*>(step->weight), step->offset, own * (width / step->option),
                         step->option, step->unit, to, threads);
          break;
        case Op::layer_norm:
          table.layer_norm(from, static_cast<const float*>(step->weight), step->bias, own * (width / step->option),
                           step->option, step->unit, to, threads);
          break;
        case Op::rotate:
          table.rotate(from, with, at(buffers, inside, step->also, row), own, width / step->option, step->option, to,
                       threads);
          break;
      }
    }
  }
}

}  // namespace llmc
