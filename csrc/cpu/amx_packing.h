// Writes the packed factors of the tile kernels (amx_layout.h).
#pragma once

#include "cpu/amx_layout.h"
#include "cpu/packing.h"

#if defined(__AMX_BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// Element (i, j) of a factor, whatever its storage type.
LORA_ORTHO_INLINE double element(const lora_ortho_matrix& m, std::int64_t i, std::int64_t j) {
    const std::ptrdiff_t at = i * m.row_stride + j * m.col_stride;
    switch (m.dtype) {
        case LORA_ORTHO_FLOAT32: return static_cast<const float*>(m.data)[at];
        case LORA_ORTHO_BFLOAT16: return to_compute(static_cast<const bfloat16*>(m.data)[at]);
        case LORA_ORTHO_FLOAT16: return to_compute(static_cast<const float16*>(m.data)[at]);
        default: return static_cast<const double*>(m.data)[at];
    }
}

// This member's share of sections that are zeroed.
template <int P>
void pack_tiles(const lora_ortho_factors& f, const TileLayout& l, void* packed, const Team& team) {
    auto put = [&](Section section, std::int64_t step, std::int64_t column,
                   float value) __attribute__((always_inline)) {
        const std::int64_t blocks = l.blocks(section);
        char* at = static_cast<char*>(packed) + l.h.section[section];
        split_one<P>(value, reinterpret_cast<bfloat16*>(at) + right_index(step, column, blocks, P),
                     blocks * (kTileBytes / 2));
    };
    const bool shrink = l.h.path & kTileShrink, backward = l.h.path & kTileBackward;
    const bool expand = (l.h.path & kExpandMask) == kExpandTiles;
    auto share = [&](std::int64_t count, bool end) {
        const std::int64_t blocks = ceil_div(count, kPackBlock);
        const std::int64_t at = (end ? team.end(blocks) : team.begin(blocks)) * kPackBlock;
        return at < count ? at : count;
    };
    const std::int64_t first_i = share(l.h.d_in, false), last_i = share(l.h.d_in, true);
    const std::int64_t first_n = share(l.h.d_out, false), last_n = share(l.h.d_out, true);
    for (int j = 0; j < f.adapters; ++j)
        for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
            for (std::int64_t i = first_i; i < last_i; ++i) {
                const float a = static_cast<float>(element(f.lora_A[j], k, i));
                if (shrink) put(kATiles, i, l.rank_begin[j] + k, a);
                if (backward) put(kATransposedTiles, j * l.narrow + k, i, a);
            }
            for (std::int64_t n = first_n; n < last_n; ++n) {
                const float b = static_cast<float>(element(f.lora_B[j], n, k));
                if (expand) put(kBTiles, j * l.wide + k, n, b);
                if (backward) put(kBTransposedTiles, n, j * l.narrow + k, b);
            }
        }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
