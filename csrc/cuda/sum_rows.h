// out[n, r] = gain_j sum_m mask(m, n; j) x[m, n] s[m, r], j the adapter of rank r: grad_B =
// (mask (.) grad)^T s, and grad_A^T = x^T grad_s where nothing is masked.
//
// A block owns 32 columns, at most kTilesAtOnce tiles of ranks and a share of the rows; each of its
// warps takes 32 rows at a time through a part of shared memory of its own, which turns x, the
// draws and s round so that neighbouring rows lie side by side. The warps are added in a fixed
// order.
#pragma once

#include "cuda/draws.h"
#include "cuda/launch_config.h"
#include "cuda/target.h"

namespace lora_ortho::cuda {

template <class T>
struct SumRowsArguments {
    const Adapter* adapters;
    const Tile* tiles;
    View<T> x;           // (rows, cols)
    const T* s;          // [rows][rank_sum]
    const float* gains;  // null: ones
    std::int64_t rows, cols, rank_sum, tile_count;
    std::uint32_t col_blocks, panels;  // blocks: col_blocks * panels * splits, columns fastest
    std::int32_t splits;
    Draw draw;
    std::int32_t wide;  // x may be read 16 bytes at a time
    Place place;
    float* partial;  // [splits][rank_sum * cols] in the order of the target, or null
    Target target;
};

// One warp's part of shared memory, in elements of T but for the draws: all turned round.
template <class T>
struct SumRowsShared {
    static constexpr int kPitch = kSumRowsRows + 4;
    static constexpr int kX = 0;
    static constexpr int kS = kGroup * kPitch * static_cast<int>(sizeof(T));
    static constexpr int kDraws =
        kS + kTilesAtOnce<T> * kTile * kPitch * static_cast<int>(sizeof(T));
    static constexpr int kWarpBytes = (kDraws + kGroup * kPitch * 2 + 15) / 16 * 16;
    static constexpr int kSumBytes =
        kSumRowsWarps * kGroup * kTile * kTilesAtOnce<T> * static_cast<int>(sizeof(float));
    static constexpr int kBytes =
        kSumRowsWarps * kWarpBytes > kSumBytes ? kSumRowsWarps * kWarpBytes : kSumBytes;
};

// Element i (0 .. N - 1) of words in shared memory.
template <class T, int N>
LORA_ORTHO_DEVICE Run<T, N> load_run(Shared shared, int byte) {
    Run<T, N> out;
#pragma unroll
    for (int i = 0; i < Run<T, N>::kWords; i += 2) {
        const Pair pair = shared.load_pair(byte + 4 * i);
        out.word[i] = pair.word[0];
        out.word[i + 1] = pair.word[1];
    }
    return out;
}

template <class T>
LORA_ORTHO_DEVICE void store_bits(Shared shared, int byte, std::uint32_t bits) {
    if (sizeof(T) == 4) {
        shared.store_word(byte, bits);
    } else {
        shared.store_half(byte, bits);
    }
}

// 32 rows of x, turned; columns from 8t on, rows 8 apart from g on. Zeros beyond the matrix.
template <class T>
LORA_ORTHO_DEVICE void turn_x(const SumRowsArguments<T>& p, Shared shared, int warp_at,
                              std::int64_t row0, std::int64_t col0, int g, int t) {
    using L = SumRowsShared<T>;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        const int row = 8 * q + g;
        Eight<T> x;
        x.clear();
        if (row0 + row < p.rows) {
            x = p.wide ? p.x.template eight<true>(row0 + row, col0 + 8 * t, p.cols)
                       : p.x.template eight<false>(row0 + row, col0 + 8 * t, p.cols);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            constexpr int kPer = Word<T>::kElements;
            const std::uint32_t word = x.word[e / kPer];
            store_bits<T>(shared,
                          warp_at + L::kX + ((8 * t + e) * L::kPitch + row) * int(sizeof(T)),
                          e % kPer == 0 ? word : word >> 16);
        }
    }
}

template <class T>
LORA_ORTHO_DEVICE void turn_draws(const Stream& stream, Shared shared, int warp_at,
                                  std::int64_t row0, std::int64_t col0, int g, int t,
                                  std::uint32_t lane_set) {
    using L = SumRowsShared<T>;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        const int row = 8 * q + g;
        const Draws draws =
            stream.template draws<false>(stream.row(static_cast<std::uint32_t>(row0 + row)),
                                         static_cast<std::uint32_t>(col0 / 8 + t), lane_set);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            shared.store_half(warp_at + L::kDraws + ((8 * t + e) * L::kPitch + row) * 2, draws[e]);
        }
    }
}

// 32 rows of the panel's ranks of s, turned: each lane eight rows of one rank of every tile.
template <class T>
LORA_ORTHO_DEVICE void turn_s(const SumRowsArguments<T>& p, Shared shared, int warp_at,
                              std::int64_t row0, std::int64_t first_tile, int tiles, int lane) {
    using L = SumRowsShared<T>;
    const int rank = lane % kTile;
    for (int i = 0; i < tiles; ++i) {
        const Tile tile = p.tiles[first_tile + i];
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            const int row = 4 * q + lane / kTile;
            std::uint32_t bits = 0;
            if (row0 + row < p.rows && rank < tile.count) {
                bits = raw_bits(p.s[(row0 + row) * p.rank_sum + tile.begin + rank]);
            }
            store_bits<T>(shared,
                          warp_at + L::kS + ((kTile * i + rank) * L::kPitch + row) * int(sizeof(T)),
                          bits);
        }
    }
}

// Four rows of one column, zero where the adapter does not own the element.
template <class T>
LORA_ORTHO_DEVICE FourOf<T> masked_column(Shared shared, int warp_at, int col, int row, Draw draw,
                                          std::uint32_t first, std::uint32_t span) {
    using L = SumRowsShared<T>;
    constexpr int kPer = Word<T>::kElements;
    FourOf<T> x =
        load_run<T, 4>(shared, warp_at + L::kX + (col * L::kPitch + row) * int(sizeof(T)));
    if (draw == Draw::kNone) return x;
    const Pair draws = shared.load_pair(warp_at + L::kDraws + (col * L::kPitch + row) * 2);
#pragma unroll
    for (int w = 0; w < FourOf<T>::kWords; ++w) {
        bool keep[2];
#pragma unroll
        for (int k = 0; k < kPer; ++k) {
            const int e = w * kPer + k;
            const std::uint32_t word = draws.word[e / 2];
            keep[k] = (e % 2 == 0 ? word & 0xffffu : word >> 16) - first <= span;
        }
        x.word[w] = Word<T>::masked(x.word[w], keep);
    }
    return x;
}

template <class T>
LORA_ORTHO_KERNEL(kSumRowsThreads, kSumRowsBlocks)
grad_factor_kernel(const SumRowsArguments<T> p) {
    using L = SumRowsShared<T>;
    constexpr int kTiles = kTilesAtOnce<T>;
    const Shared shared = shared_memory();
    const int warp = thread_index() >> 5, lane = thread_index() & 31;
    const int g = lane >> 2, t = lane & 3, warp_at = warp * L::kWarpBytes;
    const auto block = static_cast<std::uint32_t>(block_index());
    const std::int64_t col0 = static_cast<std::int64_t>(block % p.col_blocks) * kGroup;
    const std::int64_t panel = block / p.col_blocks % p.panels;
    const std::int64_t split = block / p.col_blocks / p.panels;
    const std::int64_t first_tile = panel * kTiles;
    const int tiles =
        static_cast<int>(p.tile_count - first_tile < kTiles ? p.tile_count - first_tile : kTiles);
    const Stream stream(p.place);

    Four sum[2][kTiles] = {};
    for (std::int64_t row0 = (split * kSumRowsWarps + warp) * kSumRowsRows; row0 < p.rows;
         row0 += static_cast<std::int64_t>(kSumRowsWarps * p.splits) * kSumRowsRows) {
        sync_warp();
        turn_x(p, shared, warp_at, row0, col0, g, t);
        turn_s(p, shared, warp_at, row0, first_tile, tiles, lane);
        if (p.draw == Draw::kShared) turn_draws<T>(stream, shared, warp_at, row0, col0, g, t, 0);
        sync_warp();
        std::int32_t adapter = -1;
        FourOf<T> x[2][2][2];  // column tile, half of the rows, upper or lower columns
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            if (i >= tiles) break;
            const std::int32_t wanted = p.tiles[first_tile + i].adapter;
            if (wanted != adapter) {
                adapter = wanted;
                if (p.draw == Draw::kOwn) {
                    sync_warp();
                    turn_draws<T>(stream, shared, warp_at, row0, col0, g, t,
                                  static_cast<std::uint32_t>(adapter));
                    sync_warp();
                }
                const std::uint32_t first = p.adapters[adapter].interval.first;
                const std::uint32_t span = p.adapters[adapter].interval.last - first;
#pragma unroll
                for (int v = 0; v < 8; ++v) {
                    const int m = v / 4, half = v / 2 % 2, h = v % 2;
                    x[m][half][h] = masked_column<T>(shared, warp_at, 16 * m + 8 * h + g,
                                                     16 * half + 4 * t, p.draw, first, span);
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Right<T> right(load_run<T, 4>(
                    shared,
                    warp_at + L::kS +
                        ((kTile * i + g) * L::kPitch + 16 * half + 4 * t) * int(sizeof(T))));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const Left<T> left(x[m][half][0], x[m][half][1]);
                    sum[m][i] = multiply(left, right, sum[m][i]);
                }
            }
        }
    }

    // [warp][column][rank of the panel]
    constexpr int kWidth = kTiles * kTile;
    sync_block();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int col = 16 * m + 8 * h + g, rank = kTile * i + 2 * t;
                shared.store_pair(((warp * kGroup + col) * kWidth + rank) * 4,
                                  {{as_bits(sum[m][i].v[2 * h]), as_bits(sum[m][i].v[2 * h + 1])}});
            }
        }
    }
    sync_block();
    for (int e = thread_index(); e < kGroup * kWidth; e += kSumRowsThreads) {
        // Neighbouring threads on neighbouring elements of the target.
        const int col = p.target.flat ? e / kWidth : e % kGroup;
        const int rank = p.target.flat ? e % kWidth : e / kGroup;
        const int i = rank / kTile, k = rank % kTile;
        if (col0 + col >= p.cols || i >= tiles) continue;
        const Tile tile = p.tiles[first_tile + i];
        if (k >= tile.count) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kSumRowsWarps; ++w) {
            total += shared.load_float(((w * kGroup + col) * kWidth + rank) * 4);
        }
        if (p.gains) total *= p.gains[tile.adapter];
        const Adapter a = p.adapters[tile.adapter];
        const std::int64_t at =
            p.target.flat ? a.begin * p.cols + (col0 + col) * a.rank + tile.begin - a.begin + k
                          : (tile.begin + k) * p.cols + col0 + col;
        if (p.partial) {
            p.partial[split * p.rank_sum * p.cols + at] = total;
        } else {
            store_any(p.target.data, p.target.dtype, at, total);
        }
    }
}

}  // namespace lora_ortho::cuda
