// The mask stream (MASK_STREAM.md) a row at a time: 16-bit draws of neighbouring columns.
#pragma once

#include "cpu/simd.h"
#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// Columns of one call of the vector generator, and the slack that an unaligned column_offset needs.
constexpr int kDrawColumns = 8 * kLanes<std::uint64_t>;
constexpr int kDrawSlack = kDrawColumns;

// Philox4x32-7 of one lane per group of eight columns.
class RowDraws {
    using U64 = Vec<std::uint64_t>;

public:
    RowDraws(std::uint64_t seed, std::uint32_t stream, std::uint32_t sample, std::uint32_t lane_set)
        : stream_(stream), last_((sample << 8) | lane_set) {
        std::uint32_t k0 = static_cast<std::uint32_t>(seed);
        std::uint32_t k1 = static_cast<std::uint32_t>(seed >> 32);
        for (int i = 0; i < kRounds; ++i) {
            key0_[i] = k0;
            key1_[i] = k1;
            k0 += 0x9e3779b9u;
            k1 += 0xbb67ae85u;
        }
    }

    // Writes the draws of `columns` columns from `column` (a multiple of 8) on, rounded up to
    // kDrawColumns. `out` is aligned to a vector.
    void row(std::uint64_t row, std::uint64_t column, std::int64_t columns,
             std::uint16_t* out) const {
        U64 group;
        for (int lane = 0; lane < kLanes<std::uint64_t>; ++lane)
            group[lane] = (column >> 3) + lane / 2 + (lane % 2) * kBlocks;
        for (std::int64_t done = 0; done < columns; done += kDrawColumns) {
            call(group, row, out + done);
            group += splat<std::uint64_t>(2 * kBlocks);
        }
    }

private:
    static constexpr int kRounds = 7;
    static constexpr int kBlocks = kVectorBytes / 16;  // 128-bit blocks, one group of columns each

    LORA_ORTHO_INLINE void call(U64 c0, std::uint64_t row, std::uint16_t* out) const {
        U64 c1 = splat(row), c2 = splat<std::uint64_t>(stream_), c3 = splat<std::uint64_t>(last_);
        const U64 m0 = splat<std::uint64_t>(0xd2511f53u), m1 = splat<std::uint64_t>(0xcd9e8d57u);
#pragma GCC unroll 7
        for (int i = 0; i < kRounds; ++i) {  // the upper halves of c1 and c3 hold rubbish throughout
            const U64 p0 = mul_wide(m0, c0), p1 = mul_wide(m1, c2);
            c0 = (p1 >> 32) ^ c1 ^ splat<std::uint64_t>(key0_[i]);
            c2 = (p0 >> 32) ^ c3 ^ splat<std::uint64_t>(key1_[i]);
            c1 = p1;
            c3 = p0;
        }
        const U64 low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
        // Even lanes hold the first kBlocks groups, odd lanes the next.
#if defined(__AVX512F__)
        const U64 first = __builtin_shufflevector(low, high, 0, 8, 2, 10, 4, 12, 6, 14);
        const U64 second = __builtin_shufflevector(low, high, 1, 9, 3, 11, 5, 13, 7, 15);
#elif defined(__AVX2__)
        const U64 first = __builtin_shufflevector(low, high, 0, 4, 2, 6);
        const U64 second = __builtin_shufflevector(low, high, 1, 5, 3, 7);
#else
        const U64 first = __builtin_shufflevector(low, high, 0, 2);
        const U64 second = __builtin_shufflevector(low, high, 1, 3);
#endif
        __builtin_memcpy(out, &first, sizeof first);
        __builtin_memcpy(out + 8 * kBlocks, &second, sizeof second);
    }

    std::uint64_t key0_[kRounds], key1_[kRounds];
    std::uint32_t stream_, last_;
};

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
