// CUDA kernels that only note how they were called, and valid arguments of every C function of
// cuda.h: a test changes one of them and looks at the status.
#pragma once

#include <cstdint>
#include <limits>
#include <new>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "cuda/kernels.h"
#include "lora_ortho/cuda.h"
#include "no_cpu_kernels.h"

namespace {

enum class Throw { kNothing, kBadAlloc, kOther };

constexpr std::size_t kWorkspace = 256;
struct Fake {
    Throw what = Throw::kNothing;
    lora_ortho_status device = LORA_ORTHO_OK, launch = LORA_ORTHO_OK;
    int calls = 0;
} fake;

lora_ortho_status act() {
    if (fake.what == Throw::kBadAlloc) throw std::bad_alloc();
    if (fake.what == Throw::kOther) throw std::runtime_error("a fault");
    ++fake.calls;
    return fake.launch;
}

}  // namespace

namespace lora_ortho::cuda {

constexpr Kernels kFake = {
    [](const Problem&, const lora_ortho_factors&, void*, void*) { return act(); },
    [](const Problem&, std::int64_t) { return kWorkspace; },
    [](const Problem&, const void*, const lora_ortho_cuda_call&, const lora_ortho_matrix&,
       const lora_ortho_matrix*, void*, void*, void*) { return act(); },
    [](const Problem&, std::int64_t) { return kWorkspace; },
    [](const Problem&, const void*, const lora_ortho_cuda_call&, const lora_ortho_matrix&,
       const lora_ortho_matrix&, const void*, const Gradients&, void*) { return act(); },
};

Status current_device(Device& device) {
    device.multiprocessors = 100;
    return fake.device;
}
const Kernels* kernels_float32() { return &kFake; }
const Kernels* kernels_bfloat16() { return &kFake; }
const Kernels* kernels_float16() { return &kFake; }

}  // namespace lora_ortho::cuda

namespace {

constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

// Nothing behind these pointers is read or written: the kernels are fakes.
struct Arguments {
    std::int64_t ranks[256];
    std::uint32_t thresholds[256];
    alignas(64) unsigned char memory[64] = {};
    lora_ortho_matrix A[256], B[256];
    lora_ortho_factors factors;
    lora_ortho_cuda_call call{};
    lora_ortho_matrix x, base, grad;
    void *packed = memory, *workspace = memory;
    void *y = memory, *s = memory, *grad_x = memory, *grad_A = memory, *grad_B = memory;
    float* grad_gains = reinterpret_cast<float*>(memory);
    std::int32_t factor_dtype = LORA_ORTHO_FLOAT32;
    std::size_t packed_bytes = std::numeric_limits<std::size_t>::max(),
                workspace_bytes = kWorkspace;
    std::size_t bytes = 12345;
    std::size_t* bytes_out = &bytes;
    const lora_ortho_factors* factors_in = &factors;
    const lora_ortho_cuda_call* call_in = &call;
    const lora_ortho_matrix *x_in = &x, *base_in = &base, *grad_in = &grad;

    Arguments() {
        fake = {};
        for (int j = 0; j < 256; ++j) {
            ranks[j] = 2 + j % 3;
            thresholds[j] = 200u * (static_cast<std::uint32_t>(j) + 1);
            A[j] = B[j] = {memory, 4, 1, LORA_ORTHO_FLOAT32};
        }
        factors = {LORA_ORTHO_STRUCT_VERSION,
                   LORA_ORTHO_ORTHOGONAL,
                   LORA_ORTHO_FLOAT32,
                   0,
                   2,
                   4,
                   6,
                   ranks,
                   thresholds,
                   A,
                   B};
        call.struct_version = LORA_ORTHO_STRUCT_VERSION;
        call.strata = 1;
        call.tokens = 3;
        call.gains = reinterpret_cast<const float*>(memory);
        x = base = grad = {memory, 4, 1, LORA_ORTHO_FLOAT32};
    }
    Arguments(const Arguments&) = delete;

    lora_ortho_status pack_bytes() { return lora_ortho_cuda_pack_bytes(factors_in, bytes_out); }
    lora_ortho_status pack() {
        return lora_ortho_cuda_pack(factors_in, packed, packed_bytes, nullptr);
    }
    lora_ortho_status forward_bytes() {
        return lora_ortho_cuda_forward_bytes(factors_in, call_in, bytes_out);
    }
    lora_ortho_status forward() {
        return lora_ortho_cuda_forward(factors_in, packed, packed_bytes, call_in, x_in, base_in, y,
                                       s, workspace, workspace_bytes);
    }
    lora_ortho_status backward_bytes() {
        return lora_ortho_cuda_backward_bytes(factors_in, call_in, bytes_out);
    }
    lora_ortho_status backward() {
        return lora_ortho_cuda_backward(factors_in, packed, packed_bytes, call_in, grad_in, x_in, s,
                                        grad_x, grad_A, grad_B, factor_dtype, grad_gains, workspace,
                                        workspace_bytes);
    }
};

using Function = lora_ortho_status (Arguments::*)();
constexpr Function kFunctions[] = {&Arguments::pack_bytes,     &Arguments::pack,
                                   &Arguments::forward_bytes,  &Arguments::forward,
                                   &Arguments::backward_bytes, &Arguments::backward};

template <class T>
T* shifted(T* pointer, int bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(pointer) +
                                static_cast<std::uintptr_t>(bytes));
}

}  // namespace
