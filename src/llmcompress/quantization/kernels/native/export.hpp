// What the library shows to its loader.
#pragma once

#if defined(_WIN32)
#define LLMC_EXPORT extern "C" __declspec(dllexport)
#else
#define LLMC_EXPORT extern "C" __attribute__((visibility("default")))
#endif
