// What the kernels need of a GPU: indices, barriers, shared memory, asynchronous copies, matrix
// instructions, conversions. Without nvcc the same names come from the test-only shim, which runs
// the kernels on the CPU (tests/cuda_host/device_host.h).
#pragma once

#include <cstdint>

namespace lora_ortho::cuda {

constexpr int kWarp = 32;  // threads

// 16 bytes: one access of a thread to memory.
struct alignas(16) Quad {
    std::uint32_t word[4];
};
struct alignas(8) Pair {
    std::uint32_t word[2];
};

}  // namespace lora_ortho::cuda

#if !defined(__CUDACC__)
#include "device_host.h"
#else

#define LORA_ORTHO_DEVICE __device__ __forceinline__
// A kernel with blocks of `threads` threads, of which at least `blocks` fit on a multiprocessor.
#define LORA_ORTHO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace lora_ortho::cuda {

LORA_ORTHO_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
LORA_ORTHO_DEVICE std::int64_t block_index() { return blockIdx.x; }
LORA_ORTHO_DEVICE std::int64_t block_count() { return gridDim.x; }
LORA_ORTHO_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
LORA_ORTHO_DEVICE void sync_block() { __syncthreads(); }
LORA_ORTHO_DEVICE void sync_warp() { __syncwarp(); }

// The shared memory of the block, by byte offsets.
struct Shared {
    std::uint32_t at;

    LORA_ORTHO_DEVICE Quad load_quad(int byte) const {
        Quad v;
        asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                     : "r"(at + byte)
                     : "memory");
        return v;
    }
    LORA_ORTHO_DEVICE Pair load_pair(int byte) const {
        Pair v;
        asm volatile("ld.shared.v2.b32 {%0,%1}, [%2];"
                     : "=r"(v.word[0]), "=r"(v.word[1])
                     : "r"(at + byte)
                     : "memory");
        return v;
    }
    LORA_ORTHO_DEVICE float load_float(int byte) const {
        float v;
        asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at + byte) : "memory");
        return v;
    }
    LORA_ORTHO_DEVICE double load_double(int byte) const {
        double v;
        asm volatile("ld.shared.f64 %0, [%1];" : "=d"(v) : "r"(at + byte) : "memory");
        return v;
    }
    LORA_ORTHO_DEVICE void store_quad(int byte, const Quad& v) const {
        asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(at + byte), "r"(v.word[0]),
                     "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
                     : "memory");
    }
    LORA_ORTHO_DEVICE void store_pair(int byte, const Pair& v) const {
        asm volatile("st.shared.v2.b32 [%0], {%1,%2};" ::"r"(at + byte), "r"(v.word[0]),
                     "r"(v.word[1])
                     : "memory");
    }
    LORA_ORTHO_DEVICE void store_word(int byte, std::uint32_t v) const {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + byte), "r"(v) : "memory");
    }
    LORA_ORTHO_DEVICE void store_half(int byte, std::uint32_t v) const {
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(at + byte), "h"(static_cast<std::uint16_t>(v))
                     : "memory");
    }
    LORA_ORTHO_DEVICE void store_double(int byte, double v) const {
        asm volatile("st.shared.f64 [%0], %1;" ::"r"(at + byte), "d"(v) : "memory");
    }
    // 16 bytes of global memory to `byte`, visible after copy_async_wait and a barrier.
    LORA_ORTHO_DEVICE void copy_async(int byte, const void* from) const {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(at + byte), "l"(from)
                     : "memory");
    }
};
LORA_ORTHO_DEVICE Shared shared_memory() {
    extern __shared__ __align__(16) unsigned char lora_ortho_shared[];
    return {static_cast<std::uint32_t>(__cvta_generic_to_shared(lora_ortho_shared))};
}
LORA_ORTHO_DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all copies of this thread.
LORA_ORTHO_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

LORA_ORTHO_DEVICE Quad load_quad(const void* from) {
    const uint4 v = *static_cast<const uint4*>(from);
    return {{v.x, v.y, v.z, v.w}};
}
// Accesses that happen only where they are wanted, without a branch. By PTX also because the
// compiler may cut an assignment into words.
LORA_ORTHO_DEVICE Quad load_quad_if(bool wanted, const void* from) {
    Quad v;
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; "
        "mov.b32 %3, 0; @p ld.global.v4.b32 {%0,%1,%2,%3}, [%4];}"
        : "=&r"(v.word[0]), "=&r"(v.word[1]), "=&r"(v.word[2]), "=&r"(v.word[3])
        : "l"(from), "r"(static_cast<std::uint32_t>(wanted)));
    return v;
}
LORA_ORTHO_DEVICE void store_quad_if(bool wanted, void* to, const Quad& v) {
    asm volatile(
        "{.reg .pred p; setp.ne.b32 p, %5, 0; @p st.global.v4.b32 [%0], {%1,%2,%3,%4};}" ::"l"(to),
        "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]),
        "r"(static_cast<std::uint32_t>(wanted))
        : "memory");
}
// Both halves of a product.
LORA_ORTHO_DEVICE void multiply_wide(std::uint32_t a, std::uint32_t b, std::uint32_t& low,
                                     std::uint32_t& high) {
    asm("{.reg .b64 p; mul.wide.u32 p, %2, %3; mov.b64 {%0,%1}, p;}"
        : "=r"(low), "=r"(high)
        : "r"(a), "r"(b));
}
// Keeps a value in its register, so that it is not worked out anew at every use.
LORA_ORTHO_DEVICE void pin(float& value) { asm volatile("" : "+f"(value)); }
LORA_ORTHO_DEVICE void pin(std::uint32_t& value) { asm volatile("" : "+r"(value)); }

LORA_ORTHO_DEVICE float as_float(std::uint32_t bits) { return __uint_as_float(bits); }
LORA_ORTHO_DEVICE std::uint32_t as_bits(float value) { return __float_as_uint(value); }
// value * factor + addend, rounded once.
LORA_ORTHO_DEVICE float fused(float value, float factor, float addend) {
    return __fmaf_rn(value, factor, addend);
}

// Two floats, rounded to nearest even, in one word; `low` in its low half.
LORA_ORTHO_DEVICE std::uint32_t pack_bfloat16(float low, float high) {
    std::uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
LORA_ORTHO_DEVICE std::uint32_t pack_float16(float low, float high) {
    std::uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
LORA_ORTHO_DEVICE float unpack_float16(std::uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
// Rounded to the 11 significant bits of tf32, ties away from zero.
LORA_ORTHO_DEVICE std::uint32_t round_tf32(float value) {
    std::uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

// d = a b + c on 16 x 8 tiles, spread over the warp as PTX says for mma.m16n8k16 and .m16n8k8.
struct Four {
    float v[4];
};
LORA_ORTHO_DEVICE Four mma_bfloat16(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                    const Four& c) {
    Four d;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d.v[0]), "=f"(d.v[1]), "=f"(d.v[2]), "=f"(d.v[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c.v[0]),
          "f"(c.v[1]), "f"(c.v[2]), "f"(c.v[3]));
    return d;
}
LORA_ORTHO_DEVICE Four mma_float16(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                   const Four& c) {
    Four d;
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d.v[0]), "=f"(d.v[1]), "=f"(d.v[2]), "=f"(d.v[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c.v[0]),
          "f"(c.v[1]), "f"(c.v[2]), "f"(c.v[3]));
    return d;
}
LORA_ORTHO_DEVICE Four mma_tf32(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                                const Four& c) {
    Four d;
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d.v[0]), "=f"(d.v[1]), "=f"(d.v[2]), "=f"(d.v[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c.v[0]),
          "f"(c.v[1]), "f"(c.v[2]), "f"(c.v[3]));
    return d;
}

}  // namespace lora_ortho::cuda
#endif
