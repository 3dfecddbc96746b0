// What an output may be, given the formula.
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <vector>

#include "check.h"
#include "layer.h"
#include "run.h"

// Whether all values are ones that the dtype represents.
inline bool representable(const std::vector<double>& values, int dtype) {
    return std::all_of(values.begin(), values.end(),
                       [&](double v) { return round_to(v, dtype) == v; });
}

// Exact: the value rounded once. Else: within the rounding of the output, plus `slack` of the sum
// of the magnitudes of what was added up.
inline void compare(const char* name, const Buffer& buffer, int dtype, const Expected& expected,
                    bool exact, double slack) {
    const std::size_t size = bytes_of(dtype);
    for (std::size_t i = 0; i < expected.value.size(); ++i) {
        const double got = load(buffer.data() + i * size, dtype);
        const double want = expected.value[i];
        const bool good =
            exact ? got == round_to(want, dtype)
                  : std::fabs(got - want) <= unit_roundoff(dtype) * std::fabs(want) * 1.001 +
                                                 slack * expected.magnitude[i];
        if (!good) {
            std::ostringstream text;
            text.precision(17);
            text << name << "[" << i << "] is " << got << ", not " << want;
            check::verify(false, text.str(), __FILE__, __LINE__);
            return;
        }
    }
    check::verify(true, name, __FILE__, __LINE__);
}

inline void compare_all(const Layer& l, const Formula& f, const Outputs& out, bool exact) {
    const Shape& p = l.shape;
    const int accumulator = accumulator_of(p.dtype);
    const double longest =
        static_cast<double>(std::max({p.d_in, p.d_out, p.rank_sum(), p.tokens})) + 8.0;
    // Sums in float32 (float64); s, scaled s and grad_s may each be rounded to the dtype once.
    const double sums = longest * unit_roundoff(accumulator), once = unit_roundoff(p.dtype);
    compare("s", out.s, p.dtype, f.s, exact, sums);
    compare("y", out.y, p.dtype, f.y, exact, sums + 2 * once);
    compare("grad_x", out.grad_x, p.dtype, f.grad_x, exact, sums + 2 * once);
    compare("grad_A", out.grad_A, p.factor_dtype, f.grad_A, exact, sums + 2 * once);
    compare("grad_B", out.grad_B, p.factor_dtype, f.grad_B, exact, sums + 2 * once);
    compare("grad_gains", out.grad_gains, LORA_ORTHO_FLOAT64, f.grad_gains, exact,
            sums * longest + 2 * once);
}

// What the masks of a spelling_layer decide, each exact in any dtype: y, grad_B, and of grad_s,
// which counts elements, the sum over the tokens.
inline void compare_spelled(const Layer& l, const Formula& f, const Outputs& out) {
    compare("y", out.y, l.shape.dtype, f.y, true, 0.0);
    compare("grad_B", out.grad_B, l.shape.factor_dtype, f.grad_B, true, 0.0);
    compare("grad_gains", out.grad_gains, LORA_ORTHO_FLOAT64, f.grad_gains, true, 0.0);
}
