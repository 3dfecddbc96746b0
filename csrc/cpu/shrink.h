// Shrink: s = x A^T, (tokens, d_in) by (rank_sum, d_in) -> (tokens, rank_sum).
#pragma once

#include "cpu/packing.h"
#include "cpu/parallel.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// At most so many tokens are split over d_in instead of over rows.
constexpr std::int64_t kSplitTokens = 32;

// Rows are dealt out in blocks of so many.
constexpr std::int64_t kTeamRows = 16;

// How a kernel shrinks: steps of d_in whose products are added up in registers (the error of a long
// sum grows with its length), rows that one pass over a step of A serves, rows it writes at a time.
struct ShrinkConfig {
    std::int64_t step, rows, granule;
    std::int64_t tokens, pitch, steps;  // pitch of the sums: rank_sum rounded up to kPanel
    bool split;                         // over d_in

    ShrinkConfig(const Layout& l, std::int64_t tokens_, std::int64_t step_, std::int64_t rows_,
                 std::int64_t granule_)
        : step(step_),
          rows(rows_),
          granule(granule_),
          tokens(tokens_),
          pitch(l.panels * kPanel),
          steps(ceil_div(l.h.d_in, step_)),
          split(tokens_ <= kSplitTokens && steps > 1 && pitch <= 1024) {}
    std::int64_t sum_elements() const { return split ? 0 : round_up(rows, granule) * pitch; }
    std::int64_t partial_elements() const {
        return split ? steps * round_up(tokens, granule) * pitch : 0;
    }
};

// Float kernels: enough rows to use each step of A from the cache.
LORA_ORTHO_INLINE ShrinkConfig shrink_config(const Layout& l, std::int64_t tokens) {
    return {l, tokens, 256, 64, 1};
}

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
    const C* a = l.section<C>(0) + k0 * kPanel;
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
        for_row_tiles<Tile<C>::rows>(count, [&](auto mr, int i) __attribute__((always_inline)) {
            constexpr int MR = decltype(mr)::value;
            constexpr int wide = Tile<C>::wide_panels;
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

// Writes s. step(row0, rows, k0, steps, add, sums) is the kernel. Ends with a barrier.
template <class IO, class C, class Step>
LORA_ORTHO_INLINE void shrink(const Layout& l, const ShrinkConfig& config, IO* s, const Team& team,
                              C* sums, C* partials, Step step) {
    const std::int64_t pitch = config.pitch, tokens = config.tokens;
    auto length = [&](std::int64_t t) {
        const std::int64_t left = l.h.d_in - t * config.step;
        return left < config.step ? left : config.step;
    };
    if (config.split) {
        const std::int64_t part = round_up(tokens, config.granule) * pitch;
        for (std::int64_t t = team.begin(config.steps); t < team.end(config.steps); ++t)
            step(std::int64_t{0}, static_cast<int>(tokens), t * config.step, length(t), false,
                 partials + t * part);
        team.barrier();
        const std::int64_t vectors = tokens * pitch / kLanes<C>;
        for (std::int64_t v = team.begin(vectors); v < team.end(vectors); ++v) {
            Vec<C> sum = load(partials + v * kLanes<C>);
            for (std::int64_t t = 1; t < config.steps; ++t)
                sum += load(partials + t * part + v * kLanes<C>);
            const std::int64_t row = v * kLanes<C> / pitch, r0 = v * kLanes<C> % pitch;
            for (int lane = 0; lane < kLanes<C> && r0 + lane < l.h.rank_sum; ++lane)
                from_compute(sum[lane], s + row * l.h.rank_sum + r0 + lane);
        }
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
