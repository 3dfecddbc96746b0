// Which kernels serve a problem, and in which blocks: pure functions of the problem.
#pragma once

#include "cpu/draws.h"
#include "cpu/kernels.h"
#include "cpu/register_tile.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// Columns that one pass over a row block covers.
constexpr int kColumnBlock = kDrawBlock;

// All adapters are padded to one rank, so that an adapter's index is its offset.
LORA_ORTHO_INLINE std::int64_t padded_rank(const std::int64_t* ranks, int adapters) {
    std::int64_t most = 1;
    for (int j = 0; j < adapters; ++j) most = ranks[j] > most ? ranks[j] : most;
    return round_up(most, kPanel);
}

// Expand: all K products and a selection, or one product per element with its owner's factors.
// Dense costs rank_sum multiply-adds an element at kLanes a step; owner costs two loads per vector
// of the owner's rank and about kOwnerSum steps to add the lanes of a vector.
LORA_ORTHO_INLINE std::int32_t expand_path(const Header& h, std::int64_t padded) {
    if (h.method != LORA_ORTHO_ORTHOGONAL || h.adapters < 2) return kExpandDense;
    if (padded * h.adapters > 0xffff) return kExpandDense;  // offsets are 16 bits
    constexpr std::int64_t kOwnerSum = 48, kSelect = 4;
    const std::int64_t dense = h.rank_sum + kSelect * h.adapters;
    const std::int64_t owner = 2 * padded + kOwnerSum;
    return owner < dense ? kExpandOwner : kExpandDense;
}

// Tiles are AMX. bfloat16 runs on them. float32 needs six tile products for one: that pays in the
// shrink from kTileRanks ranks on, and in the backward pass up to kTileAdapters adapters, whose
// masked gradients are made one by one. Few tokens leave the rows of a tile empty.
constexpr std::int64_t kTileRanks = 96, kTileAdapters = 3;
constexpr std::int64_t kTileTokens = 16, kTileBackwardTokens = 64;

LORA_ORTHO_INLINE std::int32_t choose_path(const Header& h, std::int64_t padded) {
    std::int32_t path = expand_path(h, padded);
#if defined(__AMX_BF16__)
    if (h.dtype == LORA_ORTHO_BFLOAT16) return kExpandTiles | kTileShrink | kTileBackward;
    if (h.dtype == LORA_ORTHO_FLOAT32)
        path |= (h.rank_sum >= kTileRanks ? kTileShrink : 0) |
                (h.adapters <= kTileAdapters ? kTileBackward : 0);
#endif
    return path;
}

template <class IO>
LORA_ORTHO_INLINE bool shrinks_on_tiles(const Header& h, std::int64_t tokens) {
    return (h.path & kTileShrink) && (sizeof(IO) == 2 || tokens >= kTileTokens);
}

LORA_ORTHO_INLINE bool backward_on_tiles(const Header& h, std::int64_t tokens) {
    return (h.path & kTileBackward) && tokens >= kTileBackwardTokens;
}

// Rows whose scaled s is held at once: at most 512 KiB, a quarter of a common second-level cache.
LORA_ORTHO_INLINE std::int64_t rows_per_chunk(std::int64_t row_bytes) {
    const std::int64_t rows = (std::int64_t{512} << 10) / row_bytes / kRowBlock * kRowBlock;
    return rows < kRowBlock ? kRowBlock : rows > 256 ? 256 : rows;
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
