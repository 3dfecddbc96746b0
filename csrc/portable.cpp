// Linked into extensions for other machines (LORA_ORTHO_PORTABLE), where libstdc++ is static.
// std::shared_ptr asks this whether the process has one thread only, which glibc tells since 2.32.
// Without glibc's answer the right one is "perhaps not": reference counts are then always atomic.
extern "C" {
extern char __libc_single_threaded;
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
