// Packed factors of the tile kernels, all right operands of P bfloat16 planes (tiles.h):
//   section 0  A       steps d_in,                 columns rank_sum       shrink
//   section 1  B       steps K * wide,             columns d_out          expand
//   section 2  B^T     steps d_out,                columns K * narrow     backward, ds
//   section 3  A^T     steps K * narrow rounded up, columns d_in          backward, dx
// wide and narrow are the largest rank rounded up to kTileSteps and to kTile; padding holds zeros.
#pragma once

#include "cpu/packing.h"
#include "cpu/tiles.h"

#if defined(__AVX512BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

constexpr std::int32_t kTilePath = 2;  // Header::path beside those of Expand

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
        return ceil_div(steps[section], kTileSteps);
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
void plan_tiles(Header& h, const std::int64_t* ranks) {
    const std::int64_t narrow = padded_rank(ranks, h.adapters);
    const std::int64_t K = h.adapters, wide = round_up(narrow, kTileSteps);
    h.padded_rank_sum = narrow * K;
    h.path = kTilePath;
    const std::int64_t steps[4] = {h.d_in, wide * K, h.d_out, narrow * K};
    const std::int64_t columns[4] = {h.rank_sum, h.d_out, narrow * K, h.d_in};
    std::size_t end = h.arrays_end;
    for (int i = 0; i < 4; ++i) {
        h.section[i] = end;
        end += static_cast<std::size_t>(round_up(columns[i], kColumnPad) / kTile * P *
                                        ceil_div(steps[i], kTileSteps) * kTileBytes);
    }
    h.bytes = end;
}

template <int P>
void pack_tiles(const lora_ortho_factors& f, void* packed) {
    const TileLayout l(packed, P);
    char* out = static_cast<char*>(packed);
    std::memset(out + l.h.section[0], 0, l.h.bytes - l.h.section[0]);
    auto put = [&](int section, std::int64_t step, std::int64_t column, float value)
                   __attribute__((always_inline)) {
        const std::int64_t blocks = l.blocks(section);
        split_one<P>(value,
                     reinterpret_cast<bfloat16*>(out + l.h.section[section]) +
                         right_index(step, column, blocks, P),
                     blocks * (kTileBytes / 2));
    };
    for (int j = 0; j < f.adapters; ++j)
        for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
            for (std::int64_t i = 0; i < l.h.d_in; ++i) {
                const float a = static_cast<float>(element(f.lora_A[j], k, i));
                put(0, i, l.rank_begin[j] + k, a);
                put(3, j * l.narrow + k, i, a);
            }
            for (std::int64_t n = 0; n < l.h.d_out; ++n) {
                const float b = static_cast<float>(element(f.lora_B[j], n, k));
                put(1, j * l.wide + k, n, b);
                put(2, n, j * l.narrow + k, b);
            }
        }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
