// All kernels of one trait, as a table.
#pragma once

#include "activations.hpp"
#include "table.hpp"

namespace llmc {
namespace {

template <class Set>
constexpr Table kernels_of() {
  return {code_rows<Set>};
}

}  // namespace
}  // namespace llmc
