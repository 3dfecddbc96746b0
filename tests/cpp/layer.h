// One merge for the tests: strided inputs, exactly sized and poisoned outputs, and the formula in
// float64, element by element, with bounds for what rounding may change.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"
#include "numbers.h"

// Memory of exactly so many bytes, all NaN at first, so that what is not written shows, and so
// does, under AddressSanitizer, what is written beyond. It starts `skew` bytes behind an aligned
// address.
class Buffer {
public:
    explicit Buffer(std::size_t bytes, std::size_t skew = 0, int poison = 0xff)
        : bytes_(bytes), skew_(skew) {
        void* p = nullptr;
        if (posix_memalign(&p, LORA_ORTHO_ALIGNMENT, bytes + skew + (bytes + skew == 0)) != 0) {
            std::abort();
        }
        memory_.reset(static_cast<char*>(p));
        std::memset(p, poison, bytes + skew);
    }
    char* data() const { return memory_.get() + skew_; }
    std::size_t bytes() const { return bytes_; }
    bool operator==(const Buffer& other) const {
        return bytes_ == other.bytes_ && std::memcmp(data(), other.data(), bytes_) == 0;
    }

private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    std::size_t bytes_, skew_;
    std::unique_ptr<char, Free> memory_;
};

// How a matrix lies in memory.
enum class Lay {
    kRows,
    kColumns,
    kPadded,
    kEverySecond,
    kOneRow,
    kOneColumn,
    kOneValue,
    kUp,
    kBack
};
constexpr int kLays = 9;

// A (rows, cols) matrix of a dtype; `values` holds what its strides make of it.
struct Matrix {
    std::int64_t rows, cols;
    Buffer memory{0};
    lora_ortho_matrix view{};
    std::vector<double> values;

    template <class Generate>
    Matrix(std::int64_t rows_, std::int64_t cols_, int dtype, Lay lay, Generate&& generate)
        : rows(rows_), cols(cols_) {
        std::int64_t rs = cols, cs = 1, origin = 0;
        switch (lay) {
            case Lay::kRows: break;
            case Lay::kColumns: rs = 1, cs = rows; break;
            case Lay::kPadded: rs = cols + 3; break;
            case Lay::kEverySecond: rs = 2 * cols + 1, cs = 2; break;
            case Lay::kOneRow: rs = 0; break;
            case Lay::kOneColumn: rs = 1, cs = 0; break;
            case Lay::kOneValue: rs = cs = 0; break;
            case Lay::kUp: rs = -cols, origin = (rows - 1) * cols; break;
            case Lay::kBack: rs = -cols, cs = -1, origin = rows * cols - 1; break;
        }
        const std::size_t size = bytes_of(dtype);
        const bool empty = rows == 0 || cols == 0;
        const std::int64_t extent = empty    ? 0
                                    : origin ? rows * cols
                                             : (rows - 1) * rs + (cols - 1) * cs + 1;
        memory = Buffer(static_cast<std::size_t>(extent) * size, size);
        char* first = memory.data() + (empty ? 0 : origin) * static_cast<std::int64_t>(size);
        view = {first, rs, cs, dtype};
        const auto address = [&](std::int64_t i, std::int64_t j) {
            return first + (i * rs + j * cs) * static_cast<std::int64_t>(size);
        };
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < cols; ++j) store(address(i, j), dtype, generate());
        }
        for (std::int64_t i = 0; i < rows; ++i) {
            for (std::int64_t j = 0; j < cols; ++j) values.push_back(load(address(i, j), dtype));
        }
    }
    double operator()(std::int64_t i, std::int64_t j) const {
        return values[static_cast<std::size_t>(i * cols + j)];
    }
};

// What the formula gives for each element of an output, and the sum of the magnitudes of all
// products of inputs in it, which bounds how far rounding may lead, in the steps before as in this
// one.
struct Expected {
    std::int64_t cols;
    std::vector<double> value, magnitude;

    Expected(std::int64_t rows, std::int64_t cols_)
        : cols(cols_), value(static_cast<std::size_t>(rows * cols_)), magnitude(value.size()) {}
    // Adds factor * (what `of` is at its index `from`); without `of`, the factor.
    void add(std::size_t to, double factor) {
        value[to] += factor;
        magnitude[to] += std::fabs(factor);
    }
    void add(std::size_t to, double factor, const Expected& of, std::size_t from) {
        value[to] += factor * of.value[from];
        magnitude[to] += std::fabs(factor) * of.magnitude[from];
    }
    std::size_t at(std::int64_t i, std::int64_t j) const {
        return static_cast<std::size_t>(i * cols + j);
    }
};

struct Shape {
    int method, dtype, factor_dtype;
    std::int64_t tokens, d_in, d_out;
    std::vector<std::int64_t> ranks;
    std::vector<std::uint32_t> thresholds;
    std::vector<double> gains;
    lora_ortho_call call;  // gains and tokens are set where it is used

    std::int64_t adapters() const { return static_cast<std::int64_t>(ranks.size()); }
    std::int64_t rank_sum() const {
        std::int64_t sum = 0;
        for (const std::int64_t rank : ranks) sum += rank;
        return sum;
    }
    std::string text() const {
        std::ostringstream out;
        out << "method " << method << " dtype " << dtype << " tokens " << tokens << " d_in " << d_in
            << " d_out " << d_out << " row_offset " << call.row_offset << " col_offset "
            << call.col_offset << " sample " << call.sample << " strata " << call.strata
            << " ranks";
        for (const std::int64_t rank : ranks) out << " " << rank;
        return out.str();
    }
};

// The inputs of a merge.
struct Layer {
    Shape shape;
    std::vector<Matrix> A, B;
    Matrix x, base, grad;

    // Whether adapter j contributes to element (m, n).
    bool kept(std::int64_t m, std::int64_t n, int j) const {
        if (shape.method == LORA_ORTHO_DIRECT) return true;
        const lora_ortho_call& c = shape.call;
        const bool orthogonal = shape.method == LORA_ORTHO_ORTHOGONAL;
        const std::uint32_t u =
            lora_ortho_draw(c.seed, static_cast<std::uint32_t>(c.row_offset + m),
                            static_cast<std::uint64_t>(c.col_offset + n), c.stream, c.sample,
                            c.strata, orthogonal ? 0u : static_cast<std::uint32_t>(j));
        if (!orthogonal) return lora_ortho_keeps(u, shape.thresholds[static_cast<std::size_t>(j)]);
        return lora_ortho_owner(u, shape.thresholds.data(),
                                static_cast<std::int32_t>(shape.adapters())) == j;
    }
    std::vector<lora_ortho_matrix> views(const std::vector<Matrix>& matrices) const {
        std::vector<lora_ortho_matrix> all;
        for (const Matrix& matrix : matrices) all.push_back(matrix.view);
        return all;
    }
};

// All outputs of the formula. grad_s = dL/grad_s, gains folded in; saved = s as it is kept in its
// dtype; grad_B one block (d_out, r_j) after another.
struct Formula {
    Expected s, saved, y, grad_s, grad_x, grad_A, grad_B, grad_gains;

    Formula(const Layer& l, bool with_base)
        : s(l.shape.tokens, l.shape.rank_sum()),
          saved(s),
          y(l.shape.tokens, l.shape.d_out),
          grad_s(s),
          grad_x(l.shape.tokens, l.shape.d_in),
          grad_A(l.shape.rank_sum(), l.shape.d_in),
          grad_B(1, l.shape.d_out * l.shape.rank_sum()),
          grad_gains(1, l.shape.adapters()) {
        const Shape& p = l.shape;
        std::int64_t begin = 0;
        for (int j = 0; j < p.adapters(); ++j) {
            const std::size_t at = static_cast<std::size_t>(j);
            for (std::int64_t m = 0; m < p.tokens; ++m) {
                shrink(l, m, begin, l.A[at]);
                expand(l, m, begin, l.B[at], j);
                grad_x_grad_A(l, m, begin, l.A[at]);
            }
            begin += p.ranks[at];
        }
        for (std::int64_t m = 0; with_base && m < p.tokens; ++m) {
            for (std::int64_t n = 0; n < p.d_out; ++n) y.add(y.at(m, n), l.base(m, n));
        }
    }

private:
    void shrink(const Layer& l, std::int64_t m, std::int64_t begin, const Matrix& A) {
        for (std::int64_t r = 0; r < A.rows; ++r) {
            const std::size_t at = s.at(m, begin + r);
            for (std::int64_t i = 0; i < A.cols; ++i) s.add(at, l.x(m, i) * A(r, i));
            saved.value[at] = round_to(s.value[at], l.shape.dtype);
            saved.magnitude[at] = s.magnitude[at];
        }
    }
    void expand(const Layer& l, std::int64_t m, std::int64_t begin, const Matrix& B, int j) {
        const double gain = l.shape.gains[static_cast<std::size_t>(j)];
        for (std::int64_t n = 0; n < B.rows; ++n) {
            if (!l.kept(m, n, j)) continue;
            const double g = l.grad(m, n);
            for (std::int64_t r = 0; r < B.cols; ++r) {
                const std::size_t at = s.at(m, begin + r);
                y.add(y.at(m, n), gain * B(n, r), saved, at);
                grad_s.add(at, gain * g * B(n, r));
                grad_B.add(grad_B.at(0, l.shape.d_out * begin + n * B.cols + r), gain * g, saved,
                           at);
                grad_gains.add(grad_gains.at(0, j), g * B(n, r), saved, at);
            }
        }
    }
    void grad_x_grad_A(const Layer& l, std::int64_t m, std::int64_t begin, const Matrix& A) {
        for (std::int64_t r = 0; r < A.rows; ++r) {
            const std::size_t at = grad_s.at(m, begin + r);
            for (std::int64_t i = 0; i < A.cols; ++i) {
                grad_x.add(grad_x.at(m, i), A(r, i), grad_s, at);
                grad_A.add(grad_A.at(begin + r, i), l.x(m, i), grad_s, at);
            }
        }
    }
};
