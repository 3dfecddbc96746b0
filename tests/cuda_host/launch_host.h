// Test only: a launch runs all blocks, one after another, before it returns.
#pragma once

#include <cstdint>
#include <functional>

#include "lora_ortho/lora_ortho.h"

namespace lora_ortho::cuda {
namespace host {

// Why the launch failed is printed to stderr.
lora_ortho_status run(std::int64_t blocks, int threads, int shared_bytes,
                      const std::function<void()>& thread_body);

}  // namespace host

template <class Arguments>
lora_ortho_status launch(void (*kernel)(const Arguments), std::int64_t blocks, int threads,
                         int shared_bytes, void*, const Arguments& arguments) {
    return host::run(blocks, threads, shared_bytes, [&] { kernel(arguments); });
}

}  // namespace lora_ortho::cuda
