// Which instruction sets this processor and operating system offer, and the kernels built for them.
#pragma once

#include "cpu/kernels.h"

namespace lora_ortho::cpu {

// Whether code compiled for `isa` may run here. For AMX this asks the operating system, once, for
// the permission to use tile registers.
bool processor_has(lora_ortho_isa isa);

// The kernels for `isa`, for the best present one if AUTO; null where the processor or the build
// lacks them, or `isa` is no lora_ortho_isa. `chosen` gets the instruction set where not null.
const Kernels* find_kernels(std::int32_t isa, lora_ortho_isa* chosen = nullptr);

}  // namespace lora_ortho::cpu
