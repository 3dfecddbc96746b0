// Shrink: s = x A^T, (tokens, d_in) by (rank_sum, d_in) -> (tokens, rank_sum).
#pragma once

#include "cpu/layout.h"
#include "cpu/parallel.h"
#include "cpu/register_tile.h"
#include "cpu/view.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

template <class C, int MR, int NP>
LORA_ORTHO_INLINE void shrink_tile(const C* x, std::ptrdiff_t x_row, const C* a,
                                   std::ptrdiff_t a_panel, std::int64_t steps, bool add, C* sums,
                                   std::ptrdiff_t pitch) {
    constexpr int NV = NP * kPanelVectors<C>;
    Vec<C> acc[MR][NV] = {};
    multiply<C, MR, NP>(x, x_row, 1, a, a_panel, kPanel, steps, acc);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v) {
            C* to = sums + i * pitch + v * kLanes<C>;
            store(to, add ? load(to) + acc[i][v] : acc[i][v]);
        }
}

// sums[i][r] (+)= the products of x's rows row0.. with steps [k0, k0 + steps) of A.
template <class IO, class C>
void shrink_step(const Layout& l, View<IO> x, std::int64_t row0, int rows, std::int64_t k0,
                 std::int64_t steps, bool add, C* sums, C* block) {
    const std::ptrdiff_t pitch = l.panels * kPanel, a_panel = l.h.d_in * kPanel;
    const C* a = l.section<C>(kAPanels) + k0 * kPanel;
    for (int i0 = 0; i0 < rows; i0 += kRowBlock) {
        const int count = rows - i0 < kRowBlock ? rows - i0 : kRowBlock;
        const C* in = block;
        std::ptrdiff_t in_row = steps;
        bool direct = false;
        if constexpr (sizeof(IO) == sizeof(C)) direct = x.col == 1;
        if (direct) {
            in = reinterpret_cast<const C*>(x.at(row0 + i0, k0));
            in_row = x.row;
        } else {
            load_block(x, row0 + i0, count, k0, steps, steps, block, steps);
        }
        for_row_tiles<RegisterTile<C>::rows>(
            count, [&](auto mr, int i) __attribute__((always_inline)) {
                constexpr int MR = decltype(mr)::value;
                constexpr int wide = RegisterTile<C>::wide_panels;
                const C* from = in + i * in_row;
                C* to = sums + (i0 + i) * pitch;
                std::int64_t q = 0;
                for (; q + wide <= l.panels; q += wide)
                    shrink_tile<C, MR, wide>(from, in_row, a + q * a_panel, a_panel, steps, add,
                                             to + q * kPanel, pitch);
                if constexpr (wide > 2)
                    for (; q + 2 <= l.panels; q += 2)
                        shrink_tile<C, MR, 2>(from, in_row, a + q * a_panel, a_panel, steps, add,
                                              to + q * kPanel, pitch);
                for (; q < l.panels; ++q)
                    shrink_tile<C, MR, 1>(from, in_row, a + q * a_panel, a_panel, steps, add,
                                          to + q * kPanel, pitch);
            });
    }
}

template <class IO, class C>
LORA_ORTHO_INLINE void write_s(const Layout& l, const C* sums, std::int64_t row0, int rows, IO* s) {
    for (int i = 0; i < rows; ++i)
        for (std::int64_t r = 0; r < l.h.rank_sum; ++r)
            from_compute(sums[i * l.panels * kPanel + r], s + (row0 + i) * l.h.rank_sum + r);
}

// s = the sum of the steps' parts, in their order.
template <class IO, class C>
LORA_ORTHO_INLINE void sum_parts(const Layout& l, const ShrinkConfig& config, const C* parts, IO* s,
                                 const Team& team) {
    const std::int64_t pitch = config.pitch, part = config.part_elements();
    const std::int64_t vectors = config.tokens * pitch / kLanes<C>;
    for (std::int64_t v = team.begin(vectors); v < team.end(vectors); ++v) {
        Vec<C> sum = load(parts + v * kLanes<C>);
        for (std::int64_t t = 1; t < config.steps; ++t)
            sum += load(parts + t * part + v * kLanes<C>);
        const std::int64_t row = v * kLanes<C> / pitch, r0 = v * kLanes<C> % pitch;
        for (int lane = 0; lane < kLanes<C> && r0 + lane < l.h.rank_sum; ++lane)
            from_compute(sum[lane], s + row * l.h.rank_sum + r0 + lane);
    }
}

// Writes s. step(row0, rows, k0, steps, add, sums) is the kernel. Ends with a barrier.
template <class IO, class C, class Step>
LORA_ORTHO_INLINE void shrink(const Layout& l, const ShrinkConfig& config, IO* s, const Team& team,
                              C* sums, C* parts, Step step) {
    const std::int64_t tokens = config.tokens;
    auto length = [&](std::int64_t t) {
        const std::int64_t left = l.h.d_in - t * config.step;
        return left < config.step ? left : config.step;
    };
    if (config.split) {
        for (std::int64_t t = team.begin(config.steps); t < team.end(config.steps); ++t)
            step(std::int64_t{0}, static_cast<int>(tokens), t * config.step, length(t), false,
                 parts + t * config.part_elements());
        team.barrier();
        sum_parts(l, config, parts, s, team);
    } else {
        const std::int64_t blocks = ceil_div(tokens, kTeamRows);
        const std::int64_t last = team.end(blocks) * kTeamRows;
        const std::int64_t end = last < tokens ? last : tokens;
        for (std::int64_t row = team.begin(blocks) * kTeamRows; row < end; row += config.rows) {
            const int rows = static_cast<int>(end - row < config.rows ? end - row : config.rows);
            for (std::int64_t t = 0; t < config.steps; ++t)
                step(row, rows, t * config.step, length(t), t > 0, sums);
            write_s(l, sums, row, rows, s);
        }
    }
    team.barrier();
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
