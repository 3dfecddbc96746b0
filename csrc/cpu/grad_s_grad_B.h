// grad_s and grad_B in one pass over grad, the masks drawn again:
//   grad_s_j[m] = sum_n g[m][n] m_j[m][n] B_j[n],   grad_B_j[n] = sum_m g[m][n] m_j[m][n] s_j[m].
// An element touches only the vectors of the adapters that have it, so with shared draws the cost
// does not grow with K.
#pragma once

#include "cpu/expand.h"
#include "cpu/factor_gradients.h"
#include "cpu/parallel.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

template <class C>
struct GradSGradBScratch {
    alignas(64) std::uint16_t draws[kColumnBlock + kDrawSlack];
    alignas(64) std::uint16_t count[256];
    alignas(64) std::uint16_t owner[kColumnBlock];
    alignas(64) C grad[kColumnBlock];
    // followed by: lists uint16 [K][kColumnBlock], s C [K * padded], grad_B C [columns][K * padded]
    std::uint16_t* lists() { return reinterpret_cast<std::uint16_t*>(this + 1); }
    C* s(int adapters) { return reinterpret_cast<C*>(lists() + adapters * kColumnBlock); }
};
template <class C>
std::size_t grad_s_grad_B_scratch(const Header& h, std::int64_t columns) {
    return sizeof(GradSGradBScratch<C>) +
           static_cast<std::size_t>(h.adapters) * kColumnBlock * sizeof(std::uint16_t) +
           static_cast<std::size_t>((columns + 1) * h.padded_rank_sum) * sizeof(C);
}

// Lists of the columns that each adapter has in one row, of shared draws.
LORA_ORTHO_INLINE void list_owned(const Layout& l, const std::uint16_t* draws, int cols,
                                  std::uint16_t* owner, std::uint16_t* lists,
                                  std::uint16_t* count) {
    constexpr int W = kLanes<std::uint16_t>;
    const auto one = splat<std::uint16_t>(1);
    const int K = l.h.adapters;
    const std::uint32_t last = l.intervals[K - 1].last;  // above it: nobody's
    for (int n = 0; n < cols; n += W) {
        const Vec<std::uint16_t> u = load(draws + n);
        Vec<std::uint16_t> at{};
        for (int j = 1; j < K; ++j)
            at += u >= splat(static_cast<std::uint16_t>(l.intervals[j].first))
                      ? one
                      : Vec<std::uint16_t>{};
        if (last < 0xffff)
            at += u > splat(static_cast<std::uint16_t>(last)) ? one : Vec<std::uint16_t>{};
        store(owner + n, at);
    }
    for (int j = 0; j <= K; ++j) count[j] = 0;
    for (int n = 0; n < cols; ++n) {
        const unsigned j = owner[n];  // K: nobody
        if (j < static_cast<unsigned>(K))
            lists[j * kColumnBlock + count[j]] = static_cast<std::uint16_t>(n);
        ++count[j];
    }
}

// The list of an adapter with draws of its own, which has an element up to `last`.
LORA_ORTHO_INLINE void list_kept(std::uint32_t last, const std::uint16_t* draws, int cols,
                                 std::uint16_t* list, std::uint16_t* count) {
    unsigned kept = 0;
    for (int n = 0; n < cols; ++n) {
        list[kept] = static_cast<std::uint16_t>(n);
        kept += draws[n] <= last;
    }
    *count = static_cast<std::uint16_t>(kept);
}

// V vectors of one adapter's rank, over the columns of its list.
template <class C, int V>
LORA_ORTHO_INLINE void grad_s_grad_B_list(const std::uint16_t* list, int count, const C* grad,
                                          const C* s, const C* b, C* grad_B, std::ptrdiff_t pitch,
                                          C* grad_s) {
    Vec<C> sv[V], even[V], odd[V] = {};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        sv[v] = load(s + v * kLanes<C>);
        even[v] = load(grad_s + v * kLanes<C>);
    }
    auto touch = [&](int at, Vec<C>(&acc)[V]) __attribute__((always_inline)) {
        const std::ptrdiff_t n = list[at];
        const Vec<C> g = splat(grad[n]);
        const C* bn = b + n * pitch;
        C* to = grad_B + n * pitch;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            acc[v] += g * load(bn + v * kLanes<C>);
            store(to + v * kLanes<C>, load(to + v * kLanes<C>) + g * sv[v]);
        }
    };
    int at = 0;
    for (; at + 2 <= count; at += 2) {
        touch(at, even);
        touch(at + 1, odd);
    }
    if (at < count) touch(at, odd);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(grad_s + v * kLanes<C>, even[v] + odd[v]);
}

template <class C>
LORA_ORTHO_INLINE void grad_s_grad_B_adapter(const std::uint16_t* list, int count, const C* grad,
                                             const C* s, const C* b, C* grad_B,
                                             std::ptrdiff_t pitch, std::int64_t padded, C* grad_s) {
    std::int64_t k = 0;
    for (; k + 4 * kLanes<C> <= padded; k += 4 * kLanes<C>)
        grad_s_grad_B_list<C, 4>(list, count, grad, s + k, b + k, grad_B + k, pitch, grad_s + k);
    for (; k + 2 * kLanes<C> <= padded; k += 2 * kLanes<C>)
        grad_s_grad_B_list<C, 2>(list, count, grad, s + k, b + k, grad_B + k, pitch, grad_s + k);
    for (; k < padded; k += kLanes<C>)
        grad_s_grad_B_list<C, 1>(list, count, grad, s + k, b + k, grad_B + k, pitch, grad_s + k);
}

// One block of columns over rows [row0, row1): adds to grad_s (tokens, K * padded) and to the
// block's grad_B.
template <class IO, class C>
void grad_s_grad_B_block(const Layout& l, const Place& place, View<IO> grad, const IO* s,
                         std::int64_t row0, std::int64_t row1, std::int64_t col0, int cols,
                         C* grad_s, C* grad_B, GradSGradBScratch<C>& t) {
    const int K = l.h.adapters;
    const std::ptrdiff_t pitch = l.h.padded_rank_sum;
    const C* b = l.section<C>(kBRows) + col0 * pitch;
    C* s_row = t.s(K);
    const BlockDraws shared(place, 0, col0, kColumnBlock);
    for (std::int64_t m = row0; m < row1; ++m) {
        load_block(grad, m, 1, col0, cols, cols, t.grad, 0);
        pad_row(l, s + m * l.h.rank_sum, s_row);
        if (l.h.draw == Draw::kShared)
            list_owned(l, shared.row(m, t.draws), cols, t.owner, t.lists(), t.count);
        for (int j = 0; j < K; ++j) {
            const std::uint16_t* list = t.lists() + j * kColumnBlock;
            if (l.h.draw == Draw::kOwn) {
                const BlockDraws own(place, j, col0, kColumnBlock);
                list_kept(l.intervals[j].last, own.row(m, t.draws), cols,
                          t.lists() + j * kColumnBlock, &t.count[j]);
            } else if (l.h.draw == Draw::kNone && m == row0) {
                for (int n = 0; n < cols; ++n)
                    t.lists()[j * kColumnBlock + n] = static_cast<std::uint16_t>(n);
                t.count[j] = static_cast<std::uint16_t>(cols);
            }
            const std::int64_t at = j * l.padded;
            grad_s_grad_B_adapter<C>(list, t.count[j], t.grad, s_row + at, b + at, grad_B + at,
                                     pitch, l.padded, grad_s + m * pitch + at);
        }
    }
}

// All blocks. Member t owns one block of columns a round and walks the team's stripes of rows from
// its own on, so that no two members ever touch the same rows of grad_s or columns of grad_B: one
// pass over grad, no partial sums, a fixed order. Ends with a barrier.
template <class IO, class C>
void grad_s_grad_B(const Layout& l, const Call& call, const GradSGradBConfig& config, View<IO> grad,
                   const IO* s, C* grad_s, const Gradients& out, const Team& team,
                   GradSGradBScratch<C>& t) {
    const std::int64_t tokens = call.tokens, pitch = l.h.padded_rank_sum;
    C* grad_B = t.s(l.h.adapters) + pitch;
    for (std::int64_t m = team.begin(tokens); m < team.end(tokens); ++m)
        for (std::int64_t r = 0; r < pitch; ++r) grad_s[m * pitch + r] = 0;
    team.barrier();
    for (std::int64_t round = 0; round < config.blocks; round += team.size) {
        const std::int64_t block = round + team.id;
        const std::int64_t col0 = block * config.columns;
        const bool busy = block < config.blocks;
        const std::int64_t left = l.h.d_out - col0;
        const int cols = static_cast<int>(left < config.columns ? left : config.columns);
        if (busy) std::memset(grad_B, 0, static_cast<std::size_t>(cols * pitch) * sizeof(C));
        for (int phase = 0; phase < team.size; ++phase) {
            const Team stripe{(team.id + phase) % team.size, team.size};
            if (busy)
                grad_s_grad_B_block<IO, C>(l, call.place, grad, s, stripe.begin(tokens),
                                           stripe.end(tokens), col0, cols, grad_s, grad_B, t);
            team.barrier();
        }
        if (busy && out.grad_B)
            store_grad_B(l, call.gains, grad_B, l.padded, pitch, 1, col0, cols, out);
    }
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
