// The C interface: checks every argument, lays out the packed buffer's header, calls the kernels.
#include <cmath>
#include <cstring>

#include "common/factor_checks.h"
#include "common/guarded.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho::cpu {
namespace {

// ---- packed factors

Status check_factors(const lora_ortho_factors* factors) {
    LORA_ORTHO_CHECK(check_factor_sizes(factors));
    return find_kernels(factors->isa) ? LORA_ORTHO_OK : LORA_ORTHO_UNSUPPORTED_ISA;
}

// Offsets of the arrays behind the header.
void lay_out(Header& header) {
    const std::size_t k = static_cast<std::size_t>(header.adapters);
    header.ranks = align_up(sizeof(Header));
    header.rank_begin = header.ranks + k * sizeof(std::int64_t);
    header.intervals = header.rank_begin + (k + 1) * sizeof(std::int64_t);
    header.arrays_end = align_up(header.intervals + k * sizeof(Interval));
}

// The whole header of checked factors.
Header plan(const lora_ortho_factors& f) {
    Header header{};
    lora_ortho_isa isa = LORA_ORTHO_ISA_AUTO;
    const Kernels* kernels = find_kernels(f.isa, &isa);
    header.magic = Header::kMagic;
    header.draw = draw_of(f);
    header.dtype = f.dtype;
    header.isa = isa;
    header.adapters = f.adapters;
    header.d_in = f.d_in;
    header.d_out = f.d_out;
    for (std::int32_t j = 0; j < f.adapters; ++j) header.rank_sum += f.ranks[j];
    lay_out(header);
    kernels->plan(header, f.ranks);
    return header;
}

void write_header(const lora_ortho_factors& f, const Header& header, void* packed) {
    std::memcpy(packed, &header, sizeof header);
    auto* ranks = array_at<std::int64_t>(packed, header.ranks);
    auto* rank_begin = array_at<std::int64_t>(packed, header.rank_begin);
    auto* intervals = array_at<Interval>(packed, header.intervals);
    rank_begin[0] = 0;
    for (std::int32_t j = 0; j < f.adapters; ++j) {
        ranks[j] = f.ranks[j];
        rank_begin[j + 1] = rank_begin[j] + f.ranks[j];
        intervals[j] = interval_of(f, j);
    }
}

// The header at the start of `packed`, and the kernels that it was packed for.
Status open_packed(const void* packed, std::size_t bytes, const Header*& header,
                   const Kernels*& kernels) {
    LORA_ORTHO_CHECK(check_pointer(packed, LORA_ORTHO_ALIGNMENT));
    if (bytes < sizeof(Header)) return LORA_ORTHO_BUFFER_TOO_SMALL;
    const auto* h = static_cast<const Header*>(packed);
    if (h->magic != Header::kMagic || !is_draw(h->draw) || dtype_bytes(h->dtype) == 0 ||
        h->isa <= LORA_ORTHO_ISA_AUTO || h->isa > LORA_ORTHO_ISA_AMX || !is_adapters(h->adapters) ||
        h->d_in < 1 || h->d_out < 1 || h->rank_sum < h->adapters) {
        return LORA_ORTHO_BAD_PACKED;
    }
    Header expected{};
    expected.adapters = h->adapters;
    lay_out(expected);
    if (h->ranks != expected.ranks || h->rank_begin != expected.rank_begin ||
        h->intervals != expected.intervals || h->arrays_end != expected.arrays_end ||
        h->bytes < h->arrays_end) {
        return LORA_ORTHO_BAD_PACKED;
    }
    if (bytes < h->bytes) return LORA_ORTHO_BUFFER_TOO_SMALL;
    kernels = find_kernels(h->isa);
    if (!kernels) return LORA_ORTHO_UNSUPPORTED_ISA;
    header = h;
    return LORA_ORTHO_OK;
}

// ---- calls

Status check_call(const Header& header, const lora_ortho_call* call) {
    if (!call) return LORA_ORTHO_NULL_POINTER;
    const lora_ortho_call& c = *call;
    if (c.struct_version != LORA_ORTHO_STRUCT_VERSION) return LORA_ORTHO_BAD_VERSION;
    if (c.tokens < 0 || c.threads < 0) return LORA_ORTHO_BAD_SIZE;
    LORA_ORTHO_CHECK(check_coordinates(c, header.d_out));
    if (!fits(c.tokens, header.d_in, sizeof(double)) ||
        !fits(c.tokens, header.d_out, sizeof(double)) ||
        !fits(c.tokens, header.padded_rank_sum, 2 * sizeof(double))) {
        return LORA_ORTHO_BAD_SIZE;
    }
    LORA_ORTHO_CHECK(check_pointer(c.gains, alignof(double)));
    for (std::int32_t j = 0; j < header.adapters; ++j) {
        if (!std::isfinite(c.gains[j])) return LORA_ORTHO_BAD_GAIN;
    }
    return LORA_ORTHO_OK;
}

// What the kernels read of a checked call.
Call as_call(const lora_ortho_call& c) { return {place_of(c), c.gains, c.tokens, c.threads}; }

// Gradients of no tokens at all.
void zero_gradients(const Header& header, const Gradients& out) {
    const std::size_t size =
        dtype_bytes(out.factor_dtype) * static_cast<std::size_t>(header.rank_sum);
    if (out.grad_A) std::memset(out.grad_A, 0, size * static_cast<std::size_t>(header.d_in));
    if (out.grad_B) std::memset(out.grad_B, 0, size * static_cast<std::size_t>(header.d_out));
    for (std::int32_t j = 0; out.grad_gains && j < header.adapters; ++j) out.grad_gains[j] = 0.0;
}

}  // namespace
}  // namespace lora_ortho::cpu

using namespace lora_ortho;
using namespace lora_ortho::cpu;

extern "C" {

lora_ortho_isa lora_ortho_best_isa(void) {
    lora_ortho_isa best = LORA_ORTHO_ISA_AUTO;
    find_kernels(LORA_ORTHO_ISA_AUTO, &best);
    return best;
}

int lora_ortho_has_isa(lora_ortho_isa isa) { return find_kernels(isa) != nullptr; }

const char* lora_ortho_isa_name(lora_ortho_isa isa) {
    switch (isa) {
        case LORA_ORTHO_ISA_AUTO: return "auto";
        case LORA_ORTHO_ISA_BASELINE: return "baseline";
        case LORA_ORTHO_ISA_AVX2: return "avx2";
        case LORA_ORTHO_ISA_AVX512: return "avx512";
        case LORA_ORTHO_ISA_AVX512_BF16: return "avx512_bf16";
        case LORA_ORTHO_ISA_AMX: return "amx";
    }
    return "not a lora_ortho_isa";
}

lora_ortho_status lora_ortho_pack_bytes(const lora_ortho_factors* factors, size_t* bytes) {
    return guarded([&]() -> Status {
        LORA_ORTHO_CHECK(check_factors(factors));
        LORA_ORTHO_CHECK(check_pointer(bytes, alignof(std::size_t)));
        *bytes = plan(*factors).bytes;
        return LORA_ORTHO_OK;
    });
}

lora_ortho_status lora_ortho_pack(const lora_ortho_factors* factors, void* packed, size_t bytes) {
    return guarded([&]() -> Status {
        LORA_ORTHO_CHECK(check_factors(factors));
        LORA_ORTHO_CHECK(check_factor_matrices(*factors));
        LORA_ORTHO_CHECK(check_pointer(packed, LORA_ORTHO_ALIGNMENT));
        const Header header = plan(*factors);
        if (bytes < header.bytes) return LORA_ORTHO_BUFFER_TOO_SMALL;
        write_header(*factors, header, packed);
        find_kernels(header.isa)->pack(*factors, packed);
        return LORA_ORTHO_OK;
    });
}

lora_ortho_status lora_ortho_forward(const void* packed, size_t packed_bytes,
                                     const lora_ortho_call* call, const lora_ortho_matrix* x,
                                     const lora_ortho_matrix* base, void* y, void* s) {
    return guarded([&]() -> Status {
        const Header* header;
        const Kernels* kernels;
        LORA_ORTHO_CHECK(open_packed(packed, packed_bytes, header, kernels));
        LORA_ORTHO_CHECK(check_call(*header, call));
        LORA_ORTHO_CHECK(check_operand(header->dtype, call->tokens, x, header->d_in));
        if (base) LORA_ORTHO_CHECK(check_operand(header->dtype, call->tokens, base, header->d_out));
        if (call->tokens == 0) return LORA_ORTHO_OK;
        LORA_ORTHO_CHECK(check_pointer(y, dtype_bytes(header->dtype)));
        LORA_ORTHO_CHECK(check_pointer(s, dtype_bytes(header->dtype)));
        kernels->forward(packed, as_call(*call), *x, base, y, s);
        return LORA_ORTHO_OK;
    });
}

lora_ortho_status lora_ortho_backward_bytes(const void* packed, size_t packed_bytes,
                                            const lora_ortho_call* call, size_t* bytes) {
    return guarded([&]() -> Status {
        const Header* header;
        const Kernels* kernels;
        LORA_ORTHO_CHECK(open_packed(packed, packed_bytes, header, kernels));
        LORA_ORTHO_CHECK(check_call(*header, call));
        LORA_ORTHO_CHECK(check_pointer(bytes, alignof(std::size_t)));
        *bytes = call->tokens == 0 ? 0 : kernels->backward_bytes(packed, as_call(*call));
        return LORA_ORTHO_OK;
    });
}

lora_ortho_status lora_ortho_backward(const void* packed, size_t packed_bytes,
                                      const lora_ortho_call* call, const lora_ortho_matrix* grad,
                                      const lora_ortho_matrix* x, const void* s, void* grad_x,
                                      void* grad_A, void* grad_B, int32_t factor_dtype,
                                      double* grad_gains, void* workspace, size_t workspace_bytes) {
    return guarded([&]() -> Status {
        const Header* header;
        const Kernels* kernels;
        LORA_ORTHO_CHECK(open_packed(packed, packed_bytes, header, kernels));
        LORA_ORTHO_CHECK(check_call(*header, call));
        LORA_ORTHO_CHECK(check_operand(header->dtype, call->tokens, grad, header->d_out));
        LORA_ORTHO_CHECK(check_operand(header->dtype, call->tokens, x, header->d_in));
        if (dtype_bytes(factor_dtype) == 0) return LORA_ORTHO_BAD_DTYPE;
        const std::size_t size = dtype_bytes(factor_dtype);
        const Gradients out{grad_x, grad_A, grad_B, grad_gains, factor_dtype};
        if (!is_aligned(grad_x, dtype_bytes(header->dtype)) || !is_aligned(grad_A, size) ||
            !is_aligned(grad_B, size) || !is_aligned(grad_gains, alignof(double))) {
            return LORA_ORTHO_MISALIGNED;
        }
        if (call->tokens == 0) {
            zero_gradients(*header, out);
            return LORA_ORTHO_OK;
        }
        LORA_ORTHO_CHECK(check_pointer(s, dtype_bytes(header->dtype)));
        const std::size_t needed = kernels->backward_bytes(packed, as_call(*call));
        if (needed > 0) LORA_ORTHO_CHECK(check_pointer(workspace, LORA_ORTHO_ALIGNMENT));
        if (workspace_bytes < needed) return LORA_ORTHO_BUFFER_TOO_SMALL;
        kernels->backward(packed, as_call(*call), *grad, *x, s, out, workspace);
        return LORA_ORTHO_OK;
    });
}

}  // extern "C"
