// Second stages of the sums: parts are added in the order of their splits.
#pragma once

#include "cuda/launch_config.h"
#include "cuda/target.h"

namespace lora_ortho::cuda {

struct SumPartsArguments {
    const float* partial;  // [splits][size]
    std::int64_t size;
    std::int32_t splits;
    Target target;
};

template <class T>  // one copy for each translation unit
LORA_ORTHO_KERNEL(kSumPartsThreads, kSumPartsBlocks) sum_parts_kernel(const SumPartsArguments p) {
    const std::int64_t step = block_count() * kSumPartsThreads;
    for (std::int64_t i = block_index() * kSumPartsThreads + thread_index(); i < p.size;
         i += step) {
        float total = 0.0f;
        for (int split = 0; split < p.splits; ++split) total += p.partial[split * p.size + i];
        store_any(p.target.data, p.target.dtype, i, total);
    }
}

// grad_s = gain * sum of parts; grad_gain_j = sum of parts * s over the ranks of j, one part for a
// block.
template <class T>
struct GradSGradGainsArguments {
    const Adapter* adapters;
    std::int32_t adapter_count, splits;
    const float* partial;  // [splits][rows][rank_sum]
    const T* s;            // [rows][rank_sum]
    const float* gains;
    std::int64_t rows, rank_sum;
    T* grad_s;           // [rows][rank_sum], or null
    double* grad_gains;  // [blocks][adapters], or null
};

template <class T>
LORA_ORTHO_KERNEL(kSumPartsThreads, kSumPartsBlocks)
grad_s_grad_gains_kernel(const GradSGradGainsArguments<T> p) {
    const Shared shared = shared_memory();
    const int lane = thread_index();
    const std::int64_t row0 = block_index() * kSumPartsRows;
    const std::int64_t rows = p.rows - row0 < kSumPartsRows ? p.rows - row0 : kSumPartsRows;
    for (int j = 0; j < p.adapter_count; ++j) {
        const Adapter a = p.adapters[j];
        const float gain = p.gains[j];
        double grad_gain = 0.0;
        for (std::int64_t e = lane; e < rows * a.rank; e += kSumPartsThreads) {
            const std::int64_t at = (row0 + e / a.rank) * p.rank_sum + a.begin + e % a.rank;
            float total = 0.0f;
            for (int i = 0; i < p.splits; ++i) total += p.partial[i * p.rows * p.rank_sum + at];
            if (p.grad_s) p.grad_s[at] = from_float<T>(gain * total);
            if (p.grad_gains) grad_gain += static_cast<double>(total) * to_float(p.s[at]);
        }
        if (!p.grad_gains) continue;
        shared.store_double(8 * lane, grad_gain);
        for (int width = kSumPartsThreads / 2; width > 0; width /= 2) {
            sync_block();
            if (lane < width) {
                shared.store_double(8 * lane, shared.load_double(8 * lane) +
                                                  shared.load_double(8 * (lane + width)));
            }
        }
        if (lane == 0) p.grad_gains[block_index() * p.adapter_count + j] = shared.load_double(0);
        sync_block();
    }
}

struct GradGainsArguments {
    const double* partial;  // [blocks][adapters]
    std::int64_t blocks;
    std::int32_t adapter_count;
    float* grad_gains;
};

template <class T>
LORA_ORTHO_KERNEL(kSumPartsThreads, kSumPartsBlocks)
grad_gains_kernel(const GradGainsArguments p) {
    for (int j = thread_index(); j < p.adapter_count; j += kSumPartsThreads) {
        double total = 0.0;
        for (std::int64_t i = 0; i < p.blocks; ++i) total += p.partial[i * p.adapter_count + j];
        p.grad_gains[j] = static_cast<float>(total);
    }
}

}  // namespace lora_ortho::cuda
