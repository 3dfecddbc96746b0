// Packed factors of the tile kernels, all right operands of P bfloat16 planes (amx_tiles.h);
// sections that the path does not need are empty:
//   section 4  A       steps d_in,                 columns rank_sum       shrink
//   section 5  B       steps K * wide,             columns d_out          expand
//   section 6  B^T     steps d_out,                columns K * narrow     backward, grad_s
//   section 7  A^T     steps K * narrow,           columns d_in           backward, grad_x
// wide and narrow are the largest rank rounded up to kTileSteps and to kTile; padding holds zeros.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/packing.h"

#if defined(__AMX_BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

constexpr int kTileSection = 4;

struct TileLayout : Layout {
    TileLayout(const void* packed, int planes)
        : Layout(packed),
          P(planes),
          narrow(padded),
          wide(round_up(padded, kTileSteps)),
          narrow_sum(round_up(narrow * h.adapters, kTileSteps)),
          wide_sum(wide * h.adapters) {}

    // Blocks of steps of a section.
    std::int64_t blocks(int section) const {
        const std::int64_t steps[4] = {h.d_in, wide_sum, h.d_out, narrow_sum};
        return ceil_div(steps[section - kTileSection], kTileSteps);
    }
    // The right operand that starts at a block of steps and a tile of columns.
    Right right(int section, std::int64_t block, std::int64_t tile) const {
        const std::ptrdiff_t plane = blocks(section) * kTileBytes, column = plane * P;
        return {base + h.section[section] + tile * column + block * kTileBytes, column, kTileBytes,
                plane};
    }

    int P;
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
        h, kTileSection,
        {bytes(h.path & kTileShrink, h.d_in, h.rank_sum),
         bytes((h.path & kExpandMask) == kExpandTiles, round_up(narrow, kTileSteps) * K, h.d_out),
         bytes(backward, h.d_out, narrow * K), bytes(backward, narrow * K, h.d_in)});
}

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

// Sections 4 to 7, this member's share. They are zeroed.
template <int P>
void pack_tiles(const lora_ortho_factors& f, void* packed, const Team& team) {
    const TileLayout l(packed, P);
    auto put = [&](int section, std::int64_t step, std::int64_t column,
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
                if (shrink) put(4, i, l.rank_begin[j] + k, a);
                if (backward) put(7, j * l.narrow + k, i, a);
            }
            for (std::int64_t n = first_n; n < last_n; ++n) {
                const float b = static_cast<float>(element(f.lora_B[j], n, k));
                if (expand) put(5, j * l.wide + k, n, b);
                if (backward) put(6, n, j * l.narrow + k, b);
            }
        }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
