/* Two adapters merged on one layer through the C interface, checked against the formula, against
 * stored values and, where it is given the project's file of known answers, draw by draw. */
#include <inttypes.h>
#include <lora_ortho/lora_ortho.h>
#include <lora_ortho/mask_stream.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 5, D_IN = 12, D_OUT = 20, K = 2, RANK = 3 };

static const uint64_t SEED = 2026;

static float A[K][RANK][D_IN], B[K][D_OUT][RANK], x[TOKENS][D_IN], base[TOKENS][D_OUT];
static float y[TOKENS][D_OUT], s[TOKENS][K * RANK];

static void require(lora_ortho_status status) {
    if (status == LORA_ORTHO_OK) return;
    fprintf(stderr, "lora_ortho: %s\n", lora_ortho_status_text(status));
    exit(1);
}

/* Some numbers between -1 and 1. */
static void fill(float* values, size_t count, uint64_t seed) {
    for (size_t i = 0; i < count; ++i) {
        values[i] = (float)lora_ortho_draw(seed, 0, i, 0, 0, 1, 0) / 32768.0f - 1.0f;
    }
}

/* base + gain_j (B_j A_j x), j the owner of the element. */
static double formula(int m, int n, const uint32_t* thresholds, const double* gains) {
    const uint32_t draw = lora_ortho_draw(SEED, (uint32_t)m, (uint64_t)n, 0, 0, 1, 0);
    const int32_t j = lora_ortho_owner(draw, thresholds, K);
    double sum = base[m][n];
    for (int r = 0; j >= 0 && r < RANK; ++r) {
        double dot = 0.0;
        for (int i = 0; i < D_IN; ++i) dot += (double)A[j][r][i] * x[m][i];
        sum += gains[j] * B[j][n][r] * dot;
    }
    return sum;
}

/* y[1][0 .. 5]. */
static const float STORED[6] = {-0.0762008429f, -4.81173038f, -1.09055281f,
                                -0.39593184f,   0.722269356f, -6.81371641f};

/* The draws in a file of known answers that differ from the library's; dies without any. */
static int wrong_draws(const char* path) {
    static char line[1 << 16];
    FILE* file = fopen(path, "r");
    if (!file) {
        perror(path);
        exit(1);
    }
    int wrong = 0, all = 0;
    while (fgets(line, sizeof line, file)) {
        int64_t seed, row, col;
        uint32_t stream, sample, lane_set, u;
        if (sscanf(line,
                   "draw %" SCNd64 " %" SCNu32 " %" SCNu32 " %" SCNu32 " %" SCNd64 " %" SCNd64
                   " -> %" SCNu32,
                   &seed, &stream, &sample, &lane_set, &row, &col, &u) != 7)
            continue;
        uint16_t draw;
        require(
            lora_ortho_draws((uint64_t)seed, row, 1, col, 1, stream, sample, 1, lane_set, &draw));
        wrong += draw != u;
        ++all;
    }
    fclose(file);
    printf("%d known draws, %d differ\n", all, wrong);
    return all == 0 ? 1 : wrong;
}

int main(int argc, char** argv) {
    if (argc > 1 && wrong_draws(argv[1]) > 0) return 1;
    fill(&A[0][0][0], sizeof A / sizeof(float), 1);
    fill(&B[0][0][0], sizeof B / sizeof(float), 2);
    fill(&x[0][0], sizeof x / sizeof(float), 3);
    fill(&base[0][0], sizeof base / sizeof(float), 4);

    /* Each adapter drops half of the output elements: the masks of the two are disjoint. */
    const double p[K] = {0.5, 0.5};
    uint32_t thresholds[K];
    double keep[K];
    require(lora_ortho_thresholds(LORA_ORTHO_ORTHOGONAL, K, p, thresholds, keep));
    const double weight = 0.8, scaling = 2.0;
    const double gains[K] = {weight * scaling / keep[0], weight * scaling / keep[1]};

    const int64_t ranks[K] = {RANK, RANK};
    lora_ortho_matrix lora_A[K], lora_B[K];
    for (int j = 0; j < K; ++j) {
        lora_A[j] = (lora_ortho_matrix){A[j], D_IN, 1, LORA_ORTHO_FLOAT32};
        lora_B[j] = (lora_ortho_matrix){B[j], RANK, 1, LORA_ORTHO_FLOAT32};
    }
    const lora_ortho_factors factors = {
        .struct_version = LORA_ORTHO_STRUCT_VERSION,
        .method = LORA_ORTHO_ORTHOGONAL,
        .dtype = LORA_ORTHO_FLOAT32,
        .isa = LORA_ORTHO_ISA_AUTO,
        .adapters = K,
        .d_in = D_IN,
        .d_out = D_OUT,
        .ranks = ranks,
        .thresholds = thresholds,
        .lora_A = lora_A,
        .lora_B = lora_B,
    };
    size_t bytes;
    require(lora_ortho_pack_bytes(&factors, &bytes));
    bytes = (bytes + LORA_ORTHO_ALIGNMENT - 1) / LORA_ORTHO_ALIGNMENT * LORA_ORTHO_ALIGNMENT;
    void* packed = aligned_alloc(LORA_ORTHO_ALIGNMENT, bytes);
    require(lora_ortho_pack(&factors, packed, bytes));

    const lora_ortho_call call = {
        .struct_version = LORA_ORTHO_STRUCT_VERSION,
        .strata = 1,
        .tokens = TOKENS,
        .seed = SEED,
        .gains = gains,
    };
    const lora_ortho_matrix x_matrix = {x, D_IN, 1, LORA_ORTHO_FLOAT32};
    const lora_ortho_matrix base_matrix = {base, D_OUT, 1, LORA_ORTHO_FLOAT32};
    require(lora_ortho_forward(packed, bytes, &call, &x_matrix, &base_matrix, y, s));
    free(packed);

    double worst = 0.0;
    for (int m = 0; m < TOKENS; ++m) {
        for (int n = 0; n < D_OUT; ++n) {
            worst = fmax(worst, fabs(y[m][n] - formula(m, n, thresholds, gains)));
        }
    }
    for (int n = 0; n < 6; ++n) worst = fmax(worst, fabs(y[1][n] - STORED[n]));
    printf("lora_ortho %s, %s: largest difference from the formula and stored values %.1e\n",
           lora_ortho_version(), lora_ortho_isa_name(lora_ortho_best_isa()), worst);
    return worst < 1e-4 ? 0 : 1;
}
