// out[m, r] = sum_n mask(m, n; adapter of r) x[m, n] f[r, n]: shrink, s = x A^T, where nothing is
// masked; grad_s = (mask (.) grad) B, but for its gain, with masks drawn again.
//
// A block owns 32 rows, at most kTilesAtOnce tiles of ranks and a share of the columns; its four
// warps take groups of 32 columns in turn and are added in shared memory, in a fixed order. x goes
// from memory straight into the registers of the matrix instruction: 16 bytes are eight
// neighbouring k.
#pragma once

#include "cuda/draws.h"
#include "cuda/launch_config.h"

namespace lora_ortho::cuda {

template <class T>
struct SumColumnsArguments {
    const Adapter* adapters;
    const Tile* tiles;
    const T* factors;  // section A_rows or B_rows
    View<T> x;
    std::int64_t rows, cols, rank_sum, tile_count;
    std::uint32_t row_blocks, panels;  // blocks: row_blocks * panels * splits, rows fastest
    std::int32_t splits;
    Draw draw;
    Place place;
    float* partial;  // [splits][rows][rank_sum], or null: then
    T* out;          // [rows][rank_sum]
};

// `x` with zeros where the adapter does not own the element. `first` lies in the high half of a
// word, `span` likewise with ones below it.
template <class T>
LORA_ORTHO_DEVICE Eight<T> masked(const Eight<T>& x, const Draws& draws, std::uint32_t first,
                                  std::uint32_t span) {
    Eight<T> out;
    constexpr int kPer = Word<T>::kElements;
#pragma unroll
    for (int i = 0; i < Eight<T>::kWords; ++i) {
        bool keep[2];
#pragma unroll
        for (int k = 0; k < kPer; ++k) keep[k] = draws.high(i * kPer + k) - first <= span;
        out.word[i] = Word<T>::masked(x.word[i], keep);
    }
    return out;
}

// The masked operands of one adapter, made again where the adapter changes.
template <class T, bool kMasked, bool kWide>
struct MaskedRows {
    const SumColumnsArguments<T>& p;
    const Stream& stream;
    std::int64_t rows[4], col;
    Eight<T> x[4], kept[4];
    Draws draws[4];
    std::int32_t adapter = -1;

    LORA_ORTHO_DEVICE MaskedRows(const SumColumnsArguments<T>& p_, const Stream& stream_,
                                 const std::int64_t (&rows_)[4], std::int64_t col_)
        : p(p_), stream(stream_), col(col_) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            rows[q] = rows_[q];
            x[q] = p.x.template eight<kWide>(rows[q], col, p.cols);
            if (kMasked && p.draw == Draw::kShared)
                draws[q] = stream.template draws<kWide>(stream.row(row(q)), block(), 0);
        }
    }
    LORA_ORTHO_DEVICE void select(std::int32_t wanted) {
        if (!kMasked || wanted == adapter) return;
        adapter = wanted;
        const Interval interval = p.adapters[adapter].interval;
        const std::uint32_t first = interval.first << 16;
        const std::uint32_t span = (interval.last - interval.first) << 16 | 0xffffu;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            if (p.draw == Draw::kOwn) {
                draws[q] = stream.template draws<kWide>(stream.row(row(q)), block(),
                                                        static_cast<std::uint32_t>(adapter));
            }
            kept[q] = p.draw == Draw::kNone ? x[q] : masked(x[q], draws[q], first, span);
        }
    }
    LORA_ORTHO_DEVICE const Eight<T>& operator[](int q) const { return kMasked ? kept[q] : x[q]; }
    LORA_ORTHO_DEVICE std::uint32_t row(int q) const { return static_cast<std::uint32_t>(rows[q]); }
    LORA_ORTHO_DEVICE std::uint32_t block() const { return static_cast<std::uint32_t>(col / 8); }
};

template <class T, bool kMasked, bool kWide>
LORA_ORTHO_DEVICE void sum_columns(const SumColumnsArguments<T>& p) {
    constexpr int kTiles = kTilesAtOnce<T>;
    const Shared shared = shared_memory();
    const int warp = thread_index() >> 5, lane = thread_index() & 31;
    const int g = lane >> 2, t = lane & 3;
    const auto block = static_cast<std::uint32_t>(block_index());
    const std::int64_t row0 = static_cast<std::int64_t>(block % p.row_blocks) * kSumColumnsRows;
    const std::int64_t panel = block / p.row_blocks % p.panels;
    const std::int64_t split = block / p.row_blocks / p.panels;
    const std::int64_t groups = ceil_div(p.cols, kGroup);
    const std::int64_t first_tile = panel * kTiles;
    const int tiles =
        static_cast<int>(p.tile_count - first_tile < kTiles ? p.tile_count - first_tile : kTiles);
    const Stream stream(p.place);

    std::int64_t rows[4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
        rows[q] = row0 + 8 * q + g;
        if (rows[q] >= p.rows) rows[q] = p.rows - 1;
    }
    Four sum[2][kTiles] = {};
    for (std::int64_t group = split * kSumColumnsWarps + warp; group < groups;
         group += kSumColumnsWarps * p.splits) {
        MaskedRows<T, kMasked, kWide> x(p, stream, rows, group * kGroup + 8 * t);
        const T* factors = p.factors + ((first_tile * groups + group) * kWarp + lane) * 8;
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
            if (i >= tiles) break;
            if (kMasked) x.select(p.tiles[first_tile + i].adapter);
            const Eight<T> f = load_eight(factors + i * groups * kWarp * 8);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Right<T> right(half_of(f, half));
#pragma unroll
                for (int m = 0; m < 2; ++m) {
                    const Left<T> left(half_of(x[2 * m], half), half_of(x[2 * m + 1], half));
                    sum[m][i] = multiply(left, right, sum[m][i]);
                }
            }
        }
    }

    // [warp][row][rank of the panel]
    constexpr int kWidth = kTiles * kTile;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = 16 * m + 8 * h + g, rank = kTile * i + 2 * t;
                const int at = ((warp * kSumColumnsRows + row) * kWidth + rank) * 4;
                shared.store_pair(at,
                                  {{as_bits(sum[m][i].v[2 * h]), as_bits(sum[m][i].v[2 * h + 1])}});
            }
        }
    }
    sync_block();
    for (int e = thread_index(); e < kSumColumnsRows * kWidth; e += kSumColumnsThreads) {
        const int row = e / kWidth, i = e % kWidth / kTile, k = e % kTile;
        if (row0 + row >= p.rows || i >= tiles) continue;
        const Tile tile = p.tiles[first_tile + i];
        if (k >= tile.count) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < kSumColumnsWarps; ++w)
            total += shared.load_float((w * kSumColumnsRows * kWidth + e) * 4);
        const std::int64_t at = (row0 + row) * p.rank_sum + tile.begin + k;
        if (p.partial) {
            p.partial[split * p.rows * p.rank_sum + at] = total;
        } else {
            p.out[at] = from_float<T>(total);
        }
    }
}

// kWide: x may be read 16 bytes at a time, and masks start at a multiple of eight columns.
template <class T, bool kWide>
LORA_ORTHO_KERNEL(kSumColumnsThreads, kSumColumnsBlocks)
shrink_kernel(const SumColumnsArguments<T> p) {
    sum_columns<T, false, kWide>(p);
}

template <class T, bool kWide>
LORA_ORTHO_KERNEL(kSumColumnsThreads, kSumColumnsBlocks)
grad_s_kernel(const SumColumnsArguments<T> p) {
    sum_columns<T, true, kWide>(p);
}

}  // namespace lora_ortho::cuda
