// The C interface of the CUDA kernels: checks every argument, then enqueues. No CUDA header here.
#include <algorithm>

#include "common/factor_checks.h"
#include "common/guarded.h"
#include "cuda/kernels.h"

namespace lora_ortho::cuda {
namespace {

constexpr std::int64_t kMaxRankSum = std::int64_t{1} << 31;

// The kernels of a dtype; null for float64.
const Kernels* kernels_of(std::int32_t dtype) {
    switch (dtype) {
        case LORA_ORTHO_FLOAT32: return kernels_float32();
        case LORA_ORTHO_BFLOAT16: return kernels_bfloat16();
        case LORA_ORTHO_FLOAT16: return kernels_float16();
        default: return nullptr;
    }
}

// What every function starts with.
struct Setting {
    Problem problem;
    const Kernels* kernels = nullptr;

    Status open(const lora_ortho_factors* factors) {
        LORA_ORTHO_CHECK(current_device(problem.device));
        LORA_ORTHO_CHECK(check_factor_sizes(factors));
        kernels = kernels_of(factors->dtype);
        if (!kernels) return LORA_ORTHO_BAD_DTYPE;
        problem.layout = Layout(*factors);
        problem.draw = draw_of(*factors);
        // Steps of ranks and groups of columns are counted in 32 bits.
        const bool fits =
            problem.layout.rank_sum <= kMaxRankSum && factors->d_in <= LORA_ORTHO_COL_LIMIT;
        return fits ? LORA_ORTHO_OK : LORA_ORTHO_BAD_SIZE;
    }
    Status open(const lora_ortho_factors* factors, const lora_ortho_cuda_call* call) {
        LORA_ORTHO_CHECK(open(factors));
        if (!call) return LORA_ORTHO_NULL_POINTER;
        if (call->struct_version != LORA_ORTHO_STRUCT_VERSION) return LORA_ORTHO_BAD_VERSION;
        if (call->tokens < 0) return LORA_ORTHO_BAD_SIZE;
        LORA_ORTHO_CHECK(check_coordinates(*call, factors->d_out));
        // Partial sums of s and of gradients, at most kMaxSplits = 64 of each.
        const std::int64_t most = std::max(call->tokens, std::max(factors->d_in, factors->d_out));
        if (!fits(call->tokens, factors->d_in, sizeof(double)) ||
            !fits(call->tokens, factors->d_out, sizeof(double)) ||
            !fits(most, problem.layout.rank_sum, 128 * sizeof(double))) {
            return LORA_ORTHO_BAD_SIZE;
        }
        if (!is_aligned(call->seed_pointer, alignof(std::uint64_t))) return LORA_ORTHO_MISALIGNED;
        return check_pointer(call->gains, alignof(float));
    }
    Status check_packed(const void* packed, std::size_t bytes) const {
        LORA_ORTHO_CHECK(check_pointer(packed, LORA_ORTHO_ALIGNMENT));
        return bytes < problem.layout.bytes() ? LORA_ORTHO_BUFFER_TOO_SMALL : LORA_ORTHO_OK;
    }
};

Status check_workspace(const void* workspace, std::size_t bytes, std::size_t needed) {
    if (needed == 0) return LORA_ORTHO_OK;
    LORA_ORTHO_CHECK(check_pointer(workspace, LORA_ORTHO_ALIGNMENT));
    return bytes < needed ? LORA_ORTHO_BUFFER_TOO_SMALL : LORA_ORTHO_OK;
}

}  // namespace
}  // namespace lora_ortho::cuda

using namespace lora_ortho;
using namespace lora_ortho::cuda;

extern "C" {

lora_ortho_status lora_ortho_cuda_available(void) {
    return guarded([]() -> Status {
        Device device;
        return current_device(device);
    });
}

lora_ortho_status lora_ortho_cuda_pack_bytes(const lora_ortho_factors* factors, size_t* bytes) {
    return guarded([&]() -> Status {
        Setting setting;
        LORA_ORTHO_CHECK(setting.open(factors));
        LORA_ORTHO_CHECK(check_pointer(bytes, alignof(std::size_t)));
        *bytes = setting.problem.layout.bytes();
        return LORA_ORTHO_OK;
    });
}

lora_ortho_status lora_ortho_cuda_pack(const lora_ortho_factors* factors, void* packed,
                                       size_t bytes, void* cuda_stream) {
    return guarded([&]() -> Status {
        Setting setting;
        LORA_ORTHO_CHECK(setting.open(factors));
        LORA_ORTHO_CHECK(check_factor_matrices(*factors));
        LORA_ORTHO_CHECK(setting.check_packed(packed, bytes));
        return setting.kernels->pack(setting.problem, *factors, packed, cuda_stream);
    });
}

lora_ortho_status lora_ortho_cuda_forward_bytes(const lora_ortho_factors* factors,
                                                const lora_ortho_cuda_call* call, size_t* bytes) {
    return guarded([&]() -> Status {
        Setting setting;
        LORA_ORTHO_CHECK(setting.open(factors, call));
        LORA_ORTHO_CHECK(check_pointer(bytes, alignof(std::size_t)));
        *bytes =
            call->tokens == 0 ? 0 : setting.kernels->forward_bytes(setting.problem, call->tokens);
        return LORA_ORTHO_OK;
    });
}

lora_ortho_status lora_ortho_cuda_forward(const lora_ortho_factors* factors, const void* packed,
                                          size_t packed_bytes, const lora_ortho_cuda_call* call,
                                          const lora_ortho_matrix* x, const lora_ortho_matrix* base,
                                          void* y, void* s, void* workspace,
                                          size_t workspace_bytes) {
    return guarded([&]() -> Status {
        Setting setting;
        LORA_ORTHO_CHECK(setting.open(factors, call));
        const lora_ortho_factors& f = *factors;
        LORA_ORTHO_CHECK(setting.check_packed(packed, packed_bytes));
        LORA_ORTHO_CHECK(check_operand(f.dtype, call->tokens, x, f.d_in));
        if (base) LORA_ORTHO_CHECK(check_operand(f.dtype, call->tokens, base, f.d_out));
        if (call->tokens == 0) return LORA_ORTHO_OK;
        LORA_ORTHO_CHECK(check_pointer(y, dtype_bytes(f.dtype)));
        LORA_ORTHO_CHECK(check_pointer(s, dtype_bytes(f.dtype)));
        LORA_ORTHO_CHECK(
            check_workspace(workspace, workspace_bytes,
                            setting.kernels->forward_bytes(setting.problem, call->tokens)));
        return setting.kernels->forward(setting.problem, packed, *call, *x, base, y, s, workspace);
    });
}

lora_ortho_status lora_ortho_cuda_backward_bytes(const lora_ortho_factors* factors,
                                                 const lora_ortho_cuda_call* call, size_t* bytes) {
    return guarded([&]() -> Status {
        Setting setting;
        LORA_ORTHO_CHECK(setting.open(factors, call));
        LORA_ORTHO_CHECK(check_pointer(bytes, alignof(std::size_t)));
        *bytes = setting.kernels->backward_bytes(setting.problem, call->tokens);
        return LORA_ORTHO_OK;
    });
}

lora_ortho_status lora_ortho_cuda_backward(const lora_ortho_factors* factors, const void* packed,
                                           size_t packed_bytes, const lora_ortho_cuda_call* call,
                                           const lora_ortho_matrix* grad,
                                           const lora_ortho_matrix* x, const void* s, void* grad_x,
                                           void* grad_A, void* grad_B, int32_t factor_dtype,
                                           float* grad_gains, void* workspace,
                                           size_t workspace_bytes) {
    return guarded([&]() -> Status {
        Setting setting;
        LORA_ORTHO_CHECK(setting.open(factors, call));
        const lora_ortho_factors& f = *factors;
        LORA_ORTHO_CHECK(setting.check_packed(packed, packed_bytes));
        LORA_ORTHO_CHECK(check_operand(f.dtype, call->tokens, grad, f.d_out));
        LORA_ORTHO_CHECK(check_operand(f.dtype, call->tokens, x, f.d_in));
        const std::size_t size = dtype_bytes(factor_dtype);
        if (size == 0) return LORA_ORTHO_BAD_DTYPE;
        if (!is_aligned(grad_x, dtype_bytes(f.dtype)) || !is_aligned(grad_A, size) ||
            !is_aligned(grad_B, size) || !is_aligned(grad_gains, alignof(float))) {
            return LORA_ORTHO_MISALIGNED;
        }
        if (call->tokens > 0) LORA_ORTHO_CHECK(check_pointer(s, dtype_bytes(f.dtype)));
        LORA_ORTHO_CHECK(
            check_workspace(workspace, workspace_bytes,
                            setting.kernels->backward_bytes(setting.problem, call->tokens)));
        return setting.kernels->backward(setting.problem, packed, *call, *grad, *x, s,
                                         {grad_x, grad_A, grad_B, grad_gains, factor_dtype},
                                         workspace);
    });
}

}  // extern "C"
