// Writes the packed factors of the float kernels (layout.h).
#pragma once

#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/view.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// A row of a factor, `count` elements from (i, j) along its columns, in the compute type.
template <class C>
LORA_ORTHO_INLINE void read_row(const lora_ortho_matrix& m, std::int64_t i, std::int64_t j,
                                std::int64_t count, C* out) {
    with_storage(m.dtype, [&](auto storage) {
        using IO = decltype(storage);
        const IO* from = static_cast<const IO*>(m.data) + i * m.row_stride + j * m.col_stride;
        if (m.col_stride == 1) {
            for (std::int64_t k = 0; k < count; ++k) out[k] = static_cast<C>(to_compute(from[k]));
        } else {
            for (std::int64_t k = 0; k < count; ++k)
                out[k] = static_cast<C>(to_compute(from[k * m.col_stride]));
        }
    });
}

// to[i][q] = from[q][i] for one register's worth of i and q: log2 rounds of interleaving row q with
// row q + half.
template <class C>
LORA_ORTHO_INLINE void transpose_registers(const C* from, std::int64_t from_pitch, C* to) {
    constexpr int L = kLanes<C>;
    Vec<C> v[L], w[L];
    for (int q = 0; q < L; ++q) v[q] = load(from + q * from_pitch);
    for (int round = 1; round < L; round *= 2) {
        for (int q = 0; q < L / 2; ++q) {
            w[2 * q] = interleave<C, 0>(v[q], v[q + L / 2]);
            w[2 * q + 1] = interleave<C, L / 2>(v[q], v[q + L / 2]);
        }
        for (int q = 0; q < L; ++q) v[q] = w[q];
    }
    for (int i = 0; i < L; ++i) store(to + i * kPanel, v[i]);
}

// A panel: to[i][q] = from[q][i] for q below kPanel and i below `count`.
template <class C>
LORA_ORTHO_INLINE void transpose(const C* from, std::int64_t from_pitch, std::int64_t count,
                                 C* to) {
    constexpr int L = kLanes<C>;
    std::int64_t i = 0;
    for (; i + L <= count; i += L)
        for (int q = 0; q < kPanel; q += L)
            transpose_registers(from + q * from_pitch + i, from_pitch, to + i * kPanel + q);
    for (; i < count; ++i)
        for (int q = 0; q < kPanel; ++q) to[i * kPanel + q] = from[q * from_pitch + i];
}

// Columns [begin, begin + count) of every lora_A into kAPanels and kAColumns.
template <class C>
void pack_A(const lora_ortho_factors& f, const Layout& l, C* panels, C* columns, std::int64_t begin,
            std::int64_t count) {
    const std::int64_t rank_sum = l.h.rank_sum;
    columns += begin * rank_sum;
    alignas(64) C rows[kPanel * kPackBlock];
    for (std::int64_t panel = 0, j = 0; panel < l.panels; ++panel) {
        const std::int64_t first = panel * kPanel;
        for (std::int64_t q = 0; q < kPanel; ++q) {
            const std::int64_t r = first + q;
            C* row = rows + q * kPackBlock;
            std::int64_t filled = 0;
            if (r < rank_sum) {
                while (l.rank_begin[j + 1] <= r) ++j;
                read_row(f.lora_A[j], r - l.rank_begin[j], begin, filled = count, row);
            }
            for (std::int64_t i = filled; i < kPackBlock; ++i) row[i] = C(0);
            for (std::int64_t p = 0; r < rank_sum && p < kPackBlock / kPanel; ++p)
                std::memcpy(columns + (p * rank_sum + r) * kPanel, row + p * kPanel,
                            kPanel * sizeof(C));
        }
        if (panels)
            transpose(rows, kPackBlock, count, panels + (panel * l.h.d_in + begin) * kPanel);
    }
}

// Rows [begin, begin + count) of every lora_B into kBPanels and kBRows.
template <class C>
void pack_B(const lora_ortho_factors& f, const Layout& l, C* panels, C* rows, std::int64_t begin,
            std::int64_t count) {
    const std::int64_t width = l.h.padded_rank_sum;
    rows += begin * width;
    for (std::int64_t n = 0; n < count; ++n)
        for (int j = 0; j < f.adapters; ++j) {
            C* row = rows + n * width + j * l.padded;
            read_row(f.lora_B[j], begin + n, 0, l.ranks[j], row);
            for (std::int64_t k = l.ranks[j]; k < l.padded; ++k) row[k] = C(0);
        }
    if (!panels) return;
    panels += begin * width;
    for (std::int64_t first = 0; first < kPackBlock; first += kPanel, panels += width * kPanel) {
        const C* from = rows + first * width;
        if (first + kPanel <= count) {
            transpose(from, width, width, panels);
            continue;
        }
        std::memset(panels, 0, static_cast<std::size_t>(width) * kPanel * sizeof(C));
        for (std::int64_t q = 0; first + q < count; ++q)
            for (std::int64_t k = 0; k < width; ++k) panels[k * kPanel + q] = from[q * width + k];
    }
}

// This member's share.
template <class C>
void pack_float(const lora_ortho_factors& f, const Layout& l, void* packed, const Team& team) {
    auto section = [&](Section i) {
        char* at = static_cast<char*>(packed) + l.h.section[i];
        return l.h.section[i] == l.h.section[i + 1] ? nullptr : reinterpret_cast<C*>(at);
    };
    const std::int64_t of_A = ceil_div(l.h.d_in, kPackBlock),
                       of_B = ceil_div(l.h.d_out, kPackBlock);
    for (std::int64_t block = team.begin(of_A + of_B); block < team.end(of_A + of_B); ++block) {
        const bool is_A = block < of_A;
        const std::int64_t begin = (is_A ? block : block - of_A) * kPackBlock;
        const std::int64_t left = (is_A ? l.h.d_in : l.h.d_out) - begin;
        const std::int64_t count = left < kPackBlock ? left : kPackBlock;
        if (is_A)
            pack_A(f, l, section(kAPanels), section(kAColumns), begin, count);
        else
            pack_B(f, l, section(kBPanels), section(kBRows), begin, count);
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
