// What is thrown where memory is short. It crosses no loop of the OpenMP runtime, and no function that C calls.
#pragma once

namespace llmc {

struct NoMemory {};

}  // namespace llmc
