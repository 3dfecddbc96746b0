// The scheduler behind device_host.h: one block at a time, its threads as fibers in random order.
#include "cuda/device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cuda/kernels.h"
#include "fiber.h"
#include "launch_host.h"

namespace lora_ortho::cuda {
namespace host {
namespace {

enum class Wait { kRunning, kBlock, kWarp, kMatrix };

struct Copy {
    int byte;
    const void* from;
};

struct Thread {
    Fiber fiber;
    Wait wait = Wait::kRunning;
    std::uint32_t warp_epoch = 0;  // barriers of the warp passed
    Op op = Op::kTf32;
    std::uint32_t a[4], b[2];
    float c[4], d[4];
    std::vector<Copy> open, committed;
};

// Who last touched two bytes of shared memory, and between which barriers.
struct Mark {
    std::int16_t thread = -1;
    std::uint32_t block_epoch = 0, warp_epoch = 0;
};

struct Block {
    std::vector<Thread> threads;
    std::vector<unsigned char> shared;
    std::vector<Mark> written, read;
    std::int64_t index = 0, count = 0;
    std::uint32_t epoch = 0;  // barriers of the block passed
    int size = 0, current = 0;
    const std::function<void()>* body = nullptr;
    const char* fault = nullptr;
    int fault_byte = 0, fault_thread = 0;
    std::mt19937 random{12345};
    std::vector<int> order;
};

Block& block() {
    static thread_local Block one;
    return one;
}

Thread& self() { return block().threads[static_cast<std::size_t>(block().current)]; }

void fail(const char* what, int byte) {
    Block& b = block();
    if (b.fault) return;
    b.fault = what;
    b.fault_byte = byte;
    b.fault_thread = b.current;
}

void meet(Wait what) {
    Thread& me = self();
    me.wait = what;
    me.fiber.suspend();
}

// Whether what `mark` notes is separated from the current thread by a barrier.
bool ordered(const Mark& mark) {
    const Block& b = block();
    if (mark.thread < 0 || mark.thread == b.current || mark.block_epoch < b.epoch) return true;
    return mark.thread / kWarpSize == b.current / kWarpSize &&
           mark.warp_epoch < b.threads[static_cast<std::size_t>(b.current)].warp_epoch;
}

void touch(int byte, int size, bool write) {
    Block& b = block();
    if (byte < 0 || byte + size > static_cast<int>(b.shared.size())) {
        return fail("shared memory out of bounds", byte);
    }
    if (byte % size != 0) return fail("shared memory misaligned", byte);
    const Mark mark = {static_cast<std::int16_t>(b.current), b.epoch, self().warp_epoch};
    for (int i = byte / 2; i < (byte + size) / 2; ++i) {
        Mark &written = b.written[static_cast<std::size_t>(i)],
             &read = b.read[static_cast<std::size_t>(i)];
        if (!ordered(written)) fail("no barrier since another thread wrote here", byte);
        if (write && !ordered(read)) fail("no barrier since another thread read here", byte);
        (write ? written : read) = mark;
    }
}

// One warp's instruction, lanes begin .. begin + 31.
void multiply(int begin) {
    Block& b = block();
    const Thread* lanes = &b.threads[static_cast<std::size_t>(begin)];
    const Op op = lanes[0].op;
    const int depth = op == Op::kTf32 ? 8 : 16;
    const auto element = [op](const std::uint32_t* registers, int slot) -> double {
        if (op == Op::kTf32) return as_float(registers[slot] & ~0x1fffu);
        const std::uint32_t word = registers[slot / 2] >> (slot % 2 * 16) & 0xffffu;
        return op == Op::kBFloat16 ? as_float(word << 16)
                                   : unpack_float16(static_cast<std::uint16_t>(word));
    };
    double left[16][16], right[16][8];
    for (int lane = 0; lane < kWarpSize; ++lane) {
        const int g = lane / 4, t = lane % 4;
        if (op == Op::kTf32) {
            for (int i = 0; i < 4; ++i)
                left[g + i % 2 * 8][t + i / 2 * 4] = element(lanes[lane].a, i);
            for (int i = 0; i < 2; ++i) right[t + 4 * i][g] = element(lanes[lane].b, i);
        } else {
            for (int i = 0; i < 8; ++i) {
                left[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = element(lanes[lane].a, i);
            }
            for (int i = 0; i < 4; ++i)
                right[2 * t + i % 2 + i / 2 * 8][g] = element(lanes[lane].b, i);
        }
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
        Thread& thread = b.threads[static_cast<std::size_t>(begin + lane)];
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
            double sum = thread.c[i];
            for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][col];
            // Tensor cores cut sums off, they do not round them.
            float cut = static_cast<float>(sum);
            if (std::isfinite(cut) && std::fabs(static_cast<double>(cut)) > std::fabs(sum)) {
                cut = std::nextafter(cut, 0.0f);
            }
            thread.d[i] = cut;
        }
    }
}

// Lets a warp or the block go on where all of its threads have arrived; false where none can.
bool release() {
    Block& b = block();
    bool any = false, all_block = true, all_done = true;
    for (int begin = 0; begin < b.size; begin += kWarpSize) {
        const int end = std::min(begin + kWarpSize, b.size);
        int warp = 0, matrix = 0;
        for (int i = begin; i < end; ++i) {
            const Thread& t = b.threads[static_cast<std::size_t>(i)];
            if (!t.fiber.done()) all_done = false;
            if (t.fiber.done() || t.wait != Wait::kBlock) all_block = false;
            warp += !t.fiber.done() && t.wait == Wait::kWarp;
            matrix += !t.fiber.done() && t.wait == Wait::kMatrix;
        }
        if (warp != end - begin && matrix != kWarpSize) continue;
        if (matrix == kWarpSize) multiply(begin);
        any = true;
        for (int i = begin; i < end; ++i) {
            Thread& t = b.threads[static_cast<std::size_t>(i)];
            t.wait = Wait::kRunning;
            t.warp_epoch += warp > 0;
        }
    }
    if (all_block && !any) {
        ++b.epoch;
        any = true;
        for (int i = 0; i < b.size; ++i) {
            b.threads[static_cast<std::size_t>(i)].wait = Wait::kRunning;
        }
    }
    return any || all_done;
}

void run_block(int shared_bytes) {
    Block& b = block();
    b.shared.assign(static_cast<std::size_t>(shared_bytes), 0xff);
    b.written.assign(static_cast<std::size_t>(shared_bytes / 2 + 8), Mark{});
    b.read.assign(static_cast<std::size_t>(shared_bytes / 2 + 8), Mark{});
    b.epoch = 0;
    for (int i = 0; i < b.size; ++i) {
        Thread& t = b.threads[static_cast<std::size_t>(i)];
        t.wait = Wait::kRunning;
        t.warp_epoch = 0;
        t.open.clear();
        t.committed.clear();
        t.fiber.start([](int) { (*block().body)(); }, i);
    }
    for (bool left = true; left && !b.fault;) {
        std::shuffle(b.order.begin(), b.order.end(), b.random);
        left = false;
        for (const int i : b.order) {
            Thread& t = b.threads[static_cast<std::size_t>(i)];
            if (t.fiber.done() || t.wait != Wait::kRunning) continue;
            b.current = i;
            t.fiber.resume();
            if (!t.fiber.done())
                left = true;
            else if (!t.open.empty() || !t.committed.empty())
                fail("a copy was not waited for", 0);
        }
        for (int i = 0; i < b.size && !left; ++i) {
            left = !b.threads[static_cast<std::size_t>(i)].fiber.done();
        }
        if (left && !release()) fail("threads wait for one another", 0);
    }
}

}  // namespace

int thread_index() { return block().current; }
int block_threads() { return block().size; }
std::int64_t block_index() { return block().index; }
std::int64_t block_count() { return block().count; }
void sync_block() { meet(Wait::kBlock); }
void sync_warp() { meet(Wait::kWarp); }

void shared_load(int byte, void* to, int size) {
    touch(byte, size, false);
    if (block().fault) {
        std::memset(to, 0xff, static_cast<std::size_t>(size));
    } else {
        std::memcpy(to, &block().shared[static_cast<std::size_t>(byte)],
                    static_cast<std::size_t>(size));
    }
}

void shared_store(int byte, const void* from, int size) {
    touch(byte, size, true);
    if (block().fault) return;
    std::memcpy(&block().shared[static_cast<std::size_t>(byte)], from,
                static_cast<std::size_t>(size));
}

void shared_copy_async(int byte, const void* from) {
    touch(byte, 16, true);
    self().open.push_back({byte, from});
}

void copy_async_commit() {
    Thread& me = self();
    me.committed.insert(me.committed.end(), me.open.begin(), me.open.end());
    me.open.clear();
}

void copy_async_wait() {
    Thread& me = self();
    for (const Copy& copy : me.committed) shared_store(copy.byte, copy.from, 16);
    me.committed.clear();
}

void matrix(Op op, const std::uint32_t* a, const std::uint32_t* b, const float* c, float* d) {
    Thread& me = self();
    me.op = op;
    std::copy(a, a + 4, me.a);
    std::copy(b, b + 2, me.b);
    std::copy(c, c + 4, me.c);
    meet(Wait::kMatrix);
    std::copy(me.d, me.d + 4, d);
}

lora_ortho_status run(std::int64_t blocks, int threads, int shared_bytes,
                      const std::function<void()>& thread_body) {
    Block& b = block();
    if (b.threads.size() < static_cast<std::size_t>(threads)) {
        b.threads = std::vector<Thread>(static_cast<std::size_t>(threads));
    }
    b.size = threads;
    b.count = blocks;
    b.body = &thread_body;
    b.fault = nullptr;
    b.order.resize(static_cast<std::size_t>(threads));
    for (int i = 0; i < threads; ++i) b.order[static_cast<std::size_t>(i)] = i;
    // Blocks may come in any order too.
    std::vector<std::int64_t> order(static_cast<std::size_t>(blocks));
    for (std::int64_t i = 0; i < blocks; ++i) order[static_cast<std::size_t>(i)] = i;
    std::shuffle(order.begin(), order.end(), b.random);
    for (const std::int64_t index : order) {
        b.index = index;
        run_block(shared_bytes);
        if (!b.fault) continue;
        std::fprintf(stderr, "lora_ortho on the host: block %lld thread %d: %s (byte %d)\n",
                     static_cast<long long>(index), b.fault_thread, b.fault, b.fault_byte);
        return LORA_ORTHO_CUDA_ERROR;
    }
    return LORA_ORTHO_OK;
}

}  // namespace host

// As many multiprocessors as make the small cases of the tests split their sums.
Status current_device(Device& device) {
    device.multiprocessors = 8;
    if (const char* text = std::getenv("LORA_ORTHO_HOST_MULTIPROCESSORS")) {
        device.multiprocessors = std::max(1, std::atoi(text));
    }
    return LORA_ORTHO_OK;
}

}  // namespace lora_ortho::cuda
