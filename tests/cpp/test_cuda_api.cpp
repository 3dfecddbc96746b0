// The C functions of cuda.h over kernels of the test's own: every status is provoked, and nothing
// is launched unless the arguments are in order.
#include "cuda_arguments.h"

namespace {

// The status of a function after `change` to valid arguments.
template <class Change>
lora_ortho_status after(Function function, Change&& change) {
    Arguments a;
    change(a);
    const lora_ortho_status status = (a.*function)();
    if (status != LORA_ORTHO_OK && fake.launch == LORA_ORTHO_OK) {
        CHECK_EQ(fake.calls, 0);
        CHECK_EQ(a.bytes, std::size_t{12345});
    }
    return status;
}
#define AFTER(function, change) \
    after(&Arguments::function, []([[maybe_unused]] Arguments& a) { change; })

// One change that every function of those named must answer alike.
#define ALL(change, status)                    \
    for (const Function function : kFunctions) \
    CHECK_EQ(after(function, []([[maybe_unused]] Arguments& a) { change; }), status)
#define CALLS(change, status)                                                          \
    for (const Function function : {&Arguments::forward_bytes, &Arguments::forward,    \
                                    &Arguments::backward_bytes, &Arguments::backward}) \
    CHECK_EQ(after(function, []([[maybe_unused]] Arguments& a) { change; }), status)

}  // namespace

TEST(valid_arguments_reach_the_kernels) {
    ALL(, LORA_ORTHO_OK);
    CHECK_EQ(AFTER(backward, a.grad_x = a.grad_A = a.grad_B = a.grad_gains = nullptr),
             LORA_ORTHO_OK);
    CHECK_EQ(AFTER(forward, a.base_in = nullptr), LORA_ORTHO_OK);
    CHECK_EQ(AFTER(forward, a.call.tokens = 0), LORA_ORTHO_OK);
    CHECK_EQ(fake.calls, 0);
    CHECK_EQ(AFTER(forward, a.x.row_stride = a.x.col_stride = 0), LORA_ORTHO_OK);
    CHECK_EQ(AFTER(forward, a.x.row_stride = -4), LORA_ORTHO_OK);
    CHECK_EQ(AFTER(pack, a.factors.adapters = 255), LORA_ORTHO_OK);
    CHECK_EQ(lora_ortho_cuda_available(), LORA_ORTHO_OK);
}

TEST(the_device_comes_first) {
    ALL(fake.device = LORA_ORTHO_NO_CUDA, LORA_ORTHO_NO_CUDA);
    ALL(fake.device = LORA_ORTHO_NO_DEVICE, LORA_ORTHO_NO_DEVICE);
    ALL(fake.device = LORA_ORTHO_UNSUPPORTED_DEVICE, LORA_ORTHO_UNSUPPORTED_DEVICE);
    CHECK_EQ(lora_ortho_cuda_available(), LORA_ORTHO_UNSUPPORTED_DEVICE);
}

TEST(factors_are_checked) {
    ALL(a.factors_in = nullptr, LORA_ORTHO_NULL_POINTER);
    ALL(a.factors.struct_version = 1, LORA_ORTHO_BAD_VERSION);
    ALL(a.factors.method = 3, LORA_ORTHO_BAD_METHOD);
    ALL(a.factors.dtype = 4, LORA_ORTHO_BAD_DTYPE);
    ALL(a.factors.dtype = LORA_ORTHO_FLOAT64, LORA_ORTHO_BAD_DTYPE);
    ALL(a.factors.adapters = 0, LORA_ORTHO_BAD_ADAPTERS);
    ALL(a.factors.adapters = 256, LORA_ORTHO_BAD_ADAPTERS);
    ALL(a.factors.d_in = 0, LORA_ORTHO_BAD_SIZE);
    ALL(a.factors.d_out = kHuge, LORA_ORTHO_BAD_SIZE);
    ALL(a.factors.d_in = (INT64_C(1) << 35) + 1, LORA_ORTHO_BAD_SIZE);
    ALL(a.ranks[1] = 0, LORA_ORTHO_BAD_RANK);
    ALL(a.ranks[0] = kHuge, LORA_ORTHO_BAD_SIZE);
    ALL(a.ranks[0] = INT64_C(1) << 31, LORA_ORTHO_BAD_SIZE);
    ALL(a.factors.ranks = nullptr, LORA_ORTHO_NULL_POINTER);
    ALL(a.factors.ranks = shifted(a.ranks, 4), LORA_ORTHO_MISALIGNED);
    ALL(a.thresholds[1] = 200, LORA_ORTHO_BAD_THRESHOLD);
    ALL(a.thresholds[1] = 65537, LORA_ORTHO_BAD_THRESHOLD);
    CHECK_EQ(AFTER(pack_bytes, a.bytes_out = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.factors.lora_A = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.B[1].data = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.A[1].data = shifted(a.A[1].data, 2)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(pack, a.A[0].col_stride = kHuge), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(AFTER(pack, a.packed = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(pack, a.packed = shifted(a.packed, 32)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(pack, a.packed_bytes = 64), LORA_ORTHO_BUFFER_TOO_SMALL);
}

TEST(calls_are_checked) {
    constexpr std::int64_t kRows = std::int64_t{1} << 32, kCols = std::int64_t{1} << 35;
    CALLS(a.call_in = nullptr, LORA_ORTHO_NULL_POINTER);
    CALLS(a.call.struct_version = 1, LORA_ORTHO_BAD_VERSION);
    CALLS(a.call.tokens = -1, LORA_ORTHO_BAD_SIZE);
    CALLS(a.call.tokens = kRows + 1, LORA_ORTHO_BAD_COORDINATE);
    CALLS(a.call.row_offset = kRows - 2, LORA_ORTHO_BAD_COORDINATE);
    CALLS(a.call.row_offset = kRows - 3, LORA_ORTHO_OK);
    CALLS(a.call.col_offset = kCols - 5, LORA_ORTHO_BAD_COORDINATE);
    CALLS(a.call.sample = 1u << 24, LORA_ORTHO_BAD_COORDINATE);
    CALLS(a.call.strata = 0, LORA_ORTHO_BAD_COORDINATE);
    CALLS(a.call.strata = 65536, LORA_ORTHO_OK);
    CALLS(a.call.strata = 65537, LORA_ORTHO_BAD_COORDINATE);
    CALLS(a.call.tokens = kRows; a.factors.d_in = kCols, LORA_ORTHO_BAD_SIZE);
    CALLS(a.call.gains = nullptr, LORA_ORTHO_NULL_POINTER);
    CALLS(a.call.gains = shifted(a.call.gains, 2), LORA_ORTHO_MISALIGNED);
    CALLS(a.call.seed_pointer = reinterpret_cast<std::uint64_t*>(a.memory + 4),
          LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(forward_bytes, a.bytes_out = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(backward_bytes, a.bytes_out = nullptr), LORA_ORTHO_NULL_POINTER);
    for (const Function function : {&Arguments::forward, &Arguments::backward}) {
        const auto check = [function](lora_ortho_status status, void (*change)(Arguments&)) {
            CHECK_EQ(after(function, change), status);
        };
        check(LORA_ORTHO_NULL_POINTER, [](Arguments& a) { a.packed = nullptr; });
        check(LORA_ORTHO_BUFFER_TOO_SMALL, [](Arguments& a) { a.packed_bytes = 100; });
        check(LORA_ORTHO_NULL_POINTER, [](Arguments& a) { a.x_in = nullptr; });
        check(LORA_ORTHO_NULL_POINTER, [](Arguments& a) { a.x.data = nullptr; });
        check(LORA_ORTHO_BAD_DTYPE, [](Arguments& a) { a.x.dtype = LORA_ORTHO_FLOAT16; });
        check(LORA_ORTHO_BAD_SIZE, [](Arguments& a) { a.x.row_stride = kHuge; });
        check(LORA_ORTHO_NULL_POINTER, [](Arguments& a) { a.s = nullptr; });
        check(LORA_ORTHO_MISALIGNED, [](Arguments& a) { a.s = shifted(a.s, 1); });
        check(LORA_ORTHO_NULL_POINTER, [](Arguments& a) { a.workspace = nullptr; });
        check(LORA_ORTHO_MISALIGNED, [](Arguments& a) { a.workspace = shifted(a.memory, 16); });
        check(LORA_ORTHO_BUFFER_TOO_SMALL, [](Arguments& a) { --a.workspace_bytes; });
    }
    CHECK_EQ(AFTER(forward, a.base.dtype = 9), LORA_ORTHO_BAD_DTYPE);
    CHECK_EQ(AFTER(forward, a.y = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(backward, a.grad_in = nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(AFTER(backward, a.factor_dtype = -1), LORA_ORTHO_BAD_DTYPE);
    CHECK_EQ(AFTER(backward, a.grad_x = shifted(a.grad_x, 2)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(backward, a.grad_A = shifted(a.grad_A, 2)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(backward, a.grad_B = shifted(a.grad_B, 1)), LORA_ORTHO_MISALIGNED);
    CHECK_EQ(AFTER(backward, a.grad_gains = shifted(a.grad_gains, 2)), LORA_ORTHO_MISALIGNED);
}

TEST(what_goes_wrong_behind_the_checks_is_a_status) {
    for (const Function function : {&Arguments::pack, &Arguments::forward, &Arguments::backward}) {
        CHECK_EQ(after(function, [](Arguments&) { fake.launch = LORA_ORTHO_CUDA_ERROR; }),
                 LORA_ORTHO_CUDA_ERROR);
        CHECK_EQ(after(function, [](Arguments&) { fake.what = Throw::kBadAlloc; }),
                 LORA_ORTHO_OUT_OF_MEMORY);
        CHECK_EQ(after(function, [](Arguments&) { fake.what = Throw::kOther; }),
                 LORA_ORTHO_INTERNAL_ERROR);
    }
}
