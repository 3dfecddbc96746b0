// Which kernels serve a problem, and in which blocks: pure functions of the problem.
#pragma once

#include "cpu/kernels.h"
#include "cpu/tile.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

// Columns that one pass over a row block covers.
constexpr int kColumnBlock = 128;

// All adapters are padded to one rank, so that an adapter's index is its offset.
LORA_ORTHO_INLINE std::int64_t padded_rank(const std::int64_t* ranks, int adapters) {
    std::int64_t most = 1;
    for (int j = 0; j < adapters; ++j) most = ranks[j] > most ? ranks[j] : most;
    return round_up(most, kPanel);
}

// Expand: all K products and a selection, or one product per element with its owner's factors.
// Dense costs rank_sum multiply-adds an element at kLanes a step; owner costs two loads per vector of
// the owner's rank and about kOwnerReduce steps to add the lanes of a vector.
enum class Expand { kDense, kOwner };

LORA_ORTHO_INLINE Expand expand_path(const Header& h, std::int64_t padded) {
    if (h.method != LORA_ORTHO_ORTHOGONAL || h.adapters < 2) return Expand::kDense;
    if (padded * h.adapters > 0xffff) return Expand::kDense;  // offsets are 16 bits
    constexpr std::int64_t kOwnerReduce = 48, kSelect = 4;
    const std::int64_t dense = h.rank_sum + kSelect * h.adapters;
    const std::int64_t owner = 2 * padded + kOwnerReduce;
    return owner < dense ? Expand::kOwner : Expand::kDense;
}

// Rows whose scaled s is held at once: at most 512 KiB, a quarter of a common second-level cache.
LORA_ORTHO_INLINE std::int64_t rows_per_chunk(std::int64_t row_bytes) {
    const std::int64_t rows = (std::int64_t{512} << 10) / row_bytes / kRowBlock * kRowBlock;
    return rows < kRowBlock ? kRowBlock : rows > 256 ? 256 : rows;
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
