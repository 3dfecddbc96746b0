// Stackful coroutines on one operating-system thread. By hand on x86-64, since swapcontext asks the
// kernel at every switch; elsewhere by swapcontext.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace lora_ortho::cuda::host {

class Fiber {
public:
    static constexpr std::size_t kStackBytes = 128 << 10;

    // Runs `body(argument)` from the next resume() on.
    void start(void (*body)(int), int argument);
    // From the scheduler: continues the fiber until it suspends or ends.
    void resume();
    // From the fiber: back to the scheduler.
    void suspend();
    bool done() const { return done_; }
    [[noreturn]] void run();

private:
    std::unique_ptr<char[]> stack_;
    void (*body_)(int) = nullptr;
    int argument_ = 0;
    bool done_ = true;
#if defined(__x86_64__)
    void *self_ = nullptr, *scheduler_ = nullptr;  // stack pointers
#else
    ucontext_t self_, scheduler_;
#endif
    // AddressSanitizer's view of the stacks.
    void* fake_stack_ = nullptr;
    const void* scheduler_bottom_ = nullptr;
    std::size_t scheduler_size_ = 0;
};

}  // namespace lora_ortho::cuda::host
