// Every choice about a launch, as pure functions of sizes and of the device's multiprocessors.
#pragma once

#include <algorithm>

#include "cuda/expand.h"
#include "cuda/finish.h"
#include "cuda/layout.h"

namespace lora_ortho::cuda {

constexpr std::int64_t kBlocksPerMultiprocessor = 4;
constexpr std::int64_t kMaxSplits = 64;
constexpr std::int64_t kSharedBytes = 48 << 10;      // of any kernel without asking
constexpr std::int64_t kMostSharedBytes = 96 << 10;  // on sm_80 and later, asked for
constexpr std::int64_t kMaxBlockGroups = 32;

// Parts into which a sum of `units` is cut so that `blocks` blocks fill the device.
inline std::int32_t splits_for(std::int64_t blocks, std::int64_t units, std::int64_t sms) {
    if (blocks >= sms || blocks == 0) return 1;
    const std::int64_t wanted = ceil_div(kBlocksPerMultiprocessor * sms, blocks);
    return static_cast<std::int32_t>(
        std::max<std::int64_t>(1, std::min({wanted, units, kMaxSplits})));
}

struct ShrinkConfig {
    std::int64_t row_blocks, panels;
    std::int32_t splits;
    std::int64_t blocks() const { return row_blocks * panels * splits; }

    static ShrinkConfig make(std::int64_t rows, std::int64_t cols, std::int64_t tiles,
                             int tiles_at_once, std::int64_t sms, bool may_split) {
        ShrinkConfig c;
        c.row_blocks = ceil_div(rows, kShrinkRows);
        c.panels = ceil_div(tiles, tiles_at_once);
        const std::int64_t units = ceil_div(ceil_div(cols, kGroup), 4);
        c.splits = may_split ? splits_for(c.row_blocks * c.panels, units, sms) : 1;
        return c;
    }
};

struct ExpandConfig {
    bool staged;  // operands in shared memory: kFast
    std::int32_t row_warps, stage_groups;
    std::int64_t row_blocks, col_blocks;
    std::int32_t block_groups;
    int shared_bytes;
    std::int64_t blocks() const { return row_blocks * col_blocks; }

    // `fast`: the accesses to base and y may be 16 bytes wide.
    static ExpandConfig make(std::int64_t rows, std::int64_t cols, std::int32_t adapters,
                             std::int64_t steps, int element, int warp_rows, std::int64_t sms,
                             bool fast) {
        ExpandConfig c{};
        const std::int64_t groups = ceil_div(cols, kGroup);
        const std::int32_t most = rows <= warp_rows ? 1 : kExpandWarps;
        for (const std::int64_t room : {kSharedBytes, kMostSharedBytes}) {
            for (std::int32_t row_warps = most; fast && row_warps > 0 && !c.staged;
                 row_warps /= 2) {
                for (std::int32_t stage = 4; stage > 0 && !c.staged; stage /= 2) {
                    const std::int64_t bytes =
                        kEntryBytes * adapters +
                        steps * kStep * element * (row_warps * warp_rows + 2 * stage * kGroup);
                    if (bytes > room) continue;
                    c.staged = true;
                    c.row_warps = row_warps;
                    c.stage_groups = stage;
                    c.shared_bytes = static_cast<int>(bytes);
                }
            }
        }
        if (!c.staged) {
            c.row_warps = most;
            c.stage_groups = kExpandWarps / most;
        }
        c.row_blocks = ceil_div(rows, c.row_warps * warp_rows);
        const std::int64_t columns = std::max<std::int64_t>(
            1, kBlocksPerMultiprocessor * sms / std::max<std::int64_t>(1, c.row_blocks));
        c.block_groups = static_cast<std::int32_t>(
            std::min(kMaxBlockGroups, round_up(ceil_div(groups, columns), c.stage_groups)));
        c.col_blocks = ceil_div(groups, c.block_groups);
        return c;
    }
};

struct ReduceConfig {
    std::int64_t col_blocks, panels;
    std::int32_t splits;
    std::int64_t blocks() const { return col_blocks * panels * splits; }

    static ReduceConfig make(std::int64_t rows, std::int64_t cols, std::int64_t tiles,
                             int tiles_at_once, std::int64_t sms) {
        ReduceConfig c;
        c.col_blocks = ceil_div(cols, kGroup);
        c.panels = ceil_div(tiles, tiles_at_once);
        c.splits = splits_for(c.col_blocks * c.panels, ceil_div(rows, 4 * kReduceRows), sms);
        return c;
    }
};

}  // namespace lora_ortho::cuda
