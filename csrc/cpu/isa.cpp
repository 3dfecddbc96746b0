#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lora_ortho::cpu {
namespace {

constexpr int kIsas = LORA_ORTHO_ISA_AMX + 1;

struct Present {
    bool isa[kIsas] = {};
};

#if defined(__x86_64__)

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

// All zero where the processor has no such leaf.
Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) r = Registers{};
    return r;
}

// The register states that the operating system saves (XCR0).
unsigned long long saved_states() {
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<unsigned long long>(high) << 32) | low;
}

constexpr bool all(unsigned long long value, unsigned long long bits) {
    return (value & bits) == bits;
}
constexpr unsigned bit(int n) { return 1u << n; }

bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

// The levels of the x86-64 psABI that GCC's -march=x86-64-v3 and -v4 stand for, and what lies
// above.
Present detect() {
    Present present;
    present.isa[LORA_ORTHO_ISA_BASELINE] = true;
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_1 = cpuid(7, 1);
    const Registers extended = cpuid(0x80000001u, 0);
    constexpr unsigned kOsxsave = bit(27);
    if (!(one.c & kOsxsave)) return present;
    const unsigned long long states = saved_states();
    constexpr unsigned kYmm = bit(1) | bit(2);
    constexpr unsigned kZmm = kYmm | bit(5) | bit(6) | bit(7);
    constexpr unsigned kTiles = bit(17) | bit(18);

    // SSE3, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AVX, F16C; BMI1, AVX2, BMI2; LAHF,
    // LZCNT
    constexpr unsigned kOneC = bit(0) | bit(9) | bit(12) | bit(13) | bit(19) | bit(20) | bit(22) |
                               bit(23) | bit(28) | bit(29);
    const bool v3 = all(one.c, kOneC) && all(seven.b, bit(3) | bit(5) | bit(8)) &&
                    all(extended.c, bit(0) | bit(5)) && all(states, kYmm);
    // AVX512F, DQ, CD, BW, VL
    const bool v4 =
        v3 && all(seven.b, bit(16) | bit(17) | bit(28) | bit(30) | bit(31)) && all(states, kZmm);
    const bool bf16 = v4 && (seven_1.a & bit(5));
    present.isa[LORA_ORTHO_ISA_AVX2] = v3;
    present.isa[LORA_ORTHO_ISA_AVX512] = v4;
    present.isa[LORA_ORTHO_ISA_AVX512_BF16] = bf16;
    // AMX-BF16, AMX-TILE
    present.isa[LORA_ORTHO_ISA_AMX] =
        bf16 && all(seven.d, bit(22) | bit(24)) && all(states, kTiles) && may_use_tiles();
    return present;
}

#else

Present detect() {
    Present present;
    present.isa[LORA_ORTHO_ISA_BASELINE] = true;
    return present;
}

#endif

const Kernels* built_kernels(lora_ortho_isa isa) {
    switch (isa) {
        case LORA_ORTHO_ISA_BASELINE: return kernels_baseline();
        case LORA_ORTHO_ISA_AVX2: return kernels_avx2();
        case LORA_ORTHO_ISA_AVX512: return kernels_avx512();
        case LORA_ORTHO_ISA_AVX512_BF16: return kernels_avx512_bf16();
        case LORA_ORTHO_ISA_AMX: return kernels_amx();
        case LORA_ORTHO_ISA_AUTO: break;
    }
    return nullptr;
}

}  // namespace

bool processor_has(lora_ortho_isa isa) {
    static const Present present = detect();
    return isa >= 0 && isa < kIsas && present.isa[isa];
}

const Kernels* find_kernels(std::int32_t isa, lora_ortho_isa* chosen) {
    const bool automatic = isa == LORA_ORTHO_ISA_AUTO;
    if (isa < 0 || isa >= kIsas) return nullptr;
    for (int i = automatic ? kIsas - 1 : isa; i > LORA_ORTHO_ISA_AUTO; --i) {
        const lora_ortho_isa candidate = static_cast<lora_ortho_isa>(i);
        if (processor_has(candidate)) {
            if (const Kernels* kernels = built_kernels(candidate)) {
                if (chosen) *chosen = candidate;
                return kernels;
            }
        }
        if (!automatic) break;
    }
    return nullptr;
}

}  // namespace lora_ortho::cpu
