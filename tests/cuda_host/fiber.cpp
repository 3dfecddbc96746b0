#include "fiber.h"

#include <cstdlib>

namespace lora_ortho::cuda::host {

#if defined(__x86_64__)
// Saves what the ABI lets a callee expect, swaps stacks, restores.
extern "C" void lora_ortho_switch_stack(void** save, void* load);
asm(R"(
    .text
    .globl lora_ortho_switch_stack
    .type lora_ortho_switch_stack,@function
lora_ortho_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size lora_ortho_switch_stack,.-lora_ortho_switch_stack
)");
#endif

namespace {

Fiber* starting = nullptr;

void first_frame() { starting->run(); }

}  // namespace

void Fiber::run() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom_, &scheduler_size_);
#endif
    body_(argument_);
    done_ = true;
    suspend();
    std::abort();
}

void Fiber::start(void (*body)(int), int argument) {
    if (!stack_) stack_.reset(new char[kStackBytes]);
    body_ = body;
    argument_ = argument;
    done_ = false;
#if defined(__x86_64__)
    auto top = reinterpret_cast<std::uintptr_t>(stack_.get() + kStackBytes) & ~std::uintptr_t{63};
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;                                // alignment as after a call
    *--at = reinterpret_cast<void*>(&first_frame);  // what the first switch returns to
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    self_ = at;
#else
    getcontext(&self_);
    self_.uc_stack.ss_sp = stack_.get();
    self_.uc_stack.ss_size = kStackBytes;
    self_.uc_link = nullptr;
    makecontext(&self_, first_frame, 0);
#endif
}

void Fiber::resume() {
    starting = this;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_.get(), kStackBytes);
#endif
#if defined(__x86_64__)
    lora_ortho_switch_stack(&scheduler_, self_);
#else
    swapcontext(&scheduler_, &self_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Fiber::suspend() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(done_ ? nullptr : &fake_stack_, scheduler_bottom_,
                                   scheduler_size_);
#endif
#if defined(__x86_64__)
    lora_ortho_switch_stack(&self_, scheduler_);
#else
    swapcontext(&self_, &scheduler_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, &scheduler_bottom_, &scheduler_size_);
#endif
}

}  // namespace lora_ortho::cuda::host
