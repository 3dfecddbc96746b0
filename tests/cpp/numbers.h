// The four dtypes as doubles, and reproducible numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

inline std::size_t bytes_of(int dtype) {
    return dtype == LORA_ORTHO_FLOAT64 ? 8 : dtype == LORA_ORTHO_FLOAT32 ? 4 : 2;
}

// The dtype in which gradients of the factors arrive.
inline int accumulator_of(int dtype) {
    return dtype == LORA_ORTHO_FLOAT64 ? LORA_ORTHO_FLOAT64 : LORA_ORTHO_FLOAT32;
}

// Half a unit in the last place of 1.
inline double unit_roundoff(int dtype) {
    switch (dtype) {
        case LORA_ORTHO_FLOAT32: return std::ldexp(1.0, -24);
        case LORA_ORTHO_BFLOAT16: return std::ldexp(1.0, -8);
        case LORA_ORTHO_FLOAT16: return std::ldexp(1.0, -11);
        default: return std::ldexp(1.0, -53);
    }
}

// `value` rounded to nearest even with `digits` binary digits and exponents from `least` on.
inline double round_to(double value, int digits, int least) {
    if (value == 0.0) return value;
    int exponent;
    std::frexp(value, &exponent);
    const int ulp = (exponent - digits > least ? exponent - digits : least);
    return std::ldexp(std::nearbyint(std::ldexp(value, -ulp)), ulp);
}

inline double round_to(double value, int dtype) {
    switch (dtype) {
        case LORA_ORTHO_FLOAT32: return static_cast<float>(value);
        case LORA_ORTHO_BFLOAT16: return round_to(value, 8, -133);
        case LORA_ORTHO_FLOAT16: return round_to(value, 11, -24);
        default: return value;
    }
}

// Stores a value that the dtype represents.
inline void store(void* at, int dtype, double value) {
    const float single = static_cast<float>(value);
    std::uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    std::uint16_t half = 0;
    switch (dtype) {
        case LORA_ORTHO_FLOAT64: std::memcpy(at, &value, 8); return;
        case LORA_ORTHO_FLOAT32: std::memcpy(at, &single, 4); return;
        case LORA_ORTHO_BFLOAT16: half = static_cast<std::uint16_t>(bits >> 16); break;
        default: {
            int exponent;
            const double fraction = std::frexp(std::fabs(value), &exponent);
            if (value == 0.0) {
                half = 0;
            } else if (exponent < -13) {  // subnormal: units of 2^-24
                half = static_cast<std::uint16_t>(std::ldexp(std::fabs(value), 24));
            } else {
                const int mantissa = static_cast<int>(std::ldexp(fraction, 11)) - 1024;
                half = static_cast<std::uint16_t>(((exponent + 14) << 10) | mantissa);
            }
            if (std::signbit(value)) half |= 0x8000;
        }
    }
    std::memcpy(at, &half, 2);
}

inline double load(const void* at, int dtype) {
    double value;
    float single;
    std::uint16_t half;
    switch (dtype) {
        case LORA_ORTHO_FLOAT64: std::memcpy(&value, at, 8); return value;
        case LORA_ORTHO_FLOAT32: std::memcpy(&single, at, 4); return single;
        case LORA_ORTHO_BFLOAT16: {
            std::memcpy(&half, at, 2);
            const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
            std::memcpy(&single, &bits, 4);
            return single;
        }
        default: {
            std::memcpy(&half, at, 2);
            const int exponent = (half >> 10) & 31, mantissa = half & 1023;
            if (exponent == 31) return mantissa ? NAN : (half & 0x8000 ? -INFINITY : INFINITY);
            value =
                exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
            return half & 0x8000 ? -value : value;
        }
    }
}

// Reproducible numbers: Philox in counter order.
class Numbers {
public:
    explicit Numbers(std::uint64_t seed) : seed_(seed) {}
    std::uint32_t bits() {
        lora_ortho_words counter{};
        counter.word[0] = next_++;
        return lora_ortho_philox4x32_7(counter, static_cast<std::uint32_t>(seed_),
                                       static_cast<std::uint32_t>(seed_ >> 32))
            .word[0];
    }
    // In 0 .. n - 1.
    int below(int n) { return static_cast<int>(bits() % static_cast<std::uint32_t>(n)); }
    int between(int low, int high) { return low + below(high - low + 1); }
    // Roughly normal, standard deviation 1.
    double normal() {
        double sum = 0.0;
        for (int i = 0; i < 3; ++i) sum += std::ldexp(bits(), -31) - 1.0;
        return sum;
    }

private:
    std::uint64_t seed_;
    std::uint32_t next_ = 0;
};
