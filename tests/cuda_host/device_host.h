// Test only: csrc/cuda/device.h's names on the CPU. Every thread of a block is a fiber. Barriers
// and matrix instructions are where fibers meet; who continues first is drawn at random. Shared
// memory starts as NaN and knows who wrote and read each word since which barrier; asynchronous
// copies arrive as late as they may.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define LORA_ORTHO_DEVICE inline
#define LORA_ORTHO_KERNEL(threads, blocks) static void

namespace lora_ortho::cuda {
namespace host {

constexpr int kWarpSize = 32;
enum class Op { kBFloat16, kFloat16, kTf32 };

int thread_index();
int block_threads();
std::int64_t block_index();
std::int64_t block_count();
void sync_block();
void sync_warp();
// Checked access to the block's shared memory; a bad one fails the launch and reads NaN.
void shared_load(int byte, void* to, int size);
void shared_store(int byte, const void* from, int size);
void shared_copy_async(int byte, const void* from);
void copy_async_commit();
void copy_async_wait();
// The matrix instruction: this lane's registers in, its four results out.
void matrix(Op op, const std::uint32_t* a, const std::uint32_t* b, const float* c, float* d);

}  // namespace host

using host::block_count;
using host::block_index;
using host::block_threads;
using host::copy_async_commit;
using host::copy_async_wait;
using host::sync_block;
using host::sync_warp;
using host::thread_index;

struct Shared {
    template <class V>
    static V load(int byte) {
        V value;
        host::shared_load(byte, &value, sizeof(V));
        return value;
    }
    template <class V>
    static void store(int byte, const V& value) {
        host::shared_store(byte, &value, sizeof(V));
    }
    Quad load_quad(int byte) const { return load<Quad>(byte); }
    Pair load_pair(int byte) const { return load<Pair>(byte); }
    float load_float(int byte) const { return load<float>(byte); }
    double load_double(int byte) const { return load<double>(byte); }
    void store_quad(int byte, const Quad& v) const { store(byte, v); }
    void store_pair(int byte, const Pair& v) const { store(byte, v); }
    void store_word(int byte, std::uint32_t v) const { store(byte, v); }
    void store_half(int byte, std::uint32_t v) const { store(byte, static_cast<std::uint16_t>(v)); }
    void store_double(int byte, double v) const { store(byte, v); }
    void copy_async(int byte, const void* from) const { host::shared_copy_async(byte, from); }
};
inline Shared shared_memory() { return {}; }

// Misaligned 16-byte accesses fault on a GPU; UBSan or the aligned move finds them here.
inline Quad load_quad(const void* from) {
    if (reinterpret_cast<std::uintptr_t>(from) % 16 != 0) __builtin_trap();
    return *static_cast<const Quad*>(from);
}
inline Quad load_quad_if(bool wanted, const void* from) {
    return wanted ? load_quad(from) : Quad{};
}
inline void store_quad_if(bool wanted, void* to, const Quad& v) {
    if (!wanted) return;
    if (reinterpret_cast<std::uintptr_t>(to) % 16 != 0) __builtin_trap();
    *static_cast<Quad*>(to) = v;
}

inline void multiply_wide(std::uint32_t a, std::uint32_t b, std::uint32_t& low,
                          std::uint32_t& high) {
    const std::uint64_t product = static_cast<std::uint64_t>(a) * b;
    low = static_cast<std::uint32_t>(product);
    high = static_cast<std::uint32_t>(product >> 32);
}
inline void pin(float&) {}
inline void pin(std::uint32_t&) {}

inline float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float fused(float value, float factor, float addend) {
    return std::fma(value, factor, addend);
}

inline std::uint32_t half_bits(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    std::uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
}
inline std::uint32_t brain_bits(float value) {
    const std::uint32_t bits = as_bits(value);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline std::uint32_t pack_bfloat16(float low, float high) {
    return brain_bits(high) << 16 | brain_bits(low);
}
inline std::uint32_t pack_float16(float low, float high) {
    return half_bits(high) << 16 | half_bits(low);
}
inline float unpack_float16(std::uint16_t bits) {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return static_cast<float>(half);
}
inline std::uint32_t round_tf32(float value) {
    const std::uint32_t bits = as_bits(value);
    return std::isfinite(value) ? (bits + 0x1000) & ~0x1fffu : bits;
}

struct Four {
    float v[4];
};
inline Four mma(host::Op op, const std::uint32_t* a, const std::uint32_t* b, const Four& c) {
    Four d;
    host::matrix(op, a, b, c.v, d.v);
    return d;
}
inline Four mma_bfloat16(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const Four& c) {
    return mma(host::Op::kBFloat16, a, b, c);
}
inline Four mma_float16(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const Four& c) {
    return mma(host::Op::kFloat16, a, b, c);
}
inline Four mma_tf32(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], const Four& c) {
    return mma(host::Op::kTf32, a, b, c);
}

}  // namespace lora_ortho::cuda
