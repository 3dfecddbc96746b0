// out[m, r] = sum_n mask(m, n; adapter of r) x[m, n] f[r, n]: s = x A^T where nothing is masked,
// and ds = (m (.) g) B in the backward pass, masks drawn again.
//
// A block owns 32 rows, at most kTilesAtOnce tiles of ranks and a share of the columns; its four
// warps take groups of 32 columns in turn and are added in shared memory, in a fixed order. x goes
// from memory straight into the registers of the matrix instruction: 16 bytes are eight
// neighbouring k.
#pragma once

#include "cuda/draws.h"
#include "cuda/view.h"

namespace lora_ortho::cuda {

constexpr int kShrinkRows = 32, kShrinkThreads = 128;
template <class T>
constexpr int kTilesAtOnce = sizeof(T) == 4 ? 4 : 8;

template <class T>
struct ShrinkArguments {
    const Adapter* adapters;
    const Tile* tiles;
    const T* factors;  // section A_rows or B_rows
    View<T> x;
    std::int64_t rows, cols, rank_sum, tile_count;
    std::uint32_t row_blocks, panels;  // blocks: row_blocks * panels * splits, rows fastest
    std::int32_t splits;
    std::int32_t draw;  // 0 nothing, 1 once, 2 for every adapter
    Place place;
    float* partial;  // [splits][rows][rank_sum], or null: then
    T* out;          // [rows][rank_sum]
};

template <class T, bool kMasked>
constexpr int shrink_shared_bytes() {
    return 4 * kShrinkRows * kTile * kTilesAtOnce<T> * static_cast<int>(sizeof(float));
}

// `x` with zeros where the adapter does not own the element.
template <class T>
LORA_ORTHO_DEVICE Eight<T> masked(const Eight<T>& x, const Draws& draws, std::uint32_t lower,
                                  std::uint32_t span) {
    Eight<T> out;
    constexpr int kPer = Word<T>::kElements;
#pragma unroll
    for (int i = 0; i < Eight<T>::kWords; ++i) {
        bool keep[2];
#pragma unroll
        for (int k = 0; k < kPer; ++k) keep[k] = draws[i * kPer + k] - lower <= span;
        out.word[i] = Word<T>::masked(x.word[i], keep);
    }
    return out;
}

// The masked operands of one adapter, made again where the adapter changes.
template <class T, bool kMasked, bool kFast>
struct MaskedRows {
    const ShrinkArguments<T>& p;
    const Stream& stream;
    std::int64_t rows[4], col;
    Eight<T> x[4], kept[4];
    Draws draws[4];
    std::int32_t adapter = -1;

    LORA_ORTHO_DEVICE MaskedRows(const ShrinkArguments<T>& p_, const Stream& stream_,
                                 const std::int64_t (&rows_)[4], std::int64_t col_)
        : p(p_), stream(stream_), col(col_) {
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            rows[q] = rows_[q];
            x[q] = p.x.template eight<kFast>(rows[q], col, p.cols);
            if (kMasked && p.draw == 1) draws[q] = stream.template draws<kFast>(row(q), block(), 0);
        }
    }
    LORA_ORTHO_DEVICE void select(std::int32_t wanted) {
        if (!kMasked || wanted == adapter) return;
        adapter = wanted;
        const std::uint32_t lower = p.adapters[adapter].lower;
        const std::uint32_t span = p.adapters[adapter].limit - lower;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            if (p.draw == 2) {
                draws[q] = stream.template draws<kFast>(row(q), block(),
                                                        static_cast<std::uint32_t>(adapter));
            }
            kept[q] = p.draw == 0 ? x[q] : masked(x[q], draws[q], lower, span);
        }
    }
    LORA_ORTHO_DEVICE const Eight<T>& operator[](int q) const { return kMasked ? kept[q] : x[q]; }
    LORA_ORTHO_DEVICE std::uint32_t row(int q) const { return static_cast<std::uint32_t>(rows[q]); }
    LORA_ORTHO_DEVICE std::uint32_t block() const { return static_cast<std::uint32_t>(col / 8); }
};

template <class T, bool kMasked, bool kFast>
LORA_ORTHO_KERNEL(kShrinkThreads, 2)
shrink_kernel(const ShrinkArguments<T> p) {
    constexpr int kTiles = kTilesAtOnce<T>;
    const Shared shared = shared_memory();
    const int warp = thread_index() >> 5, lane = thread_index() & 31;
    const int g = lane >> 2, t = lane & 3;
    const auto block = static_cast<std::uint32_t>(block_index());
    const std::int64_t row0 = static_cast<std::int64_t>(block % p.row_blocks) * kShrinkRows;
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
    for (std::int64_t group = split * 4 + warp; group < groups; group += 4 * p.splits) {
        MaskedRows<T, kMasked, kFast> x(p, stream, rows, group * kGroup + 8 * t);
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
                const int at = ((warp * kShrinkRows + row) * kWidth + rank) * 4;
                shared.store_pair(at,
                                  {{as_bits(sum[m][i].v[2 * h]), as_bits(sum[m][i].v[2 * h + 1])}});
            }
        }
    }
    sync_block();
    for (int e = thread_index(); e < kShrinkRows * kWidth; e += kShrinkThreads) {
        const int row = e / kWidth, i = e % kWidth / kTile, k = e % kTile;
        if (row0 + row >= p.rows || i >= tiles) continue;
        const Tile tile = p.tiles[first_tile + i];
        if (k >= tile.count) continue;
        float total = 0.0f;
#pragma unroll
        for (int w = 0; w < 4; ++w) total += shared.load_float((w * kShrinkRows * kWidth + e) * 4);
        const std::int64_t at = (row0 + row) * p.rank_sum + tile.begin + k;
        if (p.partial) {
            p.partial[split * p.rows * p.rank_sum + at] = total;
        } else {
            p.out[at] = from_float<T>(total);
        }
    }
}

}  // namespace lora_ortho::cuda
