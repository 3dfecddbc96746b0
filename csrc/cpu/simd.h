// Vectors of one register of the instruction set this file is compiled for, and the few operations
// on them that the compiler's vector extensions do not express.
//
// Rule for everything included by kernels.cpp: no function here may be shared between translation
// units, or the linker could keep the copy that was compiled for AVX-512. So all of it lives in the
// namespace of its instruction set, and nothing from the C++ library that emits code is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define LORA_ORTHO_INLINE inline __attribute__((always_inline))

template <class T>
struct VecOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
LORA_ORTHO_INLINE Vec<T> load(const T* p) {
    Vec<T> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class T>
LORA_ORTHO_INLINE void store(T* p, Vec<T> v) {
    __builtin_memcpy(p, &v, sizeof v);
}
template <class T>
LORA_ORTHO_INLINE Vec<T> splat(T x) {
    return x - Vec<T>{};
}

// Storage types. Arithmetic happens in float or double only.
struct bfloat16 {
    std::uint16_t bits;
};
struct float16 {
    std::uint16_t bits;
};

template <class IO>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};

LORA_ORTHO_INLINE float bits_to_float(std::uint32_t u) {
    float f;
    __builtin_memcpy(&f, &u, sizeof f);
    return f;
}
LORA_ORTHO_INLINE std::uint32_t float_to_bits(float f) {
    std::uint32_t u;
    __builtin_memcpy(&u, &f, sizeof u);
    return u;
}

LORA_ORTHO_INLINE float to_compute(float x) { return x; }
LORA_ORTHO_INLINE double to_compute(double x) { return x; }
LORA_ORTHO_INLINE float to_compute(bfloat16 x) {
    return bits_to_float(static_cast<std::uint32_t>(x.bits) << 16);
}
LORA_ORTHO_INLINE float to_compute(float16 x) {
#if defined(__F16C__)
    return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
    __fp16 h;
    __builtin_memcpy(&h, &x.bits, sizeof h);
    return static_cast<float>(h);
#else
    const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000u) << 16;
    const std::uint32_t exponent = (x.bits >> 10) & 31u, mantissa = x.bits & 0x3ffu;
    if (exponent == 31u) return bits_to_float(sign | 0x7f800000u | (mantissa << 13));
    if (exponent == 0u) {  // zero and denormals: mantissa * 2^-24 is exact
        const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
        return sign ? -magnitude : magnitude;
    }
    return bits_to_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
#endif
}

// Rounds to nearest, ties to even.
LORA_ORTHO_INLINE void from_compute(float x, float* out) { *out = x; }
LORA_ORTHO_INLINE void from_compute(double x, double* out) { *out = x; }
LORA_ORTHO_INLINE void from_compute(float x, bfloat16* out) {
    const std::uint32_t u = float_to_bits(x);
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    out->bits = static_cast<std::uint16_t>(nan ? (u >> 16) | 0x40u
                                               : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
LORA_ORTHO_INLINE void from_compute(float x, float16* out) {
#if defined(__F16C__)
    out->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    const __fp16 h = static_cast<__fp16>(x);
    __builtin_memcpy(&out->bits, &h, sizeof h);
#else
    const std::uint32_t u = float_to_bits(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    std::uint32_t h;
    if (a > 0x7f800000u) {
        h = 0x7e00u;
    } else if (a >= 0x477ff000u) {  // rounds to 65536 or more: infinity
        h = 0x7c00u;
    } else if (a < 0x38800000u) {  // below 2^-14: adding 0.5 rounds to multiples of 2^-24
        h = float_to_bits(bits_to_float(a) + 0.5f) - 0x3f000000u;
    } else {
        h = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
    }
    out->bits = static_cast<std::uint16_t>(sign | h);
#endif
}

// One vector of compute values from contiguous storage.
LORA_ORTHO_INLINE Vec<float> load_compute(const float* p) { return load(p); }
LORA_ORTHO_INLINE Vec<double> load_compute(const double* p) { return load(p); }
LORA_ORTHO_INLINE Vec<float> load_compute(const bfloat16* p) {
#if defined(__AVX512F__)
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#else
    typedef std::uint16_t half __attribute__((vector_size(kVectorBytes / 2)));
    half h;
    __builtin_memcpy(&h, p, sizeof h);
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(h, Vec<std::uint32_t>) << 16);
#endif
}
LORA_ORTHO_INLINE Vec<float> load_compute(const float16* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> v;
    for (int i = 0; i < kLanes<float>; ++i) v[i] = to_compute(p[i]);
    return v;
#endif
}

LORA_ORTHO_INLINE void store_compute(float* p, Vec<float> v) { store(p, v); }
LORA_ORTHO_INLINE void store_compute(double* p, Vec<double> v) { store(p, v); }
LORA_ORTHO_INLINE void store_compute(bfloat16* p, Vec<float> v) {
    using U = Vec<std::uint32_t>;
    const U u = reinterpret_cast<U>(v);
    const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const U result = (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded;
#if defined(__AVX512F__)
    const __m256i h = _mm512_cvtepi32_epi16((__m512i)result);
#else
    typedef std::uint16_t half __attribute__((vector_size(kVectorBytes / 2)));
    const half h = __builtin_convertvector(result, half);
#endif
    __builtin_memcpy(p, &h, sizeof h);
}
LORA_ORTHO_INLINE void store_compute(float16* p, Vec<float> v) {
#if defined(__AVX512F__)
    const __m256i h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
#elif defined(__F16C__)
    const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), h);
#else
    for (int i = 0; i < kLanes<float>; ++i) from_compute(v[i], p + i);
#endif
}

// Two neighbouring vectors.
template <class IO, class C>
LORA_ORTHO_INLINE void store_compute(IO* p, Vec<C> first, Vec<C> second) {
    store_compute(p, first);
    store_compute(p + kLanes<C>, second);
}
#if defined(__AVX512BF16__)
template <>
LORA_ORTHO_INLINE void store_compute<bfloat16, float>(bfloat16* p, Vec<float> first,
                                                      Vec<float> second) {
    // The instruction flushes denormals; those go the long way.
    constexpr int kDenormal = 0x20;
    if (__builtin_expect(
            _mm512_fpclass_ps_mask(first, kDenormal) | _mm512_fpclass_ps_mask(second, kDenormal),
            0)) {
        store_compute(p, first);
        store_compute(p + kLanes<float>, second);
        return;
    }
    const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
    __builtin_memcpy(p, &both, sizeof both);
}
#endif

// a[first], b[first], a[first + 1], b[first + 1], ...
template <class T, int first>
LORA_ORTHO_INLINE Vec<T> interleave(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
    Vec<T> out;
    for (int i = 0; i < kLanes<T>; ++i) out[i] = i % 2 ? b[first + i / 2] : a[first + i / 2];
    return out;
#else
    Vec<std::conditional_t<sizeof(T) == 4, std::int32_t, std::int64_t>> lanes{};
    for (int i = 0; i < kLanes<T>; ++i) lanes[i] = first + i / 2 + i % 2 * kLanes<T>;
    return __builtin_shuffle(a, b, lanes);
#endif
}

// 64-bit products of the low halves of 64-bit lanes.
LORA_ORTHO_INLINE Vec<std::uint64_t> mul_wide(Vec<std::uint64_t> a, Vec<std::uint64_t> b) {
#if defined(__AVX512F__)
    // The form with a mask of ones: GCC 12 warns about its own header in the form without.
    return reinterpret_cast<Vec<std::uint64_t>>(
        _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
    return reinterpret_cast<Vec<std::uint64_t>>(
        _mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
    return reinterpret_cast<Vec<std::uint64_t>>(
        _mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif defined(__aarch64__)
    return reinterpret_cast<Vec<std::uint64_t>>(vmull_u32(
        vmovn_u64(reinterpret_cast<uint64x2_t>(a)), vmovn_u64(reinterpret_cast<uint64x2_t>(b))));
#else
    return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
