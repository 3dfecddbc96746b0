// Forward of the tile kernels.
#pragma once

#include "cpu/amx_shrink.h"
#include "cpu/forward.h"

#if defined(__AMX_BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

struct TileScratch {
    alignas(64) std::uint16_t draws[kTileBlock][kTileColumns + kDrawSlack];
    alignas(64) float products[kTileGroup][kTileBlock][kTileColumns];
    alignas(64) float sums[kTileBlock][kTileColumns];
};

template <int P>
LORA_ORTHO_INLINE std::size_t tile_expand_scratch(const TileLayout& l) {
    const std::int64_t pitch = left_pitch(l.wide_sum);
    return sizeof(TileScratch) +
           static_cast<std::size_t>(tile_rows_per_chunk<P>(pitch) * pitch * 2 * P);
}

// The left operand gain_j s_j of a chunk, adapters at multiples of `wide`, rows beyond zeroed up to
// a multiple of 16.
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
                split<P>(gain * load_compute(from + k), gain * load_compute(from + k + kTile),
                         to + k, plane);
            for (; k < l.ranks[j]; ++k) split_one<P>(gain * to_compute(from[k]), to + k, plane);
            from += l.ranks[j];
        }
    }
    return {out, 2 * pitch, 2 * kTileSteps, 2 * plane};
}

// Where a block of the output lies, and whether whole vectors of it can be read and written.
template <class IO>
struct TileOutput {
    const View<IO>* base;
    IO* y;
    std::int64_t row0, col0, d_out;
    int rows, cols;
    bool whole() const { return cols == kTileColumns && (!base || base->col == 1); }
};

// Asks for the lines of a block while there are products to compute: what the processor's prefetch
// does not see coming, since other work lies between two blocks.
template <class IO>
LORA_ORTHO_INLINE void prefetch_block(const TileOutput<IO>& out) {
    constexpr int line = 64 / static_cast<int>(sizeof(IO));
    for (int i = 0; i < out.rows; ++i)
        for (int n = 0; n < out.cols; n += line) {
            if (out.base) __builtin_prefetch(out.base->at(out.row0 + i, out.col0 + n), 0);
            __builtin_prefetch(out.y + (out.row0 + i) * out.d_out + out.col0 + n, 1);
        }
}

// Owners among `count` adapters, in products[0] the last of them: an element takes the last product
// whose last draw its own does not exceed, else what an earlier group left in sums. The last group
// adds base, rounds and writes y where whole vectors can be written.
template <class IO, bool first_group, bool last_group>
LORA_ORTHO_INLINE void combine_owned(const std::uint16_t* const* draws, const std::uint32_t* lasts,
                                     int count, const TileOutput<IO>& out, TileScratch& t) {
    const bool write = last_group && out.whole();
    for (int m = 0; m < out.rows; ++m) {
        IO* y = out.y + (out.row0 + m) * out.d_out + out.col0;
        const IO* base = write && out.base ? out.base->at(out.row0 + m, out.col0) : nullptr;
#pragma GCC unroll 2
        for (int n = 0; n < kTileColumns; n += 32) {
            const __m512i u = _mm512_loadu_si512(draws[m] + n);
            Vec<float> low{}, high{};
            if constexpr (!first_group) {
                low = load(&t.sums[m][n]);
                high = load(&t.sums[m][n + 16]);
            }
            for (int g = 0; g < count; ++g) {
                const __mmask32 kept =
                    _mm512_cmple_epu16_mask(u, _mm512_set1_epi16(static_cast<short>(lasts[g])));
                low = _mm512_mask_mov_ps(low, static_cast<__mmask16>(kept),
                                         _mm512_load_ps(&t.products[g][m][n]));
                high = _mm512_mask_mov_ps(high, static_cast<__mmask16>(kept >> 16),
                                          _mm512_load_ps(&t.products[g][m][n + 16]));
            }
            if (!write) {
                store(&t.sums[m][n], low);
                store(&t.sums[m][n + 16], high);
            } else if (base) {
                store_compute<IO, float>(y + n, load_compute(base + n) + low,
                                         load_compute(base + n + 16) + high);
            } else {
                store_compute<IO, float>(y + n, low, high);
            }
        }
    }
}

// One row of an adapter with draws of its own: sums += products up to `last`.
LORA_ORTHO_INLINE void add_kept(const std::uint16_t* draws, std::uint32_t last,
                                const float* products, float* sums) {
    for (int n = 0; n < kTileColumns; n += 32) {
        const __mmask32 kept = _mm512_cmple_epu16_mask(_mm512_loadu_si512(draws + n),
                                                       _mm512_set1_epi16(static_cast<short>(last)));
        for (int half = 0; half < 2; ++half) {
            const __m512 old = _mm512_load_ps(sums + n + 16 * half);
            _mm512_store_ps(sums + n + 16 * half,
                            _mm512_mask_add_ps(old, static_cast<__mmask16>(kept >> (16 * half)),
                                               old, _mm512_load_ps(products + n + 16 * half)));
        }
    }
}

// One block of y, at most kTileBlock rows by kTileColumns columns.
template <class IO>
LORA_ORTHO_INLINE void tile_expand_block(const TileLayout& l, const Place& place,
                                         const Left& scaled, const TileOutput<IO>& out,
                                         TileScratch& t) {
    const int K = l.h.adapters;
    const std::int64_t blocks = l.wide / kTileSteps;
    auto products = [&](std::int64_t first, std::int64_t steps,
                        float* to) __attribute__((always_inline)) {
        const Left a{bytes_at(scaled.data, 2 * kTileSteps * first), scaled.row, scaled.step,
                     scaled.plane};
        product_rows<kPlanes<IO>>(a, l.right(kBTiles, first, out.col0 / kTile), steps, out.rows,
                                  ceil_div(out.cols, kTile), to, kTileColumns, false);
    };
    const std::uint16_t* u[kTileBlock];
    auto draw_rows = [&](int lane_set) __attribute__((always_inline)) {
        const BlockDraws block(place, lane_set, out.col0, kTileColumns);
        for (int m = 0; m < out.rows; ++m) u[m] = block.row(out.row0 + m, t.draws[m]);
    };
    if (l.h.draw == Draw::kShared) {
        // From the last adapter down, so that the lowest interval that ends at the draw or
        // above decides.
        for (int end = K; end > 0; end -= kTileGroup) {
            const int count = end < kTileGroup ? end : kTileGroup;
            std::uint32_t lasts[kTileGroup];
            for (int g = 0; g < count; ++g) {
                lasts[g] = l.intervals[end - 1 - g].last;
                products((end - 1 - g) * blocks, blocks, t.products[g][0]);
            }
            const bool first_group = end == K, last_group = end <= kTileGroup;
            if (first_group) draw_rows(0);
            if (first_group && last_group)
                combine_owned<IO, true, true>(u, lasts, count, out, t);
            else if (first_group)
                combine_owned<IO, true, false>(u, lasts, count, out, t);
            else if (last_group)
                combine_owned<IO, false, true>(u, lasts, count, out, t);
            else
                combine_owned<IO, false, false>(u, lasts, count, out, t);
        }
        if (out.whole()) return;
    } else if (l.h.draw == Draw::kOwn) {
        std::memset(t.sums, 0, sizeof t.sums);
        for (int j = 0; j < K; ++j) {
            products(j * blocks, blocks, t.products[j % kTileGroup][0]);
            draw_rows(j);
            for (int m = 0; m < out.rows; ++m)
                add_kept(u[m], l.intervals[j].last, t.products[j % kTileGroup][m], t.sums[m]);
        }
    } else {
        products(0, l.blocks(kBTiles), t.sums[0]);
    }
    store_block<IO, float>(t.sums[0], kTileColumns, out.base, out.row0, out.rows, out.col0,
                           out.cols, out.d_out, out.y);
}

template <class IO>
void forward_tiles(const TileLayout& l, const Call& call, const lora_ortho_matrix& x,
                   const lora_ortho_matrix* base, void* y, void* s) {
    constexpr int P = kPlanes<IO>;
    const int threads = team_size(call.threads);
    const Shrink<IO> first(l, call.tokens);
    const std::size_t expand = tile_expand_scratch<P>(l);
    const Scratch scratch(first.member_bytes > expand ? first.member_bytes : expand, threads);
    const Scratch shared(first.shared_bytes, 1);
    const View<IO> base_view = base ? view_of<IO>(*base) : View<IO>{};
    IO* s_out = static_cast<IO*>(s);
    const bool prefetch = prefetches(call.tokens, l.h.d_out, sizeof(IO));
    run_team(threads, [&](const Team& team) {
        first.run(view_of<IO>(x), s_out, team, scratch.of<char>(team), shared.of<char>(Team{0, 1}));
        const TileState state;
        auto& t = *scratch.of<TileScratch>(team);
        auto* scaled = reinterpret_cast<bfloat16*>(&t + 1);
        for_chunks(team, call.tokens, l.h.d_out, tile_rows_per_chunk<P>(left_pitch(l.wide_sum)),
                   [&](std::int64_t row0, std::int64_t rows, std::int64_t col0, std::int64_t cols) {
                       const Left left =
                           scale_left<IO, P>(l, call.gains, s_out, row0, rows, scaled);
                       for_blocks(rows, cols, kTileBlock, kTileColumns, l.wide_sum * 2 * P,
                                  [&](std::int64_t i, int height, std::int64_t n, int width) {
                                      const TileOutput<IO> out{base ? &base_view : nullptr,
                                                               static_cast<IO*>(y),
                                                               row0 + i,
                                                               col0 + n,
                                                               l.h.d_out,
                                                               height,
                                                               width};
                                      if (prefetch) prefetch_block(out);
                                      tile_expand_block(l, call.place,
                                                        Left{bytes_at(left.data, i * left.row),
                                                             left.row, left.step, left.plane},
                                                        out, t);
                                  });
                   });
    });
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
