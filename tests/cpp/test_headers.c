/* The public headers are strict C11, and their functions link from C. */
#include <stdio.h>
#include <string.h>

#include "lora_ortho/lora_ortho.h"
#include "lora_ortho/mask_stream.h"

int main(void) {
    static const uint32_t expected[10] = {6177, 62576, 32269, 38036, 39227,
                                          2939, 49830, 720,   14368, 29961};
    const uint64_t seed = UINT64_C(0x0123456789abcdef);
    uint16_t drawn[10];
    int failed = 0;
    if (lora_ortho_draws(seed, 0, 1, 0, 10, 0, 0, 1, 0, drawn) != LORA_ORTHO_OK) ++failed;
    for (uint32_t col = 0; col < 10; ++col) {
        if (drawn[col] != expected[col]) ++failed;
        if (lora_ortho_draw(seed, 0, col, 0, 0, 1, 0) != expected[col]) ++failed;
    }
    if (lora_ortho_draws(seed, 0, 1, 0, 1, 0, 1, 2, 0, drawn) != LORA_ORTHO_OK) ++failed;
    if (drawn[0] != expected[0] + 32768) ++failed;
    if (strcmp(lora_ortho_status_text(LORA_ORTHO_OK), "ok") != 0) ++failed;
    if (lora_ortho_best_isa() < LORA_ORTHO_ISA_BASELINE) ++failed;
    printf("%d passed, %d failed\n", failed == 0, failed != 0);
    return failed != 0;
}
