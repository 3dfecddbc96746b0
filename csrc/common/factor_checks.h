// Checks of factors and coordinates that hold for every device.
#pragma once

#include <algorithm>

#include "common/checks.h"
#include "common/draw.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho {

inline Status check_thresholds(const lora_ortho_factors& f) {
    const Draw draw = draw_of(f);
    if (draw == Draw::kNone) return LORA_ORTHO_OK;
    LORA_ORTHO_CHECK(check_pointer(f.thresholds, alignof(std::uint32_t)));
    std::uint32_t below = 0;
    for (std::int32_t j = 0; j < f.adapters; ++j) {
        const std::uint32_t threshold = f.thresholds[j];
        if (threshold <= below || threshold > LORA_ORTHO_DRAW_LIMIT)
            return LORA_ORTHO_BAD_THRESHOLD;
        if (draw == Draw::kShared) below = threshold;
    }
    return LORA_ORTHO_OK;
}

// Everything but isa and the matrices.
inline Status check_factor_sizes(const lora_ortho_factors* factors) {
    if (!factors) return LORA_ORTHO_NULL_POINTER;
    const lora_ortho_factors& f = *factors;
    if (f.struct_version != LORA_ORTHO_STRUCT_VERSION) return LORA_ORTHO_BAD_VERSION;
    if (!is_draw(draw_of(f))) return LORA_ORTHO_BAD_METHOD;
    if (dtype_bytes(f.dtype) == 0) return LORA_ORTHO_BAD_DTYPE;
    if (!is_adapters(f.adapters)) return LORA_ORTHO_BAD_ADAPTERS;
    if (f.d_in < 1 || f.d_out < 1 || f.d_out > LORA_ORTHO_COL_LIMIT) return LORA_ORTHO_BAD_SIZE;
    LORA_ORTHO_CHECK(check_pointer(f.ranks, alignof(std::int64_t)));
    std::int64_t most = 0;
    for (std::int32_t j = 0; j < f.adapters; ++j) {
        if (f.ranks[j] < 1) return LORA_ORTHO_BAD_RANK;
        if (f.ranks[j] > kMaxRank) return LORA_ORTHO_BAD_SIZE;
        most = std::max(most, f.ranks[j]);
    }
    const std::int64_t padded_rank_sum = f.adapters * (most + kMaxPadding);
    // 2 * float64: room for a second copy in another layout.
    if (!fits(padded_rank_sum, f.d_in, 2 * sizeof(double)) ||
        !fits(padded_rank_sum, f.d_out, 2 * sizeof(double))) {
        return LORA_ORTHO_BAD_SIZE;
    }
    return check_thresholds(f);
}

inline Status check_factor_matrices(const lora_ortho_factors& f) {
    if (!f.lora_A || !f.lora_B) return LORA_ORTHO_NULL_POINTER;
    for (std::int32_t j = 0; j < f.adapters; ++j) {
        LORA_ORTHO_CHECK(check_matrix(f.lora_A[j], f.ranks[j], f.d_in));
        LORA_ORTHO_CHECK(check_matrix(f.lora_B[j], f.d_out, f.ranks[j]));
    }
    return LORA_ORTHO_OK;
}

// The coordinates of a call: lora_ortho_call or lora_ortho_cuda_call.
template <class Call>
Status check_coordinates(const Call& c, std::int64_t d_out) {
    const bool inside = c.sample < LORA_ORTHO_SAMPLE_LIMIT && is_strata(c.strata) &&
                        c.row_offset >= 0 && c.col_offset >= 0 &&
                        c.tokens <= LORA_ORTHO_ROW_LIMIT - c.row_offset &&
                        c.col_offset <= LORA_ORTHO_COL_LIMIT - d_out;
    return inside ? LORA_ORTHO_OK : LORA_ORTHO_BAD_COORDINATE;
}

// A (tokens, cols) matrix in the dtype of the factors.
inline Status check_operand(std::int32_t dtype, std::int64_t tokens,
                            const lora_ortho_matrix* matrix, std::int64_t cols) {
    if (!matrix) return LORA_ORTHO_NULL_POINTER;
    if (matrix->dtype != dtype) return LORA_ORTHO_BAD_DTYPE;
    return tokens == 0 ? LORA_ORTHO_OK : check_matrix(*matrix, tokens, cols);
}

}  // namespace lora_ortho
