// The CPU kernels for one instruction set. Compiled once per set, with LORA_ORTHO_ISA its name.
#include "cpu/kernels.h"

#include "cpu/amx_backward.h"
#include "cpu/amx_packing.h"
#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/packing.h"

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
    place_sections(h, kATiles, {0, 0, 0, 0});
#endif
}

void pack(const lora_ortho_factors& f, void* packed) {
    const CallLayout l(packed);
    const Header& h = l.h;
    std::memset(static_cast<char*>(packed) + h.section[kATiles], 0, h.bytes - h.section[kATiles]);
    run_team(packs_in_team(h) ? team_size(0) : 1, [&](const Team& team) {
        f.dtype == LORA_ORTHO_FLOAT64 ? pack_float<double>(f, l, packed, team)
                                      : pack_float<float>(f, l, packed, team);
#if defined(__AMX_BF16__)
        f.dtype == LORA_ORTHO_BFLOAT16 ? pack_tiles<1>(f, l, packed, team)
                                       : pack_tiles<3>(f, l, packed, team);
#endif
    });
}

void forward(const void* packed, const Call& call, const lora_ortho_matrix& x,
             const lora_ortho_matrix* base, void* y, void* s) {
    const CallLayout l(packed);
#if defined(__AMX_BF16__)
    if ((l.h.path & kExpandMask) == kExpandTiles)
        return forward_tiles<bfloat16>(l, call, x, base, y, s);
#endif
    with_storage(l.h.dtype,
                 [&](auto storage) { forward_float<decltype(storage)>(l, call, x, base, y, s); });
}

std::size_t backward_bytes(const void* packed, const Call& call) {
    const CallLayout l(packed);
#if defined(__AMX_BF16__)
    if (backward_on_tiles(l.h, call.tokens))
        return l.h.dtype == LORA_ORTHO_BFLOAT16 ? TileBackwardSizes<1>(l, call).total()
                                                : TileBackwardSizes<3>(l, call).total();
#endif
    return l.h.dtype == LORA_ORTHO_FLOAT64 ? backward_sizes<double>(l.h, call).total()
                                           : backward_sizes<float>(l.h, call).total();
}

void backward(const void* packed, const Call& call, const lora_ortho_matrix& grad,
              const lora_ortho_matrix& x, const void* s, const Gradients& out, void* workspace) {
    const CallLayout l(packed);
#if defined(__AMX_BF16__)
    if (backward_on_tiles(l.h, call.tokens))
        return l.h.dtype == LORA_ORTHO_BFLOAT16
                   ? backward_tiles<bfloat16>(l, call, grad, x, s, out, workspace)
                   : backward_tiles<float>(l, call, grad, x, s, out, workspace);
#endif
    with_storage(l.h.dtype, [&](auto storage) {
        backward_float<decltype(storage)>(l, call, grad, x, s, out, workspace);
    });
}

constexpr Kernels kTable = {plan, pack, forward, backward_bytes, backward};

}  // namespace
}  // namespace LORA_ORTHO_ISA

const Kernels* LORA_ORTHO_JOIN(kernels_, LORA_ORTHO_ISA)() { return &LORA_ORTHO_ISA::kTable; }

}  // namespace lora_ortho::cpu
