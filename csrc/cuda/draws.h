// The draws of eight neighbouring columns, and the masks that follow from them.
#pragma once

#include "common/draw.h"
#include "common/place.h"
#include "cuda/numbers.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho::cuda {

// Eight draws of 16 bits, column order.
struct Draws {
    std::uint32_t word[4];

    LORA_ORTHO_DEVICE std::uint32_t operator[](int i) const {
        return i % 2 == 0 ? word[i / 2] & 0xffffu : word[i / 2] >> 16;
    }
};

// Philox4x32-7 of mask_stream.h, with the product that the hardware has.
LORA_ORTHO_DEVICE Draws philox(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2,
                               std::uint32_t c3, std::uint64_t key) {
    std::uint32_t key0 = static_cast<std::uint32_t>(key);
    std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
#pragma unroll
    for (int round = 0; round < LORA_ORTHO_PHILOX_ROUNDS; ++round) {
        std::uint32_t low0, high0, low1, high1;
        multiply_wide(c0, LORA_ORTHO_PHILOX_M0, low0, high0);
        multiply_wide(c2, LORA_ORTHO_PHILOX_M1, low1, high1);
        c0 = high1 ^ c1 ^ key0;
        c2 = high0 ^ c3 ^ key1;
        c1 = low1;
        c3 = low0;
        key0 += LORA_ORTHO_PHILOX_W0;
        key1 += LORA_ORTHO_PHILOX_W1;
    }
    return {{c0, c1, c2, c3}};
}

// The part of the mask stream that a call reads.
struct Stream {
    std::uint64_t seed;
    std::uint32_t stream, sample;
    std::uint32_t row_offset, first_block;
    int shift;  // columns of the first block that lie before the call's own

    LORA_ORTHO_DEVICE explicit Stream(const Place& p)
        : seed(p.seed_pointer ? *p.seed_pointer : p.seed),
          stream(p.stream),
          sample(p.sample << 8),
          row_offset(static_cast<std::uint32_t>(p.row_offset)),
          first_block(static_cast<std::uint32_t>(p.col_offset >> 3)),
          shift(static_cast<int>(p.col_offset & 7)) {}

    // Columns 8 block .. 8 block + 7 of `row`, of the call; kAligned: `shift` is zero.
    template <bool kAligned>
    LORA_ORTHO_DEVICE Draws draws(std::uint32_t row, std::uint32_t block,
                                  std::uint32_t lane_set) const {
        const std::uint32_t at = first_block + block;
        const Draws first = philox(at, row_offset + row, stream, sample | lane_set, seed);
        if (kAligned || shift == 0) return first;
        const Draws second = philox(at + 1, row_offset + row, stream, sample | lane_set, seed);
        std::uint32_t w[8] = {first.word[0],  first.word[1],  first.word[2],  first.word[3],
                              second.word[0], second.word[1], second.word[2], second.word[3]};
        // A barrel shifter, so that no array is indexed at run time.
#pragma unroll
        for (int i = 0; i < 6; ++i) w[i] = shift & 4 ? w[i + 2] : w[i];
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = shift & 2 ? w[i + 1] : w[i];
        Draws out;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out.word[i] = shift & 1 ? (w[i] >> 16) | (w[i + 1] << 16) : w[i];
        }
        return out;
    }
};

}  // namespace lora_ortho::cuda
