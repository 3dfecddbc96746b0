// Packed factors of the tile kernels, all right operands of P bfloat16 planes (amx_tiles.h);
// sections that the path does not need are empty:
//   kATiles             A    steps d_in,        columns rank_sum    shrink
//   kBTiles             B    steps K * wide,    columns d_out       expand
//   kBTransposedTiles   B^T  steps d_out,       columns K * narrow  grad_s
//   kATransposedTiles   A^T  steps K * narrow,  columns d_in        grad_x
// wide and narrow are the largest rank rounded up to kTileSteps and to kTile; padding holds zeros.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/layout.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

#if defined(__AMX_BF16__)

struct TileLayout : Layout {
    explicit TileLayout(const void* packed)
        : Layout(packed),
          P(h.dtype == LORA_ORTHO_BFLOAT16 ? 1 : 3),
          narrow(padded),
          wide(round_up(padded, kTileSteps)),
          narrow_sum(round_up(narrow * h.adapters, kTileSteps)),
          wide_sum(wide * h.adapters) {}

    // Blocks of steps of a section.
    std::int64_t blocks(Section section) const {
        const std::int64_t steps[4] = {h.d_in, wide_sum, h.d_out, narrow_sum};
        return ceil_div(steps[section - kATiles], kTileSteps);
    }
    // The right operand that starts at a block of steps and a tile of columns.
    Right right(Section section, std::int64_t block, std::int64_t tile) const {
        const std::ptrdiff_t plane = blocks(section) * kTileBytes, column = plane * P;
        return {base + h.section[section] + tile * column + block * kTileBytes, column, kTileBytes,
                plane};
    }

    int P;  // planes
    std::int64_t narrow, wide, narrow_sum, wide_sum;
};

template <int P>
void plan_tiles(Header& h) {
    const std::int64_t K = h.adapters, narrow = h.padded_rank_sum / K;
    auto bytes = [&](bool wanted, std::int64_t steps, std::int64_t columns) {
        return wanted ? round_up(columns, kColumnPad) / kTile * P * ceil_div(steps, kTileSteps) *
                            kTileBytes
                      : std::int64_t{0};
    };
    const bool backward = h.path & kTileBackward;
    place_sections(
        h, kATiles,
        {bytes(h.path & kTileShrink, h.d_in, h.rank_sum),
         bytes((h.path & kExpandMask) == kExpandTiles, round_up(narrow, kTileSteps) * K, h.d_out),
         bytes(backward, h.d_out, narrow * K), bytes(backward, narrow * K, h.d_in)});
}

// What a call builds.
using CallLayout = TileLayout;

#else

using CallLayout = Layout;

#endif

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
