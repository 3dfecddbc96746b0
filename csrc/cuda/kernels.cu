// The launches of one element type, LORA_ORTHO_ELEMENT.
#include "cuda/kernels.h"

#include "cuda/expand.h"
#include "cuda/launch.h"
#include "cuda/launch_config.h"
#include "cuda/pack.h"
#include "cuda/sum_columns.h"
#include "cuda/sum_parts.h"
#include "cuda/sum_rows.h"

namespace lora_ortho::cuda {
namespace {

using T = LORA_ORTHO_ELEMENT;

View<T> view_of(const lora_ortho_matrix* m) {
    if (!m) return {nullptr, 0, 0};
    return {static_cast<const T*>(m->data), m->row_stride, m->col_stride};
}

// ---- pack

Status pack(const Problem& problem, const lora_ortho_factors& f, void* packed, void* stream) {
    const Layout& l = problem.layout;
    PackArguments<T> a{};
    a.d_in = l.d_in;
    a.d_out = l.d_out;
    a.steps = l.steps;
    a.adapters = l.at<Adapter>(kAdapters, packed);
    a.tiles = l.at<Tile>(kTiles, packed);
    a.section[0] = l.at<T>(kARows, packed);
    a.section[1] = l.at<T>(kBColumns, packed);
    a.section[2] = l.at<T>(kBRows, packed);
    a.section[3] = l.at<T>(kAColumns, packed);
    for (std::int32_t j = 0; j < f.adapters; ++j) {
        a.A = f.lora_A[j];
        a.B = f.lora_B[j];
        a.index = j;
        a.adapter.rank = f.ranks[j];
        a.adapter.interval = interval_of(f, j);
        const std::int64_t elements =
            round_up(f.ranks[j], kStep) * std::max(l.in_groups, l.out_groups) * kGroup;
        LORA_ORTHO_CHECK(launch(pack_kernel<T>, loop_blocks(elements, kPackElements * kPackThreads),
                                kPackThreads, 0, stream, a));
        a.adapter.begin += f.ranks[j];
        a.adapter.step += ceil_div(f.ranks[j], kStep);
        a.adapter.tile += ceil_div(f.ranks[j], kTile);
    }
    return LORA_ORTHO_OK;
}

// ---- sums over columns: shrink, grad_s

// Everything but the kind of draw and where the call stands in the mask stream.
SumColumnsArguments<T> sum_columns_arguments(const Layout& l, const void* packed, Section factors,
                                             const SumColumnsConfig& config) {
    SumColumnsArguments<T> a{};
    a.adapters = l.at<Adapter>(kAdapters, packed);
    a.tiles = l.at<Tile>(kTiles, packed);
    a.factors = l.at<T>(factors, packed);
    a.rank_sum = l.rank_sum;
    a.tile_count = l.tiles;
    a.row_blocks = static_cast<std::uint32_t>(config.row_blocks);
    a.panels = static_cast<std::uint32_t>(config.panels);
    a.splits = config.splits;
    return a;
}

// s = x A^T, into `partial` where the sum is split.
Status shrink(const Layout& l, const void* packed, const lora_ortho_cuda_call& c,
              const SumColumnsConfig& config, const lora_ortho_matrix& x, float* partial, T* s) {
    SumColumnsArguments<T> a = sum_columns_arguments(l, packed, kARows, config);
    a.x = view_of(&x);
    a.rows = c.tokens;
    a.cols = l.d_in;
    a.partial = partial;
    a.out = s;
    return launch(is_wide(a.x, a.cols) ? shrink_kernel<T, true> : shrink_kernel<T, false>,
                  config.blocks(), kSumColumnsThreads, config.shared_bytes, c.cuda_stream, a);
}

// (mask (.) grad) B in parts.
Status grad_s_parts(const Problem& problem, const void* packed, const lora_ortho_cuda_call& c,
                    const SumColumnsConfig& config, const lora_ortho_matrix& grad, float* partial) {
    SumColumnsArguments<T> a = sum_columns_arguments(problem.layout, packed, kBRows, config);
    a.x = view_of(&grad);
    a.rows = c.tokens;
    a.cols = problem.layout.d_out;
    a.draw = problem.draw;
    a.place = place_of(c);
    a.partial = partial;
    const bool wide =
        is_wide(a.x, a.cols) && (a.draw == Draw::kNone || a.place.col_offset % 8 == 0);
    return launch(wide ? grad_s_kernel<T, true> : grad_s_kernel<T, false>, config.blocks(),
                  kSumColumnsThreads, config.shared_bytes, c.cuda_stream, a);
}

// ---- sums over ranks: expand, grad_x

ExpandArguments<T> expand_arguments(const Layout& l, const void* packed, Section factors,
                                    const ExpandConfig& config) {
    ExpandArguments<T> a{};
    a.adapters = l.at<Adapter>(kAdapters, packed);
    a.factors = l.at<T>(factors, packed);
    a.adapter_count = l.adapters;
    a.steps = static_cast<std::int32_t>(l.steps);
    a.splits = 1;
    a.rank_sum = l.rank_sum;
    a.row_warps = config.row_warps;
    a.stage_groups = config.stage_groups;
    a.row_blocks = static_cast<std::uint32_t>(config.row_blocks);
    a.block_groups = config.block_groups;
    return a;
}

Status launch_expand(const ExpandConfig& config, ExpandArguments<T> a, void* stream) {
    a.wide_s = is_aligned(a.s, 4 * sizeof(T));
    void (*kernel)(const ExpandArguments<T>) =
        a.draw == Draw::kShared
            ? config.staged ? expand_kernel<T, true, true> : expand_kernel<T, true, false>
        : config.staged ? expand_kernel<T, false, true>
                        : expand_kernel<T, false, false>;
    return launch(kernel, config.blocks(), kExpandThreads, config.shared_bytes, stream, a);
}

// The output from s, or from the parts of s, which it then writes.
Status expand(const Problem& problem, const void* packed, const lora_ortho_cuda_call& c,
              const ExpandConfig& config, const lora_ortho_matrix* base, const float* partial,
              std::int32_t splits, T* s, T* y) {
    ExpandArguments<T> a = expand_arguments(problem.layout, packed, kBColumns, config);
    a.draw = problem.draw;
    a.gains = c.gains;
    a.s = s;
    a.partial = partial;
    a.splits = splits;
    a.rows = c.tokens;
    a.cols = problem.layout.d_out;
    a.base = view_of(base);
    a.y = y;
    a.place = place_of(c);
    return launch_expand(config, a, c.cuda_stream);
}

// grad_s A.
Status grad_x(const Problem& problem, const void* packed, const lora_ortho_cuda_call& c, T* grad_s,
              void* to) {
    const Layout& l = problem.layout;
    const bool wide = l.d_in % 8 == 0 && is_aligned(to, 16);
    const ExpandConfig config =
        expand_config<T>(l, c.tokens, l.d_in, problem.device.multiprocessors, wide);
    ExpandArguments<T> a = expand_arguments(l, packed, kAColumns, config);
    a.draw = Draw::kNone;
    a.s = grad_s;
    a.rows = c.tokens;
    a.cols = l.d_in;
    a.y = static_cast<T*>(to);
    return launch_expand(config, a, c.cuda_stream);
}

// ---- sums over rows: grad_B, grad_A

SumRowsArguments<T> sum_rows_arguments(const Layout& l, const void* packed, std::int64_t rows,
                                       const SumRowsConfig& config) {
    SumRowsArguments<T> a{};
    a.adapters = l.at<Adapter>(kAdapters, packed);
    a.tiles = l.at<Tile>(kTiles, packed);
    a.rows = rows;
    a.rank_sum = l.rank_sum;
    a.tile_count = l.tiles;
    a.col_blocks = static_cast<std::uint32_t>(config.col_blocks);
    a.panels = static_cast<std::uint32_t>(config.panels);
    a.splits = config.splits;
    return a;
}

// `parts` has room for all splits; not used where there is one.
Status launch_sum_rows(const SumRowsConfig& config, SumRowsArguments<T> a, float* parts,
                       void* stream) {
    a.partial = config.splits > 1 ? parts : nullptr;
    a.wide = is_wide(a.x, a.cols);
    LORA_ORTHO_CHECK(launch(grad_factor_kernel<T>, config.blocks(), kSumRowsThreads,
                            SumRowsShared<T>::kBytes, stream, a));
    if (config.splits == 1) return LORA_ORTHO_OK;
    const SumPartsArguments sum = {parts, a.rank_sum * a.cols, config.splits, a.target};
    return launch(sum_parts_kernel<T>, loop_blocks(sum.size, kSumPartsThreads), kSumPartsThreads, 0,
                  stream, sum);
}

// gain (mask (.) grad)^T s.
Status grad_B(const Problem& problem, const void* packed, const lora_ortho_cuda_call& c,
              const SumRowsConfig& config, const lora_ortho_matrix& grad, const T* s,
              const Gradients& out, float* parts) {
    SumRowsArguments<T> a = sum_rows_arguments(problem.layout, packed, c.tokens, config);
    a.x = view_of(&grad);
    a.cols = problem.layout.d_out;
    a.s = s;
    a.gains = c.gains;
    a.draw = problem.draw;
    a.place = place_of(c);
    a.target = {out.grad_B, out.factor_dtype, 1};
    return launch_sum_rows(config, a, parts, c.cuda_stream);
}

// grad_s^T x.
Status grad_A(const Problem& problem, const void* packed, const lora_ortho_cuda_call& c,
              const SumRowsConfig& config, const lora_ortho_matrix& x, const T* grad_s,
              const Gradients& out, float* parts) {
    SumRowsArguments<T> a = sum_rows_arguments(problem.layout, packed, c.tokens, config);
    a.x = view_of(&x);
    a.cols = problem.layout.d_in;
    a.s = grad_s;
    a.draw = Draw::kNone;
    a.target = {out.grad_A, out.factor_dtype, 0};
    return launch_sum_rows(config, a, parts, c.cuda_stream);
}

// ---- forward: shrink, expand

std::size_t forward_bytes(const Problem& problem, std::int64_t tokens) {
    const Layout& l = problem.layout;
    const SumColumnsConfig config =
        sum_columns_config<T>(l, tokens, l.d_in, problem.device.multiprocessors, true);
    if (config.splits == 1) return 0;
    return sizeof(float) * static_cast<std::size_t>(config.splits * tokens * l.rank_sum);
}

Status forward(const Problem& problem, const void* packed, const lora_ortho_cuda_call& c,
               const lora_ortho_matrix& x, const lora_ortho_matrix* base, void* y, void* s,
               void* workspace) {
    const Layout& l = problem.layout;
    const std::int64_t sms = problem.device.multiprocessors;
    const bool wide = l.d_out % 8 == 0 && is_aligned(y, 16) && c.col_offset % 8 == 0 &&
                      (!base || is_wide(view_of(base), l.d_out));
    const ExpandConfig expand_by = expand_config<T>(l, c.tokens, l.d_out, sms, wide);
    const SumColumnsConfig shrink_by =
        sum_columns_config<T>(l, c.tokens, l.d_in, sms, expand_by.staged);
    float* partial = shrink_by.splits > 1 ? static_cast<float*>(workspace) : nullptr;
    LORA_ORTHO_CHECK(shrink(l, packed, c, shrink_by, x, partial, static_cast<T*>(s)));
    return expand(problem, packed, c, expand_by, base, partial, shrink_by.splits,
                  static_cast<T*>(s), static_cast<T*>(y));
}

// ---- backward: grad_B; grad_s in parts, their sum and grad_gains; then grad_x, grad_A

// How the sums are split, and the byte offsets of the parts of the workspace.
struct BackwardPlan {
    SumColumnsConfig grad_s_by;
    SumRowsConfig grad_B_by, grad_A_by;
    std::int64_t grad_gains_blocks;
    std::size_t grad_s_parts, grad_s, grad_gains_parts, factor_parts, bytes;

    BackwardPlan(const Layout& l, std::int64_t tokens, std::int64_t sms) {
        grad_s_by = sum_columns_config<T>(l, tokens, l.d_out, sms, true);
        grad_B_by = sum_rows_config<T>(l, tokens, l.d_out, sms);
        grad_A_by = sum_rows_config<T>(l, tokens, l.d_in, sms);
        grad_gains_blocks = ceil_div(tokens, kSumPartsRows);
        const std::int64_t s = tokens * l.rank_sum, gains = grad_gains_blocks * l.adapters;
        const std::int64_t B = grad_B_by.splits > 1 ? grad_B_by.splits * l.d_out * l.rank_sum : 0;
        const std::int64_t A = grad_A_by.splits > 1 ? grad_A_by.splits * l.d_in * l.rank_sum : 0;
        const auto after = [](std::size_t begin, std::int64_t elements, std::size_t size) {
            return begin + align_up(static_cast<std::size_t>(elements) * size);
        };
        grad_s_parts = 0;
        grad_s = after(grad_s_parts, grad_s_by.splits * s, sizeof(float));
        grad_gains_parts = after(grad_s, s, sizeof(T));
        factor_parts = after(grad_gains_parts, gains, sizeof(double));
        bytes = after(factor_parts, std::max(A, B), sizeof(float));
    }
};

std::size_t backward_bytes(const Problem& problem, std::int64_t tokens) {
    return BackwardPlan(problem.layout, tokens, problem.device.multiprocessors).bytes;
}

// grad_s and grad_gains from the parts of grad_s; null where not wanted.
Status grad_s_grad_gains(const Problem& problem, const void* packed, const lora_ortho_cuda_call& c,
                         const BackwardPlan& plan, const float* grad_s_parts, const T* s, T* grad_s,
                         double* grad_gains_parts, float* grad_gains) {
    const Layout& l = problem.layout;
    GradSGradGainsArguments<T> a{};
    a.adapters = l.at<Adapter>(kAdapters, packed);
    a.adapter_count = l.adapters;
    a.splits = plan.grad_s_by.splits;
    a.partial = grad_s_parts;
    a.s = s;
    a.gains = c.gains;
    a.rows = c.tokens;
    a.rank_sum = l.rank_sum;
    a.grad_s = grad_s;
    a.grad_gains = grad_gains ? grad_gains_parts : nullptr;
    LORA_ORTHO_CHECK(launch(grad_s_grad_gains_kernel<T>, plan.grad_gains_blocks, kSumPartsThreads,
                            kSumPartsThreads * static_cast<int>(sizeof(double)), c.cuda_stream, a));
    if (!grad_gains) return LORA_ORTHO_OK;
    const GradGainsArguments sum = {grad_gains_parts, plan.grad_gains_blocks, l.adapters,
                                    grad_gains};
    return launch(grad_gains_kernel<T>, 1, kSumPartsThreads, 0, c.cuda_stream, sum);
}

Status backward(const Problem& problem, const void* packed, const lora_ortho_cuda_call& c,
                const lora_ortho_matrix& grad, const lora_ortho_matrix& x, const void* s,
                const Gradients& out, void* workspace) {
    const BackwardPlan plan(problem.layout, c.tokens, problem.device.multiprocessors);
    char* room = static_cast<char*>(workspace);
    const auto* saved = static_cast<const T*>(s);
    auto* parts = reinterpret_cast<float*>(room + plan.factor_parts);
    if (out.grad_B) {
        LORA_ORTHO_CHECK(grad_B(problem, packed, c, plan.grad_B_by, grad, saved, out, parts));
    }
    if (!out.grad_x && !out.grad_A && !out.grad_gains) return LORA_ORTHO_OK;

    auto* grad_s_sums = reinterpret_cast<float*>(room + plan.grad_s_parts);
    auto* grad_s = reinterpret_cast<T*>(room + plan.grad_s);
    LORA_ORTHO_CHECK(grad_s_parts(problem, packed, c, plan.grad_s_by, grad, grad_s_sums));
    LORA_ORTHO_CHECK(grad_s_grad_gains(
        problem, packed, c, plan, grad_s_sums, saved, out.grad_x || out.grad_A ? grad_s : nullptr,
        reinterpret_cast<double*>(room + plan.grad_gains_parts), out.grad_gains));
    if (out.grad_x) LORA_ORTHO_CHECK(grad_x(problem, packed, c, grad_s, out.grad_x));
    if (out.grad_A) {
        LORA_ORTHO_CHECK(grad_A(problem, packed, c, plan.grad_A_by, x, grad_s, out, parts));
    }
    return LORA_ORTHO_OK;
}

constexpr Kernels kKernels = {pack, forward_bytes, forward, backward_bytes, backward};

}  // namespace

#define LORA_ORTHO_JOIN_(a, b) a##b
#define LORA_ORTHO_JOIN(a, b) LORA_ORTHO_JOIN_(a, b)
const Kernels* LORA_ORTHO_JOIN(kernels_, LORA_ORTHO_ELEMENT_NAME)() { return &kKernels; }

}  // namespace lora_ortho::cuda
