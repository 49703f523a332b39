// Which instruction sets the processor has and the operating system saves.
#pragma once

namespace llmc::cpu {

bool has_avx2();         // with FMA, F16C and BMI2, which every such processor has
bool has_avx_vnni();     // the dot product of bytes on 256 bits
bool has_avx512_vnni();  // and on 512
bool has_avx512_amx();   // tiles of bytes and of bfloat16, which the process may use
bool has_neon_dot();

}  // namespace llmc::cpu
