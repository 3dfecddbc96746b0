// Packed factors of the float kernels, in the compute type C; sections that the path does not need
// are empty:
//   section 0  A by panels   [ceil(rank_sum / kPanel)][d_in][kPanel]      shrink
//   section 1  B by panels   [d_out padded / kPanel][K * padded][kPanel]  expand, dense
//   section 2  B by rows     [d_out][K * padded]                          expand, owner; backward
//   section 3  A by columns  [d_in padded / kPanel][rank_sum][kPanel]     backward, grad_x
// padded is launch_config.h's padded_rank; what is padded holds zeros.
#pragma once

#include "cpu/launch_config.h"
#include "cpu/parallel.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

constexpr int kColumnPad = 64;  // sections 1 and 3: a whole number of the widest tiles

struct Layout {
    explicit Layout(const void* packed)
        : h(*static_cast<const Header*>(packed)),
          base(static_cast<const char*>(packed)),
          ranks(array_at<std::int64_t>(packed, h.ranks)),
          rank_begin(array_at<std::int64_t>(packed, h.rank_begin)),
          thresholds(array_at<std::uint32_t>(packed, h.thresholds)),
          padded(h.padded_rank_sum / h.adapters),
          panels(ceil_div(h.rank_sum, kPanel)) {}

    template <class T>
    const T* section(int i) const {
        return reinterpret_cast<const T*>(base + h.section[i]);
    }

    const Header& h;
    const char* base;
    const std::int64_t* ranks;
    const std::int64_t* rank_begin;
    const std::uint32_t* thresholds;
    std::int64_t padded;  // rank of every adapter after padding
    std::int64_t panels;  // of A
};

// Gives sections [first, first + 4) their offsets and moves the end of the buffer.
LORA_ORTHO_INLINE void place_sections(Header& h, int first, const std::int64_t (&bytes)[4]) {
    for (int i = 0; i < 4; ++i) {
        h.section[first + i] = h.bytes;
        h.bytes += static_cast<std::size_t>(round_up(bytes[i], LORA_ORTHO_ALIGNMENT));
    }
}

template <class C>
void plan_float(Header& h) {
    const std::int32_t expand = h.path & kExpandMask;
    const std::int64_t size = sizeof(C);
    place_sections(
        h, 0,
        {expand == kExpandTiles ? 0 : ceil_div(h.rank_sum, kPanel) * h.d_in * kPanel * size,
         expand == kExpandDense ? round_up(h.d_out, kColumnPad) * h.padded_rank_sum * size : 0,
         h.d_out * h.padded_rank_sum * size, h.rank_sum * round_up(h.d_in, kColumnPad) * size});
}

// What one member of the team packs at a time: so many columns of every lora_A, then so many rows
// of every lora_B. Its part of each section is contiguous, or one run for each panel of A.
constexpr std::int64_t kPackBlock = kColumnPad;

// Fewer elements than this are packed sooner than a team has met.
constexpr std::int64_t kPackTeam = 1 << 15;

LORA_ORTHO_INLINE int pack_threads(const Header& h) {
    return h.rank_sum * (h.d_in + h.d_out) < kPackTeam ? 1 : team_size(0);
}

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

// Columns [begin, begin + count) of every lora_A into sections 0 and 3.
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

// Rows [begin, begin + count) of every lora_B into sections 1 and 2.
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

// Sections 0 to 3, this member's share.
template <class C>
void pack_float(const lora_ortho_factors& f, void* packed, const Team& team) {
    const Layout l(packed);
    auto section = [&](int i) {
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
            pack_A(f, l, section(0), section(3), begin, count);
        else
            pack_B(f, l, section(1), section(2), begin, count);
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
