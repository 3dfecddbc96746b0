// The interface between the C functions (api.cpp, which checks every argument) and the CPU kernels
// (one translation unit per instruction set, which assume that all was checked).
#pragma once

#include <cstddef>
#include <cstdint>

#include "lora_ortho/lora_ortho.h"

namespace lora_ortho::cpu {

// Start of a packed buffer. api.cpp fills the first part, Kernels::plan the second.
struct Header {
    static constexpr std::uint64_t kMagic = 0x314b434150414f4cull;  // "LOAPACK1"

    std::uint64_t magic;
    std::int32_t method, dtype, isa, adapters;
    std::int64_t d_in, d_out, rank_sum;  // rank_sum = sum of the unpadded ranks
    // Byte offsets from the start of the buffer to K-element arrays, written by api.cpp.
    std::size_t ranks;       // int64
    std::size_t rank_begin;  // int64, exclusive prefix sums of ranks, K + 1 elements
    std::size_t thresholds;  // uint32; 65536 throughout for DIRECT
    std::size_t arrays_end;  // first free byte after them, a multiple of LORA_ORTHO_ALIGNMENT

    // Filled by Kernels::plan from the part above and the arrays.
    std::int32_t path;             // which kernels serve this problem (Path of launch_config.h)
    std::int64_t padded_rank_sum;  // sum of the ranks as the kernels pad them
    std::size_t section[8];        // offsets of the packed factors (packing.h, amx_packing.h)
    std::size_t bytes;             // of the whole buffer
};

template <class T>
const T* array_at(const void* packed, std::size_t offset) {
    return reinterpret_cast<const T*>(static_cast<const char*>(packed) + offset);
}
template <class T>
T* array_at(void* packed, std::size_t offset) {
    return reinterpret_cast<T*>(static_cast<char*>(packed) + offset);
}

// Header::path: how y is expanded in the low bits, and what runs on tiles of bfloat16.
enum PathBits : std::int32_t {
    kExpandDense = 0,  // all K products of an element, then a selection
    kExpandOwner = 1,  // the product with its owner's factors
    kExpandTiles = 2,  // dense, on tiles
    kExpandMask = 3,
    kTileShrink = 4,  // where there are tokens enough
    kTileBackward = 8,
};

// Where the gradients of the factors go: K blocks (r_j, d_in) and (d_out, r_j). Null: not wanted.
struct FactorGradients {
    void *grad_A, *grad_B;
    std::int32_t dtype;
};

struct Kernels {
    // Fills the second part of the header. `ranks` are those of the factors.
    void (*plan)(Header& header, const std::int64_t* ranks);
    // Writes all sections. The header and api.cpp's arrays are in place.
    void (*pack)(const lora_ortho_factors& factors, void* packed);
    void (*forward)(const void* packed, const lora_ortho_call& call, const lora_ortho_matrix& x,
                    const lora_ortho_matrix* base, void* y, void* s);
    std::size_t (*backward_bytes)(const Header& header, const lora_ortho_call& call);
    void (*backward)(const void* packed, const lora_ortho_call& call, const lora_ortho_matrix& grad,
                     const lora_ortho_matrix& x, const void* s, void* grad_x,
                     const FactorGradients& factors, double* grad_gains, void* workspace);
};

// Null where this build has no kernels for the instruction set. Defined by the translation unit
// that was compiled for it; whether the processor has it is isa.h's business.
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();

}  // namespace lora_ortho::cpu
