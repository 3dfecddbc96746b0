// Matrices of the caller: storage types, strides, blocks copied into the compute type.
#pragma once

#include "cpu/simd.h"
#include "lora_ortho/lora_ortho.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// Calls body with a value of the storage type that a lora_ortho_dtype names.
template <class Body>
LORA_ORTHO_INLINE void with_storage(std::int32_t dtype, Body body) {
    switch (dtype) {
        case LORA_ORTHO_FLOAT32: return body(float{});
        case LORA_ORTHO_BFLOAT16: return body(bfloat16{});
        case LORA_ORTHO_FLOAT16: return body(float16{});
        default: return body(double{});
    }
}

// A strided matrix of one storage type.
template <class IO>
struct View {
    const IO* data;
    std::ptrdiff_t row, col;
    const IO* at(std::int64_t i, std::int64_t j) const { return data + i * row + j * col; }
};

template <class IO>
LORA_ORTHO_INLINE View<IO> view_of(const lora_ortho_matrix& m) {
    return {static_cast<const IO*>(m.data), m.row_stride, m.col_stride};
}

// out[i][j] = view(row0 + i, col0 + j), `rows` x `cols`, row pitch `pitch`; columns up to `padded`
// are zeroed.
template <class IO, class C>
LORA_ORTHO_INLINE void load_block(View<IO> view, std::int64_t row0, std::int64_t rows,
                                  std::int64_t col0, std::int64_t cols, std::int64_t padded, C* out,
                                  std::ptrdiff_t pitch) {
    for (std::int64_t i = 0; i < rows; ++i) {
        const IO* in = view.at(row0 + i, col0);
        C* to = out + i * pitch;
        std::int64_t j = 0;
        if (view.col == 1)
            for (; j + kLanes<C> <= cols; j += kLanes<C>) store(to + j, load_compute(in + j));
        for (; j < cols; ++j) to[j] = to_compute(in[j * view.col]);
        for (; j < padded; ++j) to[j] = 0;
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
