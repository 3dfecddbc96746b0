// Where the gradient of the factors goes: any dtype, the layout of all lora_A or of all lora_B.
#pragma once

#include "cuda/numbers.h"
#include "lora_ortho/lora_ortho.h"

namespace lora_ortho::cuda {

struct Target {
    void* data;
    std::int32_t dtype;  // lora_ortho_dtype
    // Element (n, rank k of adapter a): flat * (a.begin * cols + n * a.rank + k)
    //                                   + (1 - flat) * ((a.begin + k) * cols + n)
    std::int32_t flat;
};

// Stores a float in any dtype.
LORA_ORTHO_DEVICE void store_any(void* data, std::int32_t dtype, std::int64_t at, float value) {
    switch (dtype) {
        case LORA_ORTHO_FLOAT32: static_cast<float*>(data)[at] = value; break;
        case LORA_ORTHO_BFLOAT16:
            static_cast<BFloat16*>(data)[at] = from_float<BFloat16>(value);
            break;
        case LORA_ORTHO_FLOAT16:
            static_cast<Float16*>(data)[at] = from_float<Float16>(value);
            break;
        default: static_cast<double*>(data)[at] = value;
    }
}

}  // namespace lora_ortho::cuda
