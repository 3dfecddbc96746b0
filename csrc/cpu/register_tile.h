// The register tile every float kernel is made of: C[i][n] += sum_k a[i][k] * b[k][n] for a few
// rows i and a few vectors of columns n.
#pragma once

#include "cpu/simd.h"
#include "lora_ortho/lora_ortho.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// Columns of a panel: packed factors are stored panel by panel, [k][kPanel].
constexpr int kPanel = 16;
// Rows that the kernels step by; a multiple of Tile::rows.
constexpr int kRowBlock = 8;

template <class C>
constexpr int kPanelVectors = kPanel / kLanes<C>;

// Registers: rows * panels * kPanelVectors accumulators, one row of b, one broadcast; select_rows
// where as many results are kept beside the accumulators.
template <class C>
struct Tile {
#if defined(__AVX512F__)
    static constexpr int rows = 8, select_rows = 4;
    static constexpr int panels = sizeof(C) == 4 ? 2 : 1;
    static constexpr int wide_panels = sizeof(C) == 4 ? 3 : 1;
#elif defined(__AVX2__)
    static constexpr int rows = sizeof(C) == 4 ? 4 : 2, select_rows = sizeof(C) == 4 ? 2 : 1;
    static constexpr int panels = 1, wide_panels = 1;
#else
    static constexpr int rows = sizeof(C) == 4 ? 2 : 1, select_rows = 1;
    static constexpr int panels = 1, wide_panels = 1;
#endif
};

// a: (MR, k) with element strides a_row and a_k. b: element (k, column) of panel q at
// b + q * b_panel + k * b_k + column.
template <class C, int MR, int NP>
LORA_ORTHO_INLINE void multiply(const C* a, std::ptrdiff_t a_row, std::ptrdiff_t a_k, const C* b,
                                std::ptrdiff_t b_panel, std::ptrdiff_t b_k, std::int64_t k,
                                Vec<C> (&acc)[MR][NP * kPanelVectors<C>]) {
    constexpr int NV = NP * kPanelVectors<C>;
    for (std::int64_t step = 0; step < k; ++step) {
        Vec<C> row[NV];
#pragma GCC unroll 16
        for (int v = 0; v < NV; ++v)
            row[v] = load(b + (v / kPanelVectors<C>)*b_panel + (v % kPanelVectors<C>)*kLanes<C>);
#pragma GCC unroll 16
        for (int i = 0; i < MR; ++i) {
            const Vec<C> x = splat(a[i * a_row]);
#pragma GCC unroll 16
            for (int v = 0; v < NV; ++v) acc[i][v] += x * row[v];
        }
        a += a_k;
        b += b_k;
    }
}

// Runs body(std::integral_constant-like tag of MR, first row) over `rows` rows in register tiles,
// the last ones narrower so that one row costs one row.
template <int N>
struct Int {
    static constexpr int value = N;
};
template <int MR, class Body>
LORA_ORTHO_INLINE void for_row_tiles(int rows, Body body) {
    int i = 0;
    for (; i + MR <= rows; i += MR) body(Int<MR>{}, i);
    if constexpr (MR > 4)
        for (; i + 4 <= rows; i += 4) body(Int<4>{}, i);
    for (; i < rows; ++i) body(Int<1>{}, i);
}

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
