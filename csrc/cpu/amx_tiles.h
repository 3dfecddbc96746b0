// Products of bfloat16 tiles with float32 sums, by AMX. (The same tiles on AVX512_BF16 dot products
// took 1.8 to 4.9 times as long as the float kernels do on that processor.)
//
// A float32 operand is three bfloat16 planes, x = x0 + x1 + x2 exactly (8 bits each, truncated),
// and a product keeps the six terms x_a y_b with a + b <= 2: what is dropped is at most 2^-21 of
// the product and 2^-24.5 in the mean over normal operands, about the rounding of one float32
// operation. Values below 2^-102 lose their last planes to the flush of denormals; a non-finite
// value makes what it touches non-finite.
#pragma once

#include "cpu/simd.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

// Storage types that have tile kernels here.
template <class IO>
constexpr bool kTiled = false;

#if defined(__AMX_BF16__)

template <>
constexpr bool kTiled<float> = true;
template <>
constexpr bool kTiled<bfloat16> = true;

// A tile: 16 rows of 32 bfloat16 (left operand), or 16 pairs of steps by 16 columns (right
// operand).
constexpr int kTile = 16, kTileSteps = 32;
constexpr std::ptrdiff_t kTileBytes = 1024;

template <class IO>
constexpr int kPlanes = 1;
template <>
constexpr int kPlanes<float> = 3;

// Strides in bytes. Left: between rows, blocks of kTileSteps steps, planes.
struct Left {
    const void* data;
    std::ptrdiff_t row, step, plane;
};
// Right: whole tiles of kTileBytes; between tiles of columns, blocks of steps, planes.
struct Right {
    const void* data;
    std::ptrdiff_t column, step, plane;
};

LORA_ORTHO_INLINE const char* bytes_at(const void* p, std::ptrdiff_t offset) {
    return static_cast<const char*>(p) + offset;
}

// Tile registers are named by immediates, hence the assembly.
template <int t>
LORA_ORTHO_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
LORA_ORTHO_INLINE void tile_load(const void* p, std::ptrdiff_t stride) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(stride) : "memory");
}
template <int t>
LORA_ORTHO_INLINE void tile_store(void* p, std::ptrdiff_t stride) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(p), "r"(stride) : "memory");
}
template <int c, int a, int b>
LORA_ORTHO_INLINE void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// Tile state of one thread: all eight tiles 16 rows of 64 bytes.
class TileState {
public:
    TileState() {
        alignas(64) std::uint8_t config[64] = {1};
        for (int t = 0; t < 8; ++t) {
            config[16 + 2 * t] = 64;
            config[48 + t] = 16;
        }
        __asm__ volatile("ldtilecfg %0" ::"m"(config));
    }
    ~TileState() { __asm__ volatile("tilerelease"); }
    TileState(const TileState&) = delete;
    TileState& operator=(const TileState&) = delete;
};

// Registers: sums 0-3, left operands 4-5, right operands 6-7. A right tile serves two blocks of
// rows: what bounds the long products is the second-level cache it comes from.
template <int P, int NA, int NB, int pb, int pa>
LORA_ORTHO_INLINE void step_planes(const char* a, std::ptrdiff_t a_row, std::ptrdiff_t a_plane,
                                   const char* b, const Right& right) {
    if constexpr (pb < P) {
        if constexpr (pa == 0) {
            tile_load<6>(b + pb * right.plane, 64);
            if constexpr (NB == 2) tile_load<7>(b + right.column + pb * right.plane, 64);
        }
        tile_load<4>(a + pa * a_plane, a_row);
        if constexpr (NA == 2) tile_load<5>(a + kTile * a_row + pa * a_plane, a_row);
        tile_dot<0, 4, 6>();
        if constexpr (NB == 2) tile_dot<1, 4, 7>();
        if constexpr (NA == 2) tile_dot<2, 5, 6>();
        if constexpr (NA == 2 && NB == 2) tile_dot<3, 5, 7>();
        if constexpr (pa + pb + 1 < P)
            step_planes<P, NA, NB, pb, pa + 1>(a, a_row, a_plane, b, right);
        else
            step_planes<P, NA, NB, pb + 1, 0>(a, a_row, a_plane, b, right);
    }
}

// c (NA * 16 rows, NB * 16 columns of float32, row pitch c_row bytes) (+)= a b over `steps` blocks.
template <int P, int NA, int NB>
LORA_ORTHO_INLINE void tile_product(const Left& a, const Right& b, std::int64_t steps, float* c,
                                    std::ptrdiff_t c_row, bool add) {
    char* to = reinterpret_cast<char*>(c);
    char* below = to + kTile * c_row;
    if (add) {
        tile_load<0>(to, c_row);
        if constexpr (NB == 2) tile_load<1>(to + 64, c_row);
        if constexpr (NA == 2) tile_load<2>(below, c_row);
        if constexpr (NA == 2 && NB == 2) tile_load<3>(below + 64, c_row);
    } else {
        tile_zero<0>();
        if constexpr (NB == 2) tile_zero<1>();
        if constexpr (NA == 2) tile_zero<2>();
        if constexpr (NA == 2 && NB == 2) tile_zero<3>();
    }
    for (std::int64_t step = 0; step < steps; ++step)
        step_planes<P, NA, NB, 0, 0>(bytes_at(a.data, step * a.step), a.row, a.plane,
                                     bytes_at(b.data, step * b.step), b);
    tile_store<0>(to, c_row);
    if constexpr (NB == 2) tile_store<1>(to + 64, c_row);
    if constexpr (NA == 2) tile_store<2>(below, c_row);
    if constexpr (NA == 2 && NB == 2) tile_store<3>(below + 64, c_row);
}

// Products of `rows` (16 or 32) rows of a with `tiles` tiles of b's columns.
template <int P>
LORA_ORTHO_INLINE void product_rows(const Left& a, const Right& b, std::int64_t steps, int rows,
                                    std::int64_t tiles, float* c, std::int64_t pitch, bool add) {
    for (std::int64_t q = 0; q < tiles; q += 2) {
        const Right at{bytes_at(b.data, q * b.column), b.column, b.step, b.plane};
        float* to = c + q * kTile;
        if (q + 2 <= tiles)
            rows > kTile ? tile_product<P, 2, 2>(a, at, steps, to, 4 * pitch, add)
                         : tile_product<P, 1, 2>(a, at, steps, to, 4 * pitch, add);
        else
            rows > kTile ? tile_product<P, 2, 1>(a, at, steps, to, 4 * pitch, add)
                         : tile_product<P, 1, 1>(a, at, steps, to, 4 * pitch, add);
    }
}

// Two vectors of float32 to 32 bfloat16 in each of P planes: rounded with one plane, exact with
// three.
template <int P>
LORA_ORTHO_INLINE void split(Vec<float> first, Vec<float> second, bfloat16* out,
                             std::ptrdiff_t plane) {
    if constexpr (P == 1) {
        store_compute(out, first);
        store_compute(out + kTile, second);
    } else {
        using U = Vec<std::uint32_t>;
        // High halves of both vectors, in order: words 1, 3, 5, ... of the pair.
        const __m512i odd =
            _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29,
                             27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
#pragma GCC unroll 3
        for (int p = 0; p < P; ++p) {
            _mm512_storeu_si512(out + p * plane,
                                _mm512_permutex2var_epi16((__m512i)first, odd, (__m512i)second));
            first -= (Vec<float>)((U)first & 0xffff0000u);
            second -= (Vec<float>)((U)second & 0xffff0000u);
        }
    }
}

// One value, for packing and for tails.
template <int P>
LORA_ORTHO_INLINE void split_one(float x, bfloat16* out, std::ptrdiff_t plane) {
    if constexpr (P == 1) {
        from_compute(x, out);
    } else {
        for (int p = 0; p < P; ++p) {
            const std::uint32_t high = float_to_bits(x) & 0xffff0000u;
            out[p * plane].bits = static_cast<std::uint16_t>(high >> 16);
            x -= bits_to_float(high);
        }
    }
}

// Where element (step, column) of a right operand of `steps` blocks lies in its plane, in elements.
LORA_ORTHO_INLINE std::int64_t right_index(std::int64_t step, std::int64_t column,
                                           std::int64_t blocks, int planes) {
    const std::int64_t tile = column / kTile * planes * blocks + step / kTileSteps;
    return tile * (kTileBytes / 2) + step % kTileSteps / 2 * 32 + column % kTile * 2 + step % 2;
}

#endif

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
