// How elements are drawn, and which draws are each adapter's: all that a device knows of masks.
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

constexpr bool is_draw(Draw draw) { return draw >= Draw::kNone && draw <= Draw::kOwn; }

// Not is_draw where its argument is no lora_ortho_method.
constexpr Draw draw_of(std::int32_t method) {
    switch (method) {
        case LORA_ORTHO_ORTHOGONAL: return Draw::kShared;
        case LORA_ORTHO_DROPOUT: return Draw::kOwn;
        case LORA_ORTHO_DIRECT: return Draw::kNone;
        default: return static_cast<Draw>(-1);
    }
}
constexpr Draw draw_of(const lora_ortho_factors& f) { return draw_of(f.method); }

// The 16-bit draws from first to last, both included.
struct Interval {
    std::uint32_t first, last;
};

// Those with which adapter j of checked factors has an element: where a threshold, which is
// exclusive, becomes a last draw, which is inclusive.
inline Interval interval_of(const lora_ortho_factors& f, std::int32_t j) {
    const Draw draw = draw_of(f);
    if (draw == Draw::kNone) return {0, LORA_ORTHO_DRAW_LIMIT - 1};
    return {draw == Draw::kShared && j > 0 ? f.thresholds[j - 1] : 0, f.thresholds[j] - 1};
}

}  // namespace lora_ortho
