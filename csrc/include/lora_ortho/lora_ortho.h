/* lora_ortho: y = base + sum_j gain_j * m_j (.) (B_j A_j x), masks drawn in registers.
 *
 * The C interface of the library. No global state, no exceptions, no torch, no Python. Every
 * function returns a status and leaves its outputs untouched unless the status is LORA_ORTHO_OK.
 *
 * Life of a merge: fill lora_ortho_factors, ask lora_ortho_pack_bytes, pack once, then call
 * lora_ortho_forward and lora_ortho_backward as often as wanted. The masks are a pure function of
 * seed and coordinates (MASK_STREAM.md); nothing of size tokens x d_out is stored for them.
 *
 * Memory: all of it is the caller's. What lora_ortho_factors points to is copied by lora_ortho_pack
 * and may be freed after it; what a call is given is not needed after the call. Outputs must not
 * overlap inputs, each other or the workspace, with one exception: y may be base.
 *
 * Threads: any number of them may call any function at once, also on one packed buffer, which calls
 * only read; each call needs outputs and a workspace of its own. A call runs on a team of OpenMP
 * threads and returns when all is done.
 */
#ifndef LORA_ORTHO_LORA_ORTHO_H
#define LORA_ORTHO_LORA_ORTHO_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define LORA_ORTHO_API
#else
#define LORA_ORTHO_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Layout of the structs below; a call with another number is refused. */
#define LORA_ORTHO_STRUCT_VERSION 2u
/* Alignment in bytes of packed factors and of workspaces. */
#define LORA_ORTHO_ALIGNMENT 64u
#define LORA_ORTHO_MAX_ADAPTERS 255

typedef enum lora_ortho_status {
    LORA_ORTHO_OK = 0,
    LORA_ORTHO_NULL_POINTER = 1,   /* a required pointer is null */
    LORA_ORTHO_BAD_VERSION = 2,    /* struct_version is not LORA_ORTHO_STRUCT_VERSION */
    LORA_ORTHO_BAD_METHOD = 3,     /* method is not a lora_ortho_method */
    LORA_ORTHO_BAD_DTYPE = 4,      /* dtype is not a lora_ortho_dtype */
    LORA_ORTHO_BAD_ADAPTERS = 5,   /* adapters is not in 1 .. LORA_ORTHO_MAX_ADAPTERS */
    LORA_ORTHO_BAD_RANK = 6,       /* a rank is not positive */
    LORA_ORTHO_BAD_SIZE = 7,       /* a size is negative, zero where it may not be, or overflows */
    LORA_ORTHO_BAD_COORDINATE = 8, /* a row, column, stream, sample or strata leaves its range */
    LORA_ORTHO_BAD_THRESHOLD = 9,  /* thresholds are not in 1 .. 65536, or do not increase */
    LORA_ORTHO_BAD_RATE = 10,      /* a dropout rate outside [0, 1), or their keeps exceed 1 */
    LORA_ORTHO_BAD_GAIN = 11,      /* a gain is not finite */
    LORA_ORTHO_MISALIGNED = 12,    /* a pointer is not aligned as its type needs */
    LORA_ORTHO_BUFFER_TOO_SMALL = 13, /* packed factors or workspace smaller than asked for */
    LORA_ORTHO_BAD_PACKED = 14,       /* the buffer does not hold factors packed by this library */
    LORA_ORTHO_UNSUPPORTED_ISA = 15,  /* this processor or build lacks the instruction set */
    LORA_ORTHO_OUT_OF_MEMORY = 16,
    LORA_ORTHO_INTERNAL_ERROR = 17,
    LORA_ORTHO_NO_CUDA = 18,            /* the library was built without its CUDA kernels */
    LORA_ORTHO_NO_DEVICE = 19,          /* no NVIDIA GPU, or no driver for one */
    LORA_ORTHO_UNSUPPORTED_DEVICE = 20, /* the current GPU is older than compute capability 8.0 */
    LORA_ORTHO_CUDA_ERROR = 21          /* the CUDA runtime refused a launch */
} lora_ortho_status;

typedef enum lora_ortho_method {
    LORA_ORTHO_ORTHOGONAL = 0, /* at most one adapter owns an output element */
    LORA_ORTHO_DROPOUT = 1,    /* each adapter keeps elements independently */
    LORA_ORTHO_DIRECT = 2      /* no mask */
} lora_ortho_method;

typedef enum lora_ortho_dtype {
    LORA_ORTHO_FLOAT32 = 0,
    LORA_ORTHO_BFLOAT16 = 1,
    LORA_ORTHO_FLOAT16 = 2,
    LORA_ORTHO_FLOAT64 = 3
} lora_ortho_dtype;

/* Instruction sets of the CPU kernels, each including those before it on its architecture. */
typedef enum lora_ortho_isa {
    LORA_ORTHO_ISA_AUTO = 0,
    LORA_ORTHO_ISA_BASELINE = 1,    /* x86-64 (SSE2), aarch64 (NEON), or plain C++ */
    LORA_ORTHO_ISA_AVX2 = 2,        /* x86-64-v3 */
    LORA_ORTHO_ISA_AVX512 = 3,      /* x86-64-v4 */
    LORA_ORTHO_ISA_AVX512_BF16 = 4, /* v4 and AVX512_BF16 */
    LORA_ORTHO_ISA_AMX = 5          /* v4, AVX512_BF16, AMX-TILE and AMX-BF16 */
} lora_ortho_isa;

/* A read-only matrix. Strides are in elements and may be zero or negative. */
typedef struct lora_ortho_matrix {
    const void* data;
    int64_t row_stride;
    int64_t col_stride;
    int32_t dtype; /* lora_ortho_dtype */
} lora_ortho_matrix;

/* The adapters of one layer. */
typedef struct lora_ortho_factors {
    uint32_t struct_version;
    int32_t method;   /* lora_ortho_method */
    int32_t dtype;    /* dtype of x, base, y and s; each of the factors may have another */
    int32_t isa;      /* lora_ortho_isa */
    int32_t adapters; /* K */
    int64_t d_in, d_out;
    const int64_t* ranks;            /* K */
    const uint32_t* thresholds;      /* K; T_j of MASK_STREAM.md; ignored for DIRECT */
    const lora_ortho_matrix* lora_A; /* K matrices (ranks[j], d_in), any dtypes */
    const lora_ortho_matrix* lora_B; /* K matrices (d_out, ranks[j]), any dtypes */
} lora_ortho_factors;

/* What changes from call to call. */
typedef struct lora_ortho_call {
    uint32_t struct_version;
    uint32_t stream; /* which layer */
    uint32_t sample; /* which Monte Carlo draw, below 2^24 */
    uint32_t strata; /* samples that share the elements out: 1 .. 65536; 1: none do */
    int32_t threads; /* 0: as OpenMP decides */
    int64_t tokens;
    int64_t row_offset, col_offset;
    uint64_t seed;
    const double* gains; /* K; w_j c_j / qhat_j of MASK_STREAM.md */
} lora_ortho_call;

/* Text of a status, static; never null. */
LORA_ORTHO_API const char* lora_ortho_status_text(lora_ortho_status status);
/* "major.minor.patch", static. */
LORA_ORTHO_API const char* lora_ortho_version(void);
/* The best instruction set here, and whether one is present. */
LORA_ORTHO_API lora_ortho_isa lora_ortho_best_isa(void);
LORA_ORTHO_API int lora_ortho_has_isa(lora_ortho_isa isa);
LORA_ORTHO_API const char* lora_ortho_isa_name(lora_ortho_isa isa);

/* Thresholds T_1 .. T_K and used keep probabilities qhat_1 .. qhat_K of dropout rates p_1 .. p_K.
 */
LORA_ORTHO_API lora_ortho_status lora_ortho_thresholds(lora_ortho_method method, int32_t adapters,
                                                       const double* p, uint32_t* thresholds,
                                                       double* keep);

/* The 16-bit draws of a rows x cols rectangle, row-major. */
LORA_ORTHO_API lora_ortho_status lora_ortho_draws(uint64_t seed, int64_t row0, int64_t rows,
                                                  int64_t col0, int64_t cols, uint32_t stream,
                                                  uint32_t sample, uint32_t strata,
                                                  uint32_t lane_set, uint16_t* out);

/* Packs factors into a buffer of the size asked for, aligned to LORA_ORTHO_ALIGNMENT. The buffer
 * may be moved or copied to another such buffer, not to another machine. Large factors are packed
 * by as many threads as OpenMP gives. */
LORA_ORTHO_API lora_ortho_status lora_ortho_pack_bytes(const lora_ortho_factors* factors,
                                                       size_t* bytes);
LORA_ORTHO_API lora_ortho_status lora_ortho_pack(const lora_ortho_factors* factors, void* packed,
                                                 size_t bytes);

/* y = base + sum_j gain_j m_j (.) (B_j s_j),  s_j = A_j x.
 *   x (tokens, d_in), base (tokens, d_out) or null for zeros: any strides, dtype of the factors
 *   y (tokens, d_out), s (tokens, sum r): contiguous. s may not be null: the first step writes it,
 *   the second reads it, and the backward pass reads it again.
 * Accumulates in float32 (float64 for float64) and rounds once. y may be base: the same address,
 * contiguous. It may not be x. */
LORA_ORTHO_API lora_ortho_status lora_ortho_forward(const void* packed, size_t packed_bytes,
                                                    const lora_ortho_call* call,
                                                    const lora_ortho_matrix* x,
                                                    const lora_ortho_matrix* base, void* y,
                                                    void* s);

/* Gradients from grad = dL/dy (tokens, d_out), any strides. Outputs may be null where not wanted:
 *   grad_x (tokens, d_in) contiguous, dtype of x;
 *   grad_A and grad_B: K contiguous blocks each, (r_j, d_in) and (d_out, r_j), one after another
 * without gaps, all in factor_dtype, summed in float32 (float64 for float64) and rounded once;
 *   grad_gains (K) = dL/d gain_j.
 * workspace: lora_ortho_backward_bytes bytes, aligned to LORA_ORTHO_ALIGNMENT. */
LORA_ORTHO_API lora_ortho_status lora_ortho_backward_bytes(const void* packed, size_t packed_bytes,
                                                           const lora_ortho_call* call,
                                                           size_t* bytes);
LORA_ORTHO_API lora_ortho_status lora_ortho_backward(const void* packed, size_t packed_bytes,
                                                     const lora_ortho_call* call,
                                                     const lora_ortho_matrix* grad,
                                                     const lora_ortho_matrix* x, const void* s,
                                                     void* grad_x, void* grad_A, void* grad_B,
                                                     int32_t factor_dtype, double* grad_gains,
                                                     void* workspace, size_t workspace_bytes);

#ifdef __cplusplus
}
#endif
#endif
