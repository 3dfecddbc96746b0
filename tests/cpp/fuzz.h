// What the fuzz target counts for its deterministic driver.
#pragma once

#include <cstddef>
#include <cstdint>

struct Tally {
    long inputs = 0;
    long calls[32] = {};  // by status
};
extern Tally tally;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
