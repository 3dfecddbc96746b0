// Backward of the tile kernels: reduce, then the gradients of gains, x and A from ds.
#pragma once

#include "cpu/backward.h"
#include "cpu/tiles_reduce.h"

#if defined(__AMX_BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

static_assert(kGradientColumns % kTile == 0);

template <int P>
struct TileGradientScratch {
    TileBlock<P, kReduceRows<P>, kGradientColumns> x;
    alignas(64) float sums[kTileBlock][kTileColumns];  // of dx
    // followed by dA of the block, float [K * narrow][kGradientColumns]
    float* dA() { return reinterpret_cast<float*>(this + 1); }
};

template <int P>
struct TileBackwardSizes {
    TileBackwardSizes(const TileLayout& l, const lora_ortho_call& call)
        : threads(team_size(call.threads)),
          rows(round_up(call.tokens, kTileSteps)),
          pitch(left_pitch(rows)),
          ds(align(rows * l.narrow_sum * 4)),
          transposed(align(P * l.narrow_sum * pitch * 2)),
          dgains(align(ceil_div(call.tokens, kGainRows) * l.h.adapters * 8)) {
        const std::int64_t reduce = static_cast<std::int64_t>(sizeof(TileReduceScratch<P>)) +
                                    l.narrow_sum * kReduceColumns * 4;
        const std::int64_t rest = static_cast<std::int64_t>(sizeof(TileGradientScratch<P>)) +
                                  l.narrow_sum * kGradientColumns * 4 +
                                  2 * P * kTileBlock * left_pitch(l.narrow_sum);
        member = align(reduce > rest ? reduce : rest);
    }
    static std::size_t align(std::int64_t n) { return static_cast<std::size_t>(round_up(n, 64)); }
    std::size_t total() const {
        return ds + transposed + dgains + member * static_cast<std::size_t>(threads);
    }

    int threads;
    std::int64_t rows, pitch;  // tokens rounded up; elements between the rows of s^T and ds^T
    std::size_t ds, transposed, dgains, member;
};

// All blocks of columns, in the order of reduce.h's reduce(). Ends with a barrier.
template <class IO, int P>
void reduce_tiles(const TileLayout& l, const Draw& draw, View<IO> grad, const Left& transposed,
                  std::int64_t rows, float* ds, const FactorGradients& factors, const Team& team,
                  TileReduceScratch<P>& t) {
    const std::int64_t tokens = draw.call.tokens, stripes = rows / kTileSteps;
    const std::int64_t blocks = ceil_div(l.h.d_out, kReduceColumns);
    for (std::int64_t round = 0; round < blocks; round += team.size) {
        const std::int64_t block = round + team.id, col0 = block * kReduceColumns;
        const bool busy = block < blocks;
        const int cols =
            static_cast<int>(l.h.d_out - col0 < kReduceColumns ? l.h.d_out - col0 : kReduceColumns);
        if (busy)
            std::memset(t.db(), 0, static_cast<std::size_t>(l.narrow_sum * kReduceColumns * 4));
        for (int phase = 0; phase < team.size; ++phase) {
            const Team stripe{(team.id + phase) % team.size, team.size};
            const std::int64_t row0 = stripe.begin(stripes) * kTileSteps;
            const std::int64_t end = stripe.end(stripes) * kTileSteps;
            if (busy)
                tile_reduce_block<IO, P>(l, draw, grad, transposed, row0,
                                         end < tokens ? end : tokens, col0, cols, ds, t);
            team.barrier();
        }
        if (busy && factors.dB)
            write_dB(l, draw.call.gains, t.db(), l.narrow, 1, kReduceColumns, col0, cols, factors);
    }
}

// For rows of one chunk: dgains_j += ds_j . s_j, then ds is scaled by the gains.
template <class IO>
LORA_ORTHO_INLINE void scale_ds(const TileLayout& l, const double* gains, const IO* s,
                                std::int64_t row0, std::int64_t row1, float* ds, double* sums) {
    for (int j = 0; j < l.h.adapters; ++j) sums[j] = 0;
    for (std::int64_t m = row0; m < row1; ++m)
        for (int j = 0; j < l.h.adapters; ++j) {
            const IO* from = s + m * l.h.rank_sum + l.rank_begin[j];
            float* row = ds + m * l.narrow_sum + j * l.narrow;
            const float gain = static_cast<float>(gains[j]);
            float dot = 0;
            for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
                dot += row[k] * to_compute(from[k]);
                row[k] *= gain;
            }
            sums[j] += static_cast<double>(dot);
        }
}

// dx = ds A over rows [row0, row1).
template <class IO, int P>
void write_dx_tiles(const TileLayout& l, const float* ds, std::int64_t row0, std::int64_t row1,
                    IO* dx, TileGradientScratch<P>& t) {
    auto* block = reinterpret_cast<bfloat16*>(t.dA());
    const View<float> view{ds, l.narrow_sum, 1};
    for (std::int64_t m = row0; m < row1; m += kTileBlock) {
        const int rows = static_cast<int>(row1 - m < kTileBlock ? row1 - m : kTileBlock);
        const int padded = rows > kTile ? kTileBlock : kTile;
        const Left a = load_left<float, P>(view, m, rows, padded, 0, l.narrow_sum, false, block);
        for (std::int64_t n = 0; n < l.h.d_in; n += kTileColumns) {
            const int cols =
                static_cast<int>(l.h.d_in - n < kTileColumns ? l.h.d_in - n : kTileColumns);
            product_rows<P>(a, l.right(7, 0, n / kTile), l.blocks(7), padded, ceil_div(cols, kTile),
                            t.sums[0], kTileColumns, false);
            finish_block<IO, float>(t.sums[0], kTileColumns, nullptr, m, rows, n, cols, l.h.d_in,
                                    dx);
        }
    }
}

// dA = ds^T x over columns [col0, col0 + cols).
template <class IO, int P>
void write_dA_tiles(const TileLayout& l, const Left& transposed, View<IO> x, std::int64_t tokens,
                    std::int64_t col0, int cols, const FactorGradients& factors,
                    TileGradientScratch<P>& t) {
    float* sums = t.dA();
    std::memset(sums, 0, static_cast<std::size_t>(l.narrow_sum * kGradientColumns * 4));
    for (std::int64_t m = 0; m < tokens; m += kReduceRows<P>) {
        const int count =
            static_cast<int>(tokens - m < kReduceRows<P> ? tokens - m : kReduceRows<P>);
        load_tile_block(x, m, count, col0, cols, t.x);
        interleave_block(t.x);
        for (std::int64_t r = 0; r < l.narrow_sum; r += kTileBlock) {
            const Left a{bytes_at(transposed.data, r * transposed.row + 2 * m), transposed.row,
                         transposed.step, transposed.plane};
            product_rows<P>(a, t.x.as_right(), ceil_div(count, kTileSteps), kTileBlock,
                            kGradientColumns / kTile, sums + r * kGradientColumns, kGradientColumns,
                            true);
        }
    }
    for (int j = 0; j < l.h.adapters; ++j)
        write_dA(l, sums + j * l.narrow * kGradientColumns, kGradientColumns, l.rank_begin[j],
                 l.ranks[j], col0, cols, factors);
}

template <class IO>
void backward_tiles(const void* packed, const lora_ortho_call& call, const lora_ortho_matrix& grad,
                    const lora_ortho_matrix& x, const void* s, void* dx,
                    const FactorGradients& factors, double* dgains, void* workspace) {
    constexpr int P = kPlanes<IO>;
    const TileLayout l(packed, P);
    const TileBackwardSizes<P> sizes(l, call);
    char* at = static_cast<char*>(workspace);
    float* ds = reinterpret_cast<float*>(at);
    auto* flipped = reinterpret_cast<bfloat16*>(at + sizes.ds);
    double* sums = reinterpret_cast<double*>(at + sizes.ds + sizes.transposed);
    char* members = at + sizes.ds + sizes.transposed + sizes.dgains;
    const IO* s_in = static_cast<const IO*>(s);
    const std::int64_t chunks = ceil_div(call.tokens, kGainRows);
    const Left transposed{flipped, 2 * sizes.pitch, 2 * kTileSteps, 2 * l.narrow_sum * sizes.pitch};
    const Draw draw{call, l};
    run_team(sizes.threads, [&](const Team& team) {
        const TileState state;
        char* own = members + sizes.member * static_cast<std::size_t>(team.id);
        const std::int64_t stripes = sizes.rows / kTileSteps;
        const std::int64_t row0 = team.begin(stripes) * kTileSteps;
        const std::int64_t row1 = team.end(stripes) * kTileSteps;
        std::memset(ds + row0 * l.narrow_sum, 0,
                    static_cast<std::size_t>((row1 - row0) * l.narrow_sum * 4));
        if (team.id == 0)  // rows of s^T between K * narrow and narrow_sum
            std::memset(static_cast<void*>(flipped), 0, sizes.transposed);
        team.barrier();
        transpose_rows<P>(l, row0, row1 < call.tokens ? row1 : call.tokens, sizes.pitch, flipped,
                          [&](std::int64_t m, int j, std::int64_t k) {
                              return to_compute(s_in[m * l.h.rank_sum + l.rank_begin[j] + k]);
                          });
        team.barrier();
        reduce_tiles<IO, P>(l, draw, view_of<IO>(grad), transposed, sizes.rows, ds, factors, team,
                            *reinterpret_cast<TileReduceScratch<P>*>(own));
        auto& t = *reinterpret_cast<TileGradientScratch<P>*>(own);
        for (std::int64_t c = team.begin(chunks); c < team.end(chunks); ++c) {
            const std::int64_t begin = c * kGainRows;
            const std::int64_t end =
                begin + kGainRows < call.tokens ? begin + kGainRows : call.tokens;
            scale_ds<IO>(l, call.gains, s_in, begin, end, ds, sums + c * l.h.adapters);
            if (factors.dA)
                transpose_rows<P>(l, begin, end, sizes.pitch, flipped,
                                  [&](std::int64_t m, int j, std::int64_t k) {
                                      return ds[m * l.narrow_sum + j * l.narrow + k];
                                  });
            if (dx) write_dx_tiles<IO, P>(l, ds, begin, end, static_cast<IO*>(dx), t);
        }
        team.barrier();
        if (dgains && team.id == 0) add_dgains(l, chunks, sums, dgains);
        const std::int64_t pieces = ceil_div(l.h.d_in, kGradientColumns);
        if (factors.dA)
            for (std::int64_t p = team.begin(pieces); p < team.end(pieces); ++p) {
                const std::int64_t col0 = p * kGradientColumns, left = l.h.d_in - col0;
                write_dA_tiles<IO, P>(
                    l, transposed, view_of<IO>(x), call.tokens, col0,
                    static_cast<int>(left < kGradientColumns ? left : kGradientColumns), factors,
                    t);
            }
    });
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
