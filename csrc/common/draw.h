// What a lora_ortho_method comes down to behind the boundary: how elements are drawn, and which
// draws are each adapter's.
#pragma once

#include <cstdint>

#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho {

enum class Draw : std::int32_t {
    kNone,    // nothing is drawn: every adapter has every element
    kShared,  // one draw for an element, which falls into the interval of one adapter at most
    kOwn,     // a draw for each adapter; its index is the lane set
};

// Of a checked lora_ortho_method.
constexpr Draw draw_of(std::int32_t method) {
    return method == LORA_ORTHO_ORTHOGONAL ? Draw::kShared
           : method == LORA_ORTHO_DROPOUT  ? Draw::kOwn
                                           : Draw::kNone;
}

// The 16-bit draws from first to last, both included.
struct Interval {
    std::uint32_t first, last;
};

// Those with which adapter j of checked factors has an element.
inline Interval interval_of(const lora_ortho_factors& f, std::int32_t j) {
    const Draw draw = draw_of(f.method);
    if (draw == Draw::kNone) return {0, LORA_ORTHO_DRAW_LIMIT - 1};
    return {draw == Draw::kShared && j > 0 ? f.thresholds[j - 1] : 0, f.thresholds[j] - 1};
}

}  // namespace lora_ortho
