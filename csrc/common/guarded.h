// No exception leaves the C interface.
#pragma once

#include <new>

#include "lora_ortho/lora_ortho.h"

namespace lora_ortho {

// Runs `body` and turns what it throws into a status.
template <class Body>
lora_ortho_status guarded(Body&& body) noexcept {
    try {
        return body();
    } catch (const std::bad_alloc&) {
        return LORA_ORTHO_OUT_OF_MEMORY;
    } catch (...) {
        return LORA_ORTHO_INTERNAL_ERROR;
    }
}

}  // namespace lora_ortho
