// The mask stream (MASK_STREAM.md) a row at a time: 16-bit draws of neighbouring columns.
#pragma once

#include "common/place.h"
#include "cpu/launch_config.h"
#include "cpu/simd.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// Columns of one vector of the generator, one 64-bit lane per group of eight; the slack that an
// unaligned column offset and the last vector need.
constexpr int kDrawColumns = 8 * kLanes<std::uint64_t>;
constexpr int kDrawSlack = kDrawColumns;

// Philox4x32-7 for rows of one block of columns: where the kernels turn coordinates into draws. The
// row enters as the second word of the counter and meets the column, the first, in round 3: what
// rounds 1 to 3 make of the column alone is computed once.
class BlockDraws {
    using U64 = Vec<std::uint64_t>;

public:
    // The block is `columns` <= kColumnBlock columns of the call from `col` on.
    BlockDraws(const Place& place, int lane_set, std::int64_t col, int columns)
        : row_offset_(place.row_offset),
          rotation_(static_cast<std::uint16_t>(place.part.rotation)) {
        const std::uint64_t column = static_cast<std::uint64_t>(place.col_offset + col);
        skip_ = static_cast<int>(column & 7);
        vectors_ = (columns + skip_ + kDrawColumns - 1) / kDrawColumns;
        std::uint32_t k0 = static_cast<std::uint32_t>(place.seed);
        std::uint32_t k1 = static_cast<std::uint32_t>(place.seed >> 32);
        for (int i = 0; i < kRounds; ++i) {
            key0_[i] = k0;
            key1_[i] = k1;
            k0 += LORA_ORTHO_PHILOX_W0;
            k1 += LORA_ORTHO_PHILOX_W1;
        }
        const std::uint64_t last = (place.part.block << 8) | static_cast<std::uint32_t>(lane_set);
        const std::uint64_t p1 = std::uint64_t{LORA_ORTHO_PHILOX_M1} * place.stream;
        row_key_ = (p1 >> 32) ^ key0_[0];
        U64 group = splat(column >> 3) + kLaneGroup;
        for (int v = 0; v < vectors_; ++v, group += splat<std::uint64_t>(2 * kBlocks)) {
            const U64 first = mul_wide(splat(kM0), group);
            const U64 c2 = (first >> 32) ^ splat(last ^ key1_[0]);
            const U64 second = mul_wide(splat(kM1), c2);
            const U64 c0 = (second >> 32) ^ splat((p1 & kLow) ^ key0_[1]);
            const U64 third = mul_wide(splat(kM0), c0);
            columns_[v] = {first ^ splat(key1_[1]), second ^ splat(key0_[2]),
                           (third >> 32) ^ splat(key1_[2]), third};
        }
    }

    // Writes the draws of a row of the call to `buffer`, aligned to a vector, of kDrawSlack more
    // elements than the block has columns; returns where the block's first is.
    LORA_ORTHO_INLINE const std::uint16_t* row(std::int64_t row, std::uint16_t* buffer) const {
        const std::uint64_t absolute = static_cast<std::uint64_t>(row_offset_ + row);
        const std::uint64_t p0 = kM0 * (absolute ^ row_key_);  // both below 2^32
        const U64 high = splat(p0 >> 32), low = splat(p0 & kLow);
        for (int v = 0; v < vectors_; ++v)
            late_rounds(columns_[v], high, low, buffer + v * kDrawColumns);
        if (__builtin_expect(rotation_ != 0, 0)) rotate(buffer);
        return buffer + skip_;
    }

private:
    static constexpr int kRounds = LORA_ORTHO_PHILOX_ROUNDS;
    static constexpr int kBlocks = kVectorBytes / 16;  // 128-bit blocks, one group of columns each
    static constexpr std::uint64_t kM0 = LORA_ORTHO_PHILOX_M0, kM1 = LORA_ORTHO_PHILOX_M1;
    static constexpr std::uint64_t kLow = 0xffffffffu;

    // Which group of columns each lane has, as late_rounds() needs it.
#if defined(__AVX512F__)
    static constexpr U64 kLaneGroup = {0, 4, 1, 5, 2, 6, 3, 7};
#elif defined(__AVX2__)
    static constexpr U64 kLaneGroup = {0, 2, 1, 3};
#else
    static constexpr U64 kLaneGroup = {0, 1};
#endif

    // The words of the counter before round 3, and what its first product leaves, without the row.
    struct Column {
        U64 c2, c1, after_c2, after_c3;
    };

    // Apart from late_rounds(): a call without strata pays one branch a row.
    LORA_ORTHO_INLINE void rotate(std::uint16_t* draws) const {
        for (int n = 0; n < vectors_ * kDrawColumns; n += kLanes<std::uint16_t>)
            store(draws + n, load(draws + n) + splat(rotation_));
    }

    // From round 3 on; high and low are the halves of the product of the row in round 2. The upper
    // halves of the words hold rubbish throughout.
    LORA_ORTHO_INLINE void late_rounds(const Column& column, U64 high, U64 low,
                                       std::uint16_t* out) const {
        U64 p1 = mul_wide(splat(kM1), column.c2 ^ high);
        U64 c0 = (p1 >> 32) ^ column.c1, c1 = p1;
        U64 c2 = column.after_c2 ^ low, c3 = column.after_c3;
#pragma GCC unroll 7
        for (int i = 3; i + 1 < kRounds; ++i) {
            const U64 p0 = mul_wide(splat(kM0), c0);
            p1 = mul_wide(splat(kM1), c2);
            c0 = (p1 >> 32) ^ c1 ^ splat(key0_[i]);
            c2 = (p0 >> 32) ^ c3 ^ splat(key1_[i]);
            c1 = p1;
            c3 = p0;
        }
        const U64 first_pair = last_round(mul_wide(splat(kM1), c2), c1, key0_[kRounds - 1]);
        const U64 second_pair = last_round(mul_wide(splat(kM0), c0), c3, key1_[kRounds - 1]);
        // Even lanes hold the first kBlocks groups, odd lanes the next.
#if defined(__AVX512F__)
        const U64 even =
            __builtin_shufflevector(first_pair, second_pair, 0, 8, 2, 10, 4, 12, 6, 14);
        const U64 odd = __builtin_shufflevector(first_pair, second_pair, 1, 9, 3, 11, 5, 13, 7, 15);
#elif defined(__AVX2__)
        const U64 even = __builtin_shufflevector(first_pair, second_pair, 0, 4, 2, 6);
        const U64 odd = __builtin_shufflevector(first_pair, second_pair, 1, 5, 3, 7);
#else
        const U64 even = __builtin_shufflevector(first_pair, second_pair, 0, 2);
        const U64 odd = __builtin_shufflevector(first_pair, second_pair, 1, 3);
#endif
        __builtin_memcpy(out, &even, sizeof even);
        __builtin_memcpy(out + 8 * kBlocks, &odd, sizeof odd);
    }
    // Two words of the output: high half of the product ^ word ^ key below, its low half above.
    static LORA_ORTHO_INLINE U64 last_round(U64 product, U64 word, std::uint64_t key) {
        return ((product >> 32) | (product << 32)) ^ ((word ^ splat(key)) & splat(kLow));
    }

    Column columns_[kColumnBlock / kDrawColumns + 1];
    std::uint64_t key0_[kRounds], key1_[kRounds];
    std::uint64_t row_key_;
    std::int64_t row_offset_;
    std::uint16_t rotation_;
    int skip_, vectors_;
};

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
