#include "parallel.hpp"

#include <atomic>

#include "export.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace llmc {
namespace {

// Of libgomp; LLVM's and Intel's runtime have it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

// A runtime whose threads were lost in a fork waits for them forever.
std::atomic<bool> forked{false};

struct Work {
  int64_t items, grain;
  Body body;
  void* context;
  std::atomic<int64_t> next{0};
  std::atomic<bool> short_of_memory{false};
};

// Each thread takes what is next: nothing is left over where the runtime gives fewer threads than it was asked for, as
// it does inside of a loop that is parallel already.
void take(void* data) {
  auto& work = *static_cast<Work*>(data);
  for (;;) {
    const int64_t begin = work.next.fetch_add(work.grain, std::memory_order_relaxed);
    if (begin >= work.items) return;
    const int64_t end = begin + work.grain;
    if (!work.body(work.context, begin, end < work.items ? end : work.items)) {
      work.short_of_memory.store(true, std::memory_order_relaxed);
      return;
    }
  }
}

}  // namespace

bool parallel_ranges(int64_t items, int64_t grain, int64_t threads, Body body, void* context) {
  Work work{items, grain > 0 ? grain : 1, body, context};
  const auto run = gomp_parallel.load(std::memory_order_relaxed);
  const bool alone = threads < 2 || items <= work.grain || !run || forked.load(std::memory_order_relaxed);
  if (alone)
    take(&work);
  else
    run(take, &work, static_cast<unsigned>(threads), 0);
  return !work.short_of_memory.load(std::memory_order_relaxed);
}

}  // namespace llmc

// `parallel` is GOMP_parallel of the runtime that torch has loaded; without it every loop runs on the caller's thread.
LLMC_EXPORT void llmc_use_openmp(void* parallel) {
  llmc::gomp_parallel = reinterpret_cast<llmc::GompParallel>(parallel);
#if !defined(_WIN32)
  static const int once = pthread_atfork(nullptr, nullptr, [] { llmc::forked = true; });
  (void)once;
#endif
}
