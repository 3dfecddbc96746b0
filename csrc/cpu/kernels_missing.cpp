// Compiled in place of kernels.cpp for each instruction set that the architecture or the compiler
// lacks, with LORA_ORTHO_ISA set to its name.
#include "cpu/kernels.h"

#define LORA_ORTHO_JOIN(a, b) a##b
#define LORA_ORTHO_KERNELS(isa) LORA_ORTHO_JOIN(kernels_, isa)

namespace lora_ortho::cpu {

const Kernels* LORA_ORTHO_KERNELS(LORA_ORTHO_ISA)() { return nullptr; }

}  // namespace lora_ortho::cpu
