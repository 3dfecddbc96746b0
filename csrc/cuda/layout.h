// Packed factors in device memory:
//   adapters   [K + 1] Adapter; the last holds only the ends
//   tiles      [tiles] Tile: which ranks of s a tile of eight holds
//   A_rows     A as right operand of shrink            [tiles][groups of d_in][8 ranks][32]
//   B_columns  B as right operand of expand            [groups of d_out][steps] of kColumnBlock
//   B_rows     B transposed, likewise, for grad_s      [tiles][groups of d_out][8 ranks][32]
//   A_columns  A transposed, likewise, for grad_x      [groups of d_in][steps] of kColumnBlock
// What is padded holds zeros. A step is 16 ranks of one adapter; a group 32 columns.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/checks.h"
#include "common/draw.h"

#if defined(__CUDACC__)
#define LORA_ORTHO_BOTH __host__ __device__ constexpr
#else
#define LORA_ORTHO_BOTH constexpr
#endif

namespace lora_ortho::cuda {

constexpr int kStep = 16;   // ranks of one step of a product
constexpr int kGroup = 32;  // columns of one group: four threads with eight neighbours each
constexpr int kTile = 8;    // ranks of one tile of s

struct Adapter {
    Interval interval;         // of the draws with which it has an element
    std::int64_t rank, begin;  // columns begin .. begin + rank of s are its
    std::int64_t step, tile;   // the first of its steps and tiles
};

struct Tile {
    std::int32_t adapter, count;  // count ranks, 1 .. 8
    std::int64_t begin;           // its first column of s
};

constexpr int kColumnBlock = kGroup * kStep;  // elements

LORA_ORTHO_BOTH std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
LORA_ORTHO_BOTH std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

enum Section { kAdapters, kTiles, kARows, kBColumns, kBRows, kAColumns, kSections };

// Sizes and byte offsets, from the factors' sizes alone: host and device agree without a copy. Made
// once a call.
struct Layout {
    std::int32_t adapters = 0;
    std::int64_t d_in = 0, d_out = 0, rank_sum = 0, steps = 0, tiles = 0;
    std::int64_t in_groups = 0, out_groups = 0;
    std::size_t section[kSections + 1] = {};

    Layout() = default;
    // Of checked factors.
    explicit Layout(const lora_ortho_factors& f)
        : adapters(f.adapters),
          d_in(f.d_in),
          d_out(f.d_out),
          in_groups(ceil_div(f.d_in, kGroup)),
          out_groups(ceil_div(f.d_out, kGroup)) {
        const std::size_t element = dtype_bytes(f.dtype);
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

}  // namespace lora_ortho::cuda
