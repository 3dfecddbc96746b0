// Where a call stands in the mask stream.
#pragma once

#include <cstdint>

#include "lora_ortho/cuda.h"
#include "lora_ortho/lora_ortho.h"

namespace lora_ortho {

// What a kernel must know to draw: made once a call, at the boundary, of checked arguments.
struct Place {
    const std::uint64_t* seed_pointer;  // read instead of seed where not null, on a GPU alone
    std::uint64_t seed;
    std::int64_t row_offset, col_offset;
    std::uint32_t stream, sample;
};

inline Place place_of(const lora_ortho_call& c) {
    return {nullptr, c.seed, c.row_offset, c.col_offset, c.stream, c.sample};
}
inline Place place_of(const lora_ortho_cuda_call& c) {
    return {c.seed_pointer, c.seed, c.row_offset, c.col_offset, c.stream, c.sample};
}

}  // namespace lora_ortho
