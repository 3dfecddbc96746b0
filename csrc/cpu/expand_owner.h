// Expand where K is large: one product of the owner's rank per element instead of K.
#pragma once

#include "cpu/expand.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// [a0+a1, b1+b0, a2+a3, b3+b2, ...] in segments of kLanes / 2^level lanes: one blend, one
// permutation and one addition fold two vectors of partial sums into one.
template <class C, int segment>
LORA_ORTHO_INLINE Vec<C> fold(Vec<C> a, Vec<C> b) {
    using Index = Vec<std::conditional_t<sizeof(C) == 4, std::int32_t, std::int64_t>>;
    constexpr int W = kLanes<C>, half = segment / 2;
    Index kept{}, crossed{};
    for (int i = 0; i < W; ++i) {
        const bool upper = (i / half) % 2;
        kept[i] = upper ? W + i : i;
        crossed[i] = upper ? W + i - half : i + half;
    }
    return __builtin_shuffle(a, b, kept) + __builtin_shuffle(a, b, crossed);
}

// Lane i of the result is the sum of the lanes of v[i]: fold even and odd vectors, then the two.
template <class C, int count, int stride>
LORA_ORTHO_INLINE Vec<C> sum_lanes(const Vec<C>* v) {
    if constexpr (count == 1)
        return v[0];
    else
        return fold<C, 2 * kLanes<C> / count>(sum_lanes<C, count / 2, 2 * stride>(v),
                                              sum_lanes<C, count / 2, 2 * stride>(v + stride));
}

// Dot products of kLanes neighbouring elements with their owners' factors.
template <class C, int chunks>
LORA_ORTHO_INLINE Vec<C> owner_products(const C* s, const C* b, std::ptrdiff_t b_row,
                                        const std::uint16_t* offsets, std::int64_t padded) {
    constexpr int W = kLanes<C>;
    Vec<C> acc[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
        const C* si = s + offsets[i];
        const C* bi = b + i * b_row + offsets[i];
        acc[i] = load(si) * load(bi);
        if constexpr (chunks > 0) {
#pragma GCC unroll 8
            for (int k = 1; k < chunks; ++k) acc[i] += load(si + k * W) * load(bi + k * W);
        } else {
            for (std::int64_t k = W; k < padded; k += W) acc[i] += load(si + k) * load(bi + k);
        }
    }
    return sum_lanes<C, W, 1>(acc);
}

// Offsets (owner * padded) of the elements of a row, and the draws of those nobody owns left in
// place.
LORA_ORTHO_INLINE void owner_offsets(const Layout& l, const std::uint16_t* draws,
                                     std::uint16_t* offsets) {
    constexpr int W = kLanes<std::uint16_t>;
    const auto step = splat(static_cast<std::uint16_t>(l.padded));
    for (int n = 0; n < kColumnBlock; n += W) {
        const Vec<std::uint16_t> u = load(draws + n);
        Vec<std::uint16_t> at{};
        for (int j = 1; j < l.h.adapters; ++j)
            at += u >= splat(static_cast<std::uint16_t>(l.intervals[j].first))
                      ? step
                      : Vec<std::uint16_t>{};
        store(offsets + n, at);
    }
}

template <class C, int chunks>
LORA_ORTHO_INLINE void expand_owner_rows(const Layout& l, const Place& place, const C* scaled,
                                         std::int64_t row0, int rows, std::int64_t col0, int cols,
                                         ExpandScratch<C>& t) {
    const BlockDraws block(place, 0, col0, kColumnBlock);
    const C* b = l.section<C>(kBRows) + col0 * l.h.padded_rank_sum;
    const std::uint32_t last = l.intervals[l.h.adapters - 1].last;  // above it: nobody's
    auto* offsets = reinterpret_cast<std::uint16_t*>(t.wide[0]);
    for (int i = 0; i < rows; ++i) {
        const std::uint16_t* u = block.row(row0 + i, t.draws);
        owner_offsets(l, u, offsets);
        const C* s = scaled + i * l.h.padded_rank_sum;
        int n = 0;
        for (; n + kLanes<C> <= cols; n += kLanes<C>) {
            const Vec<C> products = owner_products<C, chunks>(
                s, b + n * l.h.padded_rank_sum, l.h.padded_rank_sum, offsets + n, l.padded);
            store(&t.sums[i][n], products);
        }
        for (; n < cols; ++n) {
            const C* bn = b + n * l.h.padded_rank_sum + offsets[n];
            C sum = 0;
            for (std::int64_t k = 0; k < l.padded; ++k) sum += s[offsets[n] + k] * bn[k];
            t.sums[i][n] = sum;
        }
        if (last < 0xffff)
            for (n = 0; n < cols; ++n) t.sums[i][n] = u[n] <= last ? t.sums[i][n] : C{0};
    }
}

template <class C>
LORA_ORTHO_INLINE void expand_owner(const Layout& l, const Place& place, const C* scaled,
                                    std::int64_t row0, int rows, std::int64_t col0, int cols,
                                    ExpandScratch<C>& t) {
    switch (l.padded / kLanes<C>) {
        case 1: return expand_owner_rows<C, 1>(l, place, scaled, row0, rows, col0, cols, t);
        case 2: return expand_owner_rows<C, 2>(l, place, scaled, row0, rows, col0, cols, t);
        case 4: return expand_owner_rows<C, 4>(l, place, scaled, row0, rows, col0, cols, t);
        default: return expand_owner_rows<C, 0>(l, place, scaled, row0, rows, col0, cols, t);
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
