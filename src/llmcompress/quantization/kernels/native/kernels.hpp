// All kernels of one instruction set, as a table.
#pragma once

#include "activation_functions.hpp"
#include "activations.hpp"
#include "int8_pack.hpp"
#include "int8_product.hpp"
#include "packed_product.hpp"
#include "rms_norm.hpp"
#include "table.hpp"

namespace llmc {
namespace {

template <class Set, class Int8>
constexpr Table kernels_of() {
  return {code_rows<Set>, pack_int8<Int8>, multiply_int8<Int8>, multiply_packed<Set>,
          activate<Int8>, rms_norm<Set>,   Set::byte_limit};
}

}  // namespace
}  // namespace llmc
