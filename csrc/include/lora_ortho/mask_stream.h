/* The mask stream of MASK_STREAM.md, version 1, for C99, C++ and CUDA: integers only.
 *
 * One Philox4x32-7 call makes the draws of eight neighbouring output features of one row. Every
 * function is pure; the vectorised kernels have their own copies and are tested against these.
 */
#ifndef LORA_ORTHO_MASK_STREAM_H
#define LORA_ORTHO_MASK_STREAM_H

#include <stdint.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LORA_ORTHO_HD __host__ __device__
#else
#define LORA_ORTHO_HD
#endif

/* Ranges of the coordinates: row < 2^32, col < 2^35, sample < 2^24, 1 <= strata <= 2^16,
 * lane_set < 2^8. */
#define LORA_ORTHO_ROW_LIMIT (INT64_C(1) << 32)
#define LORA_ORTHO_COL_LIMIT (INT64_C(1) << 35)
#define LORA_ORTHO_SAMPLE_LIMIT (UINT32_C(1) << 24)
#define LORA_ORTHO_LANE_SET_LIMIT (UINT32_C(1) << 8)
#define LORA_ORTHO_MAX_STRATA (UINT32_C(1) << 16)
/* A threshold that every draw is below. */
#define LORA_ORTHO_DRAW_LIMIT (UINT32_C(1) << 16)

/* Multipliers and key increments of Philox4x32 (Salmon et al., SC 2011), and the rounds used here.
 */
#define LORA_ORTHO_PHILOX_M0 UINT32_C(0xd2511f53)
#define LORA_ORTHO_PHILOX_M1 UINT32_C(0xcd9e8d57)
#define LORA_ORTHO_PHILOX_W0 UINT32_C(0x9e3779b9)
#define LORA_ORTHO_PHILOX_W1 UINT32_C(0xbb67ae85)
#define LORA_ORTHO_PHILOX_ROUNDS 7

/* Four 32-bit words: a counter or an output of Philox. */
typedef struct lora_ortho_words {
    uint32_t word[4];
} lora_ortho_words;

/* Philox4x32 with seven rounds of `counter` under the key (key0, key1). */
static inline LORA_ORTHO_HD lora_ortho_words lora_ortho_philox4x32_7(lora_ortho_words counter,
                                                                     uint32_t key0, uint32_t key1) {
    lora_ortho_words x = counter;
    for (int round = 0; round < LORA_ORTHO_PHILOX_ROUNDS; ++round) {
        const uint64_t product0 = (uint64_t)LORA_ORTHO_PHILOX_M0 * x.word[0];
        const uint64_t product1 = (uint64_t)LORA_ORTHO_PHILOX_M1 * x.word[2];
        x.word[0] = (uint32_t)(product1 >> 32) ^ x.word[1] ^ key0;
        x.word[2] = (uint32_t)(product0 >> 32) ^ x.word[3] ^ key1;
        x.word[1] = (uint32_t)product1;
        x.word[3] = (uint32_t)product0;
        key0 += LORA_ORTHO_PHILOX_W0;
        key1 += LORA_ORTHO_PHILOX_W1;
    }
    return x;
}

/* Sample number `sample` of a stratified stream is part `sample % strata` of a block of `strata`
 * samples: all of a block read the same words, and each adds a rotation of its own to the draws. */
typedef struct lora_ortho_part {
    uint32_t block;    /* what the counter holds in place of the sample */
    uint32_t rotation; /* below 2^16; 0 for one stratum */
} lora_ortho_part;

static inline LORA_ORTHO_HD lora_ortho_part lora_ortho_part_of(uint32_t sample, uint32_t strata) {
    lora_ortho_part part;
    part.block = sample / strata;
    part.rotation = ((sample % strata) << 16) / strata;
    return part;
}

/* The eight draws of columns 8 * col_block .. 8 * col_block + 7; lora_ortho_draw_of takes one out.
 */
static inline LORA_ORTHO_HD lora_ortho_words lora_ortho_draw_block(uint64_t seed, uint32_t row,
                                                                   uint32_t col_block,
                                                                   uint32_t stream, uint32_t sample,
                                                                   uint32_t strata,
                                                                   uint32_t lane_set) {
    const lora_ortho_part part = lora_ortho_part_of(sample, strata);
    lora_ortho_words words;
    words.word[0] = col_block;
    words.word[1] = row;
    words.word[2] = stream;
    words.word[3] = (part.block << 8) | lane_set;
    words = lora_ortho_philox4x32_7(words, (uint32_t)seed, (uint32_t)(seed >> 32));
    for (int i = 0; i < 4; ++i) {
        const uint32_t low = (words.word[i] + part.rotation) & 0xffffu;
        words.word[i] = ((words.word[i] & 0xffff0000u) + (part.rotation << 16)) | low;
    }
    return words;
}

/* The 16-bit draw of column `col` from the block that holds it. */
static inline LORA_ORTHO_HD uint32_t lora_ortho_draw_of(lora_ortho_words block, uint64_t col) {
    return (block.word[(col & 7u) >> 1] >> (16u * (uint32_t)(col & 1u))) & 0xffffu;
}

/* The 16-bit draw of one element. */
static inline LORA_ORTHO_HD uint32_t lora_ortho_draw(uint64_t seed, uint32_t row, uint64_t col,
                                                     uint32_t stream, uint32_t sample,
                                                     uint32_t strata, uint32_t lane_set) {
    return lora_ortho_draw_of(
        lora_ortho_draw_block(seed, row, (uint32_t)(col >> 3), stream, sample, strata, lane_set),
        col);
}

/* One draw for all adapters: the first j with draw < thresholds[j], or -1 for nobody. */
static inline LORA_ORTHO_HD int32_t lora_ortho_owner(uint32_t draw, const uint32_t* thresholds,
                                                     int32_t adapters) {
    for (int32_t j = 0; j < adapters; ++j) {
        if (draw < thresholds[j]) return j;
    }
    return -1;
}

/* A draw for each adapter: 1 where the adapter with this threshold keeps the element, else 0. */
static inline LORA_ORTHO_HD int lora_ortho_keeps(uint32_t draw, uint32_t threshold) {
    return draw < threshold;
}

#endif
