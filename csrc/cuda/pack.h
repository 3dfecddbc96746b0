// Factors of any dtype and layout into the sections of layout.h, one launch for each adapter.
#pragma once

#include "cuda/launch_config.h"

namespace lora_ortho::cuda {

template <class T>
struct PackArguments {
    lora_ortho_matrix A, B;  // (rank, d_in), (d_out, rank)
    Adapter adapter;
    std::int32_t index;
    std::int64_t d_in, d_out, steps;  // steps of all adapters
    Adapter* adapters;
    Tile* tiles;
    T* section[4];  // A_rows, B_columns, B_rows, A_columns
};

LORA_ORTHO_DEVICE float element(const lora_ortho_matrix& m, std::int64_t i, std::int64_t j) {
    const std::int64_t at = i * m.row_stride + j * m.col_stride;
    switch (m.dtype) {
        case LORA_ORTHO_FLOAT32: return static_cast<const float*>(m.data)[at];
        case LORA_ORTHO_BFLOAT16: return to_float(static_cast<const BFloat16*>(m.data)[at]);
        case LORA_ORTHO_FLOAT16: return to_float(static_cast<const Float16*>(m.data)[at]);
        default: return static_cast<float>(static_cast<const double*>(m.data)[at]);
    }
}

// Element (rank k, feature i) of a factor, or zero beyond it.
LORA_ORTHO_DEVICE float rank_element(const lora_ortho_matrix& m, bool is_A, std::int64_t rank,
                                     std::int64_t features, std::int64_t k, std::int64_t i) {
    if (k >= rank || i >= features) return 0.0f;
    return is_A ? element(m, k, i) : element(m, i, k);
}

template <class T>
LORA_ORTHO_KERNEL(kPackThreads, kPackBlocks)
pack_kernel(const PackArguments<T> p) {
    const Adapter& a = p.adapter;
    const std::int64_t start = block_index() * kPackThreads + thread_index();
    const std::int64_t stride = block_count() * kPackThreads;
    const std::int64_t tiles = ceil_div(a.rank, kTile), steps = ceil_div(a.rank, kStep);
    if (start == 0) {
        p.adapters[p.index] = a;
        // The ends, until the next adapter overwrites them.
        p.adapters[p.index + 1] = {{0, 0}, 0, a.begin + a.rank, a.step + steps, a.tile + tiles};
    }
    for (std::int64_t i = start; i < tiles; i += stride) {
        const std::int64_t left = a.rank - i * kTile;
        p.tiles[a.tile + i] = {p.index, static_cast<std::int32_t>(left < kTile ? left : kTile),
                               a.begin + i * kTile};
    }
#pragma unroll
    for (int is_A = 0; is_A < 2; ++is_A) {
        const lora_ortho_matrix& m = is_A ? p.A : p.B;
        const std::int64_t features = is_A ? p.d_in : p.d_out;
        const std::int64_t groups = ceil_div(features, kGroup);
        T* rows = p.section[is_A ? 0 : 2];
        for (std::int64_t e = start; e < tiles * kTile * groups * kGroup; e += stride) {
            const std::int64_t k = e / (groups * kGroup), i = e % (groups * kGroup);
            const std::int64_t tile = a.tile + k / kTile, group = i / kGroup;
            rows[((tile * groups + group) * kTile + k % kTile) * kGroup + i % kGroup] =
                from_float<T>(rank_element(m, is_A, a.rank, features, k, i));
        }
        T* columns = p.section[is_A ? 3 : 1];
        for (std::int64_t e = start; e < steps * kStep * groups * kGroup; e += stride) {
            const std::int64_t k = e / (groups * kGroup), i = e % (groups * kGroup);
            const std::int64_t step = a.step + k / kStep, group = i / kGroup;
            columns[(group * p.steps + step) * kColumnBlock +
                    column_block_index<T>(static_cast<int>(i % kGroup),
                                          static_cast<int>(k % kStep))] =
                from_float<T>(rank_element(m, is_A, a.rank, features, k, i));
        }
    }
}

}  // namespace lora_ortho::cuda
