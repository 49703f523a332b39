// Memory that a thread keeps from one call to the next: fresh pages cost as much as what is computed in them.
#pragma once

#include <cstdint>

namespace llmc {

enum class Kept { codes, buffers };

// Returns at least so many bytes, which last until the thread's next call for the same. Throws NoMemory.
void* kept_memory(Kept what, int64_t bytes);

}  // namespace llmc
