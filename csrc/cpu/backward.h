// Backward of the float kernels: grad_s and grad_B in one pass, then grad_gains, grad_x and grad_A.
#pragma once

#include "cpu/forward.h"
#include "cpu/grad_s_grad_B.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

struct BackwardSizes {
    std::size_t grad_s, grad_gains, member;
    GradSGradBConfig grad_s_grad_B;
    std::int64_t width;  // columns of a step of grad_A
    int threads;
    std::size_t total() const {
        return grad_s + grad_gains + member * static_cast<std::size_t>(threads);
    }
};

template <class C>
BackwardSizes backward_sizes(const Header& h, const Call& call) {
    auto align = [](std::size_t n) { return (n + 63) & ~std::size_t{63}; };
    const int threads = team_size(call.threads);
    const GradSGradBConfig config = grad_s_grad_B_config(h, sizeof(C), threads);
    const std::size_t first = grad_s_grad_B_scratch<C>(h, config.columns);
    const std::int64_t width = grad_A_width(h, sizeof(C));
    const std::size_t rest =
        sizeof(ExpandScratch<C>) +
        static_cast<std::size_t>((kGradARows + h.rank_sum) * width) * sizeof(C);
    return {align(static_cast<std::size_t>(call.tokens * h.padded_rank_sum) * sizeof(C)),
            align(static_cast<std::size_t>(ceil_div(call.tokens, kGainRows) * h.adapters) * 8),
            align(first > rest ? first : rest),
            config,
            width,
            threads};
}

// For rows of one chunk: this chunk's part of grad_gains_j, grad_s_j . s_j; then grad_s gets its
// gains and becomes (rank_sum) wide, in place, its row pitch kept.
template <class IO, class C>
LORA_ORTHO_INLINE void scale_grad_s(const Layout& l, const double* gains, const IO* s,
                                    std::int64_t row0, std::int64_t row1, C* grad_s, double* sums) {
    for (int j = 0; j < l.h.adapters; ++j) sums[j] = 0;
    for (std::int64_t m = row0; m < row1; ++m) {
        const IO* from = s + m * l.h.rank_sum;
        C* row = grad_s + m * l.h.padded_rank_sum;
        C* to = row;
        for (int j = 0; j < l.h.adapters; ++j) {
            C dot = 0;
            for (std::int64_t k = 0; k < l.ranks[j]; ++k) {
                const C d = row[j * l.padded + k];
                dot += d * to_compute(*from++);
                *to++ = static_cast<C>(gains[j]) * d;
            }
            sums[j] += static_cast<double>(dot);
        }
    }
}

// The parts of all chunks, in their order.
LORA_ORTHO_INLINE void sum_parts_of_grad_gains(const Layout& l, std::int64_t chunks,
                                               const double* sums, double* grad_gains) {
    for (int j = 0; j < l.h.adapters; ++j) {
        grad_gains[j] = 0;
        for (std::int64_t c = 0; c < chunks; ++c) grad_gains[j] += sums[c * l.h.adapters + j];
    }
}

// grad_x = grad_s A over rows [row0, row1).
template <class IO, class C>
void grad_x_rows(const Layout& l, const C* grad_s, std::int64_t row0, std::int64_t row1, IO* grad_x,
                 ExpandScratch<C>& t) {
    const std::ptrdiff_t panel = l.h.rank_sum * kPanel;
    for (std::int64_t n = 0; n < l.h.d_in; n += kColumnBlock) {
        const int cols =
            static_cast<int>(l.h.d_in - n < kColumnBlock ? l.h.d_in - n : kColumnBlock);
        for (std::int64_t m = row0; m < row1; m += kRowBlock) {
            const int rows = static_cast<int>(row1 - m < kRowBlock ? row1 - m : kRowBlock);
            const Products<C> all{grad_s + m * l.h.padded_rank_sum, l.h.padded_rank_sum,
                                  l.section<C>(kAColumns) + n / kPanel * panel, panel,
                                  l.h.rank_sum};
            expand_all<C>(all, rows, cols, t);
            store_block<IO, C>(t.sums[0], kColumnBlock, nullptr, m, rows, n, cols, l.h.d_in,
                               grad_x);
        }
    }
}

// grad_A = grad_s^T x over columns [col0, col0 + cols). `block` holds rows of x, `sums` (rank_sum,
// width).
template <class IO, class C>
void grad_A_columns(const Layout& l, const C* grad_s, View<IO> x, std::int64_t tokens,
                    std::int64_t col0, std::int64_t cols, std::int64_t width, C* block, C* sums,
                    const Gradients& out) {
    constexpr int NP = RegisterTile<C>::panels, NV = NP * kPanelVectors<C>;
    std::memset(sums, 0, static_cast<std::size_t>(l.h.rank_sum * width) * sizeof(C));
    for (std::int64_t m = 0; m < tokens; m += kGradARows) {
        const std::int64_t rows = tokens - m < kGradARows ? tokens - m : kGradARows;
        load_block(x, m, rows, col0, cols, width, block, width);
        for (std::int64_t r = 0; r < l.h.rank_sum; r += kRowBlock) {
            const std::int64_t left = l.h.rank_sum - r;
            for_row_tiles<RegisterTile<C>::rows>(
                static_cast<int>(left < kRowBlock ? left : kRowBlock),
                [&](auto mr, int i) __attribute__((always_inline)) {
                    constexpr int MR = decltype(mr)::value;
                    for (std::int64_t n = 0; n < cols; n += NP * kPanel) {
                        C* to = sums + (r + i) * width + n;
                        Vec<C> acc[MR][NV];
#pragma GCC unroll 16
                        for (int at = 0; at < MR * NV; ++at)
                            acc[at / NV][at % NV] =
                                load(to + at / NV * width + at % NV * kLanes<C>);
                        multiply<C, MR, NP>(grad_s + m * l.h.padded_rank_sum + r + i, 1,
                                            l.h.padded_rank_sum, block + n, kPanel, width, rows,
                                            acc);
#pragma GCC unroll 16
                        for (int at = 0; at < MR * NV; ++at)
                            store(to + at / NV * width + at % NV * kLanes<C>,
                                  acc[at / NV][at % NV]);
                    }
                });
        }
    }
    store_grad_A(l, sums, width, 0, l.h.rank_sum, col0, cols, out);
}

template <class IO>
void backward_float(const Layout& l, const Call& call, const lora_ortho_matrix& grad,
                    const lora_ortho_matrix& x, const void* s, const Gradients& out,
                    void* workspace) {
    using C = typename ComputeOf<IO>::type;
    const BackwardSizes sizes = backward_sizes<C>(l.h, call);
    char* at = static_cast<char*>(workspace);
    C* grad_s = reinterpret_cast<C*>(at);
    double* sums = reinterpret_cast<double*>(at + sizes.grad_s);
    char* members = at + sizes.grad_s + sizes.grad_gains;
    const IO* s_in = static_cast<const IO*>(s);
    const std::int64_t chunks = ceil_div(call.tokens, kGainRows);
    run_team(sizes.threads, [&](const Team& team) {
        char* own = members + sizes.member * static_cast<std::size_t>(team.id);
        grad_s_grad_B<IO, C>(l, call, sizes.grad_s_grad_B, view_of<IO>(grad), s_in, grad_s, out,
                             team, *reinterpret_cast<GradSGradBScratch<C>*>(own));
        for (std::int64_t c = team.begin(chunks); c < team.end(chunks); ++c) {
            const std::int64_t row0 = c * kGainRows;
            const std::int64_t row1 =
                row0 + kGainRows < call.tokens ? row0 + kGainRows : call.tokens;
            scale_grad_s<IO, C>(l, call.gains, s_in, row0, row1, grad_s, sums + c * l.h.adapters);
            if (out.grad_x)
                grad_x_rows<IO, C>(l, grad_s, row0, row1, static_cast<IO*>(out.grad_x),
                                   *reinterpret_cast<ExpandScratch<C>*>(own));
        }
        team.barrier();
        if (out.grad_gains && team.id == 0)
            sum_parts_of_grad_gains(l, chunks, sums, out.grad_gains);
        const std::int64_t width = sizes.width, stripes = ceil_div(l.h.d_in, width);
        C* block = reinterpret_cast<C*>(own + sizeof(ExpandScratch<C>));
        if (out.grad_A)
            for (std::int64_t p = team.begin(stripes); p < team.end(stripes); ++p) {
                const std::int64_t left = l.h.d_in - p * width;
                grad_A_columns<IO, C>(l, grad_s, view_of<IO>(x), call.tokens, p * width,
                                      left < width ? left : width, width, block,
                                      block + kGradARows * width, out);
            }
    });
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
