// Gradients of the factors on their way out: from the accumulators of a block to the adapters' own
// blocks, grad_A_j (r_j, d_in) and grad_B_j (d_out, r_j), in the dtype asked for.
#pragma once

#include "cpu/layout.h"
#include "cpu/view.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

template <class C, class T>
LORA_ORTHO_INLINE void store_rounded(C value, T* out) {
    from_compute(static_cast<typename ComputeOf<T>::type>(value), out);
}

// Columns [col0, col0 + cols) of rows [rank0, rank0 + ranks) of all grad_A_j, joined.
template <class C>
LORA_ORTHO_INLINE void store_grad_A(const Layout& l, const C* sums, std::ptrdiff_t pitch,
                                    std::int64_t rank0, std::int64_t ranks, std::int64_t col0,
                                    std::int64_t cols, const Gradients& out) {
    with_storage(out.factor_dtype, [&](auto storage) __attribute__((always_inline)) {
        using T = decltype(storage);
        for (std::int64_t r = 0; r < ranks; ++r) {
            const C* from = sums + r * pitch;
            T* to = static_cast<T*>(out.grad_A) + (rank0 + r) * l.h.d_in + col0;
            std::int64_t n = 0;
            if constexpr (std::is_same_v<typename ComputeOf<T>::type, C>)
                for (; n + kLanes<C> <= cols; n += kLanes<C>) store_compute(to + n, load(from + n));
            for (; n < cols; ++n) store_rounded(from[n], to + n);
        }
    });
}

// Rows [col0, col0 + cols) of every grad_B_j: gain_j times the accumulators, whose element for
// column n and rank k of adapter j lies at grad_B + n * column + (j * padded + k) * rank.
template <class C>
LORA_ORTHO_INLINE void store_grad_B(const Layout& l, const double* gains, const C* grad_B,
                                    std::int64_t padded, std::ptrdiff_t column, std::ptrdiff_t rank,
                                    std::int64_t col0, int cols, const Gradients& out) {
    with_storage(out.factor_dtype, [&](auto storage) __attribute__((always_inline)) {
        using T = decltype(storage);
        for (int j = 0; j < l.h.adapters; ++j) {
            const C gain = static_cast<C>(gains[j]);
            const C* from = grad_B + j * padded * rank;
            const std::int64_t ranks = l.ranks[j];
            T* to = static_cast<T*>(out.grad_B) + l.rank_begin[j] * l.h.d_out + col0 * ranks;
            for (int n = 0; n < cols; ++n, from += column, to += ranks)
                for (std::int64_t k = 0; k < ranks; ++k)
                    store_rounded(gain * from[k * rank], to + k);
        }
    });
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
