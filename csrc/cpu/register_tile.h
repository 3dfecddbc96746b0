// The register tile every float kernel is made of: C[i][n] += sum_k a[i][k] * b[k][n] for a few
// rows i and a few vectors of columns n.
#pragma once

#include "cpu/launch_config.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

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

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
