// The interface between the C functions (api.cpp, which checks every argument) and the CPU kernels
// (one translation unit per instruction set, which assume that all was checked).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/draw.h"
#include "common/place.h"
#include "lora_ortho/lora_ortho.h"

namespace lora_ortho::cpu {

// The packed factors, each where the path needs it: layout.h and amx_layout.h say in which order.
enum Section {
    kAPanels,
    kBPanels,
    kBRows,
    kAColumns,
    kATiles,
    kBTiles,
    kBTransposedTiles,
    kATransposedTiles,
    kSections
};

// Start of a packed buffer. api.cpp fills the first part, Kernels::plan the second.
struct Header {
    static constexpr std::uint64_t kMagic = 0x324b434150414f4cull;  // "LOAPACK2"

    std::uint64_t magic;
    Draw draw;
    std::int32_t dtype, isa, adapters;
    std::int64_t d_in, d_out, rank_sum;  // rank_sum = sum of the unpadded ranks
    // Byte offsets from the start of the buffer to K-element arrays, written by api.cpp.
    std::size_t ranks;       // int64
    std::size_t rank_begin;  // int64, exclusive prefix sums of ranks, K + 1 elements
    std::size_t intervals;   // Interval: which draws are each adapter's
    std::size_t arrays_end;  // first free byte after them, a multiple of LORA_ORTHO_ALIGNMENT

    // Filled by Kernels::plan from the part above and the arrays.
    std::int32_t path;               // which kernels serve this problem, PathBits
    std::int64_t padded_rank_sum;    // sum of the ranks as the kernels pad them
    std::size_t section[kSections];  // offsets
    std::size_t bytes;               // of the whole buffer
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

// A lora_ortho_call that was checked.
struct Call {
    Place place;
    const double* gains;
    std::int64_t tokens;
    int threads;  // 0: as OpenMP decides
};

// Where gradients go; null where not wanted. Those of the factors, in factor_dtype: K blocks
// (r_j, d_in) and (d_out, r_j).
struct Gradients {
    void *grad_x, *grad_A, *grad_B;
    double* grad_gains;
    std::int32_t factor_dtype;
};

struct Kernels {
    // Fills the second part of the header. `ranks` are those of the factors.
    void (*plan)(Header& header, const std::int64_t* ranks);
    // Writes all sections. The header and api.cpp's arrays are in place.
    void (*pack)(const lora_ortho_factors& factors, void* packed);
    void (*forward)(const void* packed, const Call& call, const lora_ortho_matrix& x,
                    const lora_ortho_matrix* base, void* y, void* s);
    std::size_t (*backward_bytes)(const void* packed, const Call& call);
    void (*backward)(const void* packed, const Call& call, const lora_ortho_matrix& grad,
                     const lora_ortho_matrix& x, const void* s, const Gradients& out,
                     void* workspace);
};

// Null where this build has no kernels for the instruction set. Defined by the translation unit
// that was compiled for it; whether the processor has it is isa.h's business.
const Kernels* kernels_baseline();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();

}  // namespace lora_ortho::cpu
