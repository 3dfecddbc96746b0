// Backward of the tile kernels: grad_s and grad_B in one pass, then grad_gains, grad_x and grad_A.
#pragma once

#include "cpu/amx_grad_s_grad_B.h"
#include "cpu/backward.h"

#if defined(__AMX_BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

template <int P>
struct TileGradXGradAScratch {
    TileBlock<P, kGradBlockRows<P>, kGradAColumns> x;
    alignas(64) float sums[kTileBlock][kTileColumns];  // of grad_x
    // followed by grad_A of the block, float [K * narrow][kGradAColumns]
    float* grad_A() { return reinterpret_cast<float*>(this + 1); }
};

template <int P>
struct TileBackwardSizes {
    TileBackwardSizes(const TileLayout& l, const Call& call)
        : threads(team_size(call.threads)),
          rows(round_up(call.tokens, kTileSteps)),
          pitch(left_pitch(rows)),
          grad_s(align(rows * l.narrow_sum * 4)),
          transposed(align(P * l.narrow_sum * pitch * 2)),
          grad_gains(align(ceil_div(call.tokens, kGainRows) * l.h.adapters * 8)) {
        const std::int64_t first = static_cast<std::int64_t>(sizeof(TileGradSGradBScratch<P>)) +
                                   l.narrow_sum * kGradBlockColumns * 4;
        const std::int64_t rest = static_cast<std::int64_t>(sizeof(TileGradXGradAScratch<P>)) +
                                  l.narrow_sum * kGradAColumns * 4 +
                                  2 * P * kTileBlock * left_pitch(l.narrow_sum);
        member = align(first > rest ? first : rest);
    }
    static std::size_t align(std::int64_t n) { return static_cast<std::size_t>(round_up(n, 64)); }
    std::size_t total() const {
        return grad_s + transposed + grad_gains + member * static_cast<std::size_t>(threads);
    }

    int threads;
    std::int64_t rows, pitch;  // tokens rounded up; elements between the rows of s^T and grad_s^T
    std::size_t grad_s, transposed, grad_gains, member;
};

// All blocks of columns, in the order of grad_s_grad_B(). Ends with a barrier.
template <class IO, int P>
void grad_s_grad_B_tiles(const TileLayout& l, const Call& call, View<IO> grad,
                         const Left& transposed, std::int64_t rows, float* grad_s,
                         const Gradients& out, const Team& team, TileGradSGradBScratch<P>& t) {
    const std::int64_t tokens = call.tokens, stripes = rows / kTileSteps;
    const std::int64_t blocks = ceil_div(l.h.d_out, kGradBlockColumns);
    for (std::int64_t round = 0; round < blocks; round += team.size) {
        const std::int64_t block = round + team.id, col0 = block * kGradBlockColumns;
        const bool busy = block < blocks;
        const int cols = static_cast<int>(l.h.d_out - col0 < kGradBlockColumns ? l.h.d_out - col0
                                                                               : kGradBlockColumns);
        if (busy)
            std::memset(t.grad_B(), 0,
                        static_cast<std::size_t>(l.narrow_sum * kGradBlockColumns * 4));
        for (int phase = 0; phase < team.size; ++phase) {
            const Team stripe{(team.id + phase) % team.size, team.size};
            const std::int64_t row0 = stripe.begin(stripes) * kTileSteps;
            const std::int64_t end = stripe.end(stripes) * kTileSteps;
            if (busy)
                grad_s_grad_B_tile_block<IO, P>(l, call.place, grad, transposed, row0,
                                                end < tokens ? end : tokens, col0, cols, grad_s, t);
            team.barrier();
        }
        if (busy && out.grad_B)
            store_grad_B(l, call.gains, t.grad_B(), l.narrow, 1, kGradBlockColumns, col0, cols,
                         out);
    }
}

// For rows of one chunk: this chunk's part of grad_gains_j, grad_s_j . s_j; then grad_s gets its
// gains.
template <class IO>
LORA_ORTHO_INLINE void scale_grad_s_tiles(const TileLayout& l, const double* gains, const IO* s,
                                          std::int64_t row0, std::int64_t row1, float* grad_s,
                                          double* sums) {
    for (int j = 0; j < l.h.adapters; ++j) sums[j] = 0;
    for (std::int64_t m = row0; m < row1; ++m)
        for (int j = 0; j < l.h.adapters; ++j) {
            const IO* from = s + m * l.h.rank_sum + l.rank_begin[j];
            float* row = grad_s + m * l.narrow_sum + j * l.narrow;
            const float gain = static_cast<float>(gains[j]);
            float dot = 0;
            for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
                dot += row[k] * to_compute(from[k]);
                row[k] *= gain;
            }
            sums[j] += static_cast<double>(dot);
        }
}

// grad_x = grad_s A over rows [row0, row1).
template <class IO, int P>
void grad_x_tiles(const TileLayout& l, const float* grad_s, std::int64_t row0, std::int64_t row1,
                  IO* grad_x, TileGradXGradAScratch<P>& t) {
    auto* block = reinterpret_cast<bfloat16*>(t.grad_A());
    const View<float> view{grad_s, l.narrow_sum, 1};
    for (std::int64_t m = row0; m < row1; m += kTileBlock) {
        const int rows = static_cast<int>(row1 - m < kTileBlock ? row1 - m : kTileBlock);
        const int padded = rows > kTile ? kTileBlock : kTile;
        const Left a = load_left<float, P>(view, m, rows, padded, 0, l.narrow_sum, false, block);
        for (std::int64_t n = 0; n < l.h.d_in; n += kTileColumns) {
            const int cols =
                static_cast<int>(l.h.d_in - n < kTileColumns ? l.h.d_in - n : kTileColumns);
            product_rows<P>(a, l.right(kATransposedTiles, 0, n / kTile),
                            l.blocks(kATransposedTiles), padded, ceil_div(cols, kTile), t.sums[0],
                            kTileColumns, false);
            store_block<IO, float>(t.sums[0], kTileColumns, nullptr, m, rows, n, cols, l.h.d_in,
                                   grad_x);
        }
    }
}

// grad_A = grad_s^T x over columns [col0, col0 + cols).
template <class IO, int P>
void grad_A_tiles(const TileLayout& l, const Left& transposed, View<IO> x, std::int64_t tokens,
                  std::int64_t col0, int cols, const Gradients& out, TileGradXGradAScratch<P>& t) {
    float* sums = t.grad_A();
    std::memset(sums, 0, static_cast<std::size_t>(l.narrow_sum * kGradAColumns * 4));
    for (std::int64_t m = 0; m < tokens; m += kGradBlockRows<P>) {
        const int count =
            static_cast<int>(tokens - m < kGradBlockRows<P> ? tokens - m : kGradBlockRows<P>);
        load_tile_block(x, m, count, col0, cols, t.x);
        interleave_block(t.x);
        for (std::int64_t r = 0; r < l.narrow_sum; r += kTileBlock) {
            const Left a{bytes_at(transposed.data, r * transposed.row + 2 * m), transposed.row,
                         transposed.step, transposed.plane};
            product_rows<P>(a, t.x.as_right(), ceil_div(count, kTileSteps), kTileBlock,
                            kGradAColumns / kTile, sums + r * kGradAColumns, kGradAColumns, true);
        }
    }
    for (int j = 0; j < l.h.adapters; ++j)
        store_grad_A(l, sums + j * l.narrow * kGradAColumns, kGradAColumns, l.rank_begin[j],
                     l.ranks[j], col0, cols, out);
}

template <class IO>
void backward_tiles(const TileLayout& l, const Call& call, const lora_ortho_matrix& grad,
                    const lora_ortho_matrix& x, const void* s, const Gradients& out,
                    void* workspace) {
    constexpr int P = kPlanes<IO>;
    const TileBackwardSizes<P> sizes(l, call);
    char* at = static_cast<char*>(workspace);
    float* grad_s = reinterpret_cast<float*>(at);
    auto* flipped = reinterpret_cast<bfloat16*>(at + sizes.grad_s);
    double* sums = reinterpret_cast<double*>(at + sizes.grad_s + sizes.transposed);
    char* members = at + sizes.grad_s + sizes.transposed + sizes.grad_gains;
    const IO* s_in = static_cast<const IO*>(s);
    const std::int64_t chunks = ceil_div(call.tokens, kGainRows);
    const Left transposed{flipped, 2 * sizes.pitch, 2 * kTileSteps, 2 * l.narrow_sum * sizes.pitch};
    run_team(sizes.threads, [&](const Team& team) {
        const TileState state;
        char* own = members + sizes.member * static_cast<std::size_t>(team.id);
        const std::int64_t stripes = sizes.rows / kTileSteps;
        const std::int64_t row0 = team.begin(stripes) * kTileSteps;
        const std::int64_t row1 = team.end(stripes) * kTileSteps;
        std::memset(grad_s + row0 * l.narrow_sum, 0,
                    static_cast<std::size_t>((row1 - row0) * l.narrow_sum * 4));
        if (team.id == 0)  // rows of s^T between K * narrow and narrow_sum
            std::memset(static_cast<void*>(flipped), 0, sizes.transposed);
        team.barrier();
        transpose_rows<P>(l, row0, row1 < call.tokens ? row1 : call.tokens, sizes.pitch, flipped,
                          [&](std::int64_t m, int j, std::int64_t k) {
                              return to_compute(s_in[m * l.h.rank_sum + l.rank_begin[j] + k]);
                          });
        team.barrier();
        grad_s_grad_B_tiles<IO, P>(l, call, view_of<IO>(grad), transposed, sizes.rows, grad_s, out,
                                   team, *reinterpret_cast<TileGradSGradBScratch<P>*>(own));
        auto& t = *reinterpret_cast<TileGradXGradAScratch<P>*>(own);
        for (std::int64_t c = team.begin(chunks); c < team.end(chunks); ++c) {
            const std::int64_t begin = c * kGainRows;
            const std::int64_t end =
                begin + kGainRows < call.tokens ? begin + kGainRows : call.tokens;
            scale_grad_s_tiles<IO>(l, call.gains, s_in, begin, end, grad_s,
                                   sums + c * l.h.adapters);
            if (out.grad_A)
                transpose_rows<P>(l, begin, end, sizes.pitch, flipped,
                                  [&](std::int64_t m, int j, std::int64_t k) {
                                      return grad_s[m * l.narrow_sum + j * l.narrow + k];
                                  });
            if (out.grad_x)
                grad_x_tiles<IO, P>(l, grad_s, begin, end, static_cast<IO*>(out.grad_x), t);
        }
        team.barrier();
        if (out.grad_gains && team.id == 0)
            sum_parts_of_grad_gains(l, chunks, sums, out.grad_gains);
        const std::int64_t pieces = ceil_div(l.h.d_in, kGradAColumns);
        if (out.grad_A)
            for (std::int64_t p = team.begin(pieces); p < team.end(pieces); ++p) {
                const std::int64_t col0 = p * kGradAColumns, left = l.h.d_in - col0;
                grad_A_tiles<IO, P>(l, transposed, view_of<IO>(x), call.tokens, col0,
                                    static_cast<int>(left < kGradAColumns ? left : kGradAColumns),
                                    out, t);
            }
    });
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
