// Monte Carlo samples of one merge and the gradient of its weights, through the C interface,
// checked by statistics, against stored values and against a file of known draws, where one is
// given:
//   c++ -std=c++17 main.cpp $(pkg-config --cflags --libs lora_ortho) -o cpp_consumer
#include <lora_ortho/lora_ortho.h>
#include <lora_ortho/mask_stream.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t kTokens = 4, kIn = 24, kOut = 40;
constexpr std::int32_t kAdapters = 3, kSamples = 4000;

void require(lora_ortho_status status) {
    if (status != LORA_ORTHO_OK) throw std::runtime_error(lora_ortho_status_text(status));
}

struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t{LORA_ORTHO_ALIGNMENT}); }
};
std::unique_ptr<void, Free> aligned(std::size_t bytes) {
    return std::unique_ptr<void, Free>(
        ::operator new(bytes, std::align_val_t{LORA_ORTHO_ALIGNMENT}));
}

// Some numbers between -1 and 1.
std::vector<double> numbers(std::int64_t count, std::uint64_t seed) {
    std::vector<double> values;
    for (std::int64_t i = 0; i < count; ++i) {
        values.push_back(
            lora_ortho_draw(seed, 0, static_cast<std::uint64_t>(i), 0, 0, 1, 0) / 32768.0 - 1.0);
    }
    return values;
}

// Three float64 adapters of ranks 1, 2 and 4 on one layer.
class Merge {
public:
    Merge(lora_ortho_method method, const std::vector<double>& p) : gains(kAdapters) {
        std::vector<std::uint32_t> thresholds(kAdapters);
        std::vector<double> keep(kAdapters);
        require(lora_ortho_thresholds(method, kAdapters, p.data(), thresholds.data(), keep.data()));
        for (std::size_t j = 0; j < gains.size(); ++j) gains[j] = 1.0 / keep[j];

        const std::int64_t ranks[kAdapters] = {1, 2, 4};
        std::vector<std::vector<double>> values;
        std::vector<lora_ortho_matrix> A, B;
        for (std::int64_t rank : ranks) {
            values.push_back(numbers(rank * kIn, 10 + values.size()));
            A.push_back({values.back().data(), kIn, 1, LORA_ORTHO_FLOAT64});
            values.push_back(numbers(kOut * rank, 10 + values.size()));
            B.push_back({values.back().data(), rank, 1, LORA_ORTHO_FLOAT64});
        }
        const lora_ortho_factors factors = {LORA_ORTHO_STRUCT_VERSION,
                                            method,
                                            LORA_ORTHO_FLOAT64,
                                            LORA_ORTHO_ISA_AUTO,
                                            kAdapters,
                                            kIn,
                                            kOut,
                                            ranks,
                                            thresholds.data(),
                                            A.data(),
                                            B.data()};
        require(lora_ortho_pack_bytes(&factors, &bytes_));
        packed_ = aligned(bytes_);
        require(lora_ortho_pack(&factors, packed_.get(), bytes_));
    }

    // y (kTokens, kOut) of Monte Carlo sample number `sample`; no base.
    const std::vector<double>& forward(std::uint32_t sample) {
        const lora_ortho_call call = call_of(sample);
        require(
            lora_ortho_forward(packed_.get(), bytes_, &call, &x_, nullptr, y_.data(), s_.data()));
        return y_;
    }

    // Gradients of sum(y * grad) by the gains.
    std::vector<double> backward(std::uint32_t sample, const std::vector<double>& grad) {
        const lora_ortho_call call = call_of(sample);
        const lora_ortho_matrix grad_matrix = {grad.data(), kOut, 1, LORA_ORTHO_FLOAT64};
        std::size_t needed = 0;
        require(lora_ortho_backward_bytes(packed_.get(), bytes_, &call, &needed));
        const auto workspace = aligned(needed);
        std::vector<double> grad_gains(kAdapters);
        require(lora_ortho_backward(packed_.get(), bytes_, &call, &grad_matrix, &x_, s_.data(),
                                    nullptr, nullptr, nullptr, LORA_ORTHO_FLOAT64,
                                    grad_gains.data(), workspace.get(), needed));
        return grad_gains;
    }

    std::vector<double> gains;

private:
    lora_ortho_call call_of(std::uint32_t sample) const {
        lora_ortho_call call{};
        call.struct_version = LORA_ORTHO_STRUCT_VERSION;
        call.sample = sample;
        call.strata = 1;
        call.tokens = kTokens;
        call.seed = 2026;
        call.threads = 1;
        call.gains = gains.data();
        return call;
    }

    std::vector<double> input_ = numbers(kTokens * kIn, 1);
    lora_ortho_matrix x_ = {input_.data(), kIn, 1, LORA_ORTHO_FLOAT64};
    std::vector<double> y_ = std::vector<double>(kTokens * kOut);
    std::vector<double> s_ = std::vector<double>(kTokens * 7);
    std::size_t bytes_ = 0;
    std::unique_ptr<void, Free> packed_;
};

// Sample 0 of the orthogonal merge, row 2, columns 0 .. 5.
constexpr double kStored[] = {-11.644454796348789, -3.4207303264667552, -2.7203381532349136,
                              5.0226314841594197,  -3.1134659752920224, -5.8338725489480465};

// How many blocks of draws in a file of known answers differ from the library's; throws without
// any.
int wrong_blocks(const char* path) {
    std::ifstream file(path);
    int wrong = 0, all = 0;
    for (std::string line; std::getline(file, line);) {
        std::istringstream words(line);
        std::string kind, arrow;
        std::int64_t seed, row, rows, col, cols;
        std::uint32_t stream, sample, lane_set, u;
        if (!(words >> kind >> seed >> stream >> sample >> lane_set >> row >> rows >> col >> cols >>
              arrow) ||
            kind != "block" || arrow != "->") {
            continue;
        }
        std::vector<std::uint16_t> draws(static_cast<std::size_t>(rows * cols));
        require(lora_ortho_draws(static_cast<std::uint64_t>(seed), row, rows, col, cols, stream,
                                 sample, 1, lane_set, draws.data()));
        bool same = true;
        for (const std::uint16_t draw : draws) same = words >> u && draw == u && same;
        wrong += !same;
        ++all;
    }
    if (all == 0) throw std::runtime_error(std::string(path) + " holds no blocks of draws");
    std::printf("%d known blocks of draws, %d differ\n", all, wrong);
    return wrong;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1 && wrong_blocks(argv[1]) > 0) return 1;
    const std::vector<double> p = {2.0 / 3, 2.0 / 3, 2.0 / 3};
    Merge orthogonal(LORA_ORTHO_ORTHOGONAL, p), direct(LORA_ORTHO_DIRECT, p);

    // The mean over samples is the direct merge, within chance.
    const std::vector<double> expected = direct.forward(0);
    std::vector<double> sum(expected.size()), squares(expected.size());
    for (std::int32_t sample = 0; sample < kSamples; ++sample) {
        const std::vector<double>& y = orthogonal.forward(static_cast<std::uint32_t>(sample));
        for (std::size_t i = 0; i < y.size(); ++i) {
            sum[i] += y[i];
            squares[i] += y[i] * y[i];
        }
    }
    double worst = 0.0;
    for (std::size_t i = 0; i < sum.size(); ++i) {
        const double mean = sum[i] / kSamples, variance = squares[i] / kSamples - mean * mean;
        worst = std::fmax(worst, std::fabs(mean - expected[i]) / std::sqrt(variance / kSamples));
    }

    // y is linear in the gains, so sum_j gain_j dgain_j = sum(y * grad).
    const std::vector<double> y = orthogonal.forward(7), grad = numbers(kTokens * kOut, 99);
    const std::vector<double> grad_gains = orthogonal.backward(7, grad);
    double difference = 0.0;
    for (std::size_t i = 0; i < y.size(); ++i) difference -= y[i] * grad[i];
    for (std::size_t j = 0; j < grad_gains.size(); ++j)
        difference += orthogonal.gains[j] * grad_gains[j];

    const std::vector<double>& first = orthogonal.forward(0);
    for (std::size_t n = 0; n < 6; ++n) {
        difference = std::fmax(std::fabs(difference), std::fabs(first[2 * kOut + n] - kStored[n]));
    }

    std::printf(
        "lora_ortho %s: mean of %d samples within %.1f standard errors of the direct merge, "
        "gradient of the gains and stored values within %.1e\n",
        lora_ortho_version(), kSamples, worst, std::fabs(difference));
    return worst < 5.0 && std::fabs(difference) < 1e-10 ? 0 : 1;
}
