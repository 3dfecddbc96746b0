// Threads: one OpenMP team per call, work dealt out by hand so that it depends on the problem
// alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "cpu/simd.h"

namespace lora_ortho::cpu::LORA_ORTHO_ISA {

struct Team {
    int id, size;

    void barrier() const {
#if defined(_OPENMP)
#pragma omp barrier
#endif
    }
    // This member's share of `count` pieces, contiguous.
    std::int64_t begin(std::int64_t count) const { return count * id / size; }
    std::int64_t end(std::int64_t count) const { return count * (id + 1) / size; }
};

LORA_ORTHO_INLINE int team_size(int threads) {
#if defined(_OPENMP)
    return threads > 0 ? threads : omp_get_max_threads();
#else
    (void)threads;
    return 1;
#endif
}

template <class Body>
LORA_ORTHO_INLINE void run_team(int threads, Body body) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        body(Team{omp_get_thread_num(), omp_get_num_threads()});
        return;
    }
#else
    (void)threads;
#endif
    body(Team{0, 1});
}

// Memory of one call, split between the members of a team. Throws std::bad_alloc, outside the team.
class Scratch {
public:
    Scratch(std::size_t bytes_per_member, int members)
        : pitch_((bytes_per_member + 4095) & ~std::size_t{4095}) {
        const std::size_t bytes = pitch_ * static_cast<std::size_t>(members);
        if (bytes && !(data_ = static_cast<char*>(std::aligned_alloc(4096, bytes))))
            throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    template <class T>
    T* of(const Team& team) const {
        return reinterpret_cast<T*>(data_ + pitch_ * static_cast<std::size_t>(team.id));
    }

private:
    std::size_t pitch_;
    char* data_ = nullptr;
};

}  // namespace lora_ortho::cpu::LORA_ORTHO_ISA
