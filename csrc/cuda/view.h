// How the kernels read matrices and packed columns.
#pragma once

#include "cuda/layout.h"
#include "cuda/numbers.h"

namespace lora_ortho::cuda {

// Where element (column c of 32, rank k of 16) lies in a column block. The columns are permuted so
// that the accumulators of thread (g, t) are columns 8t .. 8t + 7: tile i of four holds, at g,
// column 8 (g / 2) + 2 i + g % 2. As many tiles as fill 16 bytes lie side by side for each thread.
template <class T>
LORA_ORTHO_DEVICE int column_block_index(int c, int k) {
    constexpr int kTogether = 4 / static_cast<int>(sizeof(T));  // tiles in 16 bytes
    const int i = c % 8 / 2, g = c / 8 * 2 + c % 2, lane = 4 * g + k / 4;
    return ((i / kTogether * kWarp + lane) * kTogether + i % kTogether) * 4 + k % 4;
}

// A matrix that a kernel reads. Strides in elements.
template <class T>
struct View {
    const T* data;
    std::int64_t row_stride, col_stride;

    LORA_ORTHO_DEVICE const T* row(std::int64_t i) const { return data + i * row_stride; }
    // Elements (i, j) .. (i, j + 7); zeros from column `cols` on. kWide: one 16-byte access of
    // narrow elements, two of wide ones.
    template <bool kWide>
    LORA_ORTHO_DEVICE Eight<T> eight(std::int64_t i, std::int64_t j, std::int64_t cols) const {
        Eight<T> out;
        out.clear();
        if (kWide) {
            if (j < cols) out = load_eight(row(i) + j);
        } else {
            const T* at = row(i) + j * col_stride;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (j + e < cols) out.set_bits(e, raw_bits(at[e * col_stride]));
            }
        }
        return out;
    }
};

}  // namespace lora_ortho::cuda
