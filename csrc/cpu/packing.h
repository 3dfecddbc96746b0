// Packed factors of the float kernels, in the compute type C; sections that the path does not need are
// empty:
//   section 0  A by panels   [ceil(rank_sum / kPanel)][d_in][kPanel]      shrink
//   section 1  B by panels   [d_out padded / kPanel][K * padded][kPanel]  expand, dense
//   section 2  B by rows     [d_out][K * padded]                          expand, owner; backward
//   section 3  A by columns  [d_in padded / kPanel][rank_sum][kPanel]     backward, dx
// padded is launch_config.h's padded_rank; what is padded holds zeros.
#pragma once

#include "cpu/launch_config.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

constexpr int kColumnPad = 64;  // sections 1 and 3: a whole number of the widest tiles

struct Layout {
    explicit Layout(const void* packed)
        : h(*static_cast<const Header*>(packed)),
          base(static_cast<const char*>(packed)),
          ranks(array_at<std::int64_t>(packed, h.ranks)),
          rank_begin(array_at<std::int64_t>(packed, h.rank_begin)),
          thresholds(array_at<std::uint32_t>(packed, h.thresholds)),
          padded(h.padded_rank_sum / h.adapters),
          panels(ceil_div(h.rank_sum, kPanel)) {}

    template <class T>
    const T* section(int i) const {
        return reinterpret_cast<const T*>(base + h.section[i]);
    }

    const Header& h;
    const char* base;
    const std::int64_t* ranks;
    const std::int64_t* rank_begin;
    const std::uint32_t* thresholds;
    std::int64_t padded;  // rank of every adapter after padding
    std::int64_t panels;  // of A
};

// Gives sections [first, first + 4) their offsets and moves the end of the buffer.
LORA_ORTHO_INLINE void place_sections(Header& h, int first, const std::int64_t (&bytes)[4]) {
    for (int i = 0; i < 4; ++i) {
        h.section[first + i] = h.bytes;
        h.bytes += static_cast<std::size_t>(round_up(bytes[i], LORA_ORTHO_ALIGNMENT));
    }
}

template <class C>
void plan_float(Header& h) {
    const std::int32_t expand = h.path & kExpandMask;
    const std::int64_t size = sizeof(C);
    place_sections(h, 0,
                   {expand == kExpandTiles ? 0 : ceil_div(h.rank_sum, kPanel) * h.d_in * kPanel * size,
                    expand == kExpandDense
                        ? round_up(h.d_out, kColumnPad) * h.padded_rank_sum * size
                        : 0,
                    h.d_out * h.padded_rank_sum * size,
                    h.rank_sum * round_up(h.d_in, kColumnPad) * size});
}

// Element (i, j) of a factor, whatever its storage type.
LORA_ORTHO_INLINE double element(const lora_ortho_matrix& m, std::int64_t i, std::int64_t j) {
    const std::ptrdiff_t at = i * m.row_stride + j * m.col_stride;
    switch (m.dtype) {
        case LORA_ORTHO_FLOAT32: return static_cast<const float*>(m.data)[at];
        case LORA_ORTHO_BFLOAT16: return to_compute(static_cast<const bfloat16*>(m.data)[at]);
        case LORA_ORTHO_FLOAT16: return to_compute(static_cast<const float16*>(m.data)[at]);
        default: return static_cast<const double*>(m.data)[at];
    }
}

// Sections 0 to 3. The buffer is zeroed.
template <class C>
void pack_float(const lora_ortho_factors& f, void* packed) {
    const Layout l(packed);
    auto section = [&](int i) {
        char* at = static_cast<char*>(packed) + l.h.section[i];
        return l.h.section[i] == l.h.section[i + 1] ? nullptr : reinterpret_cast<C*>(at);
    };
    C *a_panels = section(0), *b_panels = section(1), *b_rows = section(2), *a_columns = section(3);
    for (int j = 0; j < f.adapters; ++j) {
        for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
            const std::int64_t r = l.rank_begin[j] + k;
            for (std::int64_t i = 0; i < l.h.d_in; ++i) {
                const C a = static_cast<C>(element(f.lora_A[j], k, i));
                if (a_panels) a_panels[((r / kPanel) * l.h.d_in + i) * kPanel + r % kPanel] = a;
                a_columns[((i / kPanel) * l.h.rank_sum + r) * kPanel + i % kPanel] = a;
            }
        }
        for (std::int64_t n = 0; n < l.h.d_out; ++n)
            for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
                const std::int64_t at = j * l.padded + k;
                const C b = static_cast<C>(element(f.lora_B[j], n, k));
                if (b_panels)
                    b_panels[((n / kPanel) * l.h.padded_rank_sum + at) * kPanel + n % kPanel] = b;
                b_rows[n * l.h.padded_rank_sum + at] = b;
            }
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
