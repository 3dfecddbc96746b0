// y[m, n] = base[m, n] + sum_j gain_j mask_j(m, n) (B_j s_j)[m, n]; also dx = ds A, without masks.
//
// A warp makes 16 kRowTiles rows x 32 columns at a time; thread (g, t) holds eight neighbouring columns
// of each of its rows, so one call of Philox serves them and all accesses are 16 bytes. The sum of an
// element starts at base. Orthogonal: nested thresholds from the last adapter down, sum_j = base +
// product, the last that takes the element stays. Else: sum += product where kept.
// kFast: base and y allow 16-byte accesses, masks start at a multiple of eight columns, and s (with
// the gains folded in, for bfloat16) and two stages of factors fit in shared memory.
#pragma once

#include "cuda/draws.h"
#include "cuda/view.h"

namespace lora_ortho::cuda {

constexpr int kExpandThreads = 128, kExpandWarps = kExpandThreads / kWarp;
constexpr int kRowTiles = 1;                // of a warp, 16 rows each
constexpr int kWarpRows = 16 * kRowTiles;
constexpr int kRowsOfThread = 2 * kRowTiles;

template <class T>
struct ExpandArguments {
    const Adapter* adapters;
    const T* factors;  // section B_columns or A_columns
    std::int32_t adapter_count;
    std::int32_t draw;  // 0 nothing, 1 once, 2 for every adapter
    std::int64_t steps;
    const float* gains;    // null: ones
    T* s;                  // [rows][rank_sum]; written where `partial` is not null
    const float* partial;  // [splits][rows][rank_sum]
    std::int32_t splits;
    std::int32_t row_warps;  // warps of a block that take different rows: 1, 2 or 4
    std::int64_t rows, cols, rank_sum;
    View<T> base;  // data may be null
    T* y;
    std::int64_t row_blocks, block_groups;  // groups of columns of one block
    std::int32_t stage_groups;              // groups whose factors are in shared memory at once
    Place place;
};

// Byte offsets in the shared memory of kFast.
struct ExpandShared {
    int gains, steps, s, factors, stage_bytes;

    template <class T>
    LORA_ORTHO_DEVICE static ExpandShared make(const ExpandArguments<T>& p) {
        ExpandShared l{};
        const int k = p.adapter_count;
        l.gains = 4 * k;
        l.steps = 8 * k;
        l.s = (8 * k + 4 * (k + 1) + 15) / 16 * 16;
        const int step_bytes = kStep * static_cast<int>(sizeof(T)) * static_cast<int>(p.steps);
        l.factors = l.s + p.row_warps * kWarpRows * step_bytes;
        l.stage_bytes = p.stage_groups * kGroup * step_bytes;
        return l;
    }
    LORA_ORTHO_DEVICE int bytes() const { return factors + 2 * stage_bytes; }
};

// Products of narrow floats would leave the range of float16 if the gain were folded into s, and
// float32 would be truncated once more: there the gain is applied to the product.
template <class T>
constexpr bool kFoldGain = sizeof(T) == 2;
template <>
constexpr bool kFoldGain<Float16> = false;

// Element (row, col) of s: from memory, or summed over the splits and then rounded.
template <class T>
LORA_ORTHO_DEVICE T s_element(const ExpandArguments<T>& p, std::int64_t row, std::int64_t col) {
    const std::int64_t at = row * p.rank_sum + col;
    if (!p.partial) return p.s[at];
    float total = 0.0f;
    for (int i = 0; i < p.splits; ++i) total += p.partial[i * p.rows * p.rank_sum + at];
    return from_float<T>(total);
}

// Ranks k .. k + 3 of adapter `a` in a row of s; zeros beyond its rank.
template <class T>
LORA_ORTHO_DEVICE FourOf<T> s_four(const ExpandArguments<T>& p, const Adapter& a, float gain,
                                   std::int64_t row, std::int64_t k) {
    float values[4];
    FourOf<T> out;
    if (!p.partial && k + 4 <= a.rank && (a.begin | p.rank_sum) % 4 == 0) {
        const T* from = p.s + row * p.rank_sum + a.begin + k;
#pragma unroll
        for (int w = 0; w < FourOf<T>::kWords / 2; ++w) {
            const Pair pair = reinterpret_cast<const Pair*>(from)[w];
            out.word[2 * w] = pair.word[0];
            out.word[2 * w + 1] = pair.word[1];
        }
    } else {
        out.clear();
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            if (k + e < a.rank) out.set_bits(e, raw_bits(s_element(p, row, a.begin + k + e)));
        }
    }
    if (!kFoldGain<T>) return out;
#pragma unroll
    for (int e = 0; e < 4; ++e) values[e] = out[e] * gain;
    out.set(values);
    return out;
}

// Operands from shared memory, where the block has put them.
template <class T>
struct StagedOperands {
    Shared shared;
    int s, factors;  // byte offsets of this warp's rows and this group, for this lane
    int limits, gains, steps;
    static constexpr int kQuadElements = 16 / static_cast<int>(sizeof(T));

    LORA_ORTHO_DEVICE std::uint32_t limit(int j) const {
        return shared.load<std::uint32_t>(limits + 4 * j);
    }
    LORA_ORTHO_DEVICE float gain(int j) const { return shared.load<float>(gains + 4 * j); }
    LORA_ORTHO_DEVICE int first_step(int j) const { return shared.load<int>(steps + 4 * j); }
    // Quad number `quad` of this lane in a block of `bytes_per_step`.
    LORA_ORTHO_DEVICE Quad quad(int base, int index) const {
        return shared.load_quad(base + index * kWarp * 16);
    }
    LORA_ORTHO_DEVICE Left<T> left(int, int step, int m) const {
        FourOf<T> rows[2];
        if constexpr (sizeof(T) == 2) {
            const Quad q = quad(s, step * kRowTiles + m);
            rows[0] = {{q.word[0], q.word[1]}};
            rows[1] = {{q.word[2], q.word[3]}};
        } else {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const Quad q = quad(s, (step * kRowTiles + m) * 2 + h);
                rows[h] = {{q.word[0], q.word[1], q.word[2], q.word[3]}};
            }
        }
        return Left<T>(rows[0], rows[1]);
    }
    LORA_ORTHO_DEVICE void columns(int step, FourOf<T> (&out)[4]) const {
        if constexpr (sizeof(T) == 2) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Quad q = quad(factors, step * 2 + i);
                out[2 * i] = {{q.word[0], q.word[1]}};
                out[2 * i + 1] = {{q.word[2], q.word[3]}};
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Quad q = quad(factors, step * 4 + i);
                out[i] = {{q.word[0], q.word[1], q.word[2], q.word[3]}};
            }
        }
    }
};

// Operands from device memory: any number of adapters and ranks.
template <class T>
struct DirectOperands {
    const ExpandArguments<T>& p;
    const T* factors;             // of this group, for this lane
    std::int64_t rows[kRowsOfThread];
    int t;

    LORA_ORTHO_DEVICE std::uint32_t limit(int j) const {
        const std::uint32_t u = p.adapters[j].limit;
        return (u << 16) | 0xffffu;
    }
    LORA_ORTHO_DEVICE float gain(int j) const { return p.gains ? p.gains[j] : 1.0f; }
    LORA_ORTHO_DEVICE int first_step(int j) const { return static_cast<int>(p.adapters[j].step); }
    LORA_ORTHO_DEVICE Left<T> left(int j, int step, int m) const {
        const Adapter a = p.adapters[j];
        const std::int64_t k = (step - a.step) * kStep + 4 * t;
        return Left<T>(s_four(p, a, gain(j), rows[2 * m], k),
                       s_four(p, a, gain(j), rows[2 * m + 1], k));
    }
    LORA_ORTHO_DEVICE void columns(int step, FourOf<T> (&out)[4]) const {
        constexpr int kTogether = 4 / static_cast<int>(sizeof(T));
        const T* from = factors + static_cast<std::int64_t>(step) * kColumnBlock;
#pragma unroll
        for (int i = 0; i < 4 / kTogether; ++i) {
            const Quad q = load_quad(from + i * kWarp * kTogether * 4);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                out[i * kTogether + k * kTogether / 4].word[k % (4 / kTogether)] = q.word[k];
            }
        }
    }
};

// The elements of one thread: kRowsOfThread rows of eight columns.
using Elements = float[kRowsOfThread][8];

// to = from + gain (B_j s_j), all adapters' elements, for every element of the warp.
template <class T, class Operands>
LORA_ORTHO_DEVICE void add_product(const Operands& operands, int j, const Elements& from,
                                   Elements& to) {
    Four sum[4][kRowTiles];
    const int begin = operands.first_step(j), end = operands.first_step(j + 1);
    for (int step = begin; step < end; ++step) {
        FourOf<T> columns[4];
        operands.columns(step, columns);
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
            const Left<T> left = operands.left(j, step, m);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                Four start = {};
                if (kFoldGain<T>) {
                    start = {{from[2 * m][2 * i], from[2 * m][2 * i + 1], from[2 * m + 1][2 * i],
                              from[2 * m + 1][2 * i + 1]}};
                }
                if (step > begin) start = sum[i][m];
                sum[i][m] = multiply(left, Right<T>(columns[i]), start);
            }
        }
    }
    const float gain = kFoldGain<T> ? 1.0f : operands.gain(j);
#pragma unroll
    for (int q = 0; q < kRowsOfThread; ++q) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float value = sum[e / 2][q / 2].v[q % 2 * 2 + e % 2];
            to[q][e] = kFoldGain<T> ? value : fused(value, gain, from[q][e]);
        }
    }
}

// All adapters on the elements of a thread; `y` holds base at first.
template <class T, bool kOrthogonal, bool kFast, class Operands>
LORA_ORTHO_DEVICE void add_adapters(const ExpandArguments<T>& p, const Stream& stream,
                                    const Operands& operands, const std::int64_t (&rows)[kRowsOfThread],
                                    std::int64_t col, Elements& y) {
    constexpr std::uint32_t kAll = 0xffffffffu;
    Draws draws[kRowsOfThread];
    if (kOrthogonal) {
#pragma unroll
        for (int q = 0; q < kRowsOfThread; ++q) {
            draws[q] = stream.template draws<kFast>(rows[q], col, 0);
        }
    }
    Elements base;
    if (kOrthogonal) {
#pragma unroll
        for (int q = 0; q < kRowsOfThread; ++q)
#pragma unroll
            for (int e = 0; e < 8; ++e) base[q][e] = y[q][e];
    }
    const Elements& from = kOrthogonal ? base : y;
    int j = p.adapter_count - 1;
    if (kOrthogonal && operands.limit(j) == kAll) {  // the keep probabilities sum to 1
        add_product<T>(operands, j, from, y);
        --j;
    }
    for (; j >= 0; --j) {
        const std::uint32_t limit = operands.limit(j);
        if (!kOrthogonal && (p.draw == 0 || limit == kAll)) {
            add_product<T>(operands, j, from, y);
            continue;
        }
        if (!kOrthogonal) {
#pragma unroll
            for (int q = 0; q < kRowsOfThread; ++q) {
                draws[q] = stream.template draws<kFast>(rows[q], col, static_cast<std::uint32_t>(j));
            }
        }
        Elements sum;
        add_product<T>(operands, j, from, sum);
#pragma unroll
        for (int q = 0; q < kRowsOfThread; ++q) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                // The draw in the high half; the low half changes no comparison with the limit.
                const std::uint32_t word = draws[q].word[e / 2];
                const std::uint32_t draw = e % 2 == 0 ? word << 16 : word;
                y[q][e] = draw <= limit ? sum[q][e] : y[q][e];
            }
        }
    }
}

// Loads base, adds the adapters, rounds and stores one group of columns.
template <class T, bool kOrthogonal, bool kFast, class Operands>
LORA_ORTHO_DEVICE void expand_group(const ExpandArguments<T>& p, const Stream& stream,
                                    const Operands& operands,
                                    const std::int64_t (&rows)[kRowsOfThread], std::int64_t row0,
                                    std::int64_t col) {
    Elements y;
#pragma unroll
    for (int q = 0; q < kRowsOfThread; ++q) {
        Eight<T> base;
        base.clear();
        if (p.base.data) base = p.base.template eight<kFast>(rows[q], col, p.cols);
#pragma unroll
        for (int e = 0; e < 8; ++e) y[q][e] = base[e];
    }
    add_adapters<T, kOrthogonal, kFast>(p, stream, operands, rows, col, y);
#pragma unroll
    for (int q = 0; q < kRowsOfThread; ++q) {
        const std::int64_t row = row0 + 8 * q;
        if (row >= p.rows) continue;
        Eight<T> out;
        out.set(y[q]);
        T* to = p.y + row * p.cols + col;
        if (kFast) {
            if (col < p.cols) store_eight(to, out);
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (col + e < p.cols) to[e] = from_float<T>(y[q][e]);
            }
        }
    }
}

// ---- what the block puts into shared memory

template <class T>
LORA_ORTHO_DEVICE void stage_tables(const ExpandArguments<T>& p, Shared shared,
                                    const ExpandShared& l) {
    for (int j = thread_index(); j <= p.adapter_count; j += kExpandThreads) {
        shared.store<int>(l.steps + 4 * j, static_cast<int>(p.adapters[j].step));
        if (j == p.adapter_count) break;
        shared.store<std::uint32_t>(4 * j, (p.adapters[j].limit << 16) | 0xffffu);
        shared.store<float>(l.gains + 4 * j, p.gains ? p.gains[j] : 1.0f);
    }
}

// The block's rows of s as left operands: [warp][step][row tile][lane][upper row, lower row].
template <class T>
LORA_ORTHO_DEVICE void stage_s(const ExpandArguments<T>& p, Shared shared, const ExpandShared& l,
                               std::int64_t row0) {
    constexpr int kFourBytes = 4 * static_cast<int>(sizeof(T));
    const int block_rows = p.row_warps * kWarpRows;
    for (int j = 0; j < p.adapter_count; ++j) {
        const Adapter a = p.adapters[j];
        const float gain = kFoldGain<T> && p.gains ? p.gains[j] : 1.0f;
        const int fours = static_cast<int>(p.adapters[j + 1].step - a.step) * (kStep / 4);
        for (int e = thread_index(); e < block_rows * fours; e += kExpandThreads) {
            const int row = e / fours, four = e % fours, t = four % 4;
            const int step = static_cast<int>(a.step) + four / 4;
            const int warp = row / kWarpRows, m = row % kWarpRows / 16, h = row % 16 / 8;
            const int lane = row % 8 * 4 + t;
            FourOf<T> value;
            value.clear();
            if (row0 + row < p.rows) value = s_four(p, a, gain, row0 + row, 4 * four);
            const int tile = (warp * static_cast<int>(p.steps) + step) * kRowTiles + m;
            int at = l.s + (sizeof(T) == 2 ? (tile * kWarp + lane) * 2 + h
                                           : (tile * 2 + h) * kWarp + lane) * kFourBytes;
#pragma unroll
            for (int w = 0; w < FourOf<T>::kWords; w += 2) {
                shared.store<Pair>(at, {{value.word[w], value.word[w + 1]}});
                at += 8;
            }
        }
    }
}

// Starts copying the factors of groups [group, group + count).
template <class T>
LORA_ORTHO_DEVICE void stage_factors(const ExpandArguments<T>& p, Shared shared, int to,
                                     std::int64_t group, std::int64_t count) {
    const std::int64_t group_elements = p.steps * kColumnBlock;
    const T* from = p.factors + group * group_elements;
    const int quads = static_cast<int>(count * group_elements * static_cast<int>(sizeof(T)) / 16);
    for (int i = thread_index(); i < quads; i += kExpandThreads) {
        shared.copy_async(to + 16 * i, reinterpret_cast<const Quad*>(from) + i);
    }
    copy_async_commit();
}

// s for the backward pass, where it was only there in parts: by the first block of every row.
template <class T>
LORA_ORTHO_DEVICE void write_s(const ExpandArguments<T>& p, std::int64_t row0, int block_rows) {
    const std::int64_t rows = p.rows - row0 < block_rows ? p.rows - row0 : block_rows;
    for (std::int64_t e = thread_index(); e < rows * p.rank_sum; e += kExpandThreads) {
        p.s[row0 * p.rank_sum + e] = s_element(p, row0, e);
    }
}

template <class T, bool kOrthogonal, bool kFast>
LORA_ORTHO_KERNEL(kExpandThreads)
expand_kernel(const ExpandArguments<T> p) {
    const int warp = thread_index() / kWarp, lane = thread_index() % kWarp;
    const int g = lane / 4, t = lane % 4;
    const int row_warp = warp % p.row_warps, col_warp = warp / p.row_warps;
    const int col_warps = kExpandWarps / p.row_warps;
    const std::int64_t block_row = block_index() % p.row_blocks * (p.row_warps * kWarpRows);
    const std::int64_t first = block_index() / p.row_blocks * p.block_groups;
    const std::int64_t groups = ceil_div(p.cols, kGroup);
    const std::int64_t end = first + p.block_groups < groups ? first + p.block_groups : groups;
    const std::int64_t row0 = block_row + row_warp * kWarpRows + g;
    const Stream stream(p.place);

    std::int64_t rows[kRowsOfThread];
#pragma unroll
    for (int q = 0; q < kRowsOfThread; ++q) {
        rows[q] = row0 + 8 * q < p.rows ? row0 + 8 * q : p.rows - 1;
    }
    if (p.partial && first == 0) write_s(p, block_row, p.row_warps * kWarpRows);
    if constexpr (kFast) {
        const Shared shared = shared_memory();
        const ExpandShared l = ExpandShared::make(p);
        int stage = l.factors;
        stage_factors(p, shared, stage, first,
                      end - first < p.stage_groups ? end - first : p.stage_groups);
        stage_tables(p, shared, l);
        stage_s(p, shared, l, block_row);
        for (std::int64_t group = first; group < end; group += p.stage_groups) {
            copy_async_wait();
            sync_block();
            const int other = 2 * l.factors + l.stage_bytes - stage;
            const std::int64_t next = group + p.stage_groups;
            if (next < end) {
                stage_factors(p, shared, other, next,
                              end - next < p.stage_groups ? end - next : p.stage_groups);
            }
            const int here = static_cast<int>(end - group < p.stage_groups ? end - group
                                                                           : p.stage_groups);
            const int s_warp = kWarpRows * kStep * static_cast<int>(sizeof(T) * p.steps);
            const int group_bytes = l.stage_bytes / p.stage_groups;
            for (int i = col_warp; i < here; i += col_warps) {
                const StagedOperands<T> operands = {shared,
                                                    l.s + row_warp * s_warp + 16 * lane,
                                                    stage + i * group_bytes + 16 * lane,
                                                    0,
                                                    l.gains,
                                                    l.steps};
                expand_group<T, kOrthogonal, true>(p, stream, operands, rows, row0,
                                                   (group + i) * kGroup + 8 * t);
            }
            stage = other;
        }
    } else {
        for (std::int64_t group = first + col_warp; group < end; group += col_warps) {
            constexpr int kLaneElements = 16 / static_cast<int>(sizeof(T));
            DirectOperands<T> operands = {
                p, p.factors + group * p.steps * kColumnBlock + lane * kLaneElements, {}, t};
#pragma unroll
            for (int q = 0; q < kRowsOfThread; ++q) operands.rows[q] = rows[q];
            expand_group<T, kOrthogonal, false>(p, stream, operands, rows, row0,
                                                group * kGroup + 8 * t);
        }
    }
}

}  // namespace lora_ortho::cuda
