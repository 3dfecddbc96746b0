// Where a call stands in the mask stream.
#pragma once

#include <cstdint>

#include "lora_ortho/cuda.h"
#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho {

// What a kernel must know to draw: made once a call, at the boundary, of checked arguments.
struct Place {
    const std::uint64_t* seed_pointer;  // read instead of seed where not null, on a GPU alone
    std::uint64_t seed;
    std::int64_t row_offset, col_offset;
    std::uint32_t stream;
    lora_ortho_part part;  // of the call's sample and strata
};

inline Place place_of(const lora_ortho_call& c) {
    const lora_ortho_part part = lora_ortho_part_of(c.sample, c.strata);
    return {nullptr, c.seed, c.row_offset, c.col_offset, c.stream, part};
}
inline Place place_of(const lora_ortho_cuda_call& c) {
    const lora_ortho_part part = lora_ortho_part_of(c.sample, c.strata);
    return {c.seed_pointer, c.seed, c.row_offset, c.col_offset, c.stream, part};
}

}  // namespace lora_ortho
