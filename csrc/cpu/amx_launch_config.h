// Every choice of the tile kernels beside those of launch_config.h.
#pragma once

#include "cpu/amx_tiles.h"
#include "cpu/launch_config.h"

#if defined(__AMX_BF16__)

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// A block of products: two tiles of rows, which share what is loaded of the right operand, by four
// of columns.
constexpr int kTileBlock = 2 * kTile, kTileColumns = 4 * kTile;

// Elements between the rows of a left operand: an odd number of cache lines, so that the rows of a
// tile do not meet in one set of the cache.
LORA_ORTHO_INLINE std::int64_t left_pitch(std::int64_t steps) {
    return round_up(steps, 2 * kTileSteps) + kTileSteps;
}

// ---- shrink

// Features of a step; three planes take three times the room. Rows whose sums stay in the
// second-level cache: at most kTileSumBytes.
template <int P>
constexpr std::int64_t kTileShrinkStep = P == 1 ? 256 : 128;
constexpr std::int64_t kTileSumBytes = 512 * kKiB, kMostTileShrinkRows = 256;

template <int P>
LORA_ORTHO_INLINE ShrinkConfig tile_shrink_config(const Header& h, std::int64_t tokens) {
    const std::int64_t row_bytes = round_up(h.rank_sum, kPanel) * 4;
    const std::int64_t fit = kTileSumBytes / row_bytes / kTileBlock * kTileBlock;
    const std::int64_t rows = fit > kMostTileShrinkRows ? kMostTileShrinkRows
                              : fit < kTileBlock        ? kTileBlock
                                                        : fit;
    return shrink_config(h, tokens, kTileShrinkStep<P>, rows, kTileBlock);
}

// Rows of x a multiple of kSetElements, 1 KiB, apart meet in few sets of the cache: they are copied
// if more than kRereadPanels panels of A read them.
constexpr std::int64_t kSetElements = 512, kRereadPanels = 4;

LORA_ORTHO_INLINE bool reads_rows_in_place(std::int64_t row_stride, std::int64_t panels) {
    return row_stride % kSetElements != 0 || panels <= kRereadPanels;
}

// ---- expand

// Adapters whose products are held together: they stay in the first-level cache.
constexpr int kTileGroup = 4;

// Rows of scaled s held at once, `pitch` elements each in P planes.
template <int P>
LORA_ORTHO_INLINE std::int64_t tile_rows_per_chunk(std::int64_t pitch) {
    return round_up(rows_per_chunk(pitch * 2 * P), kTileBlock);
}

// base and y are prefetched from this size on: then they are taken to come from beyond the
// second-level caches.
constexpr std::int64_t kPrefetchBytes = std::int64_t{16} << 20;

LORA_ORTHO_INLINE bool prefetches(std::int64_t tokens, std::int64_t d_out, std::size_t element) {
    return tokens * d_out * 2 * static_cast<std::int64_t>(element) > kPrefetchBytes;
}

// ---- grad_s, grad_B and grad_A

// Rows of a block of grad, and of x; three planes take three times the room. Columns of grad.
template <int P>
constexpr int kGradBlockRows = P == 1 ? 128 : 64;
constexpr int kGradBlockColumns = 128;

static_assert(kGradAColumns % kTile == 0);

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA

#endif
