// The CPU kernels for one instruction set. Compiled once per set, with LORA_ORTHO_ISA its name.
#include "cpu/kernels.h"

#include "cpu/backward.h"
#include "cpu/forward.h"

#define LORA_ORTHO_JOIN2(a, b) a##b
#define LORA_ORTHO_JOIN(a, b) LORA_ORTHO_JOIN2(a, b)

namespace lora_ortho::cpu {
namespace LORA_ORTHO_ISA {
namespace {

void plan(Header& h, const std::int64_t* ranks) {
    h.dtype == LORA_ORTHO_FLOAT64 ? plan_float<double>(h, ranks) : plan_float<float>(h, ranks);
}

void pack(const lora_ortho_factors& f, void* packed) {
    f.dtype == LORA_ORTHO_FLOAT64 ? pack_float<double>(f, packed) : pack_float<float>(f, packed);
}

// Calls body with a value of the storage type of the factors.
template <class Body>
void with_storage(std::int32_t dtype, Body body) {
    switch (dtype) {
        case LORA_ORTHO_FLOAT32: return body(float{});
        case LORA_ORTHO_BFLOAT16: return body(bfloat16{});
        case LORA_ORTHO_FLOAT16: return body(float16{});
        default: return body(double{});
    }
}

void forward(const void* packed, const lora_ortho_call& call, const lora_ortho_matrix& x,
             const lora_ortho_matrix* base, void* y, void* s) {
    with_storage(static_cast<const Header*>(packed)->dtype, [&](auto storage) {
        forward_float<decltype(storage)>(packed, call, x, base, y, s);
    });
}

std::size_t backward_bytes(const Header& h, const lora_ortho_call& call) {
    return backward_float_bytes(h, call);
}

void backward(const void* packed, const lora_ortho_call& call, const lora_ortho_matrix& grad,
              const lora_ortho_matrix& x, const void* s, void* dx, void* dA, void* dB,
              double* dgains, void* workspace) {
    with_storage(static_cast<const Header*>(packed)->dtype, [&](auto storage) {
        backward_float<decltype(storage)>(packed, call, grad, x, s, dx, dA, dB, dgains, workspace);
    });
}

constexpr Kernels kTable = {plan, pack, forward, backward_bytes, backward};

}  // namespace
}  // namespace LORA_ORTHO_ISA

const Kernels* LORA_ORTHO_JOIN(kernels_, LORA_ORTHO_ISA)() { return &LORA_ORTHO_ISA::kTable; }

}  // namespace lora_ortho::cpu
