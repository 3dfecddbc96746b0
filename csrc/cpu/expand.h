// Expand: y = base + sum_j gain_j m_j (.) (B_j s_j), the masks drawn block by block.
#pragma once

#include "cpu/draws.h"
#include "cpu/packing.h"
#include "cpu/parallel.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// One call's coordinates and gains.
struct Draw {
    const lora_ortho_call& call;
    const Layout& l;

    RowDraws stream_of(int lane_set) const {
        return RowDraws(call.seed, call.stream, call.sample, static_cast<std::uint32_t>(lane_set));
    }
    // The draws of columns [col, col + columns) of `row`; returns where the first of them is.
    const std::uint16_t* row(const RowDraws& draws, std::int64_t row, std::int64_t col,
                             std::int64_t columns, std::uint16_t* buffer) const {
        const std::uint64_t first = static_cast<std::uint64_t>(call.col_offset + col);
        const int shift = static_cast<int>(first & 7);
        draws.row(static_cast<std::uint64_t>(call.row_offset + row), first - shift, columns + shift,
                  buffer);
        return buffer + shift;
    }
};

template <class C>
struct ExpandScratch {
    alignas(64) std::uint16_t draws[kColumnBlock + kDrawSlack];
    alignas(64) std::uint32_t wide[kRowBlock][kColumnBlock];   // draws, or offsets of owners
    alignas(64) C sums[kRowBlock][kColumnBlock];
};

template <class C>
std::size_t expand_scratch(const Layout& l) {
    const std::int64_t row_bytes = l.h.padded_rank_sum * static_cast<std::int64_t>(sizeof(C));
    return sizeof(ExpandScratch<C>) + static_cast<std::size_t>(rows_per_chunk(row_bytes) * row_bytes);
}

// scaled[i][j * padded + k] = gain_j s[row0 + i][rank_begin_j + k], zeros where padded.
template <class IO, class C>
LORA_ORTHO_INLINE void scale_rows(const Layout& l, const double* gains, const IO* s,
                                  std::int64_t row0, std::int64_t rows, C* scaled) {
    for (std::int64_t i = 0; i < rows; ++i) {
        const IO* from = s + (row0 + i) * l.h.rank_sum;
        C* to = scaled + i * l.h.padded_rank_sum;
        for (int j = 0; j < l.h.adapters; ++j, to += l.padded) {
            const C gain = static_cast<C>(gains[j]);
            std::int64_t k = 0;
            for (; k < l.ranks[j]; ++k) to[k] = gain * to_compute(*from++);
            for (; k < l.padded; ++k) to[k] = 0;
        }
    }
}

// The same for one row without gains.
template <class IO, class C>
LORA_ORTHO_INLINE void pad_row(const Layout& l, const IO* s, C* out) {
    for (int j = 0; j < l.h.adapters; ++j, out += l.padded) {
        std::int64_t k = 0;
        for (; k < l.ranks[j]; ++k) out[k] = to_compute(*s++);
        for (; k < l.padded; ++k) out[k] = 0;
    }
}

// y = base + sums over one block, rounded once. Row pitch of sums: `pitch`.
template <class IO, class C>
LORA_ORTHO_INLINE void finish_block(const C* sums, std::ptrdiff_t pitch, const View<IO>* base,
                                    std::int64_t row0, int rows, std::int64_t col0, int cols,
                                    std::int64_t d_out, IO* y) {
    constexpr int W = kLanes<C>;
    for (int i = 0; i < rows; ++i) {
        const C* sum = sums + i * pitch;
        IO* out = y + (row0 + i) * d_out + col0;
        const IO* in = base ? base->at(row0 + i, col0) : nullptr;
        int n = 0;
        if (!base) {
            for (; n + 2 * W <= cols; n += 2 * W)
                store_compute<IO, C>(out + n, load(sum + n), load(sum + n + W));
        } else if (base->col == 1) {
            for (; n + 2 * W <= cols; n += 2 * W)
                store_compute<IO, C>(out + n, load_compute(in + n) + load(sum + n),
                                     load_compute(in + n + W) + load(sum + n + W));
        }
        for (; n < cols; ++n)
            from_compute(sum[n] + (base ? to_compute(in[n * base->col]) : C{0}), out + n);
    }
}

// Products of adapter j over the block; `keep` draws below `limit` select, others leave sums alone
// (orthogonal) or add nothing (dropout).
enum class Combine { kSelect, kAddKept, kStore };

template <class C, int MR, int NP, Combine mode>
LORA_ORTHO_INLINE void expand_tile(const C* s, std::ptrdiff_t s_row, const C* b,
                                   std::ptrdiff_t b_panel, std::int64_t rank,
                                   const std::uint32_t* draws, std::uint32_t last, C* sums) {
    constexpr int NV = NP * kPanelVectors<C>;
    Vec<C> acc[MR][NV] = {};
    multiply<C, MR, NP>(s, s_row, 1, b, b_panel, kPanel, rank, acc);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
            C* to = sums + i * kColumnBlock + v * kLanes<C>;
            if constexpr (mode == Combine::kStore) {
                store(to, acc[i][v]);
            } else {
                const std::uint32_t* at = draws + i * kColumnBlock + v * kLanes<C>;
                const Vec<C> old = load(to);
                if constexpr (sizeof(C) == 4) {
                    const auto kept = load(at) <= splat(last);
                    store(to, mode == Combine::kSelect ? (kept ? acc[i][v] : old)
                                                       : (kept ? old + acc[i][v] : old));
                } else {
                    for (int lane = 0; lane < kLanes<C>; ++lane)
                        if (at[lane] <= last)
                            to[lane] = mode == Combine::kSelect ? acc[i][v][lane]
                                                                : old[lane] + acc[i][v][lane];
                }
            }
        }
}

// A block's operands: rows of a (scaled s), panels of b starting at the block's first column.
template <class C>
struct Products {
    const C* a;
    std::ptrdiff_t a_row;
    const C* b;
    std::ptrdiff_t b_panel;
    std::int64_t rank;
};

// Products over a block of rows by cols, combined into sums.
template <class C, Combine mode>
LORA_ORTHO_INLINE void expand_products(const Products<C>& p, std::uint32_t last, int rows, int cols,
                                       ExpandScratch<C>& t) {
    constexpr int NP = Tile<C>::panels;
    for_row_tiles<C>(rows, [&](auto mr, int i) __attribute__((always_inline)) {
        constexpr int MR = decltype(mr)::value;
        for (int n = 0; n < cols; n += NP * kPanel)
            expand_tile<C, MR, NP, mode>(p.a + i * p.a_row, p.a_row, p.b + n / kPanel * p.b_panel,
                                         p.b_panel, p.rank, &t.wide[i][n], last, &t.sums[i][n]);
    });
}

LORA_ORTHO_INLINE void widen(const std::uint16_t* draws, std::uint32_t* wide) {
    for (int n = 0; n < kColumnBlock; ++n) wide[n] = draws[n];
}

template <class C>
LORA_ORTHO_INLINE void draw_block(const Draw& draw, int lane_set, std::int64_t row0, int rows,
                                  std::int64_t col0, ExpandScratch<C>& t) {
    const RowDraws stream = draw.stream_of(lane_set);
    for (int i = 0; i < rows; ++i)
        widen(draw.row(stream, row0 + i, col0, kColumnBlock, t.draws), t.wide[i]);
}

// One block of rows by kColumnBlock columns: all products, then the selection, from the last adapter
// down, so that the first threshold above the draw decides.
template <class C>
LORA_ORTHO_INLINE void expand_dense(const Draw& draw, const C* scaled, std::int64_t row0, int rows,
                                    std::int64_t col0, int cols, ExpandScratch<C>& t) {
    const Layout& l = draw.l;
    const int K = l.h.adapters;
    const std::ptrdiff_t b_panel = l.h.padded_rank_sum * kPanel;
    const C* b = l.section<C>(1) + col0 / kPanel * b_panel;
    if (l.h.method == LORA_ORTHO_DIRECT) {  // one product over all adapters; padding is zero
        const Products<C> all{scaled, l.h.padded_rank_sum, b, b_panel, l.h.padded_rank_sum};
        expand_products<C, Combine::kStore>(all, 0, rows, cols, t);
        return;
    }
    std::memset(t.sums, 0, sizeof t.sums);
    if (l.h.method == LORA_ORTHO_ORTHOGONAL) draw_block(draw, 0, row0, rows, col0, t);
    for (int i = 0; i < K; ++i) {
        const int j = l.h.method == LORA_ORTHO_ORTHOGONAL ? K - 1 - i : i;
        const Products<C> one{scaled + j * l.padded, l.h.padded_rank_sum,
                              b + j * l.padded * kPanel, b_panel, l.ranks[j]};
        const std::uint32_t last = l.thresholds[j] - 1;
        if (l.h.method == LORA_ORTHO_ORTHOGONAL) {
            expand_products<C, Combine::kSelect>(one, last, rows, cols, t);
        } else {
            draw_block(draw, j, row0, rows, col0, t);
            expand_products<C, Combine::kAddKept>(one, last, rows, cols, t);
        }
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
