// Checks of sizes and pointers shared by the C functions. Nothing here overflows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho {

using Status = lora_ortho_status;

// No buffer, and no distance between two elements of a matrix, may exceed this many bytes.
constexpr std::int64_t kMaxBytes = std::int64_t{1} << 60;
// Kernels pad every rank to the greatest, and that and each dimension by less than this.
constexpr std::int64_t kMaxPadding = 1024;
constexpr std::int64_t kMaxRank = std::int64_t{1} << 40;

// Bytes of one element; 0 for what is no lora_ortho_dtype.
constexpr std::size_t dtype_bytes(std::int32_t dtype) {
    switch (dtype) {
        case LORA_ORTHO_FLOAT32: return 4;
        case LORA_ORTHO_BFLOAT16:
        case LORA_ORTHO_FLOAT16: return 2;
        case LORA_ORTHO_FLOAT64: return 8;
        default: return 0;
    }
}

constexpr bool is_adapters(std::int32_t adapters) {
    return adapters >= 1 && adapters <= LORA_ORTHO_MAX_ADAPTERS;
}

constexpr bool is_strata(std::uint32_t strata) {
    return strata >= 1 && strata <= LORA_ORTHO_MAX_STRATA;
}

inline bool is_aligned(const void* pointer, std::size_t alignment) {
    return reinterpret_cast<std::uintptr_t>(pointer) % alignment == 0;
}

constexpr std::size_t align_up(std::size_t bytes) {
    return (bytes + LORA_ORTHO_ALIGNMENT - 1) / LORA_ORTHO_ALIGNMENT * LORA_ORTHO_ALIGNMENT;
}

// Whether rows * cols elements of `size` bytes, padding included, stay below kMaxBytes.
inline bool fits(std::int64_t rows, std::int64_t cols, std::size_t size) {
    std::int64_t padded_rows, padded_cols, elements, bytes;
    return !__builtin_add_overflow(rows, kMaxPadding, &padded_rows) &&
           !__builtin_add_overflow(cols, kMaxPadding, &padded_cols) &&
           !__builtin_mul_overflow(padded_rows, padded_cols, &elements) &&
           !__builtin_mul_overflow(elements, static_cast<std::int64_t>(size), &bytes) &&
           bytes <= kMaxBytes;
}

// Whether (count - 1) * stride elements of `size` bytes stay within kMaxBytes either way; count
// >= 1.
inline bool stride_fits(std::int64_t count, std::int64_t stride, std::size_t size) {
    std::int64_t elements, bytes;
    return !__builtin_mul_overflow(count - 1, stride, &elements) &&
           !__builtin_mul_overflow(elements, static_cast<std::int64_t>(size), &bytes) &&
           bytes <= kMaxBytes && bytes >= -kMaxBytes;
}

// A (rows, cols) matrix of any dtype; rows, cols >= 1.
inline Status check_matrix(const lora_ortho_matrix& matrix, std::int64_t rows, std::int64_t cols) {
    const std::size_t size = dtype_bytes(matrix.dtype);
    if (size == 0) return LORA_ORTHO_BAD_DTYPE;
    if (!matrix.data) return LORA_ORTHO_NULL_POINTER;
    if (!is_aligned(matrix.data, size)) return LORA_ORTHO_MISALIGNED;
    if (!stride_fits(rows, matrix.row_stride, size) ||
        !stride_fits(cols, matrix.col_stride, size)) {
        return LORA_ORTHO_BAD_SIZE;
    }
    return LORA_ORTHO_OK;
}

inline Status check_pointer(const void* data, std::size_t alignment) {
    if (!data) return LORA_ORTHO_NULL_POINTER;
    return is_aligned(data, alignment) ? LORA_ORTHO_OK : LORA_ORTHO_MISALIGNED;
}

// Leaves the enclosing function with the status of `expression` unless it is LORA_ORTHO_OK.
#define LORA_ORTHO_CHECK(expression)                                                  \
    do {                                                                              \
        const lora_ortho_status lora_ortho_check_status = (expression);               \
        if (lora_ortho_check_status != LORA_ORTHO_OK) return lora_ortho_check_status; \
    } while (0)

}  // namespace lora_ortho
