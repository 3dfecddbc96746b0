// grad_s and grad_B on tiles: for each adapter grad is masked twice, as left operand of grad_s and,
// its rows interleaved in pairs, as right operand of grad_B^T.
#pragma once

#include "cpu/amx_forward.h"
#include "cpu/grad_s_grad_B.h"

#if defined(__AMX_BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// A block of `rows` by `columns` in P planes, as left operand (steps are columns) and as right
// operand (steps are rows).
template <int P, int rows, int columns>
struct TileBlock {
    static constexpr std::ptrdiff_t pitch = columns + kTileSteps;
    static constexpr std::ptrdiff_t blocks = rows / kTileSteps;
    static constexpr std::ptrdiff_t tile = kTileBytes / 2;
    alignas(64) bfloat16 left[P][rows][pitch];
    alignas(64) bfloat16 right[columns / kTile][P][blocks][tile];

    Left as_left(int row) const {
        return {left[0][row], 2 * pitch, 2 * kTileSteps, 2 * rows * pitch};
    }
    Right as_right() const {
        return {right, P * blocks * kTileBytes, kTileBytes, blocks * kTileBytes};
    }
    // Position of rows 2 * pair and 2 * pair + 1, 16 columns, in `right`.
    bfloat16* pair_at(int column_tile, int plane, int pair) {
        return right[column_tile][plane][pair / kTile] + pair % kTile * 32;
    }
};

// a0 b0 a1 b1 ... of 16 elements each.
LORA_ORTHO_INLINE __m512i interleave(const void* a, const void* b) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(a)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(b)));
    return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// Fills `left` with a block of a matrix, zero beyond `count` rows and `cols` columns.
template <class IO, int P, int rows, int columns>
LORA_ORTHO_INLINE void load_tile_block(View<IO> view, std::int64_t row0, int count,
                                       std::int64_t col0, int cols,
                                       TileBlock<P, rows, columns>& block) {
    constexpr std::ptrdiff_t plane = rows * TileBlock<P, rows, columns>::pitch;
    for (int i = 0; i < rows; ++i) {
        bfloat16* to = block.left[0][i];
        int n = 0;
        if (i < count) {
            const IO* from = view.at(row0 + i, col0);
            if (view.col == 1)
                for (; n + kTileSteps <= cols; n += kTileSteps)
                    split<P>(load_compute(from + n), load_compute(from + n + kTile), to + n, plane);
            for (; n < cols; ++n) split_one<P>(to_compute(from[n * view.col]), to + n, plane);
        }
        for (int p = 0; p < P; ++p)
            std::memset(to + p * plane + n, 0, static_cast<std::size_t>(2 * (columns - n)));
    }
}

// Fills `right` from `left`.
template <int P, int rows, int columns>
LORA_ORTHO_INLINE void interleave_block(TileBlock<P, rows, columns>& block) {
    for (int p = 0; p < P; ++p)
        for (int pair = 0; pair < rows / 2; ++pair)
            for (int q = 0; q < columns / kTile; ++q)
                _mm512_store_si512(block.pair_at(q, p, pair),
                                   interleave(block.left[p][2 * pair] + q * kTile,
                                              block.left[p][2 * pair + 1] + q * kTile));
}

template <int P>
struct TileGradSGradBScratch {
    static constexpr int rows = kGradBlockRows<P>, columns = kGradBlockColumns;
    alignas(64) std::uint16_t buffer[kGradBlockColumns + kDrawSlack];
    alignas(64) std::uint16_t draws[rows][columns];
    alignas(64) std::uint16_t pairs[rows / 2][2 * columns];  // draws, interleaved as `right`
    TileBlock<P, rows, columns> grad, masked;
    // followed by grad_B^T of the block, float [K * narrow][columns]
    float* grad_B() { return reinterpret_cast<float*>(this + 1); }
};

template <int P>
LORA_ORTHO_INLINE void draw_tile(const Place& place, int lane_set, std::int64_t row0, int count,
                                 std::int64_t col0, TileGradSGradBScratch<P>& t) {
    const BlockDraws block(place, lane_set, col0, kGradBlockColumns);
    for (int i = 0; i < count; ++i)
        std::memcpy(t.draws[i], block.row(row0 + i, t.buffer), sizeof t.draws[i]);
    for (int pair = 0; pair < (count + 1) / 2; ++pair)
        for (int n = 0; n < kGradBlockColumns; n += kTile)
            _mm512_store_si512(t.pairs[pair] + 2 * n,
                               interleave(t.draws[2 * pair] + n, t.draws[2 * pair + 1] + n));
}

// masked = grad where the draw lies in the interval.
template <int P>
LORA_ORTHO_INLINE void mask_tile(int count, Interval interval, TileGradSGradBScratch<P>& t) {
    const __m512i low = _mm512_set1_epi16(static_cast<short>(interval.first));
    const __m512i high = _mm512_set1_epi16(static_cast<short>(interval.last));
    auto kept = [&](const std::uint16_t* draws) __attribute__((always_inline)) {
        const __m512i u = _mm512_load_si512(draws);
        return _mm512_mask_cmple_epu16_mask(_mm512_cmpge_epu16_mask(u, low), u, high);
    };
    auto copy = [](bfloat16* to, const bfloat16* from,
                   __mmask32 mask) __attribute__((always_inline)) {
        _mm512_store_si512(to, _mm512_maskz_mov_epi16(mask, _mm512_load_si512(from)));
    };
    for (int i = 0; i < count; ++i)
        for (int n = 0; n < kGradBlockColumns; n += kTileSteps) {
            const __mmask32 mask = kept(t.draws[i] + n);
            for (int p = 0; p < P; ++p) copy(t.masked.left[p][i] + n, t.grad.left[p][i] + n, mask);
        }
    for (int pair = 0; pair < count / 2; ++pair)
        for (int q = 0; q < kGradBlockColumns / kTile; ++q) {
            const __mmask32 mask = kept(t.pairs[pair] + 2 * kTile * q);
            for (int p = 0; p < P; ++p)
                copy(t.masked.pair_at(q, p, pair), t.grad.pair_at(q, p, pair), mask);
        }
}

// Rows [row0, row1) of a block of columns: adds to grad_s (rows, narrow_sum) and to the block's
// grad_B^T. `transposed` is s^T.
template <class IO, int P>
void grad_s_grad_B_tile_block(const TileLayout& l, const Place& place, View<IO> grad,
                              const Left& transposed, std::int64_t row0, std::int64_t row1,
                              std::int64_t col0, int cols, float* grad_s,
                              TileGradSGradBScratch<P>& t) {
    const Draw draw = l.h.draw;
    const int tiles = static_cast<int>(l.narrow / kTile);
    for (std::int64_t m = row0; m < row1; m += kGradBlockRows<P>) {
        const int count =
            static_cast<int>(row1 - m < kGradBlockRows<P> ? row1 - m : kGradBlockRows<P>);
        const int padded = static_cast<int>(round_up(count, kTileSteps));
        load_tile_block(grad, m, count, col0, cols, t.grad);
        interleave_block(t.grad);
        if (draw == Draw::kShared) draw_tile(place, 0, m, count, col0, t);
        for (int j = 0; j < l.h.adapters; ++j) {
            if (draw == Draw::kOwn) draw_tile(place, j, m, count, col0, t);
            if (draw != Draw::kNone || j == 0) mask_tile(padded, l.intervals[j], t);
            for (int i = 0; i < padded; i += kTileBlock)
                product_rows<P>(t.masked.as_left(i),
                                l.right(kBTransposedTiles, col0 / kTileSteps, j * tiles),
                                kGradBlockColumns / kTileSteps, kTileBlock, tiles,
                                grad_s + (m + i) * l.narrow_sum + j * l.narrow, l.narrow_sum, true);
            for (std::int64_t k = 0; k < l.narrow; k += kTileBlock) {
                const std::int64_t rank = j * l.narrow + k;
                const Left a{bytes_at(transposed.data, rank * transposed.row + 2 * m),
                             transposed.row, transposed.step, transposed.plane};
                product_rows<P>(a, t.masked.as_right(), padded / kTileSteps,
                                l.narrow - k > kTile ? kTileBlock : kTile,
                                kGradBlockColumns / kTile, t.grad_B() + rank * kGradBlockColumns,
                                kGradBlockColumns, true);
            }
        }
    }
}

// The left operand of a transposed matrix v (rows, narrow_sum) with float elements value(row, j,
// k). Writes rows [row0, row1) as steps.
template <int P, class Value>
LORA_ORTHO_INLINE void transpose_rows(const TileLayout& l, std::int64_t row0, std::int64_t row1,
                                      std::ptrdiff_t pitch, bfloat16* out, Value value) {
    for (int j = 0; j < l.h.adapters; ++j)
        for (std::int64_t k = 0; k < l.narrow; ++k) {
            bfloat16* to = out + (j * l.narrow + k) * pitch;
            for (std::int64_t m = row0; m < row1; ++m)
                split_one<P>(k < l.ranks[j] ? value(m, j, k) : 0.0f, to + m, l.narrow_sum * pitch);
        }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
