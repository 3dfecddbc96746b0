// The CPU kernels for one instruction set. Compiled once per set, with LORA_ORTHO_ISA its name.
#include "cpu/kernels.h"

#include "cpu/amx_backward.h"
#include "cpu/backward.h"
#include "cpu/forward.h"

#define LORA_ORTHO_JOIN2(a, b) a##b
#define LORA_ORTHO_JOIN(a, b) LORA_ORTHO_JOIN2(a, b)

namespace lora_ortho::cpu {
namespace LORA_ORTHO_ISA {
namespace {

void plan(Header& h, const std::int64_t* ranks) {
    const std::int64_t padded = padded_rank(ranks, h.adapters);
    h.padded_rank_sum = padded * h.adapters;
    h.path = choose_path(h, padded);
    h.bytes = h.arrays_end;
    h.dtype == LORA_ORTHO_FLOAT64 ? plan_float<double>(h) : plan_float<float>(h);
#if defined(__AMX_BF16__)
    h.dtype == LORA_ORTHO_BFLOAT16 ? plan_tiles<1>(h) : plan_tiles<3>(h);
#else
    place_sections(h, 4, {0, 0, 0, 0});
#endif
}

void pack(const lora_ortho_factors& f, void* packed) {
    const Header& h = *static_cast<const Header*>(packed);
    std::memset(static_cast<char*>(packed) + h.section[4], 0, h.bytes - h.section[4]);
    run_team(pack_threads(h), [&](const Team& team) {
        f.dtype == LORA_ORTHO_FLOAT64 ? pack_float<double>(f, packed, team)
                                      : pack_float<float>(f, packed, team);
#if defined(__AMX_BF16__)
        f.dtype == LORA_ORTHO_BFLOAT16 ? pack_tiles<1>(f, packed, team)
                                       : pack_tiles<3>(f, packed, team);
#endif
    });
}

void forward(const void* packed, const lora_ortho_call& call, const lora_ortho_matrix& x,
             const lora_ortho_matrix* base, void* y, void* s) {
    const Header& h = *static_cast<const Header*>(packed);
#if defined(__AMX_BF16__)
    if ((h.path & kExpandMask) == kExpandTiles)
        return forward_tiles<bfloat16>(packed, call, x, base, y, s);
#endif
    with_storage(h.dtype, [&](auto storage) {
        forward_float<decltype(storage)>(packed, call, x, base, y, s);
    });
}

std::size_t backward_bytes(const Header& h, const lora_ortho_call& call) {
#if defined(__AMX_BF16__)
    if (backward_on_tiles(h, call.tokens))
        return h.dtype == LORA_ORTHO_BFLOAT16
                   ? TileBackwardSizes<1>(TileLayout(&h, 1), call).total()
                   : TileBackwardSizes<3>(TileLayout(&h, 3), call).total();
#endif
    return h.dtype == LORA_ORTHO_FLOAT64 ? backward_sizes<double>(h, call).total()
                                         : backward_sizes<float>(h, call).total();
}

void backward(const void* packed, const lora_ortho_call& call, const lora_ortho_matrix& grad,
              const lora_ortho_matrix& x, const void* s, void* grad_x,
              const FactorGradients& factors, double* grad_gains, void* workspace) {
#if defined(__AMX_BF16__)
    const Header& h = *static_cast<const Header*>(packed);
    if (backward_on_tiles(h, call.tokens))
        return h.dtype == LORA_ORTHO_BFLOAT16
                   ? backward_tiles<bfloat16>(packed, call, grad, x, s, grad_x, factors, grad_gains,
                                              workspace)
                   : backward_tiles<float>(packed, call, grad, x, s, grad_x, factors, grad_gains,
                                           workspace);
#endif
    with_storage(static_cast<const Header*>(packed)->dtype, [&](auto storage) {
        backward_float<decltype(storage)>(packed, call, grad, x, s, grad_x, factors, grad_gains,
                                          workspace);
    });
}

constexpr Kernels kTable = {plan, pack, forward, backward_bytes, backward};

}  // namespace
}  // namespace LORA_ORTHO_ISA

const Kernels* LORA_ORTHO_JOIN(kernels_, LORA_ORTHO_ISA)() { return &LORA_ORTHO_ISA::kTable; }

}  // namespace lora_ortho::cpu
