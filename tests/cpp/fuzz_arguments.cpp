// Fuzz target for the argument checks of the C interface, the CUDA half and with it the checks that
// both halves share. Bytes become arguments: sizes that overflow, null and misaligned pointers,
// zero ranks, K = 0 and 256, strides of zero and negative. libFuzzer's entry point:
//   clang++ -fsanitize=fuzzer,address,undefined fuzz_arguments.cpp ...
#include <cstdlib>

#include "cuda_arguments.h"
#include "fuzz.h"

namespace {

struct Bytes {
    const std::uint8_t* data;
    std::size_t size, at = 0;

    std::uint8_t byte() { return at < size ? data[at++] : 0; }
    std::int64_t number() {
        static constexpr std::int64_t kEdges[] = {0,
                                                  1,
                                                  -1,
                                                  2,
                                                  3,
                                                  7,
                                                  8,
                                                  255,
                                                  256,
                                                  65536,
                                                  INT64_C(1) << 24,
                                                  INT64_C(1) << 31,
                                                  INT64_C(1) << 32,
                                                  INT64_C(1) << 35,
                                                  INT64_C(1) << 40,
                                                  INT64_C(1) << 52,
                                                  INT64_C(1) << 60,
                                                  INT64_C(1) << 62,
                                                  kHuge,
                                                  -kHuge - 1};
        const std::int64_t edge = kEdges[byte() % (sizeof kEdges / sizeof kEdges[0])];
        const std::int64_t step = static_cast<std::int64_t>(byte() % 5) - 2;
        return static_cast<std::int64_t>(static_cast<std::uint64_t>(edge) +
                                         static_cast<std::uint64_t>(step));
    }
    template <class T>
    void pointer(T*& p) {
        const int what = byte() % 4;
        if (what == 0) p = nullptr;
        if (what == 1 && p) p = shifted(p, 1);  // at most three times: never aligned again
    }
    void matrix(lora_ortho_matrix& m) {
        switch (byte() % 4) {
            case 0: pointer(m.data); break;
            case 1: m.row_stride = number(); break;
            case 2: m.col_stride = number(); break;
            default: m.dtype = static_cast<std::int32_t>(number());
        }
    }
};

void change(Arguments& a, Bytes& from) {
    switch (from.byte() % 25) {
        case 0: a.factors.adapters = static_cast<std::int32_t>(from.number()); break;
        case 1: a.factors.d_in = from.number(); break;
        case 2: a.factors.d_out = from.number(); break;
        case 3: a.ranks[from.byte()] = from.number(); break;
        case 4: a.thresholds[from.byte()] = static_cast<std::uint32_t>(from.number()); break;
        case 5: a.factors.method = static_cast<std::int32_t>(from.number()); break;
        case 6: a.factors.dtype = static_cast<std::int32_t>(from.number()); break;
        case 7: from.pointer(a.factors.ranks); break;
        case 8: from.pointer(a.factors.thresholds); break;
        case 9: from.matrix(from.byte() % 2 ? a.A[from.byte()] : a.B[from.byte()]); break;
        case 10: a.call.tokens = from.number(); break;
        case 11: a.call.row_offset = from.number(); break;
        case 12: a.call.col_offset = from.number(); break;
        case 13: a.call.sample = static_cast<std::uint32_t>(from.number()); break;
        case 14: from.pointer(a.call.gains); break;
        case 15: from.matrix(from.byte() % 3 == 0 ? a.x : from.byte() % 2 ? a.base : a.grad); break;
        case 16: from.pointer(a.packed); break;
        case 17: a.packed_bytes = static_cast<std::size_t>(from.number()); break;
        case 18: from.pointer(a.workspace); break;
        case 19: a.workspace_bytes = static_cast<std::size_t>(from.number()); break;
        case 20: from.pointer(from.byte() % 2 ? a.y : a.s); break;
        case 21:
            from.pointer(from.byte() % 3 == 0 ? a.grad_x : from.byte() % 2 ? a.grad_A : a.grad_B);
            break;
        case 22: a.factor_dtype = static_cast<std::int32_t>(from.number()); break;
        case 23: a.call.strata = static_cast<std::uint32_t>(from.number()); break;
        default: a.factors.struct_version = static_cast<std::uint32_t>(from.number());
    }
}

}  // namespace

Tally tally;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Arguments a;
    Bytes bytes = {data, size};
    for (int changes = bytes.byte() % 4; changes > 0; --changes) change(a, bytes);
    for (const Function function : kFunctions) {
        fake = {};
        a.bytes = 12345;
        const lora_ortho_status status = (a.*function)();
        if (status != LORA_ORTHO_OK && (fake.calls != 0 || a.bytes != 12345)) std::abort();
        if (status < LORA_ORTHO_OK || status > LORA_ORTHO_CUDA_ERROR) std::abort();
        ++tally.calls[status];
    }
    ++tally.inputs;
    return 0;
}
