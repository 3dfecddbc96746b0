// The draws of eight neighbouring columns, and the masks that follow from them.
#pragma once

#include "common/draw.h"
#include "common/place.h"
#include "cuda/numbers.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho::cuda {

// Eight draws of 16 bits, column order: the halves of four words, each still to be rotated.
struct Draws {
    std::uint32_t word[4], rotation;

    LORA_ORTHO_DEVICE std::uint32_t operator[](int i) const {
        return i % 2 == 0 ? (word[i / 2] + rotation) & 0xffffu : high(i) >> 16;
    }
    // Draw i in the high half of a word: one instruction. What lies in the low half changes no
    // comparison with a word whose low half is ones.
    LORA_ORTHO_DEVICE std::uint32_t high(int i) const {
        return (i % 2 == 0 ? word[i / 2] << 16 : word[i / 2]) + (rotation << 16);
    }
};

// The product of round 2 that a row alone decides: its word of the counter meets the column's in
// round 3, so that one serves all columns.
struct RowProduct {
    std::uint32_t low, high;
};

// The part of the mask stream that a call reads: Philox4x32-7 of mask_stream.h, with the product
// that the hardware has.
struct Stream {
    static constexpr int kRounds = LORA_ORTHO_PHILOX_ROUNDS;
    std::uint32_t key0[kRounds], key1[kRounds];  // of each round
    std::uint32_t stream_low, stream_high;  // the product of round 1 that the stream alone decides
    std::uint32_t sample, rotation;
    std::uint32_t row_offset, first_block;
    int shift;  // columns of the first block that lie before the call's own

    LORA_ORTHO_DEVICE explicit Stream(const Place& p)
        : sample(p.part.block << 8),
          rotation(p.part.rotation),
          row_offset(static_cast<std::uint32_t>(p.row_offset)),
          first_block(static_cast<std::uint32_t>(p.col_offset >> 3)),
          shift(static_cast<int>(p.col_offset & 7)) {
        const std::uint64_t seed = p.seed_pointer ? *p.seed_pointer : p.seed;
        key0[0] = static_cast<std::uint32_t>(seed);
        key1[0] = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
        for (int i = 1; i < kRounds; ++i) {
            key0[i] = key0[i - 1] + LORA_ORTHO_PHILOX_W0;
            key1[i] = key1[i - 1] + LORA_ORTHO_PHILOX_W1;
        }
        multiply_wide(p.stream, LORA_ORTHO_PHILOX_M1, stream_low, stream_high);
    }

    // Keeps the keys in registers, where the compiler would add them up again for every draw.
    LORA_ORTHO_DEVICE void pin_keys() {
#pragma unroll
        for (int i = 1; i < kRounds; ++i) {
            pin(key0[i]);
            pin(key1[i]);
        }
    }

    // Of row `row` of the call.
    LORA_ORTHO_DEVICE RowProduct row(std::uint32_t row) const {
        RowProduct out;
        multiply_wide(stream_high ^ (row_offset + row) ^ key0[0], LORA_ORTHO_PHILOX_M0, out.low,
                      out.high);
        return out;
    }

    // Columns 8 block .. 8 block + 7 of a row, of the call; kAligned: `shift` is zero.
    template <bool kAligned>
    LORA_ORTHO_DEVICE Draws draws(RowProduct row, std::uint32_t block,
                                  std::uint32_t lane_set) const {
        const std::uint32_t at = first_block + block;
        const lora_ortho_words first = words(row, at, lane_set);
        Draws out = {{first.word[0], first.word[1], first.word[2], first.word[3]}, rotation};
        if (kAligned || shift == 0) return out;
        const lora_ortho_words second = words(row, at + 1, lane_set);
        std::uint32_t w[8] = {first.word[0],  first.word[1],  first.word[2],  first.word[3],
                              second.word[0], second.word[1], second.word[2], second.word[3]};
        // A barrel shifter, so that no array is indexed at run time.
#pragma unroll
        for (int i = 0; i < 6; ++i) w[i] = shift & 4 ? w[i + 2] : w[i];
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = shift & 2 ? w[i + 1] : w[i];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out.word[i] = shift & 1 ? (w[i] >> 16) | (w[i + 1] << 16) : w[i];
        }
        return out;
    }

private:
    // The output of Philox: rounds 1 and 2 without the products that are at hand, then the others.
    LORA_ORTHO_DEVICE lora_ortho_words words(RowProduct row, std::uint32_t block,
                                             std::uint32_t lane_set) const {
        std::uint32_t low0, high0, low1, high1;
        multiply_wide(block, LORA_ORTHO_PHILOX_M0, low0, high0);
        multiply_wide(high0 ^ (sample | lane_set) ^ key1[0], LORA_ORTHO_PHILOX_M1, low1, high1);
        std::uint32_t c0 = high1 ^ stream_low ^ key0[1], c1 = low1;
        std::uint32_t c2 = row.high ^ low0 ^ key1[1], c3 = row.low;
#pragma unroll
        for (int round = 2; round < kRounds; ++round) {
            multiply_wide(c0, LORA_ORTHO_PHILOX_M0, low0, high0);
            multiply_wide(c2, LORA_ORTHO_PHILOX_M1, low1, high1);
            c0 = high1 ^ c1 ^ key0[round];
            c2 = high0 ^ c3 ^ key1[round];
            c1 = low1;
            c3 = low0;
        }
        return {{c0, c1, c2, c3}};
    }
};

}  // namespace lora_ortho::cuda
