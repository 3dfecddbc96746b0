// The mask stream against the golden files, and the C interface against the header.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

namespace {

using Words = std::vector<std::string>;

// A line "directive a b -> c d" as its words before and after the arrow.
struct Line {
    std::string directive;
    Words in, out;
};

Line parse(const std::string& text) {
    Line line;
    std::istringstream stream(text);
    stream >> line.directive;
    Words* words = &line.in;
    for (std::string word; stream >> word;) {
        if (word == "->") {
            words = &line.out;
        } else {
            words->push_back(word);
        }
    }
    return line;
}

std::uint64_t number(const std::string& word) {
    return word[0] == '-' ? static_cast<std::uint64_t>(std::strtoll(word.c_str(), nullptr, 10))
                          : std::strtoull(word.c_str(), nullptr, 10);
}
std::uint32_t hex(const std::string& word) {
    return static_cast<std::uint32_t>(std::strtoul(word.c_str(), nullptr, 16));
}

// philox c0 c1 c2 c3 k0 k1 -> o0 o1 o2 o3, hexadecimal
void check_philox(const Line& line) {
    if (!CHECK(line.in.size() == 6 && line.out.size() == 4)) return;
    lora_ortho_words counter;
    for (std::size_t i = 0; i < 4; ++i) counter.word[i] = hex(line.in[i]);
    const lora_ortho_words out = lora_ortho_philox4x32_7(counter, hex(line.in[4]), hex(line.in[5]));
    for (std::size_t i = 0; i < 4; ++i) CHECK_EQ(out.word[i], hex(line.out[i]));
}

// One draw, by the header and by the C function.
void check_one(std::uint64_t seed, std::uint32_t row, std::uint64_t col, std::uint32_t stream,
               std::uint32_t sample, std::uint32_t strata, std::uint32_t lane_set,
               std::uint32_t expected) {
    CHECK_EQ(lora_ortho_draw(seed, row, col, stream, sample, strata, lane_set), expected);
    std::uint16_t drawn = 0;
    CHECK_EQ(lora_ortho_draws(seed, row, 1, static_cast<std::int64_t>(col), 1, stream, sample,
                              strata, lane_set, &drawn),
             LORA_ORTHO_OK);
    CHECK_EQ(drawn, expected);
}

// draw seed stream sample lane_set row col -> u
void check_draw(const Line& line) {
    if (!CHECK(line.in.size() == 6 && line.out.size() == 1)) return;
    const std::uint64_t seed = number(line.in[0]), col = number(line.in[5]);
    const auto u32 = [&](std::size_t i) { return static_cast<std::uint32_t>(number(line.in[i])); };
    const std::uint32_t expected = static_cast<std::uint32_t>(number(line.out[0]));
    check_one(seed, u32(4), col, u32(1), u32(2), 1, u32(3), expected);
}

// strata seed stream sample strata lane_set row col -> u
void check_strata(const Line& line) {
    if (!CHECK(line.in.size() == 7 && line.out.size() == 1)) return;
    const auto u32 = [&](std::size_t i) { return static_cast<std::uint32_t>(number(line.in[i])); };
    check_one(number(line.in[0]), u32(5), number(line.in[6]), u32(1), u32(2), u32(3), u32(4),
              static_cast<std::uint32_t>(number(line.out[0])));
}

// block seed stream sample lane_set row_offset rows col_offset cols -> u ...
void check_block(const Line& line) {
    if (!CHECK(line.in.size() == 8)) return;
    const auto u32 = [&](std::size_t i) { return static_cast<std::uint32_t>(number(line.in[i])); };
    const auto i64 = [&](std::size_t i) { return static_cast<std::int64_t>(number(line.in[i])); };
    std::vector<std::uint16_t> out(line.out.size());
    if (!CHECK_EQ(i64(5) * i64(7), static_cast<std::int64_t>(out.size()))) return;
    CHECK_EQ(lora_ortho_draws(number(line.in[0]), i64(4), i64(5), i64(6), i64(7), u32(1), u32(2), 1,
                              u32(3), out.data()),
             LORA_ORTHO_OK);
    for (std::size_t i = 0; i < out.size(); ++i) CHECK_EQ(out[i], number(line.out[i]));
}

// p_1 .. p_K -> T_1 .. T_K, and the keep probabilities that follow from them
void check_thresholds_of(lora_ortho_method method, const Line& line) {
    const std::size_t adapters = line.in.size();
    if (!CHECK(adapters > 0 && line.out.size() == adapters)) return;
    std::vector<double> p, keep(adapters);
    std::vector<std::uint32_t> thresholds(adapters);
    for (const std::string& word : line.in) p.push_back(std::strtod(word.c_str(), nullptr));
    CHECK_EQ(lora_ortho_thresholds(method, static_cast<std::int32_t>(adapters), p.data(),
                                   thresholds.data(), keep.data()),
             LORA_ORTHO_OK);
    std::uint32_t below = 0;
    for (std::size_t j = 0; j < adapters; ++j) {
        CHECK_EQ(thresholds[j], number(line.out[j]));
        CHECK_EQ(keep[j], (thresholds[j] - below) / 65536.0);
        if (method == LORA_ORTHO_ORTHOGONAL) below = thresholds[j];
    }
}
void check_thresholds(const Line& line) { check_thresholds_of(LORA_ORTHO_ORTHOGONAL, line); }
void check_dropout(const Line& line) { check_thresholds_of(LORA_ORTHO_DROPOUT, line); }

// owner u T_1 .. T_K -> j
void check_owner(const Line& line) {
    if (!CHECK(!line.in.empty() && line.out.size() == 1)) return;
    std::vector<std::uint32_t> thresholds;
    for (std::size_t i = 1; i < line.in.size(); ++i) {
        thresholds.push_back(static_cast<std::uint32_t>(number(line.in[i])));
    }
    CHECK_EQ(lora_ortho_owner(static_cast<std::uint32_t>(number(line.in[0])), thresholds.data(),
                              static_cast<std::int32_t>(thresholds.size())),
             static_cast<std::int32_t>(number(line.out[0])));
}

// keep u T -> 0 or 1
void check_keep(const Line& line) {
    if (!CHECK(line.in.size() == 2 && line.out.size() == 1)) return;
    CHECK_EQ(lora_ortho_keeps(static_cast<std::uint32_t>(number(line.in[0])),
                              static_cast<std::uint32_t>(number(line.in[1]))),
             static_cast<int>(number(line.out[0])));
}

}  // namespace

TEST(golden_files) {
    const std::map<std::string, void (*)(const Line&)> directives = {
        {"philox", check_philox},   {"draw", check_draw},
        {"block", check_block},     {"thresholds", check_thresholds},
        {"dropout", check_dropout}, {"owner", check_owner},
        {"keep", check_keep},       {"strata", check_strata}};
    std::map<std::string, int> seen;
    for (const char* name : {"mask_stream.kat", "independent.kat", "strata.kat"}) {
        std::ifstream file(std::string(LORA_ORTHO_GOLDEN_DIR "/") + name);
        CHECK(file.is_open());
        int number = 0;
        for (std::string text; std::getline(file, text);) {
            check::context() = std::string(name) + ":" + std::to_string(++number);
            const Line line = parse(text);
            if (line.directive.empty() || line.directive[0] == '#') continue;
            const auto entry = directives.find(line.directive);
            if (!CHECK(entry != directives.end())) continue;
            entry->second(line);
            ++seen[line.directive];
        }
    }
    check::context().clear();
    for (const auto& directive : directives) CHECK(seen[directive.first] > 0);
    CHECK(seen["draw"] >= 281);
    CHECK(seen["strata"] >= 114);
}

TEST(a_rectangle_of_draws_is_the_draws_of_its_elements) {
    constexpr std::int64_t kRows = 5;
    for (const std::int64_t col0 :
         {std::int64_t{0}, std::int64_t{3}, (std::int64_t{1} << 35) - 21}) {
        for (const std::int64_t cols : {1, 4, 5, 8, 13, 21}) {
            const std::int64_t row0 = (std::int64_t{1} << 32) - kRows;
            std::vector<std::uint16_t> out(static_cast<std::size_t>(kRows * cols), 0xffff);
            CHECK_EQ(lora_ortho_draws(~7ull, row0, kRows, col0, cols, 0xfffffffeu, 0xffffffu, 7,
                                      255, out.data()),
                     LORA_ORTHO_OK);
            for (std::int64_t i = 0; i < kRows * cols; ++i) {
                const std::uint32_t expected = lora_ortho_draw(
                    ~7ull, static_cast<std::uint32_t>(row0 + i / cols),
                    static_cast<std::uint64_t>(col0 + i % cols), 0xfffffffeu, 0xffffffu, 7, 255);
                CHECK_EQ(out[static_cast<std::size_t>(i)], expected);
            }
        }
    }
}

// Where S * (T_j - T_{j-1}) / 65536 is a whole number and S a power of two, every element meets the
// adapter in exactly so many samples of a block.
TEST(a_block_of_strata_shares_every_element_out) {
    constexpr std::uint32_t kStrata = 8, kBlock = 5;
    const std::uint32_t thresholds[] = {3 * 8192, 4 * 8192, 6 * 8192};
    for (std::uint64_t col = 3; col < 300; ++col) {
        int met[] = {0, 0, 0, 0};  // the last: nobody
        for (std::uint32_t i = 0; i < kStrata; ++i) {
            const std::uint32_t draw =
                lora_ortho_draw(1, 2, col, 3, kBlock * kStrata + i, kStrata, 0);
            const std::int32_t owner = lora_ortho_owner(draw, thresholds, 3);
            ++met[owner < 0 ? 3 : owner];
        }
        CHECK(met[0] == 3 && met[1] == 1 && met[2] == 2 && met[3] == 2);
    }
}

TEST(owners_and_keeps_at_the_edges_of_thresholds) {
    const std::uint32_t thresholds[] = {1, 32768, 65535, 65536};
    CHECK_EQ(lora_ortho_owner(0, thresholds, 4), 0);
    CHECK_EQ(lora_ortho_owner(1, thresholds, 4), 1);
    CHECK_EQ(lora_ortho_owner(32767, thresholds, 4), 1);
    CHECK_EQ(lora_ortho_owner(32768, thresholds, 4), 2);
    CHECK_EQ(lora_ortho_owner(65534, thresholds, 4), 2);
    CHECK_EQ(lora_ortho_owner(65535, thresholds, 4), 3);
    CHECK_EQ(lora_ortho_owner(65535, thresholds, 3), -1);
    CHECK_EQ(lora_ortho_owner(0, thresholds, 0), -1);
    CHECK_EQ(lora_ortho_keeps(0, 0), 0);
    CHECK_EQ(lora_ortho_keeps(65535, 65536), 1);
    CHECK_EQ(lora_ortho_keeps(65535, 65535), 0);
}

TEST(thresholds_of_dropout_and_direct) {
    const double p[] = {0.0, 0.3, 0.9999847412109375, 0.5};
    const std::uint32_t expected[] = {65536, 45875, 1, 32768};
    std::uint32_t thresholds[4];
    double keep[4];
    CHECK_EQ(lora_ortho_thresholds(LORA_ORTHO_DROPOUT, 4, p, thresholds, keep), LORA_ORTHO_OK);
    for (int j = 0; j < 4; ++j) {
        CHECK_EQ(thresholds[j], expected[j]);
        CHECK_EQ(keep[j], expected[j] / 65536.0);
    }
    CHECK_EQ(lora_ortho_thresholds(LORA_ORTHO_DIRECT, 4, p, thresholds, keep), LORA_ORTHO_OK);
    CHECK(std::all_of(thresholds, thresholds + 4, [](std::uint32_t t) { return t == 65536; }));
    CHECK(std::all_of(keep, keep + 4, [](double k) { return k == 1.0; }));
}

TEST(a_half_rounds_up_and_a_little_above_one_counts_as_one) {
    double p[64], keep[64];
    std::uint32_t thresholds[64];
    for (double& rate : p) rate = 1.0 - (0x1p-10 + 0x1p-23);
    CHECK_EQ(lora_ortho_thresholds(LORA_ORTHO_ORTHOGONAL, 64, p, thresholds, keep), LORA_ORTHO_OK);
    CHECK_EQ(thresholds[62], 63u * 64u);       // 65536 * sum = 4032.49
    CHECK_EQ(thresholds[63], 64u * 64u + 1u);  // 65536 * sum = 4096.5
    const double above[] = {0.5, 0.5 - 9e-10}, far_above[] = {0.5, 0.5 - 1.1e-9};
    CHECK_EQ(lora_ortho_thresholds(LORA_ORTHO_ORTHOGONAL, 2, above, thresholds, keep),
             LORA_ORTHO_OK);
    CHECK_EQ(thresholds[1], 65536u);
    CHECK_EQ(lora_ortho_thresholds(LORA_ORTHO_ORTHOGONAL, 2, far_above, thresholds, keep),
             LORA_ORTHO_BAD_RATE);
}

TEST(thresholds_are_checked) {
    const double good[] = {0.5, 0.5}, above[] = {0.5, 0.4}, one[] = {0.5, 1.0};
    const double negative[] = {-0.1, 0.5}, not_a_number[] = {NAN, 0.5}, tiny[] = {0.5, 0.999999};
    std::uint32_t thresholds[2] = {7, 7};
    double keep[2] = {7, 7};
    const auto status = [&](int method, int adapters, const double* p) {
        return lora_ortho_thresholds(static_cast<lora_ortho_method>(method), adapters, p,
                                     thresholds, keep);
    };
    CHECK_EQ(status(3, 2, good), LORA_ORTHO_BAD_METHOD);
    CHECK_EQ(status(0, 0, good), LORA_ORTHO_BAD_ADAPTERS);
    CHECK_EQ(status(0, 256, good), LORA_ORTHO_BAD_ADAPTERS);
    CHECK_EQ(status(0, 2, nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(status(0, 2, reinterpret_cast<const double*>(reinterpret_cast<const char*>(good) + 4)),
             LORA_ORTHO_MISALIGNED);
    CHECK_EQ(status(0, 2, above), LORA_ORTHO_BAD_RATE);
    CHECK_EQ(status(0, 2, one), LORA_ORTHO_BAD_RATE);
    CHECK_EQ(status(1, 2, negative), LORA_ORTHO_BAD_RATE);
    CHECK_EQ(status(1, 2, not_a_number), LORA_ORTHO_BAD_RATE);
    CHECK_EQ(status(0, 2, tiny), LORA_ORTHO_BAD_THRESHOLD);
    CHECK_EQ(status(1, 2, tiny), LORA_ORTHO_BAD_THRESHOLD);
    CHECK(thresholds[0] == 7 && thresholds[1] == 7 && keep[0] == 7 && keep[1] == 7);
    CHECK_EQ(status(1, 2, above), LORA_ORTHO_OK);
    CHECK_EQ(lora_ortho_thresholds(LORA_ORTHO_DROPOUT, 2, good, nullptr, keep),
             LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(lora_ortho_thresholds(LORA_ORTHO_DROPOUT, 2, good, thresholds, nullptr),
             LORA_ORTHO_NULL_POINTER);
}

TEST(draws_are_checked) {
    constexpr std::int64_t kRows = std::int64_t{1} << 32, kCols = std::int64_t{1} << 35;
    std::uint16_t out[4] = {7, 7, 7, 7};
    const auto status = [&](std::int64_t row0, std::int64_t rows, std::int64_t col0,
                            std::int64_t cols, std::uint32_t sample, std::uint32_t lane_set) {
        return lora_ortho_draws(0, row0, rows, col0, cols, 0, sample, 1, lane_set, out);
    };
    const auto stratified = [&](std::uint32_t strata) {
        return lora_ortho_draws(0, 0, 1, 0, 1, 0, 0, strata, 0, out);
    };
    CHECK_EQ(stratified(0), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(stratified(65537), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(stratified(UINT32_MAX), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(status(0, -1, 0, 1, 0, 0), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(status(0, 1, 0, -1, 0, 0), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(status(0, kRows, 0, kCols, 0, 0), LORA_ORTHO_BAD_SIZE);
    CHECK_EQ(status(-1, 1, 0, 1, 0, 0), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(status(0, 1, -1, 1, 0, 0), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(status(kRows, 1, 0, 1, 0, 0), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(status(INT64_MAX, 1, 0, 1, 0, 0), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(status(0, 1, kCols - 1, 2, 0, 0), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(status(0, 1, 0, 1, 1u << 24, 0), LORA_ORTHO_BAD_COORDINATE);
    CHECK_EQ(status(0, 1, 0, 1, 0, 256), LORA_ORTHO_BAD_COORDINATE);
    CHECK(out[0] == 7 && out[1] == 7);
    CHECK_EQ(lora_ortho_draws(0, 0, 1, 0, 1, 0, 0, 1, 0, nullptr), LORA_ORTHO_NULL_POINTER);
    CHECK_EQ(lora_ortho_draws(0, 0, 1, 0, 1, 0, 0, 1, 0,
                              reinterpret_cast<std::uint16_t*>(reinterpret_cast<char*>(out) + 1)),
             LORA_ORTHO_MISALIGNED);
    CHECK_EQ(lora_ortho_draws(0, 0, 0, 0, 5, 0, 0, 1, 0, nullptr), LORA_ORTHO_OK);
    CHECK_EQ(lora_ortho_draws(0, 0, 5, 0, 0, 0, 0, 1, 0, nullptr), LORA_ORTHO_OK);
    CHECK_EQ(status(kRows - 1, 1, kCols - 4, 4, 0, 0), LORA_ORTHO_OK);
    CHECK_EQ(stratified(65536), LORA_ORTHO_OK);
}
