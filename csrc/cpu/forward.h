// Forward of the float kernels: shrink, then draw + expand + add + round.
#pragma once

#include "cpu/amx_shrink.h"
#include "cpu/expand_owner.h"
#include "cpu/shrink.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// Walks a chunk block by block: along the rows, so that base and y stream, within a segment of the
// columns, whose factors are column_bytes each.
template <class Body>
LORA_ORTHO_INLINE void for_blocks(std::int64_t rows, std::int64_t cols, int block_rows,
                                  int block_cols, std::int64_t column_bytes, Body body) {
    const std::int64_t segment = columns_per_segment(column_bytes, block_cols);
    for (std::int64_t begin = 0; begin < cols; begin += segment) {
        const std::int64_t end = begin + segment < cols ? begin + segment : cols;
        for (std::int64_t i = 0; i < rows; i += block_rows)
            for (std::int64_t n = begin; n < end; n += block_cols)
                body(i, static_cast<int>(rows - i < block_rows ? rows - i : block_rows), n,
                     static_cast<int>(end - n < block_cols ? end - n : block_cols));
    }
}

// Expand of rows [row0, row0 + rows) and columns [col0, col0 + cols).
template <class IO, class C>
void expand_chunk(const Layout& l, const Call& call, const IO* s, const View<IO>* base,
                  std::int64_t row0, std::int64_t rows, std::int64_t col0, std::int64_t cols, IO* y,
                  ExpandScratch<C>& t, C* scaled) {
    scale_rows(l, call.gains, s, row0, rows, scaled);
    for_blocks(rows, cols, kRowBlock, kColumnBlock,
               l.h.padded_rank_sum * static_cast<std::int64_t>(sizeof(C)),
               [&](std::int64_t i, int height, std::int64_t n, int width) {
                   const C* block = scaled + i * l.h.padded_rank_sum;
                   if ((l.h.path & kExpandMask) == kExpandOwner)
                       expand_owner<C>(l, call.place, block, row0 + i, height, col0 + n, width, t);
                   else
                       expand_dense<C>(l, call.place, block, row0 + i, height, col0 + n, width, t);
                   store_block<IO, C>(t.sums[0], kColumnBlock, base, row0 + i, height, col0 + n,
                                      width, l.h.d_out, y);
               });
}

// Deals out the output in chunks of rows by stripes of columns.
template <class Body>
LORA_ORTHO_INLINE void for_chunks(const Team& team, std::int64_t tokens, std::int64_t d_out,
                                  std::int64_t chunk, Body body) {
    const std::int64_t chunks = ceil_div(tokens, chunk), blocks = ceil_div(d_out, kColumnBlock);
    const std::int64_t stripes = column_stripes(chunks, blocks, team.size);
    const std::int64_t pieces = chunks * stripes;
    for (std::int64_t p = team.begin(pieces); p < team.end(pieces); ++p) {
        const std::int64_t row0 = p / stripes * chunk, stripe = p % stripes;
        const std::int64_t col0 = blocks * stripe / stripes * kColumnBlock;
        const std::int64_t col1 = blocks * (stripe + 1) / stripes * kColumnBlock;
        body(row0, tokens - row0 < chunk ? tokens - row0 : chunk, col0,
             (col1 < d_out ? col1 : d_out) - col0);
    }
}

// The shrink of one call: on tiles or not, and the memory it needs for that.
template <class IO>
struct Shrink {
    using C = typename ComputeOf<IO>::type;

    Shrink(const CallLayout& layout, std::int64_t tokens)
        : l(layout), tiles(shrinks_on_tiles<IO>(l.h, tokens)), config(shrink_config(l.h, tokens)) {
        std::int64_t block = kRowBlock * config.step * static_cast<std::int64_t>(sizeof(C));
#if defined(__AMX_BF16__)
        if constexpr (kTiled<IO>)
            if (tiles) {
                config = tile_shrink_config<kPlanes<IO>>(l.h, tokens);
                block = kTileBlock * left_pitch(config.step) * 2 * kPlanes<IO>;
            }
#endif
        sum_bytes = static_cast<std::size_t>(config.sum_elements()) * sizeof(C);
        member_bytes = sum_bytes + static_cast<std::size_t>(block);
        shared_bytes = static_cast<std::size_t>(config.all_part_elements()) * sizeof(C);
    }

    // Writes s. `own` is this member's memory, `shared` the team's. Ends with a barrier.
    void run(View<IO> x, IO* s, const Team& team, char* own, char* shared) const {
        C *sums = reinterpret_cast<C*>(own), *parts = reinterpret_cast<C*>(shared);
        void* block = own + sum_bytes;
#if defined(__AMX_BF16__)
        if constexpr (kTiled<IO>)
            if (tiles) return shrink_tiles<IO>(l, config, x, s, team, sums, parts, block);
#endif
        shrink<IO, C>(
            l, config, s, team, sums, parts,
            [&](std::int64_t row0, int rows, std::int64_t k0, std::int64_t steps, bool add, C* to) {
                shrink_step<IO, C>(l, x, row0, rows, k0, steps, add, to, static_cast<C*>(block));
            });
    }

    const CallLayout& l;
    bool tiles;
    ShrinkConfig config;
    std::size_t sum_bytes, member_bytes, shared_bytes;
};

template <class IO>
void forward_float(const CallLayout& l, const Call& call, const lora_ortho_matrix& x,
                   const lora_ortho_matrix* base, void* y, void* s) {
    using C = typename ComputeOf<IO>::type;
    const int threads = team_size(call.threads);
    const Shrink<IO> first(l, call.tokens);
    const std::size_t expand = expand_scratch<C>(l);
    const Scratch scratch(first.member_bytes > expand ? first.member_bytes : expand, threads);
    const Scratch shared(first.shared_bytes, 1);
    const View<IO> base_view = base ? view_of<IO>(*base) : View<IO>{};
    IO* s_out = static_cast<IO*>(s);
    run_team(threads, [&](const Team& team) {
        first.run(view_of<IO>(x), s_out, team, scratch.of<char>(team), shared.of<char>(Team{0, 1}));
        auto& t = *scratch.of<ExpandScratch<C>>(team);
        C* scaled = reinterpret_cast<C*>(&t + 1);
        const std::int64_t chunk =
            rows_per_chunk(l.h.padded_rank_sum * static_cast<std::int64_t>(sizeof(C)));
        for_chunks(team, call.tokens, l.h.d_out, chunk,
                   [&](std::int64_t row0, std::int64_t rows, std::int64_t col0, std::int64_t cols) {
                       expand_chunk<IO, C>(l, call, s_out, base ? &base_view : nullptr, row0, rows,
                                           col0, cols, static_cast<IO*>(y), t, scaled);
                   });
    });
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
