// expand: y[m, n] = base[m, n] + sum_j gain_j mask_j(m, n) (B_j s_j)[m, n]; also grad_x = grad_s A,
// without masks.
//
// A warp makes 16 rows x 32 columns at a time; thread (g, t) holds eight neighbouring columns of
// each of its rows, so one call of Philox serves them and all accesses are 16 bytes. The sum of an
// element starts at base. A shared draw: from the last adapter down, sum_j = base + product where
// the draw is at most the adapter's last; intervals lie in order, so the owner is the last to
// overwrite. Else: sum += product where kept. kStaged: base and y allow 16-byte accesses, masks
// start at a multiple of eight columns, and s (with the gains folded in, for bfloat16) and two
// stages of factors fit in shared memory.
#pragma once

#include "cuda/expand_operands.h"

namespace lora_ortho::cuda {

// The elements of one thread: kRowsOfThread rows of eight columns.
template <class T>
using Elements = float[kRowsOfThread<T>][8];

// Where a thread reads base and writes y: its first row, and how far the next one, 8 below, is.
template <class T>
struct ThreadRows {
    const T* base;
    T* y;
    std::int64_t base_step, y_step;
    std::int64_t row;
    int left, base_left;   // rows from the first on; none without base
    std::uint32_t blocks;  // of eight columns

    LORA_ORTHO_DEVICE ThreadRows(const ExpandArguments<T>& p, std::int64_t row0) : row(row0) {
        base = p.base.data + row * p.base.row_stride;
        y = p.y + row * p.cols;
        base_step = 8 * p.base.row_stride;
        y_step = 8 * p.cols;
        left = p.rows - row < kWarpRows<T> ? static_cast<int>(p.rows - row) : kWarpRows<T>;
        base_left = p.base.data ? left : 0;
        blocks = static_cast<std::uint32_t>(ceil_div(p.cols, 8));
    }
};

// The products of a thread's rows, in registers from here on.
template <class T>
struct RowProducts {
    RowProduct of[kRowsOfThread<T>];

    LORA_ORTHO_DEVICE RowProducts(const Stream& stream, std::int64_t first) {
        auto row = static_cast<std::uint32_t>(first);
        pin(row);
#pragma unroll
        for (int q = 0; q < kRowsOfThread<T>; ++q) {
            of[q] = stream.row(row + 8 * q);
            pin(of[q].low);
            pin(of[q].high);
        }
    }
};

// sum += the product of one step of adapter j.
template <class T, class Operands>
LORA_ORTHO_DEVICE void add_step(const Operands& operands, int j, const Entry& entry, int step,
                                Four (&sum)[4][kRowTiles<T>]) {
    FourOf<T> columns[4];
    operands.columns(step, columns);
#pragma unroll
    for (int m = 0; m < kRowTiles<T>; ++m) {
        const Left<T> left = operands.left(j, entry, step, m);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum[i][m] = multiply(left, Right<T>(columns[i]), sum[i][m]);
        }
    }
}

// to = from + gain (B_j s_j), as if adapter j had every element.
template <class T, class Operands>
LORA_ORTHO_DEVICE void add_product(const Operands& operands, int j, const Entry& entry,
                                   const Elements<T>& from, Elements<T>& to) {
    Four sum[4][kRowTiles<T>];
#pragma unroll
    for (int m = 0; m < kRowTiles<T>; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sum[i][m] = {};
            if (kFoldGain<T>) {
                sum[i][m] = {{from[2 * m][2 * i], from[2 * m][2 * i + 1], from[2 * m + 1][2 * i],
                              from[2 * m + 1][2 * i + 1]}};
            }
        }
    }
    add_step<T>(operands, j, entry, entry.begin, sum);
#pragma unroll 1
    for (int step = entry.begin + 1; step < entry.end; ++step) {
        add_step<T>(operands, j, entry, step, sum);
    }
#pragma unroll
    for (int q = 0; q < kRowsOfThread<T>; ++q) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float value = sum[e / 2][q / 2].v[q % 2 * 2 + e % 2];
            to[q][e] = kFoldGain<T> ? value : fused(value, entry.gain, from[q][e]);
        }
    }
}

// Draws of a thread's elements, each in the high half of a word.
template <class T>
struct HighDraws {
    std::uint32_t word[kRowsOfThread<T>][8];

    template <bool kStaged>
    LORA_ORTHO_DEVICE void draw(const Stream& stream, const RowProducts<T>& rows,
                                std::uint32_t block, std::uint32_t lane_set) {
#pragma unroll
        for (int q = 0; q < kRowsOfThread<T>; ++q) {
            const Draws draws = stream.template draws<kStaged>(rows.of[q], block, lane_set);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                word[q][i] = draws.high(i);
                pin(word[q][i]);
            }
        }
    }
};

// y = sum where the adapter takes the element, else `other`.
template <class T>
LORA_ORTHO_DEVICE void select(const HighDraws<T>& draws, std::uint32_t last, const Elements<T>& sum,
                              const Elements<T>& other, Elements<T>& y) {
#pragma unroll
    for (int q = 0; q < kRowsOfThread<T>; ++q) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            y[q][e] = draws.word[q][e] <= last ? sum[q][e] : other[q][e];
        }
    }
}

constexpr std::uint32_t kEveryDraw = 0xffffffffu;

// At most one adapter on each element.
template <class T, bool kStaged, class Operands>
LORA_ORTHO_DEVICE void add_owner(const ExpandArguments<T>& p, const Stream& stream,
                                 const RowProducts<T>& rows, const Operands& operands,
                                 std::uint32_t block, const Elements<T>& base, Elements<T>& y) {
    HighDraws<T> draws;
    draws.template draw<kStaged>(stream, rows, block, 0);
    int j = p.adapter_count - 1;
    const Entry final_entry = operands.entry(j);
    add_product<T>(operands, j, final_entry, base, y);
    // Where the keep probabilities sum to 1, the last adapter takes what the others leave.
    if (final_entry.last != kEveryDraw) select<T>(draws, final_entry.last, y, base, y);
#pragma unroll 1
    for (--j; j >= 0; --j) {
        const Entry entry = operands.entry(j);
        Elements<T> sum;
        add_product<T>(operands, j, entry, base, sum);
        select<T>(draws, entry.last, sum, y, y);
    }
}

// Every adapter that keeps the element, or all of them.
template <class T, bool kStaged, class Operands>
LORA_ORTHO_DEVICE void add_kept(const ExpandArguments<T>& p, const Stream& stream,
                                const Operands& operands, const ThreadRows<T>& at,
                                std::uint32_t block, const Elements<T>& base, Elements<T>& y) {
#pragma unroll
    for (int q = 0; q < kRowsOfThread<T>; ++q) {
#pragma unroll
        for (int e = 0; e < 8; ++e) y[q][e] = base[q][e];
    }
#pragma unroll 1
    for (int j = 0; j < p.adapter_count; ++j) {
        const Entry entry = operands.entry(j);
        if (p.draw == Draw::kNone || entry.last == kEveryDraw) {
            add_product<T>(operands, j, entry, y, y);
            continue;
        }
        HighDraws<T> draws;
        draws.template draw<kStaged>(stream, RowProducts<T>(stream, at.row), block,
                                     static_cast<std::uint32_t>(j));
        Elements<T> sum;
        add_product<T>(operands, j, entry, y, sum);
        select<T>(draws, entry.last, sum, y, y);
    }
}

// Columns 8 block .. 8 block + 7 of base in all rows of the thread; zeros where there is none.
template <class T, bool kStaged>
LORA_ORTHO_DEVICE void load_base(const ExpandArguments<T>& p, const ThreadRows<T>& at,
                                 std::uint32_t block, Elements<T>& base) {
    const T* from = at.base + (kStaged ? static_cast<std::int64_t>(block) * 8 : 0);
#pragma unroll
    for (int q = 0; q < kRowsOfThread<T>; ++q) {
        const bool wanted = 8 * q < at.base_left && block < at.blocks;
        Eight<T> eight;
        if (kStaged) {
            eight = load_eight(from, wanted);
            from += at.base_step;
        } else {
            eight.clear();
            const std::int64_t col = static_cast<std::int64_t>(block) * 8;
            if (wanted) eight = p.base.template eight<false>(at.row + 8 * q, col, p.cols);
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            base[q][e] = eight[e];
            pin(base[q][e]);
        }
    }
}

// Rounds and stores them.
template <class T, bool kStaged>
LORA_ORTHO_DEVICE void store_y(const ExpandArguments<T>& p, const ThreadRows<T>& at,
                               std::uint32_t block, const Elements<T>& y) {
    const std::int64_t col = static_cast<std::int64_t>(block) * 8;
    T* to = at.y + col;
#pragma unroll
    for (int q = 0; q < kRowsOfThread<T>; ++q) {
        const bool wanted = 8 * q < at.left && block < at.blocks;
        if (kStaged) {
            Eight<T> out;
            out.set(y[q]);
            store_eight(to, out, wanted);
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (wanted && col + e < p.cols) to[e] = from_float<T>(y[q][e]);
            }
        }
        to += at.y_step;
    }
}

// One block of eight columns in all rows of the thread.
template <class T, bool kSharedDraw, bool kStaged, class Operands>
LORA_ORTHO_DEVICE void expand_block(const ExpandArguments<T>& p, const Stream& stream,
                                    const RowProducts<T>& rows, const Operands& operands,
                                    const ThreadRows<T>& at, std::uint32_t block) {
    Elements<T> base, y;
    load_base<T, kStaged>(p, at, block, base);
    if (kSharedDraw) {
        add_owner<T, kStaged>(p, stream, rows, operands, block, base, y);
    } else {
        add_kept<T, kStaged>(p, stream, operands, at, block, base, y);
    }
    store_y<T, kStaged>(p, at, block, y);
}

template <class T, bool kSharedDraw, bool kStaged>
LORA_ORTHO_KERNEL(kExpandThreads, kExpandBlocks)
expand_kernel(const ExpandArguments<T> p) {
    const int warp = thread_index() >> 5, lane = thread_index() & 31;
    const int g = lane >> 2, t = lane & 3;
    const int row_warp = warp % p.row_warps, col_warp = warp / p.row_warps;
    const int col_warps = kExpandWarps / p.row_warps;
    const auto index = static_cast<std::uint32_t>(block_index());
    const std::int64_t block_row =
        static_cast<std::int64_t>(index % p.row_blocks) * (p.row_warps * kWarpRows<T>);
    const int first = static_cast<int>(index / p.row_blocks) * p.block_groups;
    const int groups = static_cast<int>(ceil_div(p.cols, kGroup));
    const int end = groups - first < p.block_groups ? groups : first + p.block_groups;
    Stream stream(p.place);
    const ThreadRows<T> at(p, block_row + row_warp * kWarpRows<T> + g);
    if (kSharedDraw) stream.pin_keys();
    const RowProducts<T> rows(stream, at.row);

    if constexpr (kStaged) {
        const Shared shared = shared_memory();
        const ExpandShared l = ExpandShared::make(p);
        int stage = l.factors;
        stage_factors(p, shared, stage, first, end);
        stage_entries(p, shared);
        stage_s(p, shared, l, block_row);
        if (p.partial && first == 0) write_s(p, block_row);
        const int s_bytes = kWarpRows<T> * kStep * static_cast<int>(sizeof(T)) * p.steps;
        const int group_bytes = l.stage_bytes / p.stage_groups;
        StagedOperands<T> operands = {shared, l.s + row_warp * s_bytes + 16 * lane, 0};
#pragma unroll 1
        for (int group = first; group < end; group += p.stage_groups) {
            copy_async_wait();
            sync_block();
            const int other = 2 * l.factors + l.stage_bytes - stage;
            if (group + p.stage_groups < end) {
                stage_factors(p, shared, other, group + p.stage_groups, end);
            }
            const int here = end - group < p.stage_groups ? end - group : p.stage_groups;
#pragma unroll 1
            for (int i = col_warp; i < here; i += col_warps) {
                operands.factors = stage + i * group_bytes + 16 * lane;
                auto block = static_cast<std::uint32_t>(4 * (group + i) + t);
                pin(block);
                expand_block<T, kSharedDraw, true>(p, stream, rows, operands, at, block);
            }
            stage = other;
        }
    } else {
        constexpr int kLaneElements = 16 / static_cast<int>(sizeof(T));
        DirectOperands<T> operands = {p, nullptr, {}, t};
#pragma unroll
        for (int q = 0; q < kRowsOfThread<T>; ++q) {
            operands.rows[q] = at.row + 8 * q < p.rows ? at.row + 8 * q : p.rows - 1;
        }
#pragma unroll 1
        for (int group = first + col_warp; group < end; group += col_warps) {
            operands.factors = p.factors +
                               static_cast<std::int64_t>(group) * p.steps * kColumnBlock +
                               lane * kLaneElements;
            expand_block<T, kSharedDraw, false>(p, stream, rows, operands, at,
                                                static_cast<std::uint32_t>(4 * group + t));
        }
    }
}

}  // namespace lora_ortho::cuda
