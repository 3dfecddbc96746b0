// Shrink on tiles: s = x A^T, x in P planes (amx_tiles.h).
#pragma once

#include "cpu/amx_launch_config.h"
#include "cpu/amx_layout.h"
#include "cpu/shrink.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

#if defined(__AMX_BF16__)

// A left operand of `rows` rows and `steps` steps in P planes, zero beyond them up to `padded_rows`
// and to whole blocks. Whole rows may be used where they lie if `direct`.
template <class IO, int P>
LORA_ORTHO_INLINE Left load_left(View<IO> view, std::int64_t row0, int rows, int padded_rows,
                                 std::int64_t k0, std::int64_t steps, bool direct,
                                 bfloat16* block) {
    const std::int64_t pitch = left_pitch(steps), plane = padded_rows * pitch;
    if constexpr (sizeof(IO) == 2)
        if (direct && view.col == 1 && rows == padded_rows && steps % kTileSteps == 0)
            return {view.at(row0, k0), 2 * view.row, 2 * kTileSteps, 0};
    for (int i = 0; i < padded_rows; ++i) {
        bfloat16* to = block + i * pitch;
        std::int64_t k = 0;
        if (i < rows) {
            const IO* from = view.at(row0 + i, k0);
            if (view.col == 1) {
                for (; k + kTileSteps <= steps; k += kTileSteps) {
                    if constexpr (sizeof(IO) == 2)
                        std::memcpy(to + k, from + k, 2 * kTileSteps);
                    else
                        split<P>(load_compute(from + k), load_compute(from + k + kTile), to + k,
                                 plane);
                }
            }
            for (; k < steps; ++k) split_one<P>(to_compute(from[k * view.col]), to + k, plane);
        }
        for (; k < round_up(steps, kTileSteps); ++k)
            for (int p = 0; p < P; ++p) to[p * plane + k].bits = 0;
    }
    return {block, 2 * pitch, 2 * kTileSteps, 2 * plane};
}

template <class IO, int P>
void tile_shrink_step(const TileLayout& l, View<IO> x, std::int64_t row0, int rows, std::int64_t k0,
                      std::int64_t steps, bool add, float* sums, bfloat16* block) {
    const Right a = l.right(kATiles, k0 / kTileSteps, 0);
    const bool direct = reads_rows_in_place(x.row, l.panels);
    for (int i = 0; i < rows; i += kTileBlock) {
        const int count = rows - i < kTileBlock ? rows - i : kTileBlock;
        const int padded = count > kTile ? kTileBlock : kTile;
        const Left left = load_left<IO, P>(x, row0 + i, count, padded, k0, steps, direct, block);
        product_rows<P>(left, a, ceil_div(steps, kTileSteps), padded, l.panels,
                        sums + i * l.panels * kPanel, l.panels * kPanel, add);
    }
}

// Writes s, float32 from three planes or bfloat16 from one. Ends with a barrier.
template <class IO>
LORA_ORTHO_INLINE void shrink_tiles(const TileLayout& l, const ShrinkConfig& config, View<IO> x,
                                    IO* s, const Team& team, float* sums, float* parts,
                                    void* block) {
    constexpr int P = kPlanes<IO>;
    const TileState state;
    shrink<IO, float>(
        l, config, s, team, sums, parts,
        [&](std::int64_t row0, int rows, std::int64_t k0, std::int64_t steps, bool add, float* to) {
            tile_shrink_step<IO, P>(l, x, row0, rows, k0, steps, add, to,
                                    static_cast<bfloat16*>(block));
        });
}

#endif

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
