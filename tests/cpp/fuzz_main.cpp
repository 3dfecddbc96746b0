// Runs the fuzz target on inputs from a fixed generator, for compilers without libFuzzer.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "fuzz.h"
#include "lora_ortho/lora_ortho.h"

int main(int argc, char** argv) {
    const long inputs = argc > 1 ? std::atol(argv[1]) : 200000;
    std::mt19937_64 random(2026);
    for (long i = 0; i < inputs; ++i) {
        std::uint8_t data[24];
        for (std::uint8_t& byte : data) byte = static_cast<std::uint8_t>(random() >> 32);
        LLVMFuzzerTestOneInput(data, sizeof data);
    }
    for (int status = 0; status < 32; ++status) {
        if (tally.calls[status] == 0) continue;
        std::printf("  %9ld %s\n", tally.calls[status],
                    lora_ortho_status_text(static_cast<lora_ortho_status>(status)));
    }
    std::printf("%ld inputs tried, %ld calls accepted\n", tally.inputs, tally.calls[LORA_ORTHO_OK]);
    return tally.inputs == inputs && tally.calls[LORA_ORTHO_OK] > 0 ? 0 : 1;
}
