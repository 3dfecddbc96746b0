// The C interface over kernels of the test's own: every status is provoked, and nothing is written
// unless the status is LORA_ORTHO_OK.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "arguments.h"
#include "check.h"
#include "cpu/kernels.h"
#include "lora_ortho/lora_ortho.h"

TEST(valid_arguments_reach_the_kernels) {
    CHECK_EQ(AFTER(pack, ), LORA_ORTHO_OK);
    CHECK_EQ(fake.calls, 1);
    CHECK_EQ(AFTER(forward, ), LORA_ORTHO_OK);
    CHECK_EQ(fake.calls, 1);
    CHECK_EQ(AFTER(backward, ), LORA_ORTHO_OK);
    CHECK_EQ(fake.calls, 1);
    CHECK_EQ(AFTER(backward_bytes, ), LORA_ORTHO_OK);
    Arguments a;
    CHECK_EQ(a.header().rank_sum, kRankSum);
    CHECK_EQ(a.header().isa, LORA_ORTHO_ISA_BASELINE);
    const auto* begin = lora_ortho::cpu::array_at<std::int64_t>(a.packed, a.header().rank_begin);
    CHECK(begin[0] == 0 && begin[1] == 2 && begin[2] == kRankSum);
    a.factors.method = LORA_ORTHO_DIRECT;
    a.factors.thresholds = nullptr;
    CHECK_EQ(lora_ortho_pack(&a.factors, a.packed, a.packed_bytes), LORA_ORTHO_OK);
    CHECK_EQ(lora_ortho_forward(a.packed, a.packed_bytes, &a.call, &a.x, nullptr, a.y.data(),
                                a.s.data()),
             LORA_ORTHO_OK);
    CHECK_EQ(
        lora_ortho_backward(a.packed, a.packed_bytes, &a.call, &a.base, &a.x, a.s.data(), nullptr,
                            nullptr, nullptr, LORA_ORTHO_FLOAT32, nullptr, a.workspace, kWorkspace),
        LORA_ORTHO_OK);
}

// Behind the boundary there are a kind of draw and intervals, both ends included.
TEST(a_method_becomes_a_draw_and_intervals) {
    const auto packed = [](lora_ortho_method method, Draw draw, Interval first, Interval second) {
        Arguments a;
        a.factors.method = method;
        CHECK_EQ(lora_ortho_pack(&a.factors, a.packed, a.packed_bytes), LORA_ORTHO_OK);
        CHECK(a.header().draw == draw);
        const auto* of = lora_ortho::cpu::array_at<Interval>(a.packed, a.header().intervals);
        CHECK_EQ(of[0].first, first.first);
        CHECK_EQ(of[0].last, first.last);
        CHECK_EQ(of[1].first, second.first);
        CHECK_EQ(of[1].last, second.last);
    };
    packed(LORA_ORTHO_ORTHOGONAL, Draw::kShared, {0, 19999}, {20000, 65535});
    packed(LORA_ORTHO_DROPOUT, Draw::kOwn, {0, 19999}, {0, 65535});
    packed(LORA_ORTHO_DIRECT, Draw::kNone, {0, 65535}, {0, 65535});
}

TEST(factors_are_checked) {
    CHECK_EQ(AFTER(pack, a.factors.struct_version = 1), LORA_ORTHO_BAD_VERSION);
    CHECK_EQ(AFTER(pack, a.factors.method = 3), LORA_ORTHO_BAD_METHOD);
    CHECK_EQ(AFTER(pack, a.factors.method = -1), LORA_ORTHO_BAD_METHOD);
    CHECK_EQ(AFTER(pack, a.factors.dtype = 4), LORA_ORTHO_BAD_DTYPE);
    CHECK_EQ(AFTER(pack, a.factors.isa = 6), LORA_ORTHO_UNSUPPORTED_ISA);
    CHECK_EQ(AFTER(pack, a.factors.isa = -1), LORA_ORTHO_UNSUPPORTED_ISA);
    CHECK_EQ(AFTER(pack, a.factors.isa = LORA_ORTHO_ISA_AVX2), LORA_ORTHO_UNSUPPORTED_ISA);
    CHECK_EQ(AFTER(pack, fake.missing = true), LORA_ORTHO_UNSUPPORTED_ISA);
    CHECK_EQ(AFTER(pack, a.factors.adapters = 0), LORA_ORTHO_BAD_ADAPTERS);
    CHECK_EQ(AFTER(pack, a.factors.adapters = 256), LORA_ORTHO_BAD_ADAPTERS);
    CHECK_EQ(AFTER(pack, a.factors.d_in = 0), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.factors.d_out = -1), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.factors.d_out = (std::int64_t{1} << 35) + 1), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.broadcast_factors(); a.factors.d_in = kHuge), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.broadcast_factors(); a.factors.d_in = INT64_C(1) << 52),
             LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.broadcast_factors(); a.ranks[1] = INT64_C(1) << 39;
                   a.factors.d_out = INT64_C(1) << 35),
             LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.ranks[0] = 0), LORA_ORTHO_BAD_RANK);
    CHECK_EQ(AFTER(pack, a.ranks[1] = -3), LORA_ORTHO_BAD_RANK);
    CHECK_EQ(AFTER(pack, a.broadcast_factors(); a.ranks[1] = kHuge), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.factors.ranks = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.factors.thresholds = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.factors.lora_A = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.factors.lora_B = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.factors.ranks = shifted(a.ranks, 4)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(pack, a.factors.thresholds = shifted(a.thresholds, 2)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(pack, a.thresholds[0] = 0), LORA_ORTHO_BAD_THRESHOLD);
    CHECK_EQ(AFTER(pack, a.thresholds[0] = 65536), LORA_ORTHO_BAD_THRESHOLD);
    CHECK_EQ(AFTER(pack, a.thresholds[1] = 65537), LORA_ORTHO_BAD_THRESHOLD);
    CHECK_EQ(AFTER(pack, a.factors.method = LORA_ORTHO_DROPOUT; a.thresholds[1] = 1),
             LORA_ORTHO_OK);
    CHECK_EQ(AFTER(pack, a.factors.method = LORA_ORTHO_DROPOUT; a.thresholds[1] = 0),
             LORA_ORTHO_BAD_THRESHOLD);
    CHECK_EQ(AFTER(pack, a.A[1].data = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.B[0].data = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.B[1].dtype = 7), LORA_ORTHO_BAD_DTYPE);
    CHECK_EQ(AFTER(pack, a.A[0].data = shifted(a.data, 2)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(pack, a.A[0].row_stride = kHuge), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.B[0].col_stride = -kHuge - 1), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.A[0].row_stride = a.A[0].col_stride = 0), LORA_ORTHO_OK);
    CHECK_EQ(lora_ortho_pack_bytes(nullptr, nullptr), LORA_ORTHO_NULL_POINTER);
    Arguments a;
    CHECK_EQ(lora_ortho_pack_bytes(&a.factors, nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(lora_ortho_pack(nullptr, a.packed, a.packed_bytes), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(lora_ortho_pack(&a.factors, nullptr, 2048), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(lora_ortho_pack(&a.factors, a.packed + 32, 2016), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(lora_ortho_pack(&a.factors, a.packed, a.header().bytes - 1),
             LORA_ORTHO_BUFFER_TOO_SMALL);
    CHECK_EQ(lora_ortho_pack(&a.factors, a.packed, a.header().bytes), LORA_ORTHO_OK);
}

TEST(packed_factors_are_checked) {
    CHECK_EQ(AFTER(called, a.packed_bytes = 8; a.header().magic = 0), LORA_ORTHO_BUFFER_TOO_SMALL);
    CHECK_EQ(AFTER(called, a.packed_bytes = a.header().bytes - 1), LORA_ORTHO_BUFFER_TOO_SMALL);
    CHECK_EQ(AFTER(called, a.header().magic ^= 1), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().draw = static_cast<Draw>(3)), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().draw = static_cast<Draw>(-1)), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().dtype = -1), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().isa = 0), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().isa = 6), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().adapters = 3), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().adapters = 0), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.claim_adapters(256)), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.claim_adapters(255)), LORA_ORTHO_BUFFER_TOO_SMALL);
    CHECK_EQ(AFTER(called, a.header().d_in = 0), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().d_out = 0), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().rank_sum = 1), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().ranks += 8), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().rank_begin += 8), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().intervals += 8), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().arrays_end += 64), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().bytes = 64), LORA_ORTHO_BAD_PACKED);
    CHECK_EQ(AFTER(called, a.header().isa = LORA_ORTHO_ISA_AMX), LORA_ORTHO_UNSUPPORTED_ISA);
    CHECK_EQ(AFTER(called, fake.missing = true), LORA_ORTHO_UNSUPPORTED_ISA);
    Arguments a;
    std::size_t bytes;
    CHECK_EQ(lora_ortho_backward_bytes(nullptr, 2048, &a.call, &bytes), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(lora_ortho_backward_bytes(a.packed + 8, 2040, &a.call, &bytes), LORA_ORTHO_MISALIGNED);
    alignas(64) unsigned char copy[sizeof a.packed];
    std::memcpy(copy, a.packed, sizeof copy);
    CHECK_EQ(lora_ortho_backward_bytes(copy, sizeof copy, &a.call, &bytes), LORA_ORTHO_OK);
}

TEST(calls_are_checked) {
    constexpr std::int64_t kRows = std::int64_t{1} << 32, kCols = std::int64_t{1} << 35;
    CHECK_EQ(AFTER(called, a.call.struct_version = 1), LORA_ORTHO_BAD_VERSION);
    CHECK_EQ(AFTER(called, a.call.tokens = -1), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(called, a.call.threads = -1), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(called, a.call.sample = 1u << 24), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.strata = 0), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.strata = 65536), LORA_ORTHO_OK);
    CHECK_EQ(AFTER(called, a.call.strata = 65537), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.row_offset = -1), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.col_offset = -8), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.row_offset = kRows - kTokens), LORA_ORTHO_OK);
    CHECK_EQ(AFTER(called, a.call.row_offset = kRows - kTokens + 1), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.row_offset = kHuge), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.col_offset = kCols - kOut), LORA_ORTHO_OK);
    CHECK_EQ(AFTER(called, a.call.col_offset = kCols - kOut + 1), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.col_offset = kHuge), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.tokens = kHuge), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(AFTER(called, a.call.tokens = kRows; a.header().d_in = kCols), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(called, a.call.tokens = kRows; a.header().d_out = kCols), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(called, a.call.tokens = kRows; a.header().padded_rank_sum = kRows),
             LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(called, a.call.gains = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(called, a.call.gains = shifted(a.gains, 4)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(called, a.gains[1] = NAN), LORA_ORTHO_BAD_GAIN);
    CHECK_EQ(AFTER(called, a.gains[0] = INFINITY), LORA_ORTHO_BAD_GAIN);
    Arguments a;
    std::size_t bytes;
    CHECK_EQ(lora_ortho_backward_bytes(a.packed, 2048, nullptr, &bytes), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(lora_ortho_backward_bytes(a.packed, 2048, &a.call, nullptr), LORA_ORTHO_NULL_POINTER);
}

TEST(operands_are_checked) {
    for (const auto function : {&Arguments::forward, &Arguments::backward}) {
        CHECK_EQ(after(function, [](Arguments& a) { a.x.data = nullptr; }),
                 LORA_ORTHO_NULL_POINTER);
        CHECK_EQ(after(function, [](Arguments& a) { a.base.data = nullptr; }),
                 LORA_ORTHO_NULL_POINTER);
        CHECK_EQ(after(function, [](Arguments& a) { a.x.dtype = LORA_ORTHO_FLOAT64; }),
                 LORA_ORTHO_BAD_DTYPE);
        CHECK_EQ(after(function, [](Arguments& a) { a.base.dtype = 17; }), LORA_ORTHO_BAD_DTYPE);
        CHECK_EQ(after(function, [](Arguments& a) { a.x.data = shifted(a.data, 1); }),
                 LORA_ORTHO_MISALIGNED);
        CHECK_EQ(after(function, [](Arguments& a) { a.x.row_stride = kHuge; }),
                 LORA_ORTHO_BAD_SIZE);
        CHECK_EQ(after(function, [](Arguments& a) { a.base.col_stride = kHuge / 8; }),
                 LORA_ORTHO_BAD_SIZE);
        CHECK_EQ(after(function, [](Arguments& a) { a.base.row_stride = a.base.col_stride = 0; }),
                 LORA_ORTHO_OK);
    }
    CHECK_EQ(AFTER(backward, a.factor_dtype = 4), LORA_ORTHO_BAD_DTYPE);
    CHECK_EQ(AFTER(backward, a.factor_dtype = -1), LORA_ORTHO_BAD_DTYPE);
    Arguments a;
    const auto forward = [&](const lora_ortho_matrix* x, void* y, void* s) {
        return lora_ortho_forward(a.packed, 2048, &a.call, x, nullptr, y, s);
    };
    float* y = a.y.data();
    float* s = a.s.data();
    CHECK_EQ(forward(nullptr, y, s), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(forward(&a.x, nullptr, s), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(forward(&a.x, y, nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(forward(&a.x, shifted(y, 2), s), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(forward(&a.x, y, shifted(s, 2)), LORA_ORTHO_MISALIGNED);
    const auto backward = [&](const lora_ortho_matrix* grad, const void* saved, float* grad_x,
                              float* grad_A, float* grad_B, double* grad_gains, void* workspace,
                              std::size_t bytes) {
        return lora_ortho_backward(a.packed, 2048, &a.call, grad, &a.x, saved, grad_x, grad_A,
                                   grad_B, LORA_ORTHO_FLOAT32, grad_gains, workspace, bytes);
    };
    float* grad_x = a.grad_x.data();
    double* grad_gains = a.grad_gains.data();
    const auto* g = &a.base;
    void* w = a.workspace;
    constexpr std::size_t n = kWorkspace;
    CHECK_EQ(backward(nullptr, s, grad_x, grad_x, grad_x, grad_gains, w, n),
             LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(backward(g, nullptr, grad_x, grad_x, grad_x, grad_gains, w, n),
             LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(backward(g, shifted(s, 1), grad_x, grad_x, grad_x, grad_gains, w, n),
             LORA_ORTHO_MISALIGNED);
    CHECK_EQ(backward(g, s, shifted(grad_x, 2), grad_x, grad_x, grad_gains, w, n),
             LORA_ORTHO_MISALIGNED);
    CHECK_EQ(backward(g, s, grad_x, shifted(grad_x, 2), grad_x, grad_gains, w, n),
             LORA_ORTHO_MISALIGNED);
    CHECK_EQ(backward(g, s, grad_x, grad_x, shifted(grad_x, 2), grad_gains, w, n),
             LORA_ORTHO_MISALIGNED);
    CHECK_EQ(backward(g, s, grad_x, grad_x, grad_x, shifted(grad_gains, 4), w, n),
             LORA_ORTHO_MISALIGNED);
    CHECK_EQ(backward(g, s, grad_x, grad_x, grad_x, grad_gains, nullptr, n),
             LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(backward(g, s, grad_x, grad_x, grad_x, grad_gains, shifted(w, 32), n - 32),
             LORA_ORTHO_MISALIGNED);
    CHECK_EQ(backward(g, s, grad_x, grad_x, grad_x, grad_gains, w, n - 1),
             LORA_ORTHO_BUFFER_TOO_SMALL);
    CHECK_EQ(fake.calls, 0);
    CHECK(y[0] == kUntouched && grad_x[0] == kUntouched && grad_gains[0] == kUntouched);
}

TEST(no_tokens_need_no_memory_and_have_zero_gradients) {
    Arguments a;
    a.call.tokens = 0;
    a.x.data = a.base.data = nullptr;
    CHECK_EQ(lora_ortho_forward(a.packed, 2048, &a.call, &a.x, &a.base, nullptr, nullptr),
             LORA_ORTHO_OK);
    std::size_t bytes = 1;
    CHECK_EQ(lora_ortho_backward_bytes(a.packed, 2048, &a.call, &bytes), LORA_ORTHO_OK);
    CHECK_EQ(bytes, std::size_t{0});
    CHECK_EQ(lora_ortho_backward(a.packed, 2048, &a.call, &a.base, &a.x, nullptr, nullptr,
                                 a.grad_A.data(), a.grad_B.data(), LORA_ORTHO_FLOAT32,
                                 a.grad_gains.data(), nullptr, 0),
             LORA_ORTHO_OK);
    for (const float value : a.grad_A) CHECK_EQ(value, 0.0f);
    for (const float value : a.grad_B) CHECK_EQ(value, 0.0f);
    for (const double value : a.grad_gains) CHECK_EQ(value, 0.0);
    CHECK_EQ(fake.calls, 0);
}

TEST(exceptions_become_statuses) {
    CHECK_EQ(AFTER(forward, fake.what = Throw::kBadAlloc), LORA_ORTHO_OUT_OF_MEMORY);
    CHECK_EQ(AFTER(backward, fake.what = Throw::kBadAlloc), LORA_ORTHO_OUT_OF_MEMORY);
    CHECK_EQ(AFTER(forward, fake.what = Throw::kOther), LORA_ORTHO_INTERNAL_ERROR);
    CHECK_EQ(AFTER(backward, fake.what = Throw::kOther), LORA_ORTHO_INTERNAL_ERROR);
    Arguments a;
    fake.what = Throw::kBadAlloc;
    CHECK_EQ(lora_ortho_pack(&a.factors, a.packed, a.packed_bytes), LORA_ORTHO_OUT_OF_MEMORY);
}

TEST(every_status_and_instruction_set_has_a_text) {
    for (int status = LORA_ORTHO_OK; status <= LORA_ORTHO_INTERNAL_ERROR; ++status) {
        const std::string text = lora_ortho_status_text(static_cast<lora_ortho_status>(status));
        CHECK(!text.empty() && text != lora_ortho_status_text(static_cast<lora_ortho_status>(31)));
        for (int other = LORA_ORTHO_OK; other < status; ++other) {
            CHECK(text != lora_ortho_status_text(static_cast<lora_ortho_status>(other)));
        }
    }
    CHECK_EQ(std::string(lora_ortho_isa_name(LORA_ORTHO_ISA_AMX)), "amx");
    CHECK(std::string(lora_ortho_isa_name(static_cast<lora_ortho_isa>(7))).find("not") == 0);
    fake = {};
    CHECK_EQ(lora_ortho_best_isa(), LORA_ORTHO_ISA_BASELINE);
    CHECK_EQ(lora_ortho_has_isa(LORA_ORTHO_ISA_AUTO), 1);
    CHECK_EQ(lora_ortho_has_isa(LORA_ORTHO_ISA_BASELINE), 1);
    CHECK_EQ(lora_ortho_has_isa(LORA_ORTHO_ISA_AVX2), 0);
    CHECK_EQ(lora_ortho_has_isa(static_cast<lora_ortho_isa>(7)), 0);
}
