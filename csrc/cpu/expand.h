// Expand: y = base + sum_j gain_j m_j (.) (B_j s_j), the masks drawn block by block.
#pragma once

#include "cpu/draws.h"
#include "cpu/layout.h"
#include "cpu/register_tile.h"
#include "cpu/view.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

template <class C>
struct ExpandScratch {
    alignas(64) std::uint16_t draws[kColumnBlock + kDrawSlack];
    alignas(64) std::uint32_t wide[kRowBlock][kColumnBlock];  // draws, or offsets of owners
    alignas(64) C sums[kRowBlock][kColumnBlock];
};

template <class C>
std::size_t expand_scratch(const Layout& l) {
    const std::int64_t row_bytes = l.h.padded_rank_sum * static_cast<std::int64_t>(sizeof(C));
    return sizeof(ExpandScratch<C>) +
           static_cast<std::size_t>(rows_per_chunk(row_bytes) * row_bytes);
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
LORA_ORTHO_INLINE void store_block(const C* sums, std::ptrdiff_t pitch, const View<IO>* base,
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

// Which elements of the products reach the sums.
enum class Combine { kAddKept, kStore, kAdd };

// A block's operands: rows of a (scaled s), panels of b starting at the block's first column.
template <class C>
struct Products {
    const C* a;
    std::ptrdiff_t a_row;
    const C* b;
    std::ptrdiff_t b_panel;
    std::int64_t rank;
};

// where[lane] <= last ? yes : no
template <class C>
LORA_ORTHO_INLINE Vec<C> select_kept(const std::uint32_t* where, std::uint32_t last, Vec<C> yes,
                                     Vec<C> no) {
    if constexpr (sizeof(C) == 4) {
        return load(where) <= splat(last) ? yes : no;
    } else {
        for (int lane = 0; lane < kLanes<C>; ++lane)
            no[lane] = where[lane] <= last ? yes[lane] : no[lane];
        return no;
    }
}

// Products over a block of rows by cols, stored in sums, added to them, or added where the draw is
// at most `last`.
template <class C, Combine mode>
LORA_ORTHO_INLINE void expand_products(const Products<C>& p, std::uint32_t last, int rows, int cols,
                                       ExpandScratch<C>& t) {
    constexpr int NP = RegisterTile<C>::panels, NV = NP * kPanelVectors<C>;
    for_row_tiles<RegisterTile<C>::rows>(rows, [&](auto mr, int i) __attribute__((always_inline)) {
        constexpr int MR = decltype(mr)::value;
        for (int n = 0; n < cols; n += NP * kPanel) {
            Vec<C> acc[MR][NV] = {};
            multiply<C, MR, NP>(p.a + i * p.a_row, p.a_row, 1, p.b + n / kPanel * p.b_panel,
                                p.b_panel, kPanel, p.rank, acc);
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
                for (int v = 0; v < NV; ++v) {
                    const int at = n + v * kLanes<C>;
                    C* to = &t.sums[i + m][at];
                    if constexpr (mode == Combine::kStore)
                        store(to, acc[m][v]);
                    else if constexpr (mode == Combine::kAdd)
                        store(to, load(to) + acc[m][v]);
                    else
                        store(to, select_kept<C>(&t.wide[i + m][at], last, load(to) + acc[m][v],
                                                 load(to)));
                }
        }
    });
}

// sums = all products, in steps of kSumStep ranks.
template <class C>
LORA_ORTHO_INLINE void expand_all(Products<C> p, int rows, int cols, ExpandScratch<C>& t) {
    const std::int64_t rank = p.rank;
    for (std::int64_t k = 0; k < rank; k += kSumStep, p.a += kSumStep, p.b += kSumStep * kPanel) {
        p.rank = rank - k < kSumStep ? rank - k : kSumStep;
        if (k == 0)
            expand_products<C, Combine::kStore>(p, 0, rows, cols, t);
        else
            expand_products<C, Combine::kAdd>(p, 0, rows, cols, t);
    }
}

// Shared draws: the products of every adapter, from the last down, so that the lowest interval that
// ends at the draw or above decides; the results stay in registers meanwhile. `all.rank` is the
// distance between adapters.
template <class C>
LORA_ORTHO_INLINE void expand_owned(const Layout& l, const Products<C>& all, int rows, int cols,
                                    ExpandScratch<C>& t) {
    constexpr int NP = RegisterTile<C>::panels, NV = NP * kPanelVectors<C>;
    for_row_tiles<RegisterTile<C>::select_rows>(rows, [&](auto mr,
                                                          int i) __attribute__((always_inline)) {
        constexpr int MR = decltype(mr)::value;
        for (int n = 0; n < cols; n += NP * kPanel) {
            Vec<C> result[MR][NV] = {};
            for (int j = l.h.adapters - 1; j >= 0; --j) {
                Vec<C> acc[MR][NV] = {};
                multiply<C, MR, NP>(all.a + i * all.a_row + j * all.rank, all.a_row, 1,
                                    all.b + n / kPanel * all.b_panel + j * all.rank * kPanel,
                                    all.b_panel, kPanel, l.ranks[j], acc);
#pragma GCC unroll 16
                for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
                    for (int v = 0; v < NV; ++v)
                        result[m][v] = select_kept<C>(&t.wide[i + m][n + v * kLanes<C>],
                                                      l.intervals[j].last, acc[m][v], result[m][v]);
            }
#pragma GCC unroll 16
            for (int m = 0; m < MR; ++m)
#pragma GCC unroll 16
                for (int v = 0; v < NV; ++v) store(&t.sums[i + m][n + v * kLanes<C>], result[m][v]);
        }
    });
}

LORA_ORTHO_INLINE void widen(const std::uint16_t* draws, std::uint32_t* wide) {
    for (int n = 0; n < kColumnBlock; ++n) wide[n] = draws[n];
}

template <class C>
LORA_ORTHO_INLINE void draw_block(const Place& place, int lane_set, std::int64_t row0, int rows,
                                  std::int64_t col0, ExpandScratch<C>& t) {
    const BlockDraws block(place, lane_set, col0, kColumnBlock);
    for (int i = 0; i < rows; ++i) widen(block.row(row0 + i, t.draws), t.wide[i]);
}

// One block of rows by kColumnBlock columns, all products.
template <class C>
LORA_ORTHO_INLINE void expand_dense(const Layout& l, const Place& place, const C* scaled,
                                    std::int64_t row0, int rows, std::int64_t col0, int cols,
                                    ExpandScratch<C>& t) {
    const std::ptrdiff_t b_panel = l.h.padded_rank_sum * kPanel;
    Products<C> p{scaled, l.h.padded_rank_sum, l.section<C>(kBPanels) + col0 / kPanel * b_panel,
                  b_panel, 0};
    if (l.h.draw == Draw::kNone) {  // one product over all adapters; padding is zero
        p.rank = l.h.padded_rank_sum;
        expand_all<C>(p, rows, cols, t);
    } else if (l.h.draw == Draw::kShared) {
        draw_block(place, 0, row0, rows, col0, t);
        p.rank = l.padded;
        expand_owned<C>(l, p, rows, cols, t);
    } else {
        std::memset(t.sums, 0, sizeof t.sums);
        for (int j = 0; j < l.h.adapters; ++j, p.a += l.padded, p.b += l.padded * kPanel) {
            draw_block(place, j, row0, rows, col0, t);
            p.rank = l.ranks[j];
            expand_products<C, Combine::kAddKept>(p, l.intervals[j].last, rows, cols, t);
        }
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
