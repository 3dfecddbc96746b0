// Random layers, and the C functions called on them.
#pragma once

#include <cstdint>
#include <iterator>
#include <set>
#include <vector>

#include "check.h"
#include "layer.h"
#include "lora_ortho/lora_ortho.h"

constexpr int kMethods = 3, kDtypes = 4;

inline std::vector<lora_ortho_isa> isas() {
    std::vector<lora_ortho_isa> present;
    for (int i = LORA_ORTHO_ISA_BASELINE; i <= LORA_ORTHO_ISA_AMX; ++i) {
        const auto isa = static_cast<lora_ortho_isa>(i);
        if (lora_ortho_has_isa(isa)) present.push_back(isa);
    }
    return present;
}

template <class T>
T pick(Numbers& numbers, const std::vector<T>& from) {
    return from[static_cast<std::size_t>(numbers.below(static_cast<int>(from.size())))];
}

// ---- making layers

inline std::vector<std::uint32_t> random_thresholds(Numbers& numbers, int method, int adapters) {
    constexpr int kLimit = 65536;
    if (method == LORA_ORTHO_DROPOUT) {
        std::vector<std::uint32_t> any;
        for (int j = 0; j < adapters; ++j) {
            const int edge = numbers.below(8);
            any.push_back(static_cast<std::uint32_t>(edge == 0   ? 1
                                                     : edge == 1 ? kLimit
                                                     : edge == 2 ? kLimit - 1
                                                                 : numbers.between(1, kLimit)));
        }
        return any;
    }
    std::set<std::uint32_t> chosen;
    if (numbers.below(2)) chosen.insert(kLimit);
    if (numbers.below(8) == 0) chosen.insert(1);
    if (static_cast<int>(chosen.size()) > adapters) chosen.erase(chosen.begin());
    while (static_cast<int>(chosen.size()) < adapters) {
        chosen.insert(static_cast<std::uint32_t>(numbers.between(1, kLimit)));
    }
    return {chosen.begin(), chosen.end()};
}

inline Shape random_shape(Numbers& numbers, int method, int dtype) {
    Shape p;
    p.method = method;
    p.dtype = dtype;
    p.factor_dtype = numbers.below(3)   ? dtype
                     : numbers.below(2) ? LORA_ORTHO_FLOAT32
                                        : LORA_ORTHO_FLOAT64;
    p.tokens = pick<std::int64_t>(numbers, {1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 66});
    p.d_in = pick<std::int64_t>(numbers, {1, 2, 3, 8, 15, 16, 17, 32, 33, 64, 65, 100, 131});
    p.d_out = pick<std::int64_t>(
        numbers, {1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 100, 127, 128, 129, 144, 257, 300});
    const int adapters = pick<int>(numbers, {1, 2, 2, 3, 3, 4, 5, 8, 16, 17, 32});
    const bool equal = numbers.below(3) == 0;
    const int most = adapters > 8 ? 9 : 34;
    const int rank = numbers.between(1, most);
    for (int j = 0; j < adapters; ++j) {
        p.ranks.push_back(equal ? rank : numbers.below(3) == 0 ? 1 : numbers.between(1, most));
        p.gains.push_back(pick<double>(numbers, {1.0, -1.0, 2.0, 0.5, 0.0}));
    }
    p.thresholds = random_thresholds(numbers, method, adapters);
    p.call = {};
    p.call.struct_version = LORA_ORTHO_STRUCT_VERSION;
    p.call.stream = numbers.bits();
    p.call.sample = numbers.bits() >> 8;
    p.call.seed = (static_cast<std::uint64_t>(numbers.bits()) << 32) | numbers.bits();
    p.call.tokens = p.tokens;
    const std::int64_t last_row = LORA_ORTHO_ROW_LIMIT - p.tokens;
    const std::int64_t last_col = LORA_ORTHO_COL_LIMIT - p.d_out;
    p.call.row_offset =
        pick<std::int64_t>(numbers, {0, 0, 1, 77, (INT64_C(1) << 31) - 2, last_row});
    p.call.col_offset =
        pick<std::int64_t>(numbers, {0, 0, 1, 5, 8, 1000003, (INT64_C(1) << 32) - 3, last_col});
    constexpr std::uint32_t kStrata[] = {1, 1, 2, 3, 4, 7, 64, 1000, 65535, LORA_ORTHO_MAX_STRATA};
    p.call.strata = kStrata[p.call.seed % std::size(kStrata)];
    return p;
}

inline Lay random_lay(Numbers& numbers) {
    return numbers.below(2) ? Lay::kRows : static_cast<Lay>(numbers.below(kLays));
}

// Values -1, 0, 1 where `exact`, else roughly normal ones that the dtype of x represents.
inline Layer random_layer(Numbers& numbers, const Shape& p, bool exact) {
    const auto value = [&] {
        return exact ? numbers.between(-1, 1) : round_to(numbers.normal(), p.dtype);
    };
    std::vector<Matrix> A, B;
    for (const std::int64_t rank : p.ranks) {
        A.emplace_back(rank, p.d_in, p.factor_dtype, random_lay(numbers), value);
        B.emplace_back(p.d_out, rank, p.factor_dtype, random_lay(numbers), value);
    }
    Matrix x(p.tokens, p.d_in, p.dtype, random_lay(numbers), value);
    Matrix base(p.tokens, p.d_out, p.dtype, random_lay(numbers), value);
    Matrix grad(p.tokens, p.d_out, p.dtype, random_lay(numbers), value);
    return {p, std::move(A), std::move(B), std::move(x), std::move(base), std::move(grad)};
}

// Ones everywhere, and an adapter's share of an element of y a power of two: y spells who has it.
// `lane` moves the columns against the vectors of every kernel.
inline Layer spelling_layer(int method, int dtype, std::int64_t tokens, int lane,
                            std::uint32_t sample, std::uint32_t strata) {
    constexpr std::int64_t kRank = 16;
    Shape p;
    p.method = method;
    p.dtype = p.factor_dtype = dtype;
    p.tokens = tokens;
    p.d_in = 1;
    p.d_out = 304;
    p.ranks.assign(5, kRank);
    p.thresholds = {9000, 20001, 30003, 45000, 60000};
    for (int j = 0; j < 5; ++j) p.gains.push_back((1 << j) / static_cast<double>(kRank));
    p.call = {};
    p.call.struct_version = LORA_ORTHO_STRUCT_VERSION;
    p.call.stream = 0x80000001u;
    p.call.sample = sample;
    p.call.strata = strata;
    p.call.seed = 0xfedcba9876543210u;
    p.call.tokens = tokens;
    p.call.row_offset = (INT64_C(1) << 31) - 2;
    p.call.col_offset = (INT64_C(1) << 34) + lane;
    const auto one = [] { return 1.0; };
    std::vector<Matrix> A, B;
    for (const std::int64_t rank : p.ranks) {
        A.emplace_back(rank, p.d_in, dtype, Lay::kRows, one);
        B.emplace_back(p.d_out, rank, dtype, Lay::kRows, one);
    }
    Matrix x(tokens, p.d_in, dtype, Lay::kRows, one);
    Matrix base(tokens, p.d_out, dtype, Lay::kRows, one);
    Matrix grad(tokens, p.d_out, dtype, Lay::kRows, one);
    return {p, std::move(A), std::move(B), std::move(x), std::move(base), std::move(grad)};
}

// Samples and strata of such layers: the first and the last part of a block, and parts whose
// rotation is odd, even, below and above half of the range.
struct Stratum {
    std::uint32_t sample, strata;
};
constexpr Stratum kStrataOfLayers[] = {
    {2, 3},         {1, 7},         {699999, 7},       {5, 8},
    {65535, 65536}, {65537, 65536}, {0xffffff, 65521}, {40000, 65535}};

// ---- running them

inline Buffer pack(const Layer& l, lora_ortho_isa isa) {
    const std::vector<lora_ortho_matrix> A = l.views(l.A), B = l.views(l.B);
    const Shape& p = l.shape;
    const lora_ortho_factors factors = {LORA_ORTHO_STRUCT_VERSION,
                                        p.method,
                                        p.dtype,
                                        isa,
                                        static_cast<std::int32_t>(p.adapters()),
                                        p.d_in,
                                        p.d_out,
                                        p.ranks.data(),
                                        p.thresholds.data(),
                                        A.data(),
                                        B.data()};
    std::size_t bytes = 0;
    CHECK_EQ(lora_ortho_pack_bytes(&factors, &bytes), LORA_ORTHO_OK);
    Buffer packed(bytes);
    CHECK_EQ(lora_ortho_pack(&factors, packed.data(), bytes), LORA_ORTHO_OK);
    return packed;
}

// The outputs of one forward and one backward pass.
struct Outputs {
    Buffer y, s, grad_x, grad_A, grad_B, grad_gains;

    explicit Outputs(const Shape& p, int poison = 0xff)
        : y(make(p.tokens * p.d_out, p.dtype, poison)),
          s(make(p.tokens * p.rank_sum(), p.dtype, poison)),
          grad_x(make(p.tokens * p.d_in, p.dtype, poison)),
          grad_A(make(p.rank_sum() * p.d_in, p.factor_dtype, poison)),
          grad_B(make(p.rank_sum() * p.d_out, p.factor_dtype, poison)),
          grad_gains(make(p.adapters(), LORA_ORTHO_FLOAT64, poison)) {}
    bool operator==(const Outputs& o) const {
        return y == o.y && s == o.s && grad_x == o.grad_x && grad_A == o.grad_A &&
               grad_B == o.grad_B && grad_gains == o.grad_gains;
    }

private:
    static Buffer make(std::int64_t elements, int dtype, int poison) {
        const std::size_t size = bytes_of(dtype);
        return Buffer(static_cast<std::size_t>(elements) * size, size, poison);
    }
};

inline lora_ortho_call call_of(const Shape& p, int threads) {
    lora_ortho_call call = p.call;
    call.gains = p.gains.data();
    call.threads = threads;
    return call;
}

inline void forward(const Layer& l, const Buffer& packed, int threads, bool with_base,
                    Outputs& out) {
    const lora_ortho_call call = call_of(l.shape, threads);
    CHECK_EQ(lora_ortho_forward(packed.data(), packed.bytes(), &call, &l.x.view,
                                with_base ? &l.base.view : nullptr, out.y.data(), out.s.data()),
             LORA_ORTHO_OK);
}

// Wanted outputs as bits: 1 grad_x, 2 grad_A, 4 grad_B, 8 grad_gains.
inline void backward(const Layer& l, const Buffer& packed, int threads, Outputs& out,
                     int wanted = 15, int poison = 0xff) {
    const lora_ortho_call call = call_of(l.shape, threads);
    std::size_t bytes = 0;
    CHECK_EQ(lora_ortho_backward_bytes(packed.data(), packed.bytes(), &call, &bytes),
             LORA_ORTHO_OK);
    const Buffer workspace(bytes, 0, poison);
    const auto data = [&](int bit, const Buffer& buffer) -> void* {
        return wanted & bit ? buffer.data() : nullptr;
    };
    CHECK_EQ(
        lora_ortho_backward(packed.data(), packed.bytes(), &call, &l.grad.view, &l.x.view,
                            out.s.data(), data(1, out.grad_x), data(2, out.grad_A),
                            data(4, out.grad_B), l.shape.factor_dtype,
                            static_cast<double*>(data(8, out.grad_gains)), workspace.data(), bytes),
        LORA_ORTHO_OK);
}
