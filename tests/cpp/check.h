// A test harness in one header: TEST(name) { ... CHECK(...); CHECK_EQ(a, b); }, and a main that
// runs all, says what failed where, and ends with "N passed, N failed".
#pragma once

#include <cstdio>
#include <cstring>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace check {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}
inline long& failures() {
    static long count = 0;
    return count;
}
inline long& checks() {
    static long count = 0;
    return count;
}
// What the test is at, printed with a failure.
inline std::string& context() {
    static std::string text;
    return text;
}

struct Registration {
    Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

inline bool verify(bool passed, const std::string& what, const char* file, int line) {
    ++checks();
    constexpr long kShown = 20;
    if (!passed && ++failures() <= kShown) {
        std::printf("  %s:%d: %s%s%s\n", file, line, what.c_str(), context().empty() ? "" : "  at ",
                    context().c_str());
    }
    return passed;
}

// Small integers as numbers, not as characters.
template <class T>
void print(std::ostream& out, const T& value) {
    if constexpr (std::is_integral_v<T>) {
        out << +value;
    } else {
        out << value;
    }
}

template <class A, class B>
bool verify_equal(const A& a, const B& b, const char* what, const char* file, int line) {
    if (a == b) return verify(true, what, file, line);
    std::ostringstream text;
    text << what << ": ";
    print(text, a);
    text << " is not ";
    print(text, b);
    return verify(false, text.str(), file, line);
}

inline int run_all(const char* filter) {
    int passed = 0, failed = 0;
    for (const Test& test : tests()) {
        if (filter && !std::strstr(test.name, filter)) continue;
        const long failures_before = failures(), checks_before = checks();
        context().clear();
        test.body();
        const bool ok = failures() == failures_before && checks() > checks_before;
        ok ? ++passed : ++failed;
        std::printf("%s %s (%ld checks)\n", ok ? "ok    " : "FAILED", test.name,
                    checks() - checks_before);
        std::fflush(stdout);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed > 0 || passed == 0;
}

}  // namespace check

#define TEST(name)                                               \
    static void name();                                          \
    static check::Registration name##_registration(#name, name); \
    static void name()
#define CHECK(condition) check::verify(condition, #condition, __FILE__, __LINE__)
#define CHECK_EQ(a, b) check::verify_equal(a, b, #a " == " #b, __FILE__, __LINE__)
