// Texts of the C interface: what a status means, the version.
#include "lora_ortho/lora_ortho.h"

extern "C" {

const char* lora_ortho_status_text(lora_ortho_status status) {
    switch (status) {
        case LORA_ORTHO_OK: return "ok";
        case LORA_ORTHO_NULL_POINTER: return "a required pointer is null";
        case LORA_ORTHO_BAD_VERSION: return "struct_version is not that of this library";
        case LORA_ORTHO_BAD_METHOD: return "method is not orthogonal, dropout or direct";
        case LORA_ORTHO_BAD_DTYPE:
            return "dtype is not float32, bfloat16, float16 or float64, or not that of the factors";
        case LORA_ORTHO_BAD_ADAPTERS: return "the number of adapters is not in 1 .. 255";
        case LORA_ORTHO_BAD_RANK: return "a rank is not positive";
        case LORA_ORTHO_BAD_SIZE:
            return "a size is negative, zero where it may not be, or too large to address";
        case LORA_ORTHO_BAD_COORDINATE:
            return "rows must lie below 2^32, columns below 2^35, sample below 2^24, "
                   "strata in 1 .. 65536, lane_set below 256";
        case LORA_ORTHO_BAD_THRESHOLD:
            return "a threshold is not in 1 .. 65536 or does not exceed the one before: "
                   "a keep probability is too small for 16-bit draws";
        case LORA_ORTHO_BAD_RATE:
            return "a dropout rate is not in [0, 1), or the keep probabilities sum to more than 1";
        case LORA_ORTHO_BAD_GAIN: return "a gain is not finite";
        case LORA_ORTHO_MISALIGNED: return "a pointer is not aligned as its type needs";
        case LORA_ORTHO_BUFFER_TOO_SMALL: return "packed factors or workspace are too small";
        case LORA_ORTHO_BAD_PACKED:
            return "the buffer does not hold factors packed by this library";
        case LORA_ORTHO_UNSUPPORTED_ISA: return "this processor or build lacks the instruction set";
        case LORA_ORTHO_OUT_OF_MEMORY: return "out of memory";
        case LORA_ORTHO_INTERNAL_ERROR: return "internal error";
        case LORA_ORTHO_NO_CUDA: return "the library was built without its CUDA kernels";
        case LORA_ORTHO_NO_DEVICE: return "no NVIDIA GPU, or no driver for one";
        case LORA_ORTHO_UNSUPPORTED_DEVICE:
            return "the current GPU is older than compute capability 8.0";
        case LORA_ORTHO_CUDA_ERROR: return "the CUDA runtime refused a launch";
    }
    return "not a lora_ortho_status";
}

const char* lora_ortho_version(void) { return LORA_ORTHO_VERSION; }

}  // extern "C"
