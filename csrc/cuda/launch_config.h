// Every choice about a launch: the constants that the kernels are compiled with, then pure
// functions of sizes and of the device's multiprocessors.
#pragma once

#include <algorithm>

#include "common/checks.h"
#include "cuda/view.h"

namespace lora_ortho::cuda {

// ---- the kernels' blocks; k...Blocks: at least so many of them on each multiprocessor

// shrink and grad_s: 32 rows a block are two row tiles of the matrix instruction.
constexpr int kSumColumnsThreads = 128, kSumColumnsBlocks = 2, kSumColumnsRows = 32;
constexpr int kSumColumnsWarps = kSumColumnsThreads / kWarp;
// grad_B and grad_A: each warp turns 32 rows round at a time.
constexpr int kSumRowsThreads = 128, kSumRowsBlocks = 2, kSumRowsRows = 32;
constexpr int kSumRowsWarps = kSumRowsThreads / kWarp;
// Tiles of ranks that a block of these has accumulators for: operands of float32 are split in two.
template <class T>
constexpr int kTilesAtOnce = sizeof(T) == 4 ? 4 : 8;

// expand and grad_x: small blocks, since each waits for its own stages of factors.
constexpr int kExpandThreads = 64, kExpandBlocks = 4, kExpandWarps = kExpandThreads / kWarp;
// Tiles of 16 rows of a warp: two keep four 16-byte loads of a thread in flight.
template <class T>
constexpr int kRowTiles = sizeof(T) == 4 ? 1 : 2;
template <class T>
constexpr int kWarpRows = 16 * kRowTiles<T>;
template <class T>
constexpr int kRowsOfThread = 2 * kRowTiles<T>;

// sum_parts and what follows grad_s: each block of the latter has 64 rows, one part of grad_gains.
constexpr int kSumPartsThreads = 128, kSumPartsBlocks = 2, kSumPartsRows = 64;

// pack: about four elements a thread.
constexpr int kPackThreads = 128, kPackBlocks = 2, kPackElements = 4;

// ---- what a launch is told

constexpr std::int64_t kBlocksPerMultiprocessor = 4;  // wanted, where there is a choice
constexpr std::int64_t kMaxSplits = 64;               // bounds the workspace
constexpr std::int64_t kMaxLoopBlocks = 4096;         // threads of more elements go round a loop
constexpr std::int64_t kSharedBytes = 48 << 10;       // of any kernel without asking
constexpr std::int64_t kMostSharedBytes = 96 << 10;   // on sm_80 and later, asked for
constexpr std::int32_t kMaxStageGroups = 4;           // one copy for two turns of each warp
constexpr std::int64_t kMaxBlockGroups = 32;          // 1024 columns share a block's start
constexpr int kEntryBytes = 16;                       // of an adapter in shared memory

// Whether every group of eight elements of a row is 16-byte aligned.
template <class T>
bool is_wide(const View<T>& v, std::int64_t cols) {
    return v.col_stride == 1 && cols % 8 == 0 &&
           v.row_stride * static_cast<std::int64_t>(sizeof(T)) % 16 == 0 && is_aligned(v.data, 16);
}

// Blocks of a kernel whose threads go over `elements` in a loop.
inline std::int64_t loop_blocks(std::int64_t elements, std::int64_t elements_of_block) {
    return std::min(ceil_div(elements, elements_of_block), kMaxLoopBlocks);
}

// Parts into which a sum of `units` is cut where `blocks` blocks do not fill the device.
inline std::int32_t splits_for(std::int64_t blocks, std::int64_t units, std::int64_t sms) {
    if (blocks >= sms || blocks == 0) return 1;
    const std::int64_t wanted = ceil_div(kBlocksPerMultiprocessor * sms, blocks);
    return static_cast<std::int32_t>(
        std::max<std::int64_t>(1, std::min({wanted, units, kMaxSplits})));
}

struct SumColumnsConfig {
    std::int64_t row_blocks, panels;
    std::int32_t splits;
    int shared_bytes;
    std::int64_t blocks() const { return row_blocks * panels * splits; }
};

template <class T>
SumColumnsConfig sum_columns_config(const Layout& l, std::int64_t rows, std::int64_t cols,
                                    std::int64_t sms, bool may_split) {
    SumColumnsConfig c{};
    c.row_blocks = ceil_div(rows, kSumColumnsRows);
    c.panels = ceil_div(l.tiles, kTilesAtOnce<T>);
    const std::int64_t units = ceil_div(ceil_div(cols, kGroup), kSumColumnsWarps);
    c.splits = may_split ? splits_for(c.row_blocks * c.panels, units, sms) : 1;
    c.shared_bytes = kSumColumnsWarps * kSumColumnsRows * kTile * kTilesAtOnce<T> *
                     static_cast<int>(sizeof(float));
    return c;
}

struct SumRowsConfig {
    std::int64_t col_blocks, panels;
    std::int32_t splits;
    std::int64_t blocks() const { return col_blocks * panels * splits; }
};

template <class T>
SumRowsConfig sum_rows_config(const Layout& l, std::int64_t rows, std::int64_t cols,
                              std::int64_t sms) {
    SumRowsConfig c{};
    c.col_blocks = ceil_div(cols, kGroup);
    c.panels = ceil_div(l.tiles, kTilesAtOnce<T>);
    const std::int64_t units = ceil_div(rows, kSumRowsWarps * kSumRowsRows);
    c.splits = splits_for(c.col_blocks * c.panels, units, sms);
    return c;
}

struct ExpandConfig {
    bool staged;  // operands in shared memory
    std::int32_t row_warps, stage_groups;
    std::int64_t row_blocks, col_blocks;
    std::int32_t block_groups;
    int shared_bytes;
    std::int64_t blocks() const { return row_blocks * col_blocks; }
};

// Takes the most rows and then the longest stages for which the operands of a block fit into
// shared memory: its adapters' entries, its rows of s, two stages of factors.
template <class T>
void stage_operands(const Layout& l, std::int32_t most_row_warps, ExpandConfig& c) {
    for (const std::int64_t room : {kSharedBytes, kMostSharedBytes}) {
        for (std::int32_t row_warps = most_row_warps; row_warps > 0; row_warps /= 2) {
            for (std::int32_t stage = kMaxStageGroups; stage > 0; stage /= 2) {
                const std::int64_t bytes = kEntryBytes * l.adapters +
                                           l.steps * kStep * static_cast<std::int64_t>(sizeof(T)) *
                                               (row_warps * kWarpRows<T> + 2 * stage * kGroup);
                if (bytes > room) continue;
                c.staged = true;
                c.row_warps = row_warps;
                c.stage_groups = stage;
                c.shared_bytes = static_cast<int>(bytes);
                return;
            }
        }
    }
}

// `wide`: the accesses to base and y may take 16 bytes, and masks start at a multiple of eight
// columns.
template <class T>
ExpandConfig expand_config(const Layout& l, std::int64_t rows, std::int64_t cols, std::int64_t sms,
                           bool wide) {
    ExpandConfig c{};
    const std::int32_t most_row_warps = rows <= kWarpRows<T> ? 1 : kExpandWarps;
    if (wide) stage_operands<T>(l, most_row_warps, c);
    if (!c.staged) {
        c.row_warps = most_row_warps;
        c.stage_groups = kExpandWarps / most_row_warps;
    }
    c.row_blocks = ceil_div(rows, c.row_warps * kWarpRows<T>);
    const std::int64_t groups = ceil_div(cols, kGroup);
    // Enough blocks for the device, and no more: each reads its rows of s anew.
    const std::int64_t col_blocks = std::max<std::int64_t>(
        1, kBlocksPerMultiprocessor * sms / std::max<std::int64_t>(1, c.row_blocks));
    c.block_groups = static_cast<std::int32_t>(
        std::min(kMaxBlockGroups, round_up(ceil_div(groups, col_blocks), c.stage_groups)));
    c.col_blocks = ceil_div(groups, c.block_groups);
    return c;
}

}  // namespace lora_ortho::cuda
