// Kernels that only note how they were called, and valid arguments of every C function: a test
// changes one of them and looks at the status.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "cpu/kernels.h"
#include "lora_ortho/lora_ortho.h"

namespace {

enum class Throw { kNothing, kBadAlloc, kOther };

constexpr std::size_t kWorkspace = 256;
struct Fake {
    Throw what = Throw::kNothing;
    int calls = 0;
    bool missing = false;
} fake;

void act() {
    if (fake.what == Throw::kBadAlloc) throw std::bad_alloc();
    if (fake.what == Throw::kOther) throw std::runtime_error("a fault");
    ++fake.calls;
}

}  // namespace

namespace lora_ortho::cpu {

constexpr Kernels kFake = {
    [](Header& header, const std::int64_t* ranks) {
        header.padded_rank_sum = header.rank_sum;
        header.bytes = header.arrays_end + static_cast<std::size_t>(ranks[0]) * 64;
    },
    [](const lora_ortho_factors&, void*) { act(); },
    [](const void*, const Call&, const lora_ortho_matrix&, const lora_ortho_matrix*, void* y,
       void* s) {
        act();
        *static_cast<float*>(y) = *static_cast<float*>(s) = 1.0f;
    },
    [](const void*, const Call&) { return kWorkspace; },
    [](const void*, const Call&, const lora_ortho_matrix&, const lora_ortho_matrix&, const void*,
       const Gradients& out, void*) {
        act();
        if (out.grad_x) *static_cast<float*>(out.grad_x) = 1.0f;
    },
};

const Kernels* kernels_baseline() { return fake.missing ? nullptr : &kFake; }
const Kernels* kernels_avx2() { return nullptr; }
const Kernels* kernels_avx512() { return nullptr; }
const Kernels* kernels_avx512_bf16() { return nullptr; }
const Kernels* kernels_amx() { return nullptr; }

}  // namespace lora_ortho::cpu

namespace {

using lora_ortho::Draw;
using lora_ortho::Interval;
using lora_ortho::cpu::Header;

constexpr std::int64_t kTokens = 3, kIn = 4, kOut = 6, kRankSum = 5;
constexpr float kUntouched = -77.0f;
constexpr std::int64_t kHuge = std::numeric_limits<std::int64_t>::max();

// Valid arguments of every function; a test changes one and looks at the status.
struct Arguments {
    std::int64_t ranks[2] = {2, 3};
    std::uint32_t thresholds[2] = {20000, 65536};
    double gains[2] = {1.0, -2.0};
    float data[64] = {};
    lora_ortho_matrix A[2] = {{data, kIn, 1, LORA_ORTHO_FLOAT32}, {data, 1, 3, LORA_ORTHO_FLOAT32}};
    lora_ortho_matrix B[2] = {{data, 2, 1, LORA_ORTHO_FLOAT32}, {data, 3, 1, LORA_ORTHO_FLOAT32}};
    lora_ortho_factors factors = {LORA_ORTHO_STRUCT_VERSION,
                                  LORA_ORTHO_ORTHOGONAL,
                                  LORA_ORTHO_FLOAT32,
                                  LORA_ORTHO_ISA_AUTO,
                                  2,
                                  kIn,
                                  kOut,
                                  ranks,
                                  thresholds,
                                  A,
                                  B};
    lora_ortho_call call = {LORA_ORTHO_STRUCT_VERSION, 0, 0, 1, 0, kTokens, 0, 0, 0, gains};
    lora_ortho_matrix x = {data, kIn, 1, LORA_ORTHO_FLOAT32};
    lora_ortho_matrix base = {data, kOut, 1, LORA_ORTHO_FLOAT32};
    alignas(64) unsigned char packed[2048];
    alignas(64) unsigned char workspace[kWorkspace];
    std::size_t packed_bytes = sizeof packed;
    std::int32_t factor_dtype = LORA_ORTHO_FLOAT32;
    std::vector<float> y = std::vector<float>(kTokens * kOut, kUntouched);
    std::vector<float> s = std::vector<float>(kTokens * kRankSum, kUntouched);
    std::vector<float> grad_x = std::vector<float>(kTokens * kIn, kUntouched);
    std::vector<float> grad_A = std::vector<float>(kRankSum * kIn, kUntouched);
    std::vector<float> grad_B = std::vector<float>(kRankSum * kOut, kUntouched);
    std::vector<double> grad_gains = std::vector<double>(2, kUntouched);

    Arguments() {
        fake = {};
        std::memset(packed, 0x5a, sizeof packed);
        CHECK_EQ(lora_ortho_pack(&factors, packed, packed_bytes), LORA_ORTHO_OK);
        fake = {};
    }
    Arguments(const Arguments&) = delete;
    Header& header() { return *reinterpret_cast<Header*>(packed); }

    // Strides of zero: any size is then in order as far as the matrices go.
    void broadcast_factors() {
        for (lora_ortho_matrix* m : {&A[0], &A[1], &B[0], &B[1]}) m->row_stride = m->col_stride = 0;
    }

    // A packed header of so many adapters, all of its offsets in order.
    void claim_adapters(std::int32_t adapters) {
        Header& h = header();
        const std::size_t k = static_cast<std::size_t>(adapters);
        h.adapters = adapters;
        h.rank_sum = adapters;
        h.rank_begin = h.ranks + 8 * k;
        h.intervals = h.rank_begin + 8 * (k + 1);
        h.arrays_end = (h.intervals + 8 * k + 63) / 64 * 64;
        h.bytes = h.arrays_end + 64;
    }

    // Each of these also checks that a refused call leaves its outputs as they were.
    lora_ortho_status pack() {
        std::size_t bytes = 12345;
        alignas(64) unsigned char out[2048];
        std::memset(out, 0x5a, sizeof out);
        const std::vector<unsigned char> before(out, out + sizeof out);
        const lora_ortho_status asked = lora_ortho_pack_bytes(&factors, &bytes);
        CHECK(asked == LORA_ORTHO_OK ? bytes != 12345 : bytes == 12345);
        const lora_ortho_status status = lora_ortho_pack(&factors, out, sizeof out);
        CHECK(asked == LORA_ORTHO_OK || asked == status);
        if (status != LORA_ORTHO_OK) CHECK(std::memcmp(out, before.data(), sizeof out) == 0);
        return status;
    }
    lora_ortho_status forward() {
        const lora_ortho_status status =
            lora_ortho_forward(packed, packed_bytes, &call, &x, &base, y.data(), s.data());
        if (status != LORA_ORTHO_OK) CHECK(y[0] == kUntouched && s[0] == kUntouched);
        return status;
    }
    lora_ortho_status backward() {
        const lora_ortho_status status = lora_ortho_backward(
            packed, packed_bytes, &call, &base, &x, s.data(), grad_x.data(), grad_A.data(),
            grad_B.data(), factor_dtype, grad_gains.data(), workspace, sizeof workspace);
        if (status != LORA_ORTHO_OK) CHECK(grad_x[0] == kUntouched && grad_gains[0] == kUntouched);
        return status;
    }
    lora_ortho_status backward_bytes() {
        std::size_t bytes = 12345;
        const lora_ortho_status status =
            lora_ortho_backward_bytes(packed, packed_bytes, &call, &bytes);
        CHECK(status == LORA_ORTHO_OK ? bytes != 12345 : bytes == 12345);
        return status;
    }
    // The status of every function that opens the packed factors and reads the call.
    lora_ortho_status called() {
        const lora_ortho_status status = forward();
        CHECK_EQ(backward(), status);
        CHECK_EQ(backward_bytes(), status);
        return status;
    }
};

// The status of `function` after `change` to valid arguments.
template <class Change>
lora_ortho_status after(lora_ortho_status (Arguments::*function)(), Change&& change) {
    Arguments a;
    change(a);
    const lora_ortho_status status = (a.*function)();
    if (status != LORA_ORTHO_OK) CHECK_EQ(fake.calls, 0);
    return status;
}
#define AFTER(function, change) \
    after(&Arguments::function, []([[maybe_unused]] Arguments& a) { change; })

template <class T>
T* shifted(T* pointer, int bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(pointer) +
                                static_cast<std::uintptr_t>(bytes));
}

}  // namespace
