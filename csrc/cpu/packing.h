// Packed factors of the float kernels, in the compute type C:
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

template <class C>
void plan_float(Header& h, const std::int64_t* ranks) {
    const std::int64_t padded = padded_rank(ranks, h.adapters);
    h.padded_rank_sum = padded * h.adapters;
    h.path = static_cast<std::int32_t>(expand_path(h, padded));
    const std::int64_t elements[4] = {
        ceil_div(h.rank_sum, kPanel) * h.d_in * kPanel,
        round_up(h.d_out, kColumnPad) * h.padded_rank_sum,
        h.d_out * h.padded_rank_sum,
        h.rank_sum * round_up(h.d_in, kColumnPad),
    };
    std::size_t end = h.arrays_end;
    for (int i = 0; i < 4; ++i) {
        h.section[i] = end;
        end += static_cast<std::size_t>(round_up(elements[i] * static_cast<std::int64_t>(sizeof(C)),
                                                 LORA_ORTHO_ALIGNMENT));
    }
    h.bytes = end;
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

template <class C>
void pack_float(const lora_ortho_factors& f, void* packed) {
    const Layout l(packed);
    char* out = static_cast<char*>(packed);
    std::memset(out + l.h.section[0], 0, l.h.bytes - l.h.section[0]);
    C* a_panels = reinterpret_cast<C*>(out + l.h.section[0]);
    C* b_panels = reinterpret_cast<C*>(out + l.h.section[1]);
    C* b_rows = reinterpret_cast<C*>(out + l.h.section[2]);
    C* a_columns = reinterpret_cast<C*>(out + l.h.section[3]);
    for (int j = 0; j < f.adapters; ++j) {
        for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
            const std::int64_t r = l.rank_begin[j] + k;
            C* panel = a_panels + (r / kPanel) * l.h.d_in * kPanel + r % kPanel;
            C* column = a_columns + r * kPanel;
            for (std::int64_t i = 0; i < l.h.d_in; ++i)
                panel[i * kPanel] = column[(i / kPanel) * l.h.rank_sum * kPanel + i % kPanel] =
                    static_cast<C>(element(f.lora_A[j], k, i));
        }
        for (std::int64_t n = 0; n < l.h.d_out; ++n) {
            C* panel = b_panels + (n / kPanel) * l.h.padded_rank_sum * kPanel + n % kPanel;
            C* row = b_rows + n * l.h.padded_rank_sum;
            for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
                const std::int64_t at = j * l.padded + k;
                panel[at * kPanel] = row[at] = static_cast<C>(element(f.lora_B[j], n, k));
            }
        }
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
