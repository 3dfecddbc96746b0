// Forward and backward of every instruction set present here against the formula in float64.
//
// Exact cases have small integers for values, so that every product and sum is exact in float32 and
// only the last rounding is left: outputs must be equal to the bit, whatever the order of
// summation. Cases with real values must lie within the rounding of their dtype.
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "compare.h"
#include "layer.h"
#include "lora_ortho/lora_ortho.h"
#include "run.h"

namespace {

// Runs `layers` random layers of each method and dtype on every instruction set.
void run_random_layers(int layers, bool exact_values, std::uint64_t seed) {
    int exact_layers = 0, all_layers = 0;
    for (int method = 0; method < kMethods; ++method) {
        for (int dtype = 0; dtype < kDtypes; ++dtype) {
            for (int i = 0; i < layers; ++i) {
                Numbers numbers(seed +
                                static_cast<std::uint64_t>((method * kDtypes + dtype) * 1000 + i));
                Shape p = random_shape(numbers, method, dtype);
                if (!exact_values) p.call.strata = 1;
                const Layer l = random_layer(numbers, p, exact_values);
                const bool with_base = numbers.below(4) != 0;
                const Formula f(l, with_base);
                // Broadcast inputs can make integers too large for the dtype.
                const bool exact = exact_values && representable(f.s.value, dtype) &&
                                   representable(f.grad_s.value, dtype);
                exact_layers += exact;
                ++all_layers;
                for (const lora_ortho_isa isa : isas()) {
                    const Buffer packed = pack(l, isa);
                    for (const int threads : {1, i % 2 ? 2 : 5}) {
                        check::context() = std::string(lora_ortho_isa_name(isa)) + " threads " +
                                           std::to_string(threads) + " layer " + std::to_string(i) +
                                           " " + l.shape.text();
                        Outputs out(l.shape);
                        forward(l, packed, threads, with_base, out);
                        backward(l, packed, threads, out);
                        compare_all(l, f, out, exact);
                    }
                }
            }
        }
    }
    check::context().clear();
    if (exact_values) CHECK(exact_layers * 10 >= all_layers * 9);
}

}  // namespace

TEST(instruction_sets_present) {
    for (int i = LORA_ORTHO_ISA_BASELINE; i <= LORA_ORTHO_ISA_AMX; ++i) {
        const auto isa = static_cast<lora_ortho_isa>(i);
        std::printf("  %s: %s\n", lora_ortho_isa_name(isa),
                    lora_ortho_has_isa(isa) ? "tested" : "not on this processor or in this build");
    }
    CHECK_EQ(lora_ortho_has_isa(LORA_ORTHO_ISA_BASELINE), 1);
    CHECK(isas().back() == lora_ortho_best_isa());
}

TEST(integers_come_out_exact) { run_random_layers(40, true, 1); }

TEST(real_values_lie_within_rounding) { run_random_layers(15, false, 2); }

TEST(strata_rotate_the_draws_of_every_lane) {
    int lane = 0;
    for (const int method : {LORA_ORTHO_ORTHOGONAL, LORA_ORTHO_DROPOUT}) {
        for (int dtype = 0; dtype < kDtypes; ++dtype) {
            for (const Stratum& stratum : kStrataOfLayers) {
                ++lane;
                for (const std::int64_t tokens : {1, 35}) {
                    const Layer l = spelling_layer(method, dtype, tokens, lane % 16, stratum.sample,
                                                   stratum.strata);
                    const Formula f(l, false);
                    for (const lora_ortho_isa isa : isas()) {
                        check::context() =
                            std::string(lora_ortho_isa_name(isa)) + " " + l.shape.text();
                        const Buffer packed = pack(l, isa);
                        Outputs out(l.shape);
                        forward(l, packed, 1, false, out);
                        backward(l, packed, 1, out);
                        compare_spelled(l, f, out);
                    }
                }
            }
        }
    }
    check::context().clear();
}

TEST(the_same_call_gives_the_same_bits) {
    for (int i = 0; i < 24; ++i) {
        Numbers numbers(300 + static_cast<std::uint64_t>(i));
        Shape p = random_shape(numbers, i % kMethods, i / kMethods % kDtypes);
        p.tokens = p.call.tokens = 70;
        p.call.row_offset = 3;
        const Layer l = random_layer(numbers, p, false);
        for (const lora_ortho_isa isa : isas()) {
            check::context() = std::string(lora_ortho_isa_name(isa)) + " " + p.text();
            const Buffer packed = pack(l, isa);
            for (const int threads : {1, 3}) {
                Outputs first(p), second(p, 0x5a);
                forward(l, packed, threads, true, first);
                backward(l, packed, threads, first);
                forward(l, packed, threads, true, second);
                backward(l, packed, threads, second, 15, 0x5a);
                CHECK(first == second);
            }
        }
    }
}

TEST(outputs_that_are_not_wanted_change_nothing) {
    for (int i = 0; i < 12; ++i) {
        Numbers numbers(400 + static_cast<std::uint64_t>(i));
        const Shape p = random_shape(numbers, i % kMethods, i / kMethods);
        const Layer l = random_layer(numbers, p, false);
        for (const lora_ortho_isa isa : isas()) {
            check::context() = std::string(lora_ortho_isa_name(isa)) + " " + p.text();
            const Buffer packed = pack(l, isa);
            Outputs all(p);
            forward(l, packed, 2, true, all);
            backward(l, packed, 2, all);
            for (int wanted = 0; wanted < 15; ++wanted) {
                Outputs some(p);
                const Outputs untouched(p);
                std::memcpy(some.s.data(), all.s.data(), all.s.bytes());
                backward(l, packed, 2, some, wanted);
                CHECK(some.grad_x == (wanted & 1 ? all : untouched).grad_x);
                CHECK(some.grad_A == (wanted & 2 ? all : untouched).grad_A);
                CHECK(some.grad_B == (wanted & 4 ? all : untouched).grad_B);
                CHECK(some.grad_gains == (wanted & 8 ? all : untouched).grad_gains);
            }
        }
    }
}

TEST(the_result_may_take_the_place_of_the_base) {
    for (int i = 0; i < 12; ++i) {
        Numbers numbers(500 + static_cast<std::uint64_t>(i));
        const Shape p = random_shape(numbers, i % kMethods, i / kMethods);
        const Layer l = random_layer(numbers, p, false);
        for (const lora_ortho_isa isa : isas()) {
            check::context() = std::string(lora_ortho_isa_name(isa)) + " " + p.text();
            const Buffer packed = pack(l, isa);
            Outputs apart(p), in_place(p);
            forward(l, packed, 2, true, apart);
            const std::size_t size = bytes_of(p.dtype);
            for (std::size_t e = 0; e < l.base.values.size(); ++e) {
                store(in_place.y.data() + e * size, p.dtype, l.base.values[e]);
            }
            const lora_ortho_matrix base = {in_place.y.data(), p.d_out, 1, p.dtype};
            const lora_ortho_call call = call_of(p, 2);
            CHECK_EQ(lora_ortho_forward(packed.data(), packed.bytes(), &call, &l.x.view, &base,
                                        in_place.y.data(), in_place.s.data()),
                     LORA_ORTHO_OK);
            CHECK(apart.y == in_place.y);
        }
    }
}

// A and B each of another dtype than x; and everything that was given to pack is overwritten and
// freed before the call.
TEST(factors_of_any_dtype_may_go_after_packing) {
    for (int i = 0; i < kMethods * kDtypes; ++i) {
        Numbers numbers(550 + static_cast<std::uint64_t>(i));
        const Shape p = random_shape(numbers, i % kMethods, i / kMethods);
        const Layer l = random_layer(numbers, p, true);
        for (const lora_ortho_isa isa : isas()) {
            check::context() = std::string(lora_ortho_isa_name(isa)) + " " + p.text();
            Outputs kept(p), gone(p);
            forward(l, pack(l, isa), 2, true, kept);
            backward(l, pack(l, isa), 2, kept);
            Buffer packed{0};
            {
                std::vector<Matrix> A, B;
                std::vector<lora_ortho_matrix> a, b;
                const auto another = [&](const Matrix& m, int dtype) {
                    std::size_t at = 0;
                    return Matrix(m.rows, m.cols, dtype, Lay::kRows,
                                  [&] { return m.values[at++]; });
                };
                for (std::size_t j = 0; j < l.A.size(); ++j) {
                    A.push_back(another(l.A[j], (p.dtype + 1 + static_cast<int>(j)) % kDtypes));
                    B.push_back(another(l.B[j], (p.dtype + 2 + static_cast<int>(j)) % kDtypes));
                    a.push_back(A.back().view);
                    b.push_back(B.back().view);
                }
                std::vector<std::int64_t> ranks = p.ranks;
                std::vector<std::uint32_t> thresholds = p.thresholds;
                const lora_ortho_factors factors = {LORA_ORTHO_STRUCT_VERSION,
                                                    p.method,
                                                    p.dtype,
                                                    isa,
                                                    static_cast<std::int32_t>(p.adapters()),
                                                    p.d_in,
                                                    p.d_out,
                                                    ranks.data(),
                                                    thresholds.data(),
                                                    a.data(),
                                                    b.data()};
                std::size_t bytes = 0;
                CHECK_EQ(lora_ortho_pack_bytes(&factors, &bytes), LORA_ORTHO_OK);
                packed = Buffer(bytes);
                CHECK_EQ(lora_ortho_pack(&factors, packed.data(), bytes), LORA_ORTHO_OK);
                for (auto* all : {&A, &B})
                    for (Matrix& m : *all) std::memset(m.memory.data(), 0xff, m.memory.bytes());
                ranks.assign(ranks.size(), 1);
                thresholds.assign(thresholds.size(), 1);
            }
            forward(l, packed, 2, true, gone);
            backward(l, packed, 2, gone);
            CHECK(gone == kept);
        }
    }
}

// Two calls on the rows above and below a cut, then on the columns on either side of one.
TEST(parts_have_the_masks_of_the_whole) {
    for (int i = 0; i < 24; ++i) {
        Numbers numbers(600 + static_cast<std::uint64_t>(i));
        Shape p = random_shape(numbers, i % kMethods, i / kMethods % kDtypes);
        p.tokens = p.call.tokens = numbers.between(2, 40);
        p.d_out = numbers.between(2, 280);
        p.call.row_offset = numbers.below(1000);
        p.call.col_offset = numbers.below(1000);
        const Layer l = random_layer(numbers, p, true);
        const std::size_t size = bytes_of(p.dtype);
        const std::int64_t row = numbers.between(1, static_cast<int>(p.tokens) - 1);
        const std::int64_t col = numbers.between(1, static_cast<int>(p.d_out) - 1);
        for (const lora_ortho_isa isa : isas()) {
            check::context() = std::string(lora_ortho_isa_name(isa)) + " " + p.text();
            Outputs whole(p);
            forward(l, pack(l, isa), 2, false, whole);
            // [row0, row1) x [col0, col1) computed apart
            const auto part = [&](std::int64_t row0, std::int64_t row1, std::int64_t col0,
                                  std::int64_t col1) {
                Shape q = p;
                q.tokens = q.call.tokens = row1 - row0;
                q.d_out = col1 - col0;
                q.call.row_offset += row0;
                q.call.col_offset += col0;
                std::vector<lora_ortho_matrix> A = l.views(l.A), B = l.views(l.B);
                for (lora_ortho_matrix& m : B) {
                    m.data = static_cast<const char*>(m.data) +
                             col0 * m.row_stride * static_cast<std::int64_t>(bytes_of(m.dtype));
                }
                lora_ortho_matrix x = l.x.view;
                x.data = static_cast<const char*>(x.data) +
                         row0 * x.row_stride * static_cast<std::int64_t>(size);
                const lora_ortho_factors factors = {LORA_ORTHO_STRUCT_VERSION,
                                                    q.method,
                                                    q.dtype,
                                                    isa,
                                                    static_cast<std::int32_t>(q.adapters()),
                                                    q.d_in,
                                                    q.d_out,
                                                    q.ranks.data(),
                                                    q.thresholds.data(),
                                                    A.data(),
                                                    B.data()};
                std::size_t bytes = 0;
                CHECK_EQ(lora_ortho_pack_bytes(&factors, &bytes), LORA_ORTHO_OK);
                const Buffer packed(bytes);
                CHECK_EQ(lora_ortho_pack(&factors, packed.data(), bytes), LORA_ORTHO_OK);
                Outputs out(q);
                const lora_ortho_call call = call_of(q, 1);
                CHECK_EQ(lora_ortho_forward(packed.data(), bytes, &call, &x, nullptr, out.y.data(),
                                            out.s.data()),
                         LORA_ORTHO_OK);
                bool equal = true;
                for (std::int64_t m = row0; m < row1; ++m) {
                    const std::size_t got = static_cast<std::size_t>((m - row0) * q.d_out) * size;
                    const std::size_t want = static_cast<std::size_t>(m * p.d_out + col0) * size;
                    equal &= std::memcmp(out.y.data() + got, whole.y.data() + want,
                                         static_cast<std::size_t>(q.d_out) * size) == 0;
                }
                CHECK(equal);
            };
            part(0, row, 0, p.d_out);
            part(row, p.tokens, 0, p.d_out);
            part(0, p.tokens, 0, col);
            part(0, p.tokens, col, p.d_out);
        }
    }
}

TEST(packed_factors_serve_many_callers_and_may_be_moved) {
    Numbers numbers(700);
    Shape p = random_shape(numbers, LORA_ORTHO_ORTHOGONAL, LORA_ORTHO_FLOAT32);
    p.tokens = p.call.tokens = 33;
    const Layer l = random_layer(numbers, p, false);
    Buffer packed = pack(l, LORA_ORTHO_ISA_AUTO);
    Outputs expected(p);
    forward(l, packed, 1, true, expected);
    backward(l, packed, 1, expected);
    Buffer moved(packed.bytes());
    std::memcpy(moved.data(), packed.data(), packed.bytes());
    std::memset(packed.data(), 0xff, packed.bytes());
    constexpr int kCallers = 4;
    std::vector<Outputs> outputs;
    for (int i = 0; i < kCallers; ++i) outputs.emplace_back(p);
    std::vector<lora_ortho_status> statuses(kCallers, LORA_ORTHO_INTERNAL_ERROR);
    std::vector<std::thread> callers;
    const lora_ortho_call call = call_of(p, 1);
    for (std::size_t i = 0; i < kCallers; ++i) {
        callers.emplace_back([&, i] {
            for (int repeat = 0; repeat < 20; ++repeat) {
                statuses[i] =
                    lora_ortho_forward(moved.data(), moved.bytes(), &call, &l.x.view, &l.base.view,
                                       outputs[i].y.data(), outputs[i].s.data());
            }
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (std::size_t i = 0; i < kCallers; ++i) {
        CHECK_EQ(statuses[i], LORA_ORTHO_OK);
        CHECK(outputs[i].y == expected.y && outputs[i].s == expected.s);
    }
}
