// The launches of one element type, LORA_ORTHO_ELEMENT.
#include "cuda/launch.h"

#include "common/checks.h"
#include "cuda/expand.h"
#include "cuda/finish.h"
#include "cuda/launch_config.h"
#include "cuda/pack.h"
#include "cuda/reduce.h"
#include "cuda/shrink.h"

namespace lora_ortho::cuda {
namespace {

using T = LORA_ORTHO_ELEMENT;
constexpr int kSize = static_cast<int>(sizeof(T));

// ---- what the launches of a call share

std::int32_t draw_of(std::int32_t method) {
    return method == LORA_ORTHO_ORTHOGONAL ? 1 : method == LORA_ORTHO_DROPOUT ? 2 : 0;
}

Place place_of(const lora_ortho_cuda_call& c) {
    return {c.seed_pointer, c.seed, c.row_offset, c.col_offset, c.stream, c.sample};
}

View<T> view_of(const lora_ortho_matrix* m) {
    if (!m) return {nullptr, 0, 0};
    return {static_cast<const T*>(m->data), m->row_stride, m->col_stride};
}

// Whether every group of eight elements of a row is 16-byte aligned.
bool is_wide(const View<T>& v, std::int64_t cols) {
    return v.col_stride == 1 && cols % 8 == 0 && v.row_stride * kSize % 16 == 0 &&
           is_aligned(v.data, 16);
}

ShrinkConfig shrink_config(const Layout& l, std::int64_t rows, std::int64_t cols, Device device,
                           bool may_split) {
    return ShrinkConfig::make(rows, cols, l.tiles, kTilesAtOnce<T>, device.multiprocessors,
                              may_split);
}

template <bool kMasked>
Status shrink(const Layout& l, const void* packed, const View<T>& x, std::int64_t rows,
              std::int64_t cols, const ShrinkConfig& config, std::int32_t draw, const Place& place,
              float* partial, T* out, void* stream) {
    ShrinkArguments<T> a{};
    a.adapters = l.at<Adapter>(kAdapters, packed);
    a.tiles = l.at<Tile>(kTiles, packed);
    a.factors = l.at<T>(kMasked ? kBRows : kARows, packed);
    a.x = x;
    a.rows = rows;
    a.cols = cols;
    a.rank_sum = l.rank_sum;
    a.tile_count = l.tiles;
    a.row_blocks = static_cast<std::uint32_t>(config.row_blocks);
    a.panels = static_cast<std::uint32_t>(config.panels);
    a.splits = config.splits;
    a.draw = draw;
    a.place = place;
    a.partial = partial;
    a.out = out;
    const bool fast = is_wide(x, cols) && (draw == 0 || place.col_offset % 8 == 0);
    return launch(fast ? shrink_kernel<T, kMasked, true> : shrink_kernel<T, kMasked, false>,
                  config.blocks(), kShrinkThreads, shrink_shared_bytes<T, kMasked>(), stream, a);
}

ExpandConfig expand_config(const Layout& l, std::int64_t rows, std::int64_t cols, Device device,
                           bool fast) {
    return ExpandConfig::make(rows, cols, l.adapters, l.steps, kSize, kWarpRows<T>,
                              device.multiprocessors, fast);
}

// Launches one of the four kernels that fits; `a` has everything but the configuration.
Status expand(const ExpandConfig& config, bool orthogonal, ExpandArguments<T> a, void* stream) {
    a.row_warps = config.row_warps;
    a.wide_s = is_aligned(a.s, 4 * sizeof(T));
    a.stage_groups = config.stage_groups;
    a.row_blocks = static_cast<std::uint32_t>(config.row_blocks);
    a.block_groups = config.block_groups;
    void (*kernel)(const ExpandArguments<T>) =
        orthogonal ? config.staged ? expand_kernel<T, true, true> : expand_kernel<T, true, false>
        : config.staged ? expand_kernel<T, false, true>
                        : expand_kernel<T, false, false>;
    return launch(kernel, config.blocks(), kExpandThreads, config.shared_bytes, stream, a);
}

ExpandArguments<T> expand_arguments(const Layout& l, const void* packed, bool columns_of_A) {
    ExpandArguments<T> a{};
    a.adapters = l.at<Adapter>(kAdapters, packed);
    a.factors = l.at<T>(columns_of_A ? kAColumns : kBColumns, packed);
    a.adapter_count = l.adapters;
    a.steps = static_cast<std::int32_t>(l.steps);
    a.splits = 1;
    a.rank_sum = l.rank_sum;
    return a;
}

// ---- pack

Status pack(const lora_ortho_factors& f, void* packed, void* stream) {
    const Layout l(f, sizeof(T));
    PackArguments<T> a{};
    a.d_in = f.d_in;
    a.d_out = f.d_out;
    a.steps = l.steps;
    a.adapters = l.at<Adapter>(kAdapters, packed);
    a.tiles = l.at<Tile>(kTiles, packed);
    a.section[0] = l.at<T>(kARows, packed);
    a.section[1] = l.at<T>(kBColumns, packed);
    a.section[2] = l.at<T>(kBRows, packed);
    a.section[3] = l.at<T>(kAColumns, packed);
    std::uint32_t below = 0;
    for (std::int32_t j = 0; j < f.adapters; ++j) {
        a.A = f.lora_A[j];
        a.B = f.lora_B[j];
        a.index = j;
        a.adapter.rank = f.ranks[j];
        a.adapter.lower = f.method == LORA_ORTHO_ORTHOGONAL ? below : 0;
        a.adapter.limit =
            (f.method == LORA_ORTHO_DIRECT ? LORA_ORTHO_DRAW_LIMIT : f.thresholds[j]) - 1;
        below = a.adapter.limit + 1;
        const std::int64_t elements =
            round_up(f.ranks[j], kStep) * std::max(l.in_groups, l.out_groups) * kGroup;
        const std::int64_t blocks =
            std::min<std::int64_t>(ceil_div(elements, 4 * kPackThreads), 4096);
        LORA_ORTHO_CHECK(launch(pack_kernel<T>, blocks, kPackThreads, 0, stream, a));
        a.adapter.begin += f.ranks[j];
        a.adapter.step += ceil_div(f.ranks[j], kStep);
        a.adapter.tile += ceil_div(f.ranks[j], kTile);
    }
    return LORA_ORTHO_OK;
}

// ---- forward: shrink, expand

std::size_t forward_bytes(const lora_ortho_factors& f, const lora_ortho_cuda_call& c,
                          Device device) {
    const Layout l(f, sizeof(T));
    const ShrinkConfig config = shrink_config(l, c.tokens, f.d_in, device, true);
    if (config.splits == 1) return 0;
    return sizeof(float) * static_cast<std::size_t>(config.splits * c.tokens * l.rank_sum);
}

Status forward(const lora_ortho_factors& f, const void* packed, const lora_ortho_cuda_call& c,
               const lora_ortho_matrix& x, const lora_ortho_matrix* base, void* y, void* s,
               void* workspace, Device device) {
    const Layout l(f, sizeof(T));
    ExpandArguments<T> a = expand_arguments(l, packed, false);
    a.base = view_of(base);
    const bool fast = f.d_out % 8 == 0 && is_aligned(y, 16) && c.col_offset % 8 == 0 &&
                      (!base || is_wide(a.base, f.d_out));
    const ExpandConfig config = expand_config(l, c.tokens, f.d_out, device, fast);
    const ShrinkConfig shrink_by = shrink_config(l, c.tokens, f.d_in, device, config.staged);
    float* partial = shrink_by.splits > 1 ? static_cast<float*>(workspace) : nullptr;
    LORA_ORTHO_CHECK(shrink<false>(l, packed, view_of(&x), c.tokens, f.d_in, shrink_by, 0,
                                   place_of(c), partial, static_cast<T*>(s), c.cuda_stream));
    a.draw = draw_of(f.method);
    a.gains = c.gains;
    a.s = static_cast<T*>(s);
    a.partial = partial;
    a.splits = shrink_by.splits;
    a.rows = c.tokens;
    a.cols = f.d_out;
    a.y = static_cast<T*>(y);
    a.place = place_of(c);
    return expand(config, f.method == LORA_ORTHO_ORTHOGONAL, a, c.cuda_stream);
}

// ---- backward: ds in parts, finish, then dx, dB, dA

// Byte offsets of the parts of the workspace.
struct BackwardPlan {
    ShrinkConfig ds_by;
    ReduceConfig dB_by, dA_by;
    std::int64_t finish_blocks;
    std::size_t ds_parts, ds, dgains, sums, bytes;

    BackwardPlan(const Layout& l, std::int64_t tokens, Device device) {
        const std::int64_t sms = device.multiprocessors;
        ds_by = shrink_config(l, tokens, l.d_out, device, true);
        dB_by = ReduceConfig::make(tokens, l.d_out, l.tiles, kTilesAtOnce<T>, sms);
        dA_by = ReduceConfig::make(tokens, l.d_in, l.tiles, kTilesAtOnce<T>, sms);
        finish_blocks = ceil_div(tokens, kFinishRows);
        const std::int64_t saved = tokens * l.rank_sum;
        const std::int64_t dB = dB_by.splits > 1 ? dB_by.splits * l.d_out * l.rank_sum : 0;
        const std::int64_t dA = dA_by.splits > 1 ? dA_by.splits * l.d_in * l.rank_sum : 0;
        ds_parts = 0;
        ds = ds_parts + align_up(static_cast<std::size_t>(ds_by.splits * saved) * sizeof(float));
        dgains = ds + align_up(static_cast<std::size_t>(saved) * sizeof(T));
        sums = dgains +
               align_up(static_cast<std::size_t>(finish_blocks * l.adapters) * sizeof(double));
        bytes = sums + align_up(static_cast<std::size_t>(std::max(dA, dB)) * sizeof(float));
    }
};

std::size_t backward_bytes(const lora_ortho_factors& f, const lora_ortho_cuda_call& c,
                           Device device) {
    return BackwardPlan(Layout(f, sizeof(T)), c.tokens, device).bytes;
}

// Launches the sum over rows, in parts where there are several; `a` has everything else.
Status reduce(const ReduceConfig& config, ReduceArguments<T> a, float* sums, void* stream) {
    a.col_blocks = static_cast<std::uint32_t>(config.col_blocks);
    a.panels = static_cast<std::uint32_t>(config.panels);
    a.splits = config.splits;
    a.partial = config.splits > 1 ? sums : nullptr;
    a.fast = is_wide(a.x, a.cols);
    LORA_ORTHO_CHECK(launch(reduce_kernel<T>, config.blocks(), kReduceThreads,
                            ReduceShared<T>::kBytes, stream, a));
    if (config.splits == 1) return LORA_ORTHO_OK;
    const SumArguments sum = {sums, a.rank_sum * a.cols, config.splits, a.target};
    return launch(sum_kernel<T>, std::min<std::int64_t>(ceil_div(sum.size, kFinishThreads), 4096),
                  kFinishThreads, 0, stream, sum);
}

Status backward(const lora_ortho_factors& f, const void* packed, const lora_ortho_cuda_call& c,
                const lora_ortho_matrix& grad, const lora_ortho_matrix& x, const void* s,
                const Gradients& out, void* workspace, Device device) {
    const Layout l(f, sizeof(T));
    const BackwardPlan plan(l, c.tokens, device);
    char* room = static_cast<char*>(workspace);
    float* ds_parts = reinterpret_cast<float*>(room + plan.ds_parts);
    T* ds = reinterpret_cast<T*>(room + plan.ds);
    double* dgains = reinterpret_cast<double*>(room + plan.dgains);
    float* sums = reinterpret_cast<float*>(room + plan.sums);
    void* const stream = c.cuda_stream;

    ReduceArguments<T> r{};
    r.adapters = l.at<Adapter>(kAdapters, packed);
    r.tiles = l.at<Tile>(kTiles, packed);
    r.rows = c.tokens;
    r.rank_sum = l.rank_sum;
    r.tile_count = l.tiles;
    r.place = place_of(c);
    if (out.dB) {
        r.x = view_of(&grad);
        r.cols = f.d_out;
        r.s = static_cast<const T*>(s);
        r.gains = c.gains;
        r.draw = draw_of(f.method);
        r.target = {out.dB, out.factor_dtype, 1};
        LORA_ORTHO_CHECK(reduce(plan.dB_by, r, sums, stream));
    }
    if (!out.dx && !out.dA && !out.dgains) return LORA_ORTHO_OK;

    LORA_ORTHO_CHECK(shrink<true>(l, packed, view_of(&grad), c.tokens, f.d_out, plan.ds_by,
                                  draw_of(f.method), place_of(c), ds_parts, nullptr, stream));
    FinishArguments<T> finish{};
    finish.adapters = r.adapters;
    finish.adapter_count = f.adapters;
    finish.splits = plan.ds_by.splits;
    finish.partial = ds_parts;
    finish.s = static_cast<const T*>(s);
    finish.gains = c.gains;
    finish.rows = c.tokens;
    finish.rank_sum = l.rank_sum;
    finish.ds = out.dx || out.dA ? ds : nullptr;
    finish.dgains = out.dgains ? dgains : nullptr;
    LORA_ORTHO_CHECK(launch(finish_kernel<T>, plan.finish_blocks, kFinishThreads,
                            kFinishThreads * static_cast<int>(sizeof(double)), stream, finish));
    if (out.dgains) {
        const GainArguments gain = {dgains, plan.finish_blocks, f.adapters, out.dgains};
        LORA_ORTHO_CHECK(launch(gain_kernel<T>, 1, kFinishThreads, 0, stream, gain));
    }
    if (out.dx) {
        const bool fast = f.d_in % 8 == 0 && is_aligned(out.dx, 16);
        ExpandArguments<T> a = expand_arguments(l, packed, true);
        a.s = ds;
        a.rows = c.tokens;
        a.cols = f.d_in;
        a.y = static_cast<T*>(out.dx);
        LORA_ORTHO_CHECK(
            expand(expand_config(l, c.tokens, f.d_in, device, fast), false, a, stream));
    }
    if (out.dA) {
        r.x = view_of(&x);
        r.cols = f.d_in;
        r.s = ds;
        r.gains = nullptr;
        r.draw = 0;
        r.target = {out.dA, out.factor_dtype, 0};
        LORA_ORTHO_CHECK(reduce(plan.dA_by, r, sums, stream));
    }
    return LORA_ORTHO_OK;
}

constexpr Kernels kKernels = {pack, forward_bytes, forward, backward_bytes, backward};

}  // namespace

#define LORA_ORTHO_JOIN_(a, b) a##b
#define LORA_ORTHO_JOIN(a, b) LORA_ORTHO_JOIN_(a, b)
const Kernels* LORA_ORTHO_JOIN(kernels_, LORA_ORTHO_ELEMENT_NAME)() { return &kKernels; }

}  // namespace lora_ortho::cuda
