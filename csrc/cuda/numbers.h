// The element types, and the operands of the matrix instruction in terms of "four neighbouring
// elements along k": thread (g, t) = (lane / 4, lane % 4) of a warp holds k = 4t .. 4t + 3 of rows
// g and g + 8 of the left operand (16 x 16) and of column g of the right one (16 x 8). Both
// operands permute k alike, so the product is what it should be.
#pragma once

#include "cuda/device.h"

namespace lora_ortho::cuda {

struct BFloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};
using Float32 = float;

LORA_ORTHO_DEVICE float to_float(BFloat16 x) {
    return as_float(static_cast<std::uint32_t>(x.bits) << 16);
}
LORA_ORTHO_DEVICE float to_float(Float16 x) { return unpack_float16(x.bits); }
LORA_ORTHO_DEVICE float to_float(float x) { return x; }

// One word of elements: two of 16 bits or one of 32.
template <class T>
struct Word;
template <>
struct Word<BFloat16> {
    static constexpr int kElements = 2;
    LORA_ORTHO_DEVICE static float element(std::uint32_t word, int i) {
        return as_float(i == 0 ? word << 16 : word & 0xffff0000u);
    }
    LORA_ORTHO_DEVICE static std::uint32_t make(const float* values) {
        return pack_bfloat16(values[0], values[1]);
    }
    // `word` with elements zeroed where not kept.
    LORA_ORTHO_DEVICE static std::uint32_t masked(std::uint32_t word, const bool* keep) {
        return word & ((keep[0] ? 0xffffu : 0u) | (keep[1] ? 0xffff0000u : 0u));
    }
};
template <>
struct Word<Float16> {
    static constexpr int kElements = 2;
    LORA_ORTHO_DEVICE static float element(std::uint32_t word, int i) {
        return unpack_float16(static_cast<std::uint16_t>(i == 0 ? word : word >> 16));
    }
    LORA_ORTHO_DEVICE static std::uint32_t make(const float* values) {
        return pack_float16(values[0], values[1]);
    }
    LORA_ORTHO_DEVICE static std::uint32_t masked(std::uint32_t word, const bool* keep) {
        return Word<BFloat16>::masked(word, keep);
    }
};
template <>
struct Word<float> {
    static constexpr int kElements = 1;
    LORA_ORTHO_DEVICE static float element(std::uint32_t word, int) { return as_float(word); }
    LORA_ORTHO_DEVICE static std::uint32_t make(const float* values) { return as_bits(values[0]); }
    LORA_ORTHO_DEVICE static std::uint32_t masked(std::uint32_t word, const bool* keep) {
        return keep[0] ? word : 0u;
    }
};

LORA_ORTHO_DEVICE std::uint32_t raw_bits(BFloat16 x) { return x.bits; }
LORA_ORTHO_DEVICE std::uint32_t raw_bits(Float16 x) { return x.bits; }
LORA_ORTHO_DEVICE std::uint32_t raw_bits(float x) { return as_bits(x); }

template <class T>
LORA_ORTHO_DEVICE T from_float(float value) {
    if constexpr (sizeof(T) == 4) {
        return value;
    } else {
        const float values[2] = {value, 0.0f};
        return {static_cast<std::uint16_t>(Word<T>::make(values))};
    }
}

// N neighbouring elements (4 or 8) as words.
template <class T, int N>
struct Run {
    static constexpr int kPer = Word<T>::kElements;
    static constexpr int kWords = N / kPer;
    std::uint32_t word[kWords];

    LORA_ORTHO_DEVICE float operator[](int i) const {
        return Word<T>::element(word[i / kPer], i % kPer);
    }
    LORA_ORTHO_DEVICE void set_bits(int i, std::uint32_t bits) {
        if (kPer == 1) {
            word[i] = bits;
        } else if (i % 2 == 0) {
            word[i / kPer] = bits;
        } else {
            word[i / kPer] |= bits << 16;
        }
    }
    LORA_ORTHO_DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = 0;
    }
    LORA_ORTHO_DEVICE void set(const float (&values)[N]) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) word[i] = Word<T>::make(values + i * kPer);
    }
};
template <class T>
using Eight = Run<T, 8>;
template <class T>
using FourOf = Run<T, 4>;

// Eight elements at an address aligned to 16 bytes; zeros where not wanted.
template <class T>
LORA_ORTHO_DEVICE Eight<T> load_eight(const T* from, bool wanted = true) {
    Eight<T> out;
#pragma unroll
    for (int i = 0; i < Eight<T>::kWords / 4; ++i) {
        const Quad quad = load_quad_if(wanted, reinterpret_cast<const Quad*>(from) + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) out.word[4 * i + k] = quad.word[k];
    }
    return out;
}
template <class T>
LORA_ORTHO_DEVICE void store_eight(T* to, const Eight<T>& value, bool wanted) {
#pragma unroll
    for (int i = 0; i < Eight<T>::kWords / 4; ++i) {
        Quad quad;
#pragma unroll
        for (int k = 0; k < 4; ++k) quad.word[k] = value.word[4 * i + k];
        store_quad_if(wanted, reinterpret_cast<Quad*>(to) + i, quad);
    }
}
// Half h (0 or 1) of eight elements.
template <class T>
LORA_ORTHO_DEVICE FourOf<T> half_of(const Eight<T>& eight, int h) {
    FourOf<T> out;
#pragma unroll
    for (int i = 0; i < FourOf<T>::kWords; ++i) out.word[i] = eight.word[h * FourOf<T>::kWords + i];
    return out;
}

// ---- operands: Left 16 x 16, Right 16 x 8, and their product

template <class T>
struct Left {
    std::uint32_t a[4];
    // Rows g and g + 8.
    LORA_ORTHO_DEVICE Left(const FourOf<T>& upper, const FourOf<T>& lower)
        : a{upper.word[0], lower.word[0], upper.word[1], lower.word[1]} {}
};
template <class T>
struct Right {
    std::uint32_t b[2];
    LORA_ORTHO_DEVICE explicit Right(const FourOf<T>& column) : b{column.word[0], column.word[1]} {}
};
LORA_ORTHO_DEVICE Four multiply(const Left<BFloat16>& a, const Right<BFloat16>& b, const Four& c) {
    return mma_bfloat16(a.a, b.b, c);
}
LORA_ORTHO_DEVICE Four multiply(const Left<Float16>& a, const Right<Float16>& b, const Four& c) {
    return mma_float16(a.a, b.b, c);
}

// A float is the sum of two tf32 but for 2^-24 of it; of the four products of two such sums the
// least is left out.
struct Split {
    std::uint32_t high, low;
    LORA_ORTHO_DEVICE void set(std::uint32_t bits) {
        high = round_tf32(as_float(bits));
        low = round_tf32(as_float(bits) - as_float(high));
    }
};
template <>
struct Left<float> {
    Split a[2][4];  // k step of 8, register
    LORA_ORTHO_DEVICE Left(const FourOf<float>& upper, const FourOf<float>& lower) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            a[q][0].set(upper.word[2 * q]);
            a[q][1].set(lower.word[2 * q]);
            a[q][2].set(upper.word[2 * q + 1]);
            a[q][3].set(lower.word[2 * q + 1]);
        }
    }
};
template <>
struct Right<float> {
    Split b[2][2];
    LORA_ORTHO_DEVICE explicit Right(const FourOf<float>& column) {
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            b[q][0].set(column.word[2 * q]);
            b[q][1].set(column.word[2 * q + 1]);
        }
    }
};
// Tensor cores cut sums off: the small products are summed apart, and all is added outside.
LORA_ORTHO_DEVICE Four multiply(const Left<float>& a, const Right<float>& b, const Four& c) {
    Four large = {}, small = {};
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        const std::uint32_t high[4] = {a.a[q][0].high, a.a[q][1].high, a.a[q][2].high,
                                       a.a[q][3].high};
        const std::uint32_t low[4] = {a.a[q][0].low, a.a[q][1].low, a.a[q][2].low, a.a[q][3].low};
        const std::uint32_t b_high[2] = {b.b[q][0].high, b.b[q][1].high};
        const std::uint32_t b_low[2] = {b.b[q][0].low, b.b[q][1].low};
        small = mma_tf32(low, b_high, small);
        small = mma_tf32(high, b_low, small);
        large = mma_tf32(high, b_high, large);
    }
    Four d;
#pragma unroll
    for (int i = 0; i < 4; ++i) d.v[i] = c.v[i] + (large.v[i] + small.v[i]);
    return d;
}

}  // namespace lora_ortho::cuda
