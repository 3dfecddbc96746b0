// Every choice of the float kernels: which of them serve a problem, and in blocks of which size.
// Numbers, and pure functions from a problem to a configuration of plain integers. What the tile
// kernels add is in amx_launch_config.h.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }
constexpr std::int64_t kKiB = 1024;

// ---- blocks

// Columns of a panel, in which packed factors are stored, [k][kPanel]: one AVX-512 register of
// float32, whole registers everywhere.
constexpr int kPanel = 16;
// Rows that the kernels step by; a multiple of RegisterTile::rows.
constexpr int kRowBlock = 8;
// Columns that one pass over a row block covers: their draws and sums stay in the first-level
// cache.
constexpr int kColumnBlock = 128;

template <class C>
constexpr int kPanelVectors = kPanel / kLanes<C>;

// What fills the registers: rows * panels * kPanelVectors accumulators, one row of b, one
// broadcast; select_rows where as many results are kept beside the accumulators.
template <class C>
struct RegisterTile {
#if defined(__AVX512F__)
    static constexpr int rows = 8, select_rows = 4;
    static constexpr int panels = sizeof(C) == 4 ? 2 : 1;
    static constexpr int wide_panels = sizeof(C) == 4 ? 3 : 1;
#elif defined(__AVX2__)
    static constexpr int rows = sizeof(C) == 4 ? 4 : 2, select_rows = sizeof(C) == 4 ? 2 : 1;
    static constexpr int panels = 1, wide_panels = 1;
#else
    static constexpr int rows = sizeof(C) == 4 ? 2 : 1, select_rows = 1;
    static constexpr int panels = 1, wide_panels = 1;
#endif
};

// ---- packing

// All adapters are padded to one rank, so that an adapter's index is its offset.
LORA_ORTHO_INLINE std::int64_t padded_rank(const std::int64_t* ranks, int adapters) {
    std::int64_t most = 1;
    for (int j = 0; j < adapters; ++j) most = ranks[j] > most ? ranks[j] : most;
    return round_up(most, kPanel);
}

// Panels by columns are padded to a whole number of the widest tiles.
constexpr int kColumnPad = 64;
// What one member of the team packs at a time: so many columns of every lora_A, then so many rows
// of every lora_B. Its part of each section is contiguous, or one run for each panel of A.
constexpr std::int64_t kPackBlock = kColumnPad;
// Fewer elements than this are packed sooner than a team has met.
constexpr std::int64_t kPackTeam = 1 << 15;

LORA_ORTHO_INLINE bool packs_in_team(const Header& h) {
    return h.rank_sum * (h.d_in + h.d_out) >= kPackTeam;
}

// ---- which kernels

// Expand: all K products and a selection, or one product per element with its owner's factors.
// Dense costs rank_sum multiply-adds an element at kLanes a step; owner costs two loads per vector
// of the owner's rank and about kOwnerSum steps to add the lanes of a vector.
constexpr std::int64_t kOwnerSum = 48, kSelect = 4;

LORA_ORTHO_INLINE std::int32_t expand_path(const Header& h, std::int64_t padded) {
    if (h.draw != Draw::kShared || h.adapters < 2) return kExpandDense;
    if (padded * h.adapters > 0xffff) return kExpandDense;  // offsets are 16 bits
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

// ---- shrink

// At most so many tokens are split over d_in instead of over rows, where the partial sums of a row
// are no wider than kSplitPitch.
constexpr std::int64_t kSplitTokens = 32, kSplitPitch = 1024;
// Rows are dealt out to the team in blocks of so many.
constexpr std::int64_t kTeamRows = 16;
// Features of a step, whose products are added up in registers (the error of a long sum grows with
// its length); rows that use each step of A from the cache.
constexpr std::int64_t kShrinkStep = 256, kShrinkRows = 64;

struct ShrinkConfig {
    std::int64_t step, rows;  // features of a step; rows that one pass over a step of A serves
    std::int64_t granule;     // rows that the kernel writes at a time
    std::int64_t tokens, steps, pitch;  // pitch of the sums: rank_sum rounded up to kPanel
    bool split;                         // over d_in

    std::int64_t sum_elements() const { return split ? 0 : round_up(rows, granule) * pitch; }
    std::int64_t part_elements() const { return round_up(tokens, granule) * pitch; }
    std::int64_t all_part_elements() const { return split ? steps * part_elements() : 0; }
};

LORA_ORTHO_INLINE ShrinkConfig shrink_config(const Header& h, std::int64_t tokens,
                                             std::int64_t step = kShrinkStep,
                                             std::int64_t rows = kShrinkRows,
                                             std::int64_t granule = 1) {
    const std::int64_t pitch = round_up(h.rank_sum, kPanel), steps = ceil_div(h.d_in, step);
    const bool split = tokens <= kSplitTokens && steps > 1 && pitch <= kSplitPitch;
    return {step, rows, granule, tokens, steps, pitch, split};
}

// ---- expand, and grad_x, which is the same product without masks

// The error of a long sum grows with its length: products without masks are added up in registers
// over so many ranks.
constexpr std::int64_t kSumStep = 64;

// Rows whose scaled s is held at once: at most kScaledBytes, a quarter of a common second-level
// cache.
constexpr std::int64_t kScaledBytes = 512 * kKiB, kMostChunkRows = 256;

LORA_ORTHO_INLINE std::int64_t rows_per_chunk(std::int64_t row_bytes) {
    const std::int64_t rows = kScaledBytes / row_bytes / kRowBlock * kRowBlock;
    return rows < kRowBlock ? kRowBlock : rows > kMostChunkRows ? kMostChunkRows : rows;
}

// Columns that a chunk of rows walks before its next rows: as many as leave their factors,
// column_bytes each, in the second-level cache.
constexpr std::int64_t kSegmentBytes = 512 * kKiB;

LORA_ORTHO_INLINE std::int64_t columns_per_segment(std::int64_t column_bytes, int block_cols) {
    const std::int64_t fit = kSegmentBytes / column_bytes / block_cols * block_cols;
    return fit < block_cols ? block_cols : fit;
}

// Stripes of columns that chunks of rows are cut into: as few as give each member of the team
// kPiecesPerMember pieces.
constexpr std::int64_t kPiecesPerMember = 4;

LORA_ORTHO_INLINE std::int64_t column_stripes(std::int64_t chunks, std::int64_t column_blocks,
                                              int team) {
    const std::int64_t wanted = kPiecesPerMember * team, stripes = ceil_div(wanted, chunks);
    return stripes > column_blocks ? column_blocks : stripes;
}

// ---- grad_s and grad_B

// Columns of a block, whose grad_B (columns, K * padded) stays in the cache: at most kGradBBytes.
constexpr std::int64_t kGradBBytes = 128 * kKiB;

struct GradSGradBConfig {
    std::int64_t columns, blocks;
};

LORA_ORTHO_INLINE GradSGradBConfig grad_s_grad_B_config(const Header& h, std::size_t element,
                                                        int threads) {
    const std::int64_t row = h.padded_rank_sum * static_cast<std::int64_t>(element);
    std::int64_t columns = kGradBBytes / row / kPanel * kPanel;
    columns = columns < kPanel ? kPanel : columns > kColumnBlock ? kColumnBlock : columns;
    // As many blocks as a multiple of the team, so that nobody waits.
    const std::int64_t blocks = round_up(ceil_div(h.d_out, columns), threads);
    columns = round_up(ceil_div(h.d_out, blocks), kPanel);
    return {columns, ceil_div(h.d_out, columns)};
}

// ---- grad_gains, grad_x, grad_A

// Rows whose part of grad_gains is added up together, and whose grad_x is made meanwhile: the order
// of the sum must not depend on the team.
constexpr std::int64_t kGainRows = 64;

// Rows and columns of x that one step of grad_A holds; fewer columns, in whole register tiles,
// where the sums of many ranks would leave the cache.
constexpr std::int64_t kGradARows = 128, kGradAColumnStep = 2 * kPanel;
constexpr int kGradAColumns = 64;
constexpr std::int64_t kGradABytes = 128 * kKiB;

LORA_ORTHO_INLINE std::int64_t grad_A_width(const Header& h, std::size_t element) {
    const std::int64_t row = h.rank_sum * static_cast<std::int64_t>(element);
    const std::int64_t columns = kGradABytes / row / kGradAColumnStep * kGradAColumnStep;
    return columns < kGradAColumnStep ? kGradAColumnStep
           : columns > kGradAColumns  ? kGradAColumns
                                      : columns;
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
