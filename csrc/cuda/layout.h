// Packed factors in device memory:
//   adapters   [K + 1] Adapter; the last holds only the ends
//   tiles      [tiles] Tile: which ranks of s a tile of eight holds
//   A_rows     A as right operand of shrink            [tiles][groups of d_in][8 ranks][32]
//   B_columns  B as right operand of expand            [groups of d_out][steps] of kColumnBlock
//   B_rows     B transposed, likewise, for ds          [tiles][groups of d_out][8 ranks][32]
//   A_columns  A transposed, likewise, for dx          [groups of d_in][steps] of kColumnBlock
// What is padded holds zeros. A step is 16 ranks of one adapter; a group 32 columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/numbers.h"
#include "lora_ortho/lora_ortho.h"

namespace lora_ortho::cuda {

struct Adapter {
    std::uint32_t lower, limit;  // owner of a draw u: lower <= u <= limit (lower 0: dropout, direct)
    std::int64_t rank, begin;    // columns begin .. begin + rank of s are its
    std::int64_t step, tile;     // the first of its steps and tiles
};

struct Tile {
    std::int32_t adapter, count;  // count ranks, 1 .. 8
    std::int64_t begin;           // its first column of s
};

constexpr int kColumnBlock = kGroup * kStep;  // elements

// Where element (column c of 32, rank k of 16) lies in a column block. The columns are permuted so
// that the accumulators of thread (g, t) are columns 8t .. 8t + 7: tile i of four holds, at g, column
// 8 (g / 2) + 2 i + g % 2. As many tiles as fill 16 bytes lie side by side for each thread.
template <class T>
LORA_ORTHO_DEVICE int column_block_index(int c, int k) {
    constexpr int kTogether = 4 / static_cast<int>(sizeof(T));  // tiles in 16 bytes
    const int i = c % 8 / 2, g = c / 8 * 2 + c % 2, lane = 4 * g + k / 4;
    return ((i / kTogether * kWarp + lane) * kTogether + i % kTogether) * 4 + k % 4;
}

LORA_ORTHO_BOTH std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
LORA_ORTHO_BOTH std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

enum Section { kAdapters, kTiles, kARows, kBColumns, kBRows, kAColumns, kSections };

// Sizes and byte offsets, from the factors' sizes alone: host and device agree without a copy.
struct Layout {
    std::int32_t adapters;
    std::int64_t d_in, d_out, rank_sum, steps, tiles, in_groups, out_groups;
    std::size_t section[kSections + 1];

    Layout(const lora_ortho_factors& f, std::size_t element)
        : adapters(f.adapters),
          d_in(f.d_in),
          d_out(f.d_out),
          rank_sum(0),
          steps(0),
          tiles(0),
          in_groups(ceil_div(f.d_in, kGroup)),
          out_groups(ceil_div(f.d_out, kGroup)) {
        for (std::int32_t j = 0; j < adapters; ++j) {
            rank_sum += f.ranks[j];
            steps += ceil_div(f.ranks[j], kStep);
            tiles += ceil_div(f.ranks[j], kTile);
        }
        const std::size_t rows = static_cast<std::size_t>(tiles * kTile * kGroup) * element;
        const std::size_t columns = static_cast<std::size_t>(steps * kColumnBlock) * element;
        const std::size_t in = static_cast<std::size_t>(in_groups);
        const std::size_t out = static_cast<std::size_t>(out_groups);
        const std::size_t bytes[kSections] = {
            sizeof(Adapter) * static_cast<std::size_t>(adapters + 1),
            sizeof(Tile) * static_cast<std::size_t>(tiles),
            rows * in,
            columns * out,
            rows * out,
            columns * in};
        section[0] = 0;
        for (int i = 0; i < kSections; ++i) {
            section[i + 1] = (section[i] + bytes[i] + 255) / 256 * 256;
        }
    }
    std::size_t bytes() const { return section[kSections]; }

    template <class V>
    V* at(Section s, void* packed) const {
        return reinterpret_cast<V*>(static_cast<char*>(packed) + section[s]);
    }
    template <class V>
    const V* at(Section s, const void* packed) const {
        return reinterpret_cast<const V*>(static_cast<const char*>(packed) + section[s]);
    }
};

// A matrix that a kernel reads. Strides in elements.
template <class T>
struct View {
    const T* data;
    std::int64_t row_stride, col_stride;

    LORA_ORTHO_DEVICE const T* row(std::int64_t i) const { return data + i * row_stride; }
    // Elements (i, j) .. (i, j + 7); zeros from column `cols` on.
    template <bool kFast>
    LORA_ORTHO_DEVICE Eight<T> eight(std::int64_t i, std::int64_t j, std::int64_t cols) const {
        Eight<T> out;
        out.clear();
        if (kFast) {
            if (j < cols) out = load_eight(row(i) + j);
        } else {
            const T* at = row(i) + j * col_stride;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (j + e < cols) out.set_bits(e, raw_bits(at[e * col_stride]));
            }
        }
        return out;
    }
};

}  // namespace lora_ortho::cuda
