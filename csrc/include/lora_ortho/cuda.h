/* The CUDA half of lora_ortho.h: the same merge on an NVIDIA GPU of compute capability 8.0 or
 * later.
 *
 * Every function works on the current device and only enqueues work on the stream of its call: what
 * it returns is whether the arguments were in order and the launches accepted. Capturing a stream
 * into a graph works; nothing here allocates or waits. A library built without CUDA has these
 * functions too: each then returns LORA_ORTHO_NO_CUDA.
 *
 * Pointers to packed factors, gains, outputs and workspaces and the data of matrices are device
 * memory, needed until the stream has done the work. Structs, ranks and thresholds are host memory:
 * read at every call, not needed after it.
 *
 * Life of a merge: fill lora_ortho_factors (isa is ignored), ask lora_ortho_cuda_pack_bytes, pack
 * once, then pass the same factors with every call; lora_A and lora_B are read only by
 * lora_ortho_cuda_pack. dtype float32, bfloat16 or float16; factors may be any lora_ortho_dtype.
 * Overlap, s and threads: as in lora_ortho.h. Calls on different streams are not ordered.
 */
#ifndef LORA_ORTHO_CUDA_H
#define LORA_ORTHO_CUDA_H

#include "lora_ortho/lora_ortho.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What changes from call to call. */
typedef struct lora_ortho_cuda_call {
    uint32_t struct_version; /* LORA_ORTHO_STRUCT_VERSION */
    uint32_t stream;         /* which layer */
    uint32_t sample;         /* which Monte Carlo draw, below 2^24 */
    uint32_t strata;         /* as in lora_ortho_call */
    int64_t tokens;
    int64_t row_offset, col_offset;
    uint64_t seed;                /* read where seed_pointer is null */
    const uint64_t* seed_pointer; /* in device memory, read when the kernels run */
    const float* gains;           /* K, in device memory; w_j c_j / qhat_j of MASK_STREAM.md */
    void* cuda_stream;            /* cudaStream_t; null is the default stream */
} lora_ortho_cuda_call;

/* LORA_ORTHO_OK where the current device can run the kernels; else LORA_ORTHO_NO_CUDA,
 * LORA_ORTHO_NO_DEVICE or LORA_ORTHO_UNSUPPORTED_DEVICE. */
LORA_ORTHO_API lora_ortho_status lora_ortho_cuda_available(void);

/* Packs factors into device memory of the size asked for, aligned to LORA_ORTHO_ALIGNMENT. */
LORA_ORTHO_API lora_ortho_status lora_ortho_cuda_pack_bytes(const lora_ortho_factors* factors,
                                                            size_t* bytes);
LORA_ORTHO_API lora_ortho_status lora_ortho_cuda_pack(const lora_ortho_factors* factors,
                                                      void* packed, size_t bytes,
                                                      void* cuda_stream);

/* As lora_ortho_forward, in two launches. workspace: lora_ortho_cuda_forward_bytes bytes, aligned
 * to LORA_ORTHO_ALIGNMENT; none where the tokens fill the device. */
LORA_ORTHO_API lora_ortho_status lora_ortho_cuda_forward_bytes(const lora_ortho_factors* factors,
                                                               const lora_ortho_cuda_call* call,
                                                               size_t* bytes);
LORA_ORTHO_API lora_ortho_status lora_ortho_cuda_forward(
    const lora_ortho_factors* factors, const void* packed, size_t packed_bytes,
    const lora_ortho_cuda_call* call, const lora_ortho_matrix* x, const lora_ortho_matrix* base,
    void* y, void* s, void* workspace, size_t workspace_bytes);

/* As lora_ortho_backward; grad_gains (K) float32. The same call gives the same bits. */
LORA_ORTHO_API lora_ortho_status lora_ortho_cuda_backward_bytes(const lora_ortho_factors* factors,
                                                                const lora_ortho_cuda_call* call,
                                                                size_t* bytes);
LORA_ORTHO_API lora_ortho_status lora_ortho_cuda_backward(
    const lora_ortho_factors* factors, const void* packed, size_t packed_bytes,
    const lora_ortho_cuda_call* call, const lora_ortho_matrix* grad, const lora_ortho_matrix* x,
    const void* s, void* grad_x, void* grad_A, void* grad_B, int32_t factor_dtype,
    float* grad_gains, void* workspace, size_t workspace_bytes);

#ifdef __cplusplus
}
#endif
#endif
