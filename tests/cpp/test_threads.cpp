// Many threads in the C interface at once, on one packed buffer and on their own. ThreadSanitizer
// reports what they share without order; the outputs must be those of one thread alone.
#include <thread>
#include <vector>

#include "check.h"
#include "layer.h"
#include "lora_ortho/cuda.h"
#include "run.h"

namespace {

constexpr int kThreads = 6;

void run_all_at_once(void (*body)(int)) {
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) threads.emplace_back(body, i);
    for (std::thread& thread : threads) thread.join();
}

const Layer& layer() {
    static const Layer one = [] {
        Numbers numbers(11);
        Shape p = random_shape(numbers, LORA_ORTHO_ORTHOGONAL, LORA_ORTHO_FLOAT32);
        p.tokens = p.call.tokens = 40;
        p.call.row_offset = 3;
        return random_layer(numbers, p, false);
    }();
    return one;
}

void merge(const Buffer& packed, Outputs& out) {
    forward(layer(), packed, 1, true, out);
    backward(layer(), packed, 1, out);
}

Buffer* shared_packed = nullptr;
std::vector<Outputs>* results = nullptr;

}  // namespace

TEST(calls_on_one_packed_buffer) {
    Buffer packed = pack(layer(), LORA_ORTHO_ISA_AUTO);
    Outputs alone(layer().shape);
    merge(packed, alone);
    std::vector<Outputs> found;
    for (int i = 0; i < kThreads; ++i) found.emplace_back(layer().shape);
    shared_packed = &packed;
    results = &found;
    run_all_at_once([](int i) {
        Outputs& out = (*results)[static_cast<std::size_t>(i)];
        const lora_ortho_call call = call_of(layer().shape, 1);
        for (int again = 0; again < 4; ++again) {
            lora_ortho_forward(shared_packed->data(), shared_packed->bytes(), &call,
                               &layer().x.view, &layer().base.view, out.y.data(), out.s.data());
            std::size_t bytes = 0;
            lora_ortho_backward_bytes(shared_packed->data(), shared_packed->bytes(), &call, &bytes);
            const Buffer workspace(bytes);
            lora_ortho_backward(
                shared_packed->data(), shared_packed->bytes(), &call, &layer().grad.view,
                &layer().x.view, out.s.data(), out.grad_x.data(), out.grad_A.data(),
                out.grad_B.data(), layer().shape.factor_dtype,
                reinterpret_cast<double*>(out.grad_gains.data()), workspace.data(), bytes);
        }
    });
    for (const Outputs& out : found) CHECK(out == alone);
}

TEST(everything_else_at_once) {
    static int wrong[kThreads];
    run_all_at_once([](int i) {
        const double p[2] = {0.5, 0.75};
        std::uint32_t thresholds[2] = {};
        double keep[2] = {};
        std::uint16_t draws[64] = {};
        for (int again = 0; again < 50; ++again) {
            wrong[i] += lora_ortho_best_isa() == LORA_ORTHO_ISA_AUTO;
            wrong[i] += lora_ortho_has_isa(LORA_ORTHO_ISA_BASELINE) != 1;
            wrong[i] += lora_ortho_thresholds(LORA_ORTHO_ORTHOGONAL, 2, p, thresholds, keep) !=
                        LORA_ORTHO_OK;
            wrong[i] += thresholds[1] != 49152;
            wrong[i] += lora_ortho_draws(7, 0, 8, 0, 8, 0, 0, 1, 0, draws) != LORA_ORTHO_OK;
            wrong[i] += draws[9] != lora_ortho_draw(7, 1, 1, 0, 0, 1, 0);
            wrong[i] += lora_ortho_cuda_available() != LORA_ORTHO_NO_CUDA;
        }
    });
    for (const int count : wrong) CHECK_EQ(count, 0);
}
