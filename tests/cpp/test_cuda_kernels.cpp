// The CUDA kernels, run on the CPU, through the C interface: random sizes, strides and alignments
// in buffers of exactly the size that is allowed, against the formula in float64. Under
// AddressSanitizer this finds every access to device memory that is out of bounds.
#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"
#include "compare.h"
#include "layer.h"
#include "lora_ortho/cuda.h"
#include "no_cpu_kernels.h"
#include "run.h"

namespace {

constexpr int kCudaDtypes[] = {LORA_ORTHO_FLOAT32, LORA_ORTHO_BFLOAT16, LORA_ORTHO_FLOAT16};

// The factors of a layer, and float32 gains.
struct Cuda {
    const Layer& layer;
    std::vector<lora_ortho_matrix> A, B;
    std::vector<float> gains;
    lora_ortho_factors factors;
    lora_ortho_cuda_call call{};
    std::uint64_t seed;
    Buffer packed{0};

    Cuda(const Layer& l, bool seed_in_memory) : layer(l), A(l.views(l.A)), B(l.views(l.B)) {
        const Shape& p = l.shape;
        gains.assign(p.gains.begin(), p.gains.end());
        factors = {LORA_ORTHO_STRUCT_VERSION,
                   p.method,
                   p.dtype,
                   0,
                   static_cast<std::int32_t>(p.adapters()),
                   p.d_in,
                   p.d_out,
                   p.ranks.data(),
                   p.thresholds.data(),
                   A.data(),
                   B.data()};
        seed = p.call.seed;
        call.struct_version = LORA_ORTHO_STRUCT_VERSION;
        call.stream = p.call.stream;
        call.sample = p.call.sample;
        call.strata = p.call.strata;
        call.tokens = p.tokens;
        call.row_offset = p.call.row_offset;
        call.col_offset = p.call.col_offset;
        call.seed = seed_in_memory ? ~seed : seed;
        call.seed_pointer = seed_in_memory ? &seed : nullptr;
        call.gains = gains.data();
        std::size_t bytes = 0;
        CHECK_EQ(lora_ortho_cuda_pack_bytes(&factors, &bytes), LORA_ORTHO_OK);
        packed = Buffer(bytes);
        CHECK_EQ(lora_ortho_cuda_pack(&factors, packed.data(), bytes, nullptr), LORA_ORTHO_OK);
        factors.lora_A = factors.lora_B = nullptr;  // not read again
    }
    void forward(bool with_base, Outputs& out) const {
        std::size_t bytes = 0;
        CHECK_EQ(lora_ortho_cuda_forward_bytes(&factors, &call, &bytes), LORA_ORTHO_OK);
        const Buffer workspace(bytes);
        CHECK_EQ(lora_ortho_cuda_forward(&factors, packed.data(), packed.bytes(), &call,
                                         &layer.x.view, with_base ? &layer.base.view : nullptr,
                                         out.y.data(), out.s.data(), workspace.data(), bytes),
                 LORA_ORTHO_OK);
    }
    void backward(Outputs& out) const {
        std::size_t bytes = 0;
        CHECK_EQ(lora_ortho_cuda_backward_bytes(&factors, &call, &bytes), LORA_ORTHO_OK);
        const Buffer workspace(bytes);
        const std::size_t adapters = gains.size();
        Buffer grad_gains(adapters * sizeof(float));
        CHECK_EQ(lora_ortho_cuda_backward(
                     &factors, packed.data(), packed.bytes(), &call, &layer.grad.view,
                     &layer.x.view, out.s.data(), out.grad_x.data(), out.grad_A.data(),
                     out.grad_B.data(), layer.shape.factor_dtype,
                     reinterpret_cast<float*>(grad_gains.data()), workspace.data(), bytes),
                 LORA_ORTHO_OK);
        for (std::size_t j = 0; j < adapters; ++j) {
            store(out.grad_gains.data() + 8 * j, LORA_ORTHO_FLOAT64,
                  load(grad_gains.data() + 4 * j, LORA_ORTHO_FLOAT32));
        }
    }
};

void run_layers(int layers, bool exact_values, std::uint64_t seed) {
    int exact_layers = 0, all_layers = 0;
    for (int method = 0; method < kMethods; ++method) {
        for (const int dtype : kCudaDtypes) {
            for (int i = 0; i < layers; ++i) {
                Numbers numbers(seed + static_cast<std::uint64_t>((method * 8 + dtype) * 1000 + i));
                Shape p = random_shape(numbers, method, dtype);
                if (numbers.below(2)) {  // where the widest accesses may be made
                    p.d_in = (p.d_in + 7) / 8 * 8;
                    p.d_out = (p.d_out + 7) / 8 * 8;
                    p.call.col_offset = 64;
                }
                if (!exact_values) p.call.strata = 1;
                const Layer l = random_layer(numbers, p, exact_values);
                const bool with_base = numbers.below(4) != 0;
                const Formula f(l, with_base);
                const bool exact = exact_values && representable(f.s.value, dtype) &&
                                   representable(f.grad_s.value, dtype);
                exact_layers += exact;
                ++all_layers;
                setenv("LORA_ORTHO_HOST_MULTIPROCESSORS", numbers.below(2) ? "1" : "132", 1);
                check::context() = "layer " + std::to_string(i) + " " + p.text();
                const Cuda cuda(l, numbers.below(2) != 0);
                Outputs out(p);
                cuda.forward(with_base, out);
                cuda.backward(out);
                compare_all(l, f, out, exact);
            }
        }
    }
    check::context().clear();
    if (exact_values) CHECK(exact_layers * 10 >= all_layers * 9);
}

}  // namespace

TEST(integers_come_out_exact) { run_layers(14, true, 1); }

TEST(real_values_lie_within_rounding) { run_layers(5, false, 2); }

TEST(strata_rotate_the_draws_of_every_lane) {
    int lane = 0;
    for (const int method : {LORA_ORTHO_ORTHOGONAL, LORA_ORTHO_DROPOUT}) {
        for (const int dtype : kCudaDtypes) {
            for (const Stratum& stratum : kStrataOfLayers) {
                // Every other layer starts at a multiple of eight columns.
                for (const int column : {lane++ % 8 + 8, 8}) {
                    const Layer l =
                        spelling_layer(method, dtype, 35, column, stratum.sample, stratum.strata);
                    check::context() = l.shape.text();
                    const Cuda cuda(l, false);
                    Outputs out(l.shape);
                    cuda.forward(false, out);
                    cuda.backward(out);
                    compare_spelled(l, Formula(l, false), out);
                }
            }
        }
    }
    check::context().clear();
}

TEST(no_tokens_leave_no_gradients) {
    Numbers numbers(5);
    Shape p = random_shape(numbers, LORA_ORTHO_ORTHOGONAL, LORA_ORTHO_BFLOAT16);
    p.tokens = 0;
    const Layer l = random_layer(numbers, p, true);
    const Cuda cuda(l, false);
    Outputs out(p);
    cuda.forward(true, out);
    cuda.backward(out);
    compare_all(l, Formula(l, true), out, true);
}
