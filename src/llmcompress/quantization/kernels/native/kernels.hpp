// All kernels of one instruction set, as a table.
#pragma once

#include "activation_functions.hpp"
#include "activations.hpp"
#include "combine.hpp"
#include "int8_pack.hpp"
#include "int8_product.hpp"
#include "norms.hpp"
#include "packed_product.hpp"
#include "rotate.hpp"
#include "table.hpp"

namespace llmc {
namespace {

template <class Set, class Int8>
constexpr Table kernels_of() {
  return {code_rows<Set>, pack_int8<Int8>, multiply_int8<Int8>, multiply_packed<Set>, activate<Int8>,
          combine<Set>,   rms_norm<Set>,   layer_norm<Set>,     rotate<Set>,          Set::byte_limit};
}

}  // namespace
}  // namespace llmc
