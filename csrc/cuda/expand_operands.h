// Where expand's operands come from: shared memory, filled by the block, or device memory.
#pragma once

#include "cuda/draws.h"
#include "cuda/launch_config.h"

namespace lora_ortho::cuda {

template <class T>
struct ExpandArguments {
    const Adapter* adapters;
    const T* factors;  // section B_columns or A_columns
    std::int32_t adapter_count;
    Draw draw;
    std::int32_t steps;
    const float* gains;   // null: ones
    T* s;                 // [rows][rank_sum]; written where `partial` is not null
    std::int32_t wide_s;  // four neighbours of s may be read at once where they start at a multiple
    const float* partial;  // [splits][rows][rank_sum]; null unless kStaged
    std::int32_t splits;
    std::int32_t row_warps;  // warps of a block that take different rows: 1 or 2
    std::int64_t rows, cols, rank_sum;
    View<T> base;  // data may be null
    T* y;
    std::uint32_t row_blocks;
    std::int32_t block_groups;  // groups of columns of one block
    std::int32_t stage_groups;  // groups whose factors are in shared memory at once
    Place place;
};

// Byte offsets in the shared memory of kStaged; adapters' entries come first.
struct ExpandShared {
    int s, factors, stage_bytes;

    template <class T>
    LORA_ORTHO_DEVICE static ExpandShared make(const ExpandArguments<T>& p) {
        ExpandShared l{};
        const int step_bytes = kStep * static_cast<int>(sizeof(T)) * p.steps;
        l.s = kEntryBytes * p.adapter_count;
        l.factors = l.s + p.row_warps * kWarpRows<T> * step_bytes;
        l.stage_bytes = p.stage_groups * kGroup * step_bytes;
        return l;
    }
};

// What the sum over adapters needs to know of one of them.
struct Entry {
    std::uint32_t last;  // draw, in the high half of a word of which the low half is ones
    float gain;
    int begin, end;  // steps
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
#pragma unroll 1
    for (int i = 0; i < p.splits; ++i) total += p.partial[i * p.rows * p.rank_sum + at];
    return from_float<T>(total);
}

// Ranks k .. k + 3 of adapter `a` in a row of s, gain folded in; zeros beyond its rank.
template <class T, bool kStaged>
LORA_ORTHO_DEVICE FourOf<T> s_four(const ExpandArguments<T>& p, const Adapter& a, float gain,
                                   std::int64_t row, std::int64_t k) {
    FourOf<T> out;
    if (kStaged && !p.partial && k + 4 <= a.rank && p.wide_s && (a.begin | p.rank_sum) % 4 == 0) {
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
            if (k + e >= a.rank) continue;
            const std::int64_t col = a.begin + k + e;
            out.set_bits(e,
                         raw_bits(kStaged ? s_element(p, row, col) : p.s[row * p.rank_sum + col]));
        }
    }
    if constexpr (kFoldGain<T>) {
        float values[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) values[e] = out[e] * gain;
        out.set(values);
    }
    return out;
}

// Columns of four tiles from the quads that hold them side by side.
template <class T, class LoadQuad>
LORA_ORTHO_DEVICE void load_columns(FourOf<T> (&out)[4], LoadQuad&& load) {
    constexpr int kTogether = 4 / static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < 4 / kTogether; ++i) {
        const Quad q = load(i);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            out[i * kTogether + k * kTogether / 4].word[k % (4 / kTogether)] = q.word[k];
        }
    }
}

// Operands from shared memory, where the block has put them.
template <class T>
struct StagedOperands {
    Shared shared;
    int s, factors;  // byte offsets of this warp's rows and this group, for this lane

    LORA_ORTHO_DEVICE Entry entry(int j) const {
        const Quad q = shared.load_quad(kEntryBytes * j);
        return {q.word[0], as_float(q.word[1]), static_cast<int>(q.word[2]),
                static_cast<int>(q.word[3])};
    }
    // A quad of 16-bit numbers is the operand as it is; of float32 it takes two.
    LORA_ORTHO_DEVICE Left<T> left(int, const Entry&, int step, int m) const {
        const int tile = step * kRowTiles<T> + m;
        if constexpr (sizeof(T) == 2) {
            const Quad q = shared.load_quad(s + tile * kWarp * 16);
            return Left<T>({{q.word[0], q.word[2]}}, {{q.word[1], q.word[3]}});
        } else {
            const Quad u = shared.load_quad(s + 2 * tile * kWarp * 16);
            const Quad l = shared.load_quad(s + (2 * tile + 1) * kWarp * 16);
            return Left<T>({{u.word[0], u.word[1], u.word[2], u.word[3]}},
                           {{l.word[0], l.word[1], l.word[2], l.word[3]}});
        }
    }
    LORA_ORTHO_DEVICE void columns(int step, FourOf<T> (&out)[4]) const {
        const int at = factors + step * kColumnBlock * static_cast<int>(sizeof(T));
        load_columns<T>(out, [&](int i) { return shared.load_quad(at + i * kWarp * 16); });
    }
};

// Operands from device memory: any number of adapters and ranks.
template <class T>
struct DirectOperands {
    const ExpandArguments<T>& p;
    const T* factors;  // of this group, for this lane
    std::int64_t rows[kRowsOfThread<T>];
    int t;

    LORA_ORTHO_DEVICE Entry entry(int j) const {
        return {(p.adapters[j].interval.last << 16) | 0xffffu, p.gains ? p.gains[j] : 1.0f,
                static_cast<int>(p.adapters[j].step), static_cast<int>(p.adapters[j + 1].step)};
    }
    LORA_ORTHO_DEVICE Left<T> left(int j, const Entry& entry, int step, int m) const {
        const std::int64_t k = static_cast<std::int64_t>(step - entry.begin) * kStep + 4 * t;
        const Adapter a = p.adapters[j];
        return Left<T>(s_four<T, false>(p, a, entry.gain, rows[2 * m], k),
                       s_four<T, false>(p, a, entry.gain, rows[2 * m + 1], k));
    }
    LORA_ORTHO_DEVICE void columns(int step, FourOf<T> (&out)[4]) const {
        const Quad* at =
            reinterpret_cast<const Quad*>(factors + static_cast<std::int64_t>(step) * kColumnBlock);
        load_columns<T>(out, [&](int i) { return load_quad(at + i * kWarp); });
    }
};

// ---- what the block puts into shared memory

template <class T>
LORA_ORTHO_DEVICE void stage_entries(const ExpandArguments<T>& p, Shared shared) {
    for (int j = thread_index(); j < p.adapter_count; j += kExpandThreads) {
        const float gain = p.gains ? p.gains[j] : 1.0f;
        shared.store_quad(kEntryBytes * j,
                          {{(p.adapters[j].interval.last << 16) | 0xffffu, as_bits(gain),
                            static_cast<std::uint32_t>(p.adapters[j].step),
                            static_cast<std::uint32_t>(p.adapters[j + 1].step)}});
    }
}

// The block's rows of s as left operands: [warp][step][row tile][lane] quads.
template <class T>
LORA_ORTHO_DEVICE void stage_s(const ExpandArguments<T>& p, Shared shared, const ExpandShared& l,
                               std::int64_t row0) {
    const int block_rows = p.row_warps * kWarpRows<T>;
#pragma unroll 1
    for (int j = 0; j < p.adapter_count; ++j) {
        const Adapter a = p.adapters[j];
        const float gain = kFoldGain<T> && p.gains ? p.gains[j] : 1.0f;
        const int fours = static_cast<int>(p.adapters[j + 1].step - a.step) * (kStep / 4);
#pragma unroll 1
        for (int e = thread_index(); e < block_rows * fours; e += kExpandThreads) {
            const int row = e / fours, four = e % fours;
            const int step = static_cast<int>(a.step) + four / 4;
            const int warp = row / kWarpRows<T>, m = row % kWarpRows<T> / 16, h = row % 16 / 8;
            const int lane = row % 8 * 4 + four % 4;
            FourOf<T> value;
            value.clear();
            if (row0 + row < p.rows) {
                value = s_four<T, true>(p, a, gain, row0 + row, 4 * four);
            }
            const int tile = (warp * p.steps + step) * kRowTiles<T> + m;
            if constexpr (sizeof(T) == 2) {
                const int at = l.s + (tile * kWarp + lane) * 16 + 4 * h;
                shared.store_word(at, value.word[0]);
                shared.store_word(at + 8, value.word[1]);
            } else {
                shared.store_quad(l.s + ((2 * tile + h) * kWarp + lane) * 16,
                                  {{value.word[0], value.word[1], value.word[2], value.word[3]}});
            }
        }
    }
}

// Starts copying the factors of groups [group, end), at most as many as there is room for.
template <class T>
LORA_ORTHO_DEVICE void stage_factors(const ExpandArguments<T>& p, Shared shared, int to, int group,
                                     int end) {
    const int count = end - group < p.stage_groups ? end - group : p.stage_groups;
    const T* from = p.factors + static_cast<std::int64_t>(group) * p.steps * kColumnBlock;
    const int quads = count * p.steps * (kColumnBlock * static_cast<int>(sizeof(T)) / 16);
#pragma unroll 1
    for (int i = thread_index(); i < quads; i += kExpandThreads) {
        shared.copy_async(to + 16 * i, reinterpret_cast<const Quad*>(from) + i);
    }
    copy_async_commit();
}

// s for the backward pass, where it was only there in parts: by the first block of every row.
template <class T>
LORA_ORTHO_DEVICE void write_s(const ExpandArguments<T>& p, std::int64_t row0) {
    const int block_rows = p.row_warps * kWarpRows<T>;
    const std::int64_t rows = p.rows - row0 < block_rows ? p.rows - row0 : block_rows;
#pragma unroll 1
    for (std::int64_t e = thread_index(); e < rows * p.rank_sum; e += kExpandThreads) {
        p.s[row0 * p.rank_sum + e] = s_element(p, row0, e);
    }
}

}  // namespace lora_ortho::cuda
