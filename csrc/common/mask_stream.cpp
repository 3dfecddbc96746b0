// The mask stream behind the C interface: thresholds and draws.
#include <algorithm>
#include <cmath>

#include "common/checks.h"
#include "common/draw.h"
#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

namespace lora_ortho {
namespace {

constexpr double kDrawLimit = LORA_ORTHO_DRAW_LIMIT;
constexpr double kSumSlack = 1e-9;  // keeps that sum to this much above 1 count as 1

// 1 - p in units of 2^-53: exact, since float64 rounds every 1 - p to a multiple of 2^-53. So sums
// of up to 255 are exact in 64 bits, and rounding one to float64 gives what math.fsum gives.
std::uint64_t keep_units(double p) { return static_cast<std::uint64_t>(std::ldexp(1.0 - p, 53)); }

double as_double(std::uint64_t units) { return std::ldexp(static_cast<double>(units), -53); }

std::uint32_t threshold_of(double keep) {
    const double threshold = std::floor(kDrawLimit * keep + 0.5);
    return static_cast<std::uint32_t>(threshold < kDrawLimit ? threshold : kDrawLimit);
}

struct Stream {
    std::uint32_t thresholds[LORA_ORTHO_MAX_ADAPTERS];
    double keep[LORA_ORTHO_MAX_ADAPTERS];
};

Status thresholds_of(Draw draw, std::int32_t adapters, const double* p, Stream& stream) {
    const bool shared = draw == Draw::kShared;
    std::uint64_t sum = 0;
    for (std::int32_t j = 0; j < adapters; ++j) {
        if (!(p[j] >= 0.0 && p[j] < 1.0)) return LORA_ORTHO_BAD_RATE;
        sum += keep_units(p[j]);
    }
    if (shared && as_double(sum) > 1.0 + kSumSlack) return LORA_ORTHO_BAD_RATE;
    sum = 0;
    std::uint32_t below = 0;
    for (std::int32_t j = 0; j < adapters; ++j) {
        sum = keep_units(p[j]) + (shared ? sum : 0);
        const std::uint32_t threshold = threshold_of(as_double(sum));
        if (threshold <= below) return LORA_ORTHO_BAD_THRESHOLD;
        stream.thresholds[j] = threshold;
        stream.keep[j] = (threshold - below) / kDrawLimit;
        below = shared ? threshold : 0;
    }
    return LORA_ORTHO_OK;
}

void draw_row(std::uint64_t seed, std::uint32_t row, std::uint64_t col0, std::uint64_t cols,
              std::uint32_t stream, std::uint32_t sample, std::uint32_t strata,
              std::uint32_t lane_set, std::uint16_t* out) {
    for (std::uint64_t col = col0; col < col0 + cols;) {
        const lora_ortho_words block = lora_ortho_draw_block(
            seed, row, static_cast<std::uint32_t>(col >> 3), stream, sample, strata, lane_set);
        do {
            *out++ = static_cast<std::uint16_t>(lora_ortho_draw_of(block, col++));
        } while ((col & 7u) != 0 && col < col0 + cols);
    }
}

}  // namespace
}  // namespace lora_ortho

using namespace lora_ortho;

extern "C" {

lora_ortho_status lora_ortho_thresholds(lora_ortho_method method, int32_t adapters, const double* p,
                                        uint32_t* thresholds, double* keep) {
    const Draw draw = draw_of(method);
    if (!is_draw(draw)) return LORA_ORTHO_BAD_METHOD;
    if (!is_adapters(adapters)) return LORA_ORTHO_BAD_ADAPTERS;
    LORA_ORTHO_CHECK(check_pointer(p, alignof(double)));
    LORA_ORTHO_CHECK(check_pointer(thresholds, alignof(std::uint32_t)));
    LORA_ORTHO_CHECK(check_pointer(keep, alignof(double)));
    if (draw == Draw::kNone) {
        std::fill_n(thresholds, adapters, LORA_ORTHO_DRAW_LIMIT);
        std::fill_n(keep, adapters, 1.0);
        return LORA_ORTHO_OK;
    }
    Stream stream;
    LORA_ORTHO_CHECK(thresholds_of(draw, adapters, p, stream));
    std::copy_n(stream.thresholds, adapters, thresholds);
    std::copy_n(stream.keep, adapters, keep);
    return LORA_ORTHO_OK;
}

lora_ortho_status lora_ortho_draws(uint64_t seed, int64_t row0, int64_t rows, int64_t col0,
                                   int64_t cols, uint32_t stream, uint32_t sample, uint32_t strata,
                                   uint32_t lane_set, uint16_t* out) {
    if (rows < 0 || cols < 0) return LORA_ORTHO_BAD_SIZE;
    if (row0 < 0 || rows > LORA_ORTHO_ROW_LIMIT - row0 || col0 < 0 ||
        cols > LORA_ORTHO_COL_LIMIT - col0 || sample >= LORA_ORTHO_SAMPLE_LIMIT ||
        !is_strata(strata) || lane_set >= LORA_ORTHO_LANE_SET_LIMIT) {
        return LORA_ORTHO_BAD_COORDINATE;
    }
    if (!fits(rows, cols, sizeof(std::uint16_t))) return LORA_ORTHO_BAD_SIZE;
    if (rows == 0 || cols == 0) return LORA_ORTHO_OK;
    LORA_ORTHO_CHECK(check_pointer(out, alignof(std::uint16_t)));
    for (std::int64_t i = 0; i < rows; ++i) {
        draw_row(seed, static_cast<std::uint32_t>(row0 + i), static_cast<std::uint64_t>(col0),
                 static_cast<std::uint64_t>(cols), stream, sample, strata, lane_set,
                 out + i * cols);
    }
    return LORA_ORTHO_OK;
}

}  // extern "C"
