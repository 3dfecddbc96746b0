// In place of the CPU kernels, where a test is about others.
#pragma once

#include "cpu/kernels.h"

namespace lora_ortho::cpu {

const Kernels* kernels_baseline() { return nullptr; }
const Kernels* kernels_avx2() { return nullptr; }
const Kernels* kernels_avx512() { return nullptr; }
const Kernels* kernels_avx512_bf16() { return nullptr; }
const Kernels* kernels_amx() { return nullptr; }

}  // namespace lora_ortho::cpu
