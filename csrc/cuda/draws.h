// The draws of eight neighbouring columns, and the masks that follow from them.
#pragma once

#include "cuda/numbers.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho::cuda {

// Where a call stands in the mask stream. The seed is read from device memory where it has a pointer.
struct Place {
    const std::uint64_t* seed_pointer;
    std::uint64_t seed;
    std::int64_t row_offset, col_offset;
    std::uint32_t stream, sample;
};

// Eight draws of 16 bits, column order.
struct Draws {
    std::uint32_t word[4];

    LORA_ORTHO_DEVICE std::uint32_t operator[](int i) const {
        return i % 2 == 0 ? word[i / 2] & 0xffffu : word[i / 2] >> 16;
    }
};

struct Stream {
    std::uint64_t seed;
    std::uint32_t stream, sample;
    std::int64_t row_offset, col_offset;

    LORA_ORTHO_DEVICE explicit Stream(const Place& p)
        : seed(p.seed_pointer ? *p.seed_pointer : p.seed),
          stream(p.stream),
          sample(p.sample),
          row_offset(p.row_offset),
          col_offset(p.col_offset) {}

    // Columns col .. col + 7 of `row`; kAligned: col + col_offset is a multiple of eight.
    template <bool kAligned>
    LORA_ORTHO_DEVICE Draws draws(std::int64_t row, std::int64_t col, std::uint32_t lane_set) const {
        const std::uint32_t at_row = static_cast<std::uint32_t>(row_offset + row);
        const std::int64_t at = col_offset + col;
        const Draws first = block(at_row, static_cast<std::uint32_t>(at >> 3), lane_set);
        const int shift = static_cast<int>(at & 7);
        if (kAligned || shift == 0) return first;
        const Draws second = block(at_row, static_cast<std::uint32_t>((at >> 3) + 1), lane_set);
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

private:
    LORA_ORTHO_DEVICE Draws block(std::uint32_t row, std::uint32_t col_block,
                                  std::uint32_t lane_set) const {
        const lora_ortho_words w =
            lora_ortho_draw_block(seed, row, col_block, stream, sample, lane_set);
        return {{w.word[0], w.word[1], w.word[2], w.word[3]}};
    }
};

}  // namespace lora_ortho::cuda
