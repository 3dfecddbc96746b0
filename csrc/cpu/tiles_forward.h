// Forward of the tile kernels.
#pragma once

#include "cpu/forward.h"
#include "cpu/tiles_shrink.h"

#if defined(__AMX_BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

struct TileScratch {
    alignas(64) std::uint16_t draws[kTileBlock][kTileColumns + kDrawSlack];
    // Two, in turn: what a tile register stored cannot be forwarded to a vector load.
    alignas(64) float products[2][kTileBlock][kTileColumns];
    alignas(64) float sums[kTileBlock][kTileColumns];
};

// Rows of scaled s held at once, in P planes.
template <int P>
LORA_ORTHO_INLINE std::int64_t tile_rows_per_chunk(const TileLayout& l) {
    return round_up(rows_per_chunk(left_pitch(l.wide_sum) * 2 * P), kTileBlock);
}
template <int P>
LORA_ORTHO_INLINE std::size_t tile_expand_scratch(const TileLayout& l) {
    return sizeof(TileScratch) + static_cast<std::size_t>(tile_rows_per_chunk<P>(l) *
                                                          left_pitch(l.wide_sum) * 2 * P);
}

// The left operand gain_j s_j of a chunk, adapters at multiples of `wide`, rows beyond zeroed up to a
// multiple of 16.
template <class IO, int P>
LORA_ORTHO_INLINE Left scale_left(const TileLayout& l, const double* gains, const IO* s,
                                  std::int64_t row0, std::int64_t rows, bfloat16* out) {
    const std::int64_t pitch = left_pitch(l.wide_sum), plane = round_up(rows, kTile) * pitch;
    std::memset(out, 0, static_cast<std::size_t>(2 * P * plane));
    for (std::int64_t i = 0; i < rows; ++i) {
        const IO* from = s + (row0 + i) * l.h.rank_sum;
        for (int j = 0; j < l.h.adapters; ++j) {
            const float gain = static_cast<float>(gains[j]);
            bfloat16* to = out + i * pitch + j * l.wide;
            std::int64_t k = 0;
            for (; k + kTileSteps <= l.ranks[j]; k += kTileSteps)
                split<P>(gain * load_compute(from + k), gain * load_compute(from + k + kTile), to + k,
                         plane);
            for (; k < l.ranks[j]; ++k) split_one<P>(gain * to_compute(from[k]), to + k, plane);
            from += l.ranks[j];
        }
    }
    return {out, 2 * pitch, 2 * kTileSteps, 2 * plane};
}

// One row: sums = products where kept (select), or sums += products where kept.
template <bool select>
LORA_ORTHO_INLINE void combine_kept(const std::uint16_t* draws, std::uint32_t last,
                                    const float* products, float* sums) {
    const __m512i limit = _mm512_set1_epi16(static_cast<short>(last));
#pragma GCC unroll 2
    for (int n = 0; n < kTileColumns; n += 32) {
        const __mmask32 kept = _mm512_cmple_epu16_mask(_mm512_loadu_si512(draws + n), limit);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const auto mask = static_cast<__mmask16>(kept >> (16 * half));
            float* to = sums + n + 16 * half;
            const __m512 value = _mm512_load_ps(products + n + 16 * half), old = _mm512_load_ps(to);
            _mm512_store_ps(to, select ? _mm512_mask_mov_ps(old, mask, value)
                                       : _mm512_mask_add_ps(old, mask, old, value));
        }
    }
}

// sums of at most kTileBlock rows by kTileColumns columns.
template <int P>
LORA_ORTHO_INLINE void tile_expand_block(const TileLayout& l, const Draw& draw, const Left& scaled,
                                         std::int64_t row0, int rows, std::int64_t col0, int cols,
                                         TileScratch& t) {
    const int K = l.h.adapters, method = l.h.method;
    const bool orthogonal = method == LORA_ORTHO_ORTHOGONAL;
    auto products = [&](std::int64_t first, std::int64_t blocks, float* out)
                        __attribute__((always_inline)) {
        const Left a{bytes_at(scaled.data, 2 * kTileSteps * first), scaled.row, scaled.step,
                     scaled.plane};
        product_rows<P>(a, l.right(5, first, col0 / kTile), blocks, rows, ceil_div(cols, kTile), out,
                        kTileColumns, false);
    };
    if (method == LORA_ORTHO_DIRECT) return products(0, l.blocks(5), t.sums[0]);
    const std::int64_t blocks = l.wide / kTileSteps;
    // Orthogonal: from the last adapter down, so that the first threshold above the draw decides.
    auto adapter = [&](int i) { return orthogonal ? K - 1 - i : i; };
    const std::uint16_t* u[kTileBlock];
    auto draw_rows = [&](int lane_set) __attribute__((always_inline)) {
        const RowDraws stream = draw.stream_of(lane_set);
        for (int m = 0; m < rows; ++m)
            u[m] = draw.row(stream, row0 + m, col0, kTileColumns, t.draws[m]);
    };
    products(adapter(0) * blocks, blocks, t.products[0][0]);
    std::memset(t.sums, 0, sizeof t.sums[0] * static_cast<std::size_t>(rows));
    if (orthogonal) draw_rows(0);
    for (int i = 0; i < K; ++i) {
        const int j = adapter(i);
        const std::uint32_t last = l.thresholds[j] - 1;
        if (i + 1 < K) products(adapter(i + 1) * blocks, blocks, t.products[(i + 1) % 2][0]);
        if (!orthogonal) draw_rows(j);
        for (int m = 0; m < rows; ++m)
            orthogonal ? combine_kept<true>(u[m], last, t.products[i % 2][m], t.sums[m])
                       : combine_kept<false>(u[m], last, t.products[i % 2][m], t.sums[m]);
    }
}

template <class IO>
void forward_tiles(const void* packed, const lora_ortho_call& call, const lora_ortho_matrix& x,
                   const lora_ortho_matrix* base, void* y, void* s) {
    constexpr int P = kPlanes<IO>;
    const TileLayout l(packed, P);
    const int threads = team_size(call.threads);
    const Shrink<IO> first(l, call.tokens);
    const std::size_t expand = tile_expand_scratch<P>(l);
    const Scratch scratch(first.member_bytes > expand ? first.member_bytes : expand, threads);
    const Scratch shared(first.shared_bytes, 1);
    const Draw draw{call, l};
    const View<IO> base_view = base ? view_of<IO>(*base) : View<IO>{};
    IO* s_out = static_cast<IO*>(s);
    run_team(threads, [&](const Team& team) {
        first.run(view_of<IO>(x), s_out, team, scratch.of<char>(team), shared.of<char>(Team{0, 1}));
        const TileState state;
        auto& t = *scratch.of<TileScratch>(team);
        auto* scaled = reinterpret_cast<bfloat16*>(&t + 1);
        for_chunks(team, call.tokens, l.h.d_out, tile_rows_per_chunk<P>(l),
                   [&](std::int64_t row0, std::int64_t rows, std::int64_t col0, std::int64_t cols) {
            const Left left = scale_left<IO, P>(l, call.gains, s_out, row0, rows, scaled);
            for_blocks(rows, cols, kTileBlock, kTileColumns, l.wide_sum * 2 * P,
                       [&](std::int64_t i, int height, std::int64_t n, int width) {
                const Left a{bytes_at(left.data, i * left.row), left.row, left.step, left.plane};
                tile_expand_block<P>(l, draw, a, row0 + i, height, col0 + n, width, t);
                finish_block<IO, float>(t.sums[0], kTileColumns, base ? &base_view : nullptr,
                                        row0 + i, height, col0 + n, width, l.h.d_out,
                                        static_cast<IO*>(y));
            });
        });
    });
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
