// Loops over arrays that are to stay in registers. A compiler keeps an array there only if it knows every index before
// it decides where the array lies, which GCC does not of a plain loop, however short.
#pragma once

#include <type_traits>
#include <utility>

// Of a function, before its type; of a lambda, behind its parameters.
#if defined(_MSC_VER) && !defined(__clang__)
#define LLMC_INLINED __forceinline
#define LLMC_INLINE
#else
#define LLMC_INLINED inline __attribute__((always_inline))
#define LLMC_INLINE __attribute__((always_inline))
#endif

namespace llmc {
namespace {

template <class F, int... at>
LLMC_INLINED void call_each(F f, std::integer_sequence<int, at...>) {
  (f(std::integral_constant<int, at>()), ...);
}

// Calls f with 0, 1, ... count - 1, each a constant.
template <int count, class F>
LLMC_INLINED void unrolled(F f) {
  call_each(f, std::make_integer_sequence<int, count>());
}

// The same for two indices, the second one running faster.
template <int first, int second, class F>
LLMC_INLINED void unrolled(F f) {
  unrolled<first * second>([&](auto at) LLMC_INLINE {
    constexpr int i = decltype(at)::value / second, j = decltype(at)::value % second;
    f(std::integral_constant<int, i>(), std::integral_constant<int, j>());
  });
}

}  // namespace
}  // namespace llmc
