// Packed factors of the float kernels, in the compute type C; sections that the path does not need
// are empty:
//   kAPanels    A by panels   [ceil(rank_sum / kPanel)][d_in][kPanel]      shrink
//   kBPanels    B by panels   [d_out padded / kPanel][K * padded][kPanel]  expand, dense
//   kBRows      B by rows     [d_out][K * padded]                          expand, owner; backward
//   kAColumns   A by columns  [d_in padded / kPanel][rank_sum][kPanel]     grad_x
// padded is launch_config.h's padded_rank; what is padded holds zeros.
#pragma once

#include "cpu/launch_config.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// Where things lie in a packed buffer: built once a call.
struct Layout {
    explicit Layout(const void* packed)
        : h(*static_cast<const Header*>(packed)),
          base(static_cast<const char*>(packed)),
          ranks(array_at<std::int64_t>(packed, h.ranks)),
          rank_begin(array_at<std::int64_t>(packed, h.rank_begin)),
          intervals(array_at<Interval>(packed, h.intervals)),
          padded(h.padded_rank_sum / h.adapters),
          panels(ceil_div(h.rank_sum, kPanel)) {}

    template <class T>
    const T* section(Section i) const {
        return reinterpret_cast<const T*>(base + h.section[i]);
    }

    const Header& h;
    const char* base;
    const std::int64_t* ranks;
    const std::int64_t* rank_begin;
    const Interval* intervals;
    std::int64_t padded;  // rank of every adapter after padding
    std::int64_t panels;  // of A
};

// Gives sections [first, first + 4) their offsets and moves the end of the buffer.
LORA_ORTHO_INLINE void place_sections(Header& h, Section first, const std::int64_t (&bytes)[4]) {
    for (int i = 0; i < 4; ++i) {
        h.section[first + i] = h.bytes;
        h.bytes += static_cast<std::size_t>(round_up(bytes[i], LORA_ORTHO_ALIGNMENT));
    }
}

template <class C>
void plan_float(Header& h) {
    const std::int32_t expand = h.path & kExpandMask;
    const std::int64_t size = sizeof(C);
    place_sections(
        h, kAPanels,
        {expand == kExpandTiles ? 0 : ceil_div(h.rank_sum, kPanel) * h.d_in * kPanel * size,
         expand == kExpandDense ? round_up(h.d_out, kColumnPad) * h.padded_rank_sum * size : 0,
         h.d_out * h.padded_rank_sum * size, h.rank_sum * round_up(h.d_in, kColumnPad) * size});
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
