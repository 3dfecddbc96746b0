// mask_stream.h compiled by nvcc: the host half against known answers, the device half against the
// host where there is a GPU.
#include <cstdint>
#include <cstdio>

#include "lora_ortho/mask_stream.h"

constexpr int kRows = 512, kCols = 1000;
constexpr std::uint64_t kSeed = 0x8123456789abcdefull;
constexpr std::uint32_t kThresholds[] = {20000, 40000, 65535};

// owner * 65536 + draw of each element; rows and columns are high enough to need all their bits.
static inline LORA_ORTHO_HD std::uint32_t element(int row, int col,
                                                  const std::uint32_t* thresholds) {
    const std::uint32_t draw =
        lora_ortho_draw(kSeed, 0xfffffe00u + static_cast<std::uint32_t>(row),
                        (1ull << 34) + static_cast<std::uint64_t>(col), 7, 0xffffff, 7, 255);
    return (static_cast<std::uint32_t>(lora_ortho_owner(draw, thresholds, 3)) << 16) | draw;
}

__global__ void draws_kernel(std::uint32_t* out) {
    const std::uint32_t thresholds[] = {kThresholds[0], kThresholds[1], kThresholds[2]};
    for (int col = threadIdx.x; col < kCols; col += blockDim.x) {
        out[blockIdx.x * kCols + col] = element(blockIdx.x, col, thresholds);
    }
}

static int host_failures() {
    const std::uint32_t expected[] = {6177, 62576, 32269, 38036, 39227,
                                      2939, 49830, 720,   14368, 29961};
    int failures = 0;
    for (std::uint64_t col = 0; col < 10; ++col) {
        failures += lora_ortho_draw(0x0123456789abcdefull, 0, col, 0, 0, 1, 0) != expected[col];
        // The second of two strata: the same draws, half of their range on.
        failures += lora_ortho_draw(0x0123456789abcdefull, 0, col, 0, 1, 2, 0) !=
                    (expected[col] + 32768) % 65536;
    }
    return failures;
}

int main() {
    const int failures = host_failures();
    std::printf("host: %s\n", failures ? "wrong draws" : "ok");
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("device: not run, no CUDA device here\n");
        return failures != 0;
    }
    std::uint32_t* out = nullptr;
    cudaMallocManaged(&out, sizeof(std::uint32_t) * kRows * kCols);
    draws_kernel<<<kRows, 256>>>(out);
    int differing = cudaDeviceSynchronize() == cudaSuccess ? 0 : kRows * kCols;
    for (int i = 0; differing == 0 && i < kRows * kCols; ++i) {
        differing += out[i] != element(i / kCols, i % kCols, kThresholds);
    }
    std::printf("device: %s\n", differing ? "differs from host" : "ok");
    cudaFree(out);
    return failures != 0 || differing != 0;
}
