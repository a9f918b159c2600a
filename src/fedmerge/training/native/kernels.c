/* Convolution, normalisation and pooling for small networks on one core.
 *
 * Layout "lanes": [height][width][channels][batch], batch innermost and a whole number of vectors. Every step then works
 * on whole vectors of examples whatever the number of channels or the size of the image. A group of a folded convolution
 * is a block of channels that is treated alone: its numbers do not depend on how many groups there are.
 *
 * Winograd's minimal filtering (Lavin & Gray, 2015, arXiv:1509.09308): a tile of M x M outputs of a 3 x 3 filter costs
 * (M + 2)^2 products instead of 9 M^2. With F(M) : Y = A'[(G g G') o (B' d B)]A, the slope on g is its adjoint,
 * G'[(A dY A') o (B' d B)]G, and the slope on d is a correlation of dY with the turned filter.
 *
 * No function keeps state but scratch memory of its own thread.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VL 16 /* floats in a vector */
#define NB 8  /* output channels that one kernel call sums at once, two vectors of examples each */
#elif defined(__AVX__)
#define VL 8
#define NB 4
#else
#define VL 4
#define NB 4
#endif

typedef float vec __attribute__((vector_size(4 * VL)));
typedef float loose __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t mask __attribute__((vector_size(4 * VL)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
#define MAX_TILE 6
#define ROUNDED(n, to) (((n) + (to) - 1) / (to) * (to))

INLINE vec load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, vec value) { *(loose *)to = value; }
INLINE vec zero(void) { return (vec){0}; }
/* A where the mask is set, else B. */
INLINE vec pick(mask where, vec a, vec b) { return (vec)(((mask)a & where) | ((mask)b & ~where)); }
INLINE float total(vec value) {
    float sum = 0;
    for (int i = 0; i < VL; i++) sum += value[i];
    return sum;
}

/* What a convolution is; the same order as in functions.py. */
typedef struct {
    int64_t lanes, groups, inner, outer; /* batch, groups, channels of one group in and out */
    int64_t height, width, out_height, out_width;
    int64_t kernel_height, kernel_width, stride_height, stride_width, pad_height, pad_width;
    int64_t step_outer, step_inner, step_height, step_width; /* of the weights, in floats */
    int64_t tile;                                            /* outputs a side of a Winograd tile; 0: directly */
} Shape;

/* --- scratch ------------------------------------------------------------------------------------------------------ */

typedef struct {
    char *block;
    size_t size;
} Arena;
static __thread Arena for_steps, for_slopes;

/* At least `floats` floats, aligned to 64 bytes, until the next call for the same arena; NULL if there is no memory. */
static float *scratch(Arena *arena, size_t floats) {
    size_t bytes = floats * sizeof(float) + 64;
    if (bytes > arena->size) {
        free(arena->block);
        arena->block = malloc(bytes);
        arena->size = arena->block ? bytes : 0;
    }
    return arena->block ? (float *)(arena->block + (64 - (uintptr_t)arena->block % 64) % 64) : NULL;
}

/* --- transposition ------------------------------------------------------------------------------------------------ */

#if VL == 16
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif VL == 8
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, (mask){__VA_ARGS__})
#endif

/* VL x VL in registers: interleaving the two halves log2(VL) times transposes. */
INLINE void transpose_block(const float *from, ptrdiff_t from_step, int64_t rows, float *to, ptrdiff_t to_step) {
    vec now[VL], next[VL];
    UNROLL for (int i = 0; i < VL; i++) now[i] = i < rows ? load(from + i * from_step) : zero();
    UNROLL for (int left = VL; left > 1; left /= 2) {
        UNROLL for (int i = 0; i < VL / 2; i++) {
            next[2 * i] = SHUFFLED(now[i], now[i + VL / 2], LOW);
            next[2 * i + 1] = SHUFFLED(now[i], now[i + VL / 2], HIGH);
        }
        UNROLL for (int i = 0; i < VL; i++) now[i] = next[i];
    }
    UNROLL for (int i = 0; i < VL; i++) store(to + i * to_step, now[i]);
}

/* to [columns][to_step] = from [rows][from_step] transposed; rows from `rows` up to `padded` become zero. */
static void transpose(const float *from, ptrdiff_t from_step, int64_t rows, int64_t columns, float *to,
                      ptrdiff_t to_step, int64_t padded) {
    for (int64_t r = 0; r < padded; r += VL)
        for (int64_t c = 0; c < columns; c += VL) {
            const float *block = from + r * from_step + c;
            if (columns - c >= VL && padded - r >= VL) {
                transpose_block(block, from_step, rows - r, to + c * to_step + r, to_step);
                continue;
            }
            for (int64_t i = 0; i < VL && c + i < columns; i++)
                for (int64_t j = 0; j < VL && r + j < padded; j++)
                    to[(c + i) * to_step + r + j] = r + j < rows ? block[j * from_step + i] : 0;
        }
}

/* Any [batch, channels, height, width] tensor with steps in floats into lanes; lanes beyond the batch become zero. */
void fm_to_lanes(const float *from, const int64_t *steps, int64_t batch, int64_t channels, int64_t height,
                 int64_t width, int64_t lanes, float *to) {
    int64_t pixels = height * width;
    if (steps[3] == 1 && (height == 1 || steps[2] == width)) { /* channels first */
        for (int64_t c = 0; c < channels; c++)
            transpose(from + c * steps[1], steps[0], batch, pixels, to + c * lanes, channels * lanes, lanes);
        return;
    }
    for (int64_t y = 0; y < height; y++)
        for (int64_t x = 0; x < width; x++) {
            const float *pixel = from + y * steps[2] + x * steps[3];
            float *lane = to + (y * width + x) * channels * lanes;
            if (steps[1] == 1) transpose(pixel, steps[0], batch, channels, lane, lanes, lanes);
            else
                for (int64_t c = 0; c < channels; c++)
                    for (int64_t b = 0; b < lanes; b++)
                        lane[c * lanes + b] = b < batch ? pixel[c * steps[1] + b * steps[0]] : 0;
        }
}

/* --- the one product that all convolutions are made of ------------------------------------------------------------ */

/* sums[NB][NV] += weights [terms][NB] x inputs [terms][lanes], over `terms`. */
#define ACCUMULATE(NV)                                                     \
    for (int64_t k = 0; k < terms; k++) {                                  \
        vec in[NV];                                                        \
        UNROLL for (int v = 0; v < NV; v++) in[v] = load(inputs + v * VL); \
        UNROLL for (int j = 0; j < NB; j++)                                \
            UNROLL for (int v = 0; v < NV; v++) sums[j][v] += weights[j] * in[v]; \
        inputs += lanes, weights += NB;                                    \
    }

/* out [used][lanes] = bias + product, one block of NB channels, NV vectors of examples. */
#define PRODUCT(NV)                                                                                              \
    INLINE void product##NV(const float *inputs, const float *weights, int64_t terms, int64_t lanes, float *out, \
                            int64_t used) {                                                                      \
        vec sums[NB][NV] = {{{0}}};                                                                              \
        ACCUMULATE(NV)                                                                                           \
        UNROLL for (int j = 0; j < NB; j++) {                                                                    \
            if (j >= used) break;                                                                                \
            UNROLL for (int v = 0; v < NV; v++) store(out + j * lanes + v * VL, sums[j][v]);                     \
        }                                                                                                        \
    }
PRODUCT(1)
PRODUCT(2)

/* out [outer][lanes] = weights [outer / NB][terms][NB] x inputs [terms][lanes] */
static void product(const float *inputs, const float *weights, int64_t terms, int64_t lanes, float *out,
                    int64_t outer) {
    for (int64_t n = 0; n < outer; n += NB, weights += terms * NB) {
        int64_t v = 0, used = outer - n;
        for (; v + 2 * VL <= lanes; v += 2 * VL) product2(inputs + v, weights, terms, lanes, out + n * lanes + v, used);
        for (; v < lanes; v += VL) product1(inputs + v, weights, terms, lanes, out + n * lanes + v, used);
    }
}

/* --- direct convolution ------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t from, tap; /* a place in the input, and the place in the filter that it meets */
} Meeting;

/* Forward: which inputs one output meets along one axis. */
static int64_t meet_inputs(int64_t out, int64_t size, int64_t kernel, int64_t stride, int64_t pad, Meeting *met) {
    int64_t count = 0;
    for (int64_t tap = 0; tap < kernel; tap++) {
        int64_t from = out * stride + tap - pad;
        if (from >= 0 && from < size) met[count++] = (Meeting){from, tap};
    }
    return count;
}

/* Backward: which outputs one input has reached along one axis. */
static int64_t meet_outputs(int64_t in, int64_t size, int64_t kernel, int64_t stride, int64_t pad, Meeting *met) {
    int64_t count = 0;
    for (int64_t tap = 0; tap < kernel; tap++) {
        int64_t scaled = in + pad - tap;
        if (scaled >= 0 && scaled % stride == 0 && scaled / stride < size) met[count++] = (Meeting){scaled / stride, tap};
    }
    return count;
}

#define DIRECT(NV)                                                                                                \
    INLINE void direct##NV(const float *from, int64_t pixel, int64_t width, const Meeting *rows, int64_t num_rows, \
                           const Meeting *columns, int64_t num_columns, const float *filter, int64_t kernel_width, \
                           int64_t terms, int64_t lanes, float *out, int64_t used) {                              \
        vec sums[NB][NV] = {{{0}}};                                                                               \
        for (int64_t r = 0; r < num_rows; r++)                                                                    \
            for (int64_t c = 0; c < num_columns; c++) {                                                           \
                const float *inputs = from + (rows[r].from * width + columns[c].from) * pixel;                    \
                const float *weights = filter + (rows[r].tap * kernel_width + columns[c].tap) * terms * NB;       \
                ACCUMULATE(NV)                                                                                    \
            }                                                                                                     \
        UNROLL for (int j = 0; j < NB; j++) {                                                                     \
            if (j >= used) break;                                                                                 \
            UNROLL for (int v = 0; v < NV; v++) store(out + j * lanes + v * VL, sums[j][v]);                      \
        }                                                                                                         \
    }
DIRECT(1)
DIRECT(2)

typedef int64_t Meet(int64_t, int64_t, int64_t, int64_t, int64_t, Meeting *);

/* One group; `filter` [outer / NB][kernel][terms][NB]. */
static void correlate(const Shape *s, Meet *meet, const float *in, int64_t in_height, int64_t in_width,
                      int64_t in_pixel, int64_t terms, float *out, int64_t out_height, int64_t out_width,
                      int64_t out_pixel, int64_t outer, const float *filter, Meeting *met) {
    int64_t lanes = s->lanes, kw = s->kernel_width, counts_step = kw + 1;
    Meeting *rows = met, *columns = met + s->kernel_height; /* columns: per place a count, then the meetings */
    for (int64_t x = 0; x < out_width; x++) {
        Meeting *here = columns + x * counts_step;
        here->from = meet(x, in_width, kw, s->stride_width, s->pad_width, here + 1);
    }
    for (int64_t y = 0; y < out_height; y++) {
        int64_t num_rows = meet(y, in_height, s->kernel_height, s->stride_height, s->pad_height, rows);
        for (int64_t n = 0; n < outer; n += NB) {
            const float *block = filter + n * s->kernel_height * kw * terms;
            for (int64_t x = 0; x < out_width; x++) {
                const Meeting *here = columns + x * counts_step;
                float *to = out + (y * out_width + x) * out_pixel + n * lanes;
                int64_t v = 0;
                for (; v + 2 * VL <= lanes; v += 2 * VL)
                    direct2(in + v, in_pixel, in_width, rows, num_rows, here + 1, here->from, block, kw, terms, lanes,
                            to + v, outer - n);
                for (; v < lanes; v += VL)
                    direct1(in + v, in_pixel, in_width, rows, num_rows, here + 1, here->from, block, kw, terms, lanes,
                            to + v, outer - n);
            }
        }
    }
}

/* packed [outer / NB][kernel][terms][NB] of weights with the given steps; channels beyond `outer` become zero. */
static void pack(const Shape *s, const float *weights, int64_t outer, int64_t outer_step, int64_t terms,
                 int64_t term_step, float *packed) {
    for (int64_t n = 0; n < outer; n += NB)
        for (int64_t h = 0; h < s->kernel_height; h++)
            for (int64_t w = 0; w < s->kernel_width; w++) {
                const float *tap = weights + h * s->step_height + w * s->step_width + n * outer_step;
                for (int64_t k = 0; k < terms; k++)
                    for (int64_t j = 0; j < NB; j++)
                        *packed++ = n + j < outer ? tap[k * term_step + j * outer_step] : 0;
            }
}

/* --- Winograd ----------------------------------------------------------------------------------------------------- */

/* The points of F(4): 0, +-P, +-Q and infinity. They are exact, and err half as much as the usual 1 and 2. */
#define P 0.75f
#define Q 1.5f
#define P2 (P * P)
#define Q2 (Q * Q)
#define AT_ZERO (1 / (P2 * Q2))
#define AT_P (1 / (2 * P2 * (P2 - Q2)))
#define AT_Q (1 / (2 * Q2 * (Q2 - P2)))

/* One axis of each transform; `i` and `o` are the distances between entries. */
INLINE void image_axis(int m, const vec *in, int i, vec *out, int o) { /* B' : m + 2 -> m + 2 */
    vec a = in[0], b = in[i], c = in[2 * i], d = in[3 * i];
    if (m == 2) {
        out[0] = a - c, out[o] = b + c, out[2 * o] = c - b, out[3 * o] = b - d;
        return;
    }
    vec e = in[4 * i], f = in[5 * i];
    vec even = e - Q2 * c, odd = P * d - (P * Q2) * b, even2 = e - P2 * c, odd2 = Q * d - (Q * P2) * b;
    out[0] = (P2 * Q2) * a - (P2 + Q2) * c + e, out[o] = even + odd, out[2 * o] = even - odd;
    out[3 * o] = even2 + odd2, out[4 * o] = even2 - odd2, out[5 * o] = (P2 * Q2) * b - (P2 + Q2) * d + f;
}

INLINE void result_axis(int m, const vec *in, int i, vec *out, int o) { /* A' : m + 2 -> m */
    vec sum = in[i] + in[2 * i], gap = in[i] - in[2 * i];
    if (m == 2) {
        out[0] = in[0] + sum, out[o] = gap - in[3 * i];
        return;
    }
    vec sum2 = in[3 * i] + in[4 * i], gap2 = in[3 * i] - in[4 * i];
    out[0] = in[0] + sum + sum2, out[o] = P * gap + Q * gap2;
    out[2 * o] = P2 * sum + Q2 * sum2, out[3 * o] = (P * P2) * gap + (Q * Q2) * gap2 + in[5 * i];
}

INLINE void slope_axis(int m, const vec *in, int i, vec *out, int o) { /* A : m -> m + 2 */
    vec a = in[0], b = in[i];
    if (m == 2) {
        out[0] = a, out[o] = a + b, out[2 * o] = a - b, out[3 * o] = -b;
        return;
    }
    vec c = in[2 * i], d = in[3 * i];
    vec even = a + P2 * c, odd = P * b + (P * P2) * d, even2 = a + Q2 * c, odd2 = Q * b + (Q * Q2) * d;
    out[0] = a, out[o] = even + odd, out[2 * o] = even - odd;
    out[3 * o] = even2 + odd2, out[4 * o] = even2 - odd2, out[5 * o] = d;
}

typedef float slim __attribute__((vector_size(4 * NB)));

INLINE void filter_axis(int m, const slim *in, int i, slim *out, int o) { /* G : 3 -> m + 2 */
    slim a = in[0], b = in[i], c = in[2 * i];
    if (m == 2) {
        out[0] = a, out[o] = 0.5f * (a + c + b), out[2 * o] = 0.5f * (a + c - b), out[3 * o] = c;
        return;
    }
    slim even = AT_P * a + (AT_P * P2) * c, odd = (AT_P * P) * b;
    slim even2 = AT_Q * a + (AT_Q * Q2) * c, odd2 = (AT_Q * Q) * b;
    out[0] = AT_ZERO * a, out[o] = even + odd, out[2 * o] = even - odd;
    out[3 * o] = even2 + odd2, out[4 * o] = even2 - odd2, out[5 * o] = c;
}

INLINE void gather_axis(int m, const vec *in, int i, vec *out, int o) { /* G' : m + 2 -> 3 */
    vec sum = in[i] + in[2 * i], gap = in[i] - in[2 * i];
    if (m == 2) {
        out[0] = in[0] + 0.5f * sum, out[o] = 0.5f * gap, out[2 * o] = 0.5f * sum + in[3 * i];
        return;
    }
    vec sum2 = in[3 * i] + in[4 * i], gap2 = in[3 * i] - in[4 * i];
    out[0] = AT_ZERO * in[0] + AT_P * sum + AT_Q * sum2, out[o] = (AT_P * P) * gap + (AT_Q * Q) * gap2;
    out[2 * o] = (AT_P * P2) * sum + (AT_Q * Q2) * sum2 + in[5 * i];
}

/* Where a filter's entries lie, in floats. */
typedef struct {
    int64_t outer, term, height, width;
} Steps;

/* Places of a tile lie off powers of two, else they would share few lines of the cache. */
INLINE int64_t apart(int64_t size) { return ROUNDED(size, 16) + 16; }

/* Filters of one group, packed [tile^2][outer / NB][terms][NB]; `turned` for the slope on the input. */
INLINE void transform_filters(int m, const float *weights, Steps steps, int64_t outer, int64_t terms, int turned,
                              float *packed) {
    const int t = m + 2;
    int64_t place = apart(ROUNDED(outer, NB) * terms);
    for (int64_t n = 0; n < outer; n += NB)
        for (int64_t k = 0; k < terms; k++) {
            const float *from = weights + n * steps.outer + k * steps.term;
            slim taps[9], half[3 * MAX_TILE], full[MAX_TILE];
            for (int i = 0; i < 9; i++) {
                const float *tap = from + i / 3 * steps.height + i % 3 * steps.width;
                slim value = {0};
                if (steps.outer == 1 && n + NB <= outer) memcpy(&value, tap, sizeof value);
                else
                    for (int j = 0; j < NB; j++)
                        if (n + j < outer) value[j] = tap[j * steps.outer];
                taps[turned ? 8 - i : i] = value;
            }
            UNROLL for (int x = 0; x < 3; x++) filter_axis(m, taps + x, 3, half + x, 3);
            UNROLL for (int y = 0; y < t; y++) {
                filter_axis(m, half + 3 * y, 1, full, 1);
                UNROLL for (int x = 0; x < t; x++)
                    memcpy(packed + (y * t + x) * place + (n * terms + k * NB), &full[x], sizeof(slim));
            }
        }
}

/* The same filters as [9][terms][outer, whole vectors], where terms lay side by side; returns their new steps. */
static Steps turn_filters(const float *weights, Steps steps, int64_t outer, int64_t terms, float *to) {
    int64_t wide = ROUNDED(outer, VL), place = terms * wide;
    for (int64_t i = 0; i < 9; i++)
        transpose(weights + i / 3 * steps.height + i % 3 * steps.width, steps.outer, outer, terms, to + i * place, wide,
                  wide);
    return (Steps){1, wide, 3 * place, place};
}

/* Tiles are taken in runs that fit the cache. */
static int64_t tiles_at_once(int64_t floats_per_tile, int64_t tiles) {
    int64_t fit = (96 << 10) / floats_per_tile;
    return fit < 1 ? 1 : fit < tiles ? fit : tiles;
}

/* to [places][step], each [channels][lanes]: B' d B of one tile whose upper left corner is at (top, left). */
INLINE void transform_image(int m, const float *in, int64_t pixel, int64_t height, int64_t width, int64_t top,
                            int64_t left, int64_t size, const float *nothing, float *to, int64_t step) {
    const int t = m + 2;
    const float *from[MAX_TILE * MAX_TILE];
    for (int y = 0; y < t; y++)
        for (int x = 0; x < t; x++) {
            int inside = top + y >= 0 && top + y < height && left + x >= 0 && left + x < width;
            from[y * t + x] = inside ? in + ((top + y) * width + left + x) * pixel : nothing;
        }
    for (int64_t i = 0; i < size; i += VL) {
        vec column[MAX_TILE], half[MAX_TILE * MAX_TILE], row[MAX_TILE];
        UNROLL for (int x = 0; x < t; x++) {
            UNROLL for (int y = 0; y < t; y++) column[y] = load(from[y * t + x] + i);
            image_axis(m, column, 1, half + x, t);
        }
        UNROLL for (int y = 0; y < t; y++) {
            image_axis(m, half + y * t, 1, row, 1);
            UNROLL for (int x = 0; x < t; x++) store(to + (y * t + x) * step + i, row[x]);
        }
    }
}

/* A' M A of one tile, into those of its m x m pixels that exist: `down` rows of `right` pixels. */
INLINE void transform_result(int m, const float *from, int64_t step, int64_t size, float *out, int64_t pixel,
                             int64_t row_step, int64_t down, int64_t right) {
    const int t = m + 2;
    for (int64_t i = 0; i < size; i += VL) {
        vec column[MAX_TILE], half[MAX_TILE * MAX_TILE], row[MAX_TILE];
        UNROLL for (int x = 0; x < t; x++) {
            UNROLL for (int y = 0; y < t; y++) column[y] = load(from + (y * t + x) * step + i);
            result_axis(m, column, 1, half + x, t);
        }
        UNROLL for (int y = 0; y < m; y++) {
            result_axis(m, half + y * t, 1, row, 1);
            UNROLL for (int x = 0; x < m; x++)
                if (y < down && x < right) store(out + y * row_step + x * pixel + i, row[x]);
        }
    }
}

/* One group: `filters` [tile^2][outer / NB][terms][NB], `work` for the tiles, `nothing` is zeros. */
INLINE void winograd(int m, const Shape *s, const float *in, int64_t in_height, int64_t in_width, int64_t in_pixel,
                     int64_t terms, int64_t pad_height, int64_t pad_width, float *out, int64_t out_height,
                     int64_t out_width, int64_t out_pixel, int64_t outer, const float *filters, const float *nothing,
                     float *work) {
    const int places = (m + 2) * (m + 2);
    int64_t lanes = s->lanes, across = (out_width + m - 1) / m, tiles = across * ((out_height + m - 1) / m);
    int64_t run = tiles_at_once(places * (terms + outer) * lanes, tiles), block = apart(ROUNDED(outer, NB) * terms);
    int64_t in_step = apart(run * terms * lanes), out_step = apart(run * outer * lanes);
    float *images = work, *results = work + places * in_step;
    for (int64_t first = 0; first < tiles; first += run) {
        int64_t count = tiles - first < run ? tiles - first : run;
        for (int64_t i = 0; i < count; i++) {
            int64_t tile = first + i, top = tile / across * m, left = tile % across * m;
            transform_image(m, in, in_pixel, in_height, in_width, top - pad_height, left - pad_width, terms * lanes,
                            nothing, images + i * terms * lanes, in_step);
        }
        for (int p = 0; p < places; p++)
            for (int64_t i = 0; i < count; i++)
                product(images + p * in_step + i * terms * lanes, filters + p * block, terms, lanes,
                        results + p * out_step + i * outer * lanes, outer);
        for (int64_t i = 0; i < count; i++) {
            int64_t tile = first + i, top = tile / across * m, left = tile % across * m, row = out_width * out_pixel;
            const float *from = results + i * outer * lanes;
            float *to = out + top * row + left * out_pixel;
            if (top + m <= out_height && left + m <= out_width)
                transform_result(m, from, out_step, outer * lanes, to, out_pixel, row, m, m);
            else
                transform_result(m, from, out_step, outer * lanes, to, out_pixel, row, out_height - top,
                                 out_width - left);
        }
    }
}

static int64_t winograd_work(int m, int64_t lanes, int64_t terms, int64_t outer, int64_t out_height,
                             int64_t out_width) {
    int64_t places = (m + 2) * (m + 2), tiles = (out_width + m - 1) / m * ((out_height + m - 1) / m);
    int64_t run = tiles_at_once(places * (terms + outer) * lanes, tiles);
    return places * (apart(run * terms * lanes) + apart(run * outer * lanes));
}

/* --- forward, and backward to the input --------------------------------------------------------------------------- */

/* One convolution of all groups, forward or (turned) backward. Returns 1 if memory is short. */
static int convolve(const Shape *s, int backward, const float *in, const float *weights, float *out) {
    int64_t in_height = backward ? s->out_height : s->height, in_width = backward ? s->out_width : s->width;
    int64_t out_height = backward ? s->height : s->out_height, out_width = backward ? s->width : s->out_width;
    int64_t terms = backward ? s->outer : s->inner, outer = backward ? s->inner : s->outer;
    int64_t term_step = backward ? s->step_outer : s->step_inner, outer_step = backward ? s->step_inner : s->step_outer;
    Steps steps = {outer_step, term_step, s->step_height, s->step_width};
    int64_t lanes = s->lanes, m = s->tile, kernel = s->kernel_height * s->kernel_width;
    int64_t places = m ? (m + 2) * (m + 2) : kernel, packed_size = places * apart(ROUNDED(outer, NB) * terms);
    int64_t meetings = 2 * (s->kernel_height + out_width * (s->kernel_width + 1)) * sizeof(int64_t) / sizeof(float);
    int64_t work_size = m ? winograd_work(m, lanes, terms, outer, out_height, out_width) : meetings;
    int64_t turned_size = m && outer_step != 1 && term_step == 1 ? 9 * terms * ROUNDED(outer, VL) : 0;
    float *packed = scratch(&for_steps, ROUNDED(packed_size, 16) + terms * lanes + turned_size + work_size);
    if (!packed) return 1;
    float *nothing = packed + ROUNDED(packed_size, 16), *turned = nothing + terms * lanes, *work = turned + turned_size;
    memset(nothing, 0, terms * lanes * sizeof(float));
    int64_t pad_height = backward ? 2 - s->pad_height : s->pad_height;
    int64_t pad_width = backward ? 2 - s->pad_width : s->pad_width;
    int64_t in_pixel = s->groups * terms * lanes, out_pixel = s->groups * outer * lanes;
    for (int64_t g = 0; g < s->groups; g++) {
        const float *from = in + g * terms * lanes, *own = weights + g * s->outer * s->step_outer;
        float *to = out + g * outer * lanes;
        Steps own_steps = steps;
        if (turned_size) own_steps = turn_filters(own, steps, outer, terms, turned), own = turned;
        if (m == 4) {
            transform_filters(4, own, own_steps, outer, terms, backward, packed);
            winograd(4, s, from, in_height, in_width, in_pixel, terms, pad_height, pad_width, to, out_height, out_width,
                     out_pixel, outer, packed, nothing, work);
        } else if (m == 2) {
            transform_filters(2, own, own_steps, outer, terms, backward, packed);
            winograd(2, s, from, in_height, in_width, in_pixel, terms, pad_height, pad_width, to, out_height, out_width,
                     out_pixel, outer, packed, nothing, work);
        } else {
            pack(s, own, outer, outer_step, terms, term_step, packed);
            correlate(s, backward ? meet_outputs : meet_inputs, from, in_height, in_width, in_pixel, terms, to,
                      out_height, out_width, out_pixel, outer, packed, (Meeting *)work);
        }
    }
    return 0;
}

int64_t fm_lanes(void) { return VL; }

static void add_bias(int64_t pixels, int64_t channels, int64_t lanes, const float *bias, float *y) {
    for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < channels; c++, y += lanes)
            for (int64_t v = 0; v < lanes; v += VL) store(y + v, load(y + v) + bias[c]);
}

/* slope [channels] = sum of dy over pixels and examples. */
static int bias_slope_of(int64_t pixels, int64_t channels, int64_t lanes, const float *dy, float *slope) {
    float *sums = scratch(&for_steps, channels * VL);
    if (!sums) return 1;
    memset(sums, 0, channels * VL * sizeof(float));
    for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < channels; c++, dy += lanes)
            for (int64_t v = 0; v < lanes; v += VL) store(sums + c * VL, load(sums + c * VL) + load(dy + v));
    for (int64_t c = 0; c < channels; c++) slope[c] = total(load(sums + c * VL));
    return 0;
}

/* --- backward to the weights -------------------------------------------------------------------------------------- */

#define NI 8 /* input channels that one call of `outer product` takes */

/* sums [NI][wide] += rows [NI][lanes] x slopes [lanes][wide], NV vectors of output channels. */
#define GATHER(NV)                                                                                                  \
    INLINE void gather##NV(vec sums[NI][NV], const float *in, const ptrdiff_t *rows, const float *slopes,           \
                           int64_t lanes, int64_t wide) {                                                           \
        const float *row[NI];                                                                                       \
        UNROLL for (int j = 0; j < NI; j++) row[j] = in + rows[j];                                                  \
        for (int64_t b = 0; b < lanes; b++, slopes += wide) {                                                       \
            vec slope[NV];                                                                                          \
            UNROLL for (int v = 0; v < NV; v++) slope[v] = load(slopes + v * VL);                                   \
            UNROLL for (int j = 0; j < NI; j++)                                                                     \
                UNROLL for (int v = 0; v < NV; v++) sums[j][v] += row[j][b] * slope[v];                             \
        }                                                                                                           \
    }                                                                                                               \
    /* Over `count` places: inputs every `in_step` floats, slopes every lanes x wide. */                            \
    INLINE void gathered##NV(const float *in, ptrdiff_t in_step, const ptrdiff_t *rows, const float *slopes,        \
                             int64_t count, int64_t lanes, int64_t wide, float *to, int64_t used, ptrdiff_t to_row, \
                             ptrdiff_t slope_row, int64_t num_rows, ptrdiff_t in_row) {                             \
        vec sums[NI][NV];                                                                                           \
        for (int j = 0; j < NI; j++)                                                                                \
            for (int v = 0; v < NV; v++) sums[j][v] = j < used ? load(to + j * to_row + v * VL) : zero();           \
        for (int64_t r = 0; r < num_rows; r++)                                                                      \
            for (int64_t i = 0; i < count; i++)                                                                     \
                gather##NV(sums, in + r * in_row + i * in_step, rows, slopes + r * slope_row + i * lanes * wide,    \
                           lanes, wide);                                                                            \
        for (int j = 0; j < NI; j++)                                                                                \
            for (int v = 0; v < NV; v++)                                                                            \
                if (j < used) store(to + j * to_row + v * VL, sums[j][v]);                                          \
    }
GATHER(1)
GATHER(2)

/* to [inner][wide] += sum over a block of places of inputs [inner][lanes] x slopes [lanes][wide]. */
static void gather(const float *in, ptrdiff_t in_step, ptrdiff_t in_row, const float *slopes, ptrdiff_t slope_row,
                   int64_t num_rows, int64_t count, int64_t inner, int64_t lanes, int64_t wide, float *to) {
    for (int64_t i = 0; i < inner; i += NI) {
        ptrdiff_t rows[NI];
        for (int64_t j = 0; j < NI; j++) rows[j] = (i + j < inner ? i + j : i) * lanes;
        int64_t n = 0, used = inner - i;
        for (; n + 2 * VL <= wide; n += 2 * VL)
            gathered2(in, in_step, rows, slopes + n, count, lanes, wide, to + i * wide + n, used, wide, slope_row,
                      num_rows, in_row);
        for (; n < wide; n += VL)
            gathered1(in, in_step, rows, slopes + n, count, lanes, wide, to + i * wide + n, used, wide, slope_row,
                      num_rows, in_row);
    }
}

/* One pixel's slopes [outer][lanes] as [lanes][wide]; channels beyond `outer` become zero. */
static void turn(const float *dy, int64_t outer, int64_t lanes, int64_t wide, float *to) {
    transpose(dy, lanes, outer, lanes, to, wide, wide);
}

/* Outputs of one axis that meet a valid input under `tap`: the first, and one beyond the last. */
static void valid(int64_t tap, int64_t size, int64_t out, int64_t stride, int64_t pad, int64_t *first, int64_t *last) {
    int64_t low = pad - tap, high = size - 1 + pad - tap;
    *first = low > 0 ? (low + stride - 1) / stride : 0;
    *last = high < 0 ? 0 : high / stride + 1;
    if (*last > out) *last = out;
}

/* sums [kernel][inner][wide] of one group; `turned` has room for `strip` rows of [out_width][lanes][wide]. */
static void weights_direct(const Shape *s, const float *x, const float *dy, int64_t wide, int64_t strip, float *turned,
                           float *sums) {
    int64_t lanes = s->lanes, in_pixel = s->groups * s->inner * lanes, out_pixel = s->groups * s->outer * lanes;
    int64_t row = s->out_width * lanes * wide;
    for (int64_t top = 0; top < s->out_height; top += strip) {
        int64_t bottom = top + strip < s->out_height ? top + strip : s->out_height;
        for (int64_t p = top * s->out_width; p < bottom * s->out_width; p++)
            turn(dy + p * out_pixel, s->outer, lanes, wide, turned + (p - top * s->out_width) * lanes * wide);
        for (int64_t h = 0; h < s->kernel_height; h++)
            for (int64_t w = 0; w < s->kernel_width; w++) {
                int64_t up, down, left, right;
                valid(h, s->height, s->out_height, s->stride_height, s->pad_height, &up, &down);
                valid(w, s->width, s->out_width, s->stride_width, s->pad_width, &left, &right);
                if (up < top) up = top;
                if (down > bottom) down = bottom;
                if (up >= down || left >= right) continue;
                int64_t in_y = up * s->stride_height + h - s->pad_height;
                int64_t in_x = left * s->stride_width + w - s->pad_width;
                gather(x + (in_y * s->width + in_x) * in_pixel, s->stride_width * in_pixel,
                       s->stride_height * s->width * in_pixel, turned + (up - top) * row + left * lanes * wide, row,
                       down - up, right - left, s->inner, lanes, wide, sums + (h * s->kernel_width + w) * apart(s->inner * wide));
            }
    }
}

#define FEW 8 /* input channels below which lanes stay examples */
#define NT 3 /* columns of the filter that one call takes */

/* Few input channels, as in a first layer: lanes stay examples, which are summed at the very end.
 * sums [kernel_height][inner][kernel_width / NT][outer / NB][NT][NB] of vectors. */
static void weights_of_few(const Shape *s, const float *x, const float *dy, const float *nothing, float *sums) {
    int64_t lanes = s->lanes, in_pixel = s->groups * s->inner * lanes, out_pixel = s->groups * s->outer * lanes;
    for (int64_t row = 0; row < s->out_height; row++) {
        float *to = sums;
        for (int64_t h = 0; h < s->kernel_height; h++) {
            int64_t y = row * s->stride_height + h - s->pad_height;
            int inside = y >= 0 && y < s->height;
            for (int64_t k = 0; k < s->inner; k++)
                for (int64_t tap = 0; tap < s->kernel_width; tap += NT)
                    for (int64_t n = 0; n < s->outer; n += NB, to += NT * NB * VL) {
                        if (!inside) continue;
                        const float *in = x + y * s->width * in_pixel + k * lanes;
                        const float *slope = dy + row * s->out_width * out_pixel + n * lanes;
                        int64_t steps[NB];
                        for (int64_t j = 0; j < NB; j++) steps[j] = n + j < s->outer ? j * lanes : 0;
                        vec sum[NT][NB];
                        UNROLL for (int t = 0; t < NT; t++)
                            UNROLL for (int j = 0; j < NB; j++) sum[t][j] = load(to + (t * NB + j) * VL);
                        for (int64_t w = 0; w < s->out_width; w++, slope += out_pixel) {
                            const float *from[NT];
                            for (int t = 0; t < NT; t++) {
                                int64_t at = w * s->stride_width + tap + t - s->pad_width;
                                from[t] = at >= 0 && at < s->width ? in + at * in_pixel : nothing;
                            }
                            for (int64_t v = 0; v < lanes; v += VL)
                                UNROLL for (int j = 0; j < NB; j++) {
                                    vec own = load(slope + steps[j] + v);
                                    UNROLL for (int t = 0; t < NT; t++) sum[t][j] += load(from[t] + v) * own;
                                }
                        }
                        UNROLL for (int t = 0; t < NT; t++)
                            UNROLL for (int j = 0; j < NB; j++) store(to + (t * NB + j) * VL, sum[t][j]);
                    }
        }
    }
}

static void write_slope_of_few(const Shape *s, const float *sums, float *slope) {
    for (int64_t h = 0; h < s->kernel_height; h++)
        for (int64_t k = 0; k < s->inner; k++)
            for (int64_t tap = 0; tap < s->kernel_width; tap += NT)
                for (int64_t n = 0; n < s->outer; n += NB)
                    for (int64_t i = 0; i < NT * NB; i++, sums += VL) {
                        int64_t w = tap + i / NB, o = n + i % NB;
                        if (w < s->kernel_width && o < s->outer)
                            slope[o * s->step_outer + k * s->step_inner + h * s->step_height + w * s->step_width] =
                                total(load(sums));
                    }
}

static int backward_weights_of_few(const Shape *s, const float *x, const float *dy, float *slope) {
    int64_t across = ROUNDED(s->kernel_width, NT) * ROUNDED(s->outer, NB) * VL;
    int64_t size = s->kernel_height * s->inner * across;
    float *sums = scratch(&for_steps, size + s->lanes), *nothing = sums + size;
    if (!sums) return 1;
    for (int64_t g = 0; g < s->groups; g++) {
        memset(sums, 0, (size + s->lanes) * sizeof(float));
        weights_of_few(s, x + g * s->inner * s->lanes, dy + g * s->outer * s->lanes, nothing, sums);
        write_slope_of_few(s, sums, slope + g * s->outer * s->step_outer);
    }
    return 0;
}

/* A dY A' of one tile: pixels [m x m][size] to places [step], each [size]. */
INLINE void transform_slopes(int m, const float *from, int64_t size, float *to, int64_t step) {
    const int t = m + 2;
    for (int64_t i = 0; i < size; i += VL) {
        vec column[MAX_TILE], half[MAX_TILE * MAX_TILE], row[MAX_TILE];
        UNROLL for (int x = 0; x < m; x++) {
            UNROLL for (int y = 0; y < m; y++) column[y] = load(from + (y * m + x) * size + i);
            slope_axis(m, column, 1, half + x, m);
        }
        UNROLL for (int y = 0; y < t; y++) {
            slope_axis(m, half + y * m, 1, row, 1);
            UNROLL for (int x = 0; x < t; x++) store(to + (y * t + x) * step + i, row[x]);
        }
    }
}

static int64_t weights_run(int m, const Shape *s, int64_t wide) {
    int64_t tiles = (s->out_height + m - 1) / m * ((s->out_width + m - 1) / m);
    return tiles_at_once((m + 2) * (m + 2) * (s->inner + wide) * s->lanes, tiles);
}

/* sums [tile^2][inner][wide] of one group. */
INLINE void weights_winograd(int m, const Shape *s, const float *x, const float *dy, int64_t wide, const float *nothing,
                             float *work, float *sums) {
    const int places = (m + 2) * (m + 2);
    int64_t lanes = s->lanes, in_pixel = s->groups * s->inner * lanes, out_pixel = s->groups * s->outer * lanes;
    int64_t across = (s->out_width + m - 1) / m, tiles = across * ((s->out_height + m - 1) / m);
    int64_t run = weights_run(m, s, wide), size = lanes * wide, in_size = s->inner * lanes;
    int64_t in_step = apart(run * in_size), out_step = apart(run * size);
    float *images = work, *slopes = images + places * in_step, *turned = slopes + places * out_step;
    for (int64_t first = 0; first < tiles; first += run) {
        int64_t count = tiles - first < run ? tiles - first : run;
        for (int64_t i = 0; i < count; i++) {
            int64_t top = (first + i) / across * m, left = (first + i) % across * m;
            transform_image(m, x, in_pixel, s->height, s->width, top - s->pad_height, left - s->pad_width, in_size,
                            nothing, images + i * in_size, in_step);
            for (int64_t p = 0; p < m * m; p++) {
                int64_t row = top + p / m, column = left + p % m;
                if (row < s->out_height && column < s->out_width)
                    turn(dy + (row * s->out_width + column) * out_pixel, s->outer, lanes, wide, turned + p * size);
                else memset(turned + p * size, 0, size * sizeof(float));
            }
            transform_slopes(m, turned, size, slopes + i * size, out_step);
        }
        for (int p = 0; p < places; p++)
            gather(images + p * in_step, in_size, 0, slopes + p * out_step, 0, 1, count, s->inner, lanes, wide,
                   sums + p * apart(s->inner * wide));
    }
}

/* The slopes on the nine taps, for one input channel and VL output channels. */
INLINE void slope_taps(int m, const float *sums, int64_t place, vec *taps) {
    const int t = m + 2;
    vec half[3 * MAX_TILE], column[MAX_TILE];
    UNROLL for (int x = 0; x < t; x++) {
        UNROLL for (int y = 0; y < t; y++) column[y] = load(sums + (y * t + x) * place);
        gather_axis(m, column, 1, half + x, t);
    }
    UNROLL for (int y = 0; y < 3; y++) gather_axis(m, half + y * t, 1, taps + 3 * y, 1);
}

/* The slope on the filters of one group, from `sums` [places][inner][wide]; `taps` has room for kernel x VL vectors. */
INLINE void write_slope(int m, const Shape *s, const float *sums, int64_t wide, vec *taps, float *slope) {
    int64_t place = apart(s->inner * wide), kernel = s->kernel_height * s->kernel_width;
    for (int64_t n = 0; n < s->outer; n += VL)
        for (int64_t k = 0; k < s->inner; k += VL) {
            int64_t used = s->outer - n < VL ? s->outer - n : VL, terms = s->inner - k < VL ? s->inner - k : VL;
            for (int64_t j = 0; j < terms; j++) {
                vec own[9];
                if (m) slope_taps(m, sums + (k + j) * wide + n, place, own);
                for (int64_t i = 0; i < kernel; i++)
                    taps[i * VL + j] = m ? own[i] : load(sums + i * place + (k + j) * wide + n);
            }
            for (int64_t i = 0; i < kernel; i++) {
                const float *from = (const float *)(taps + i * VL);
                float *to = slope + n * s->step_outer + k * s->step_inner + i / s->kernel_width * s->step_height +
                            i % s->kernel_width * s->step_width;
                if (used == VL && terms == VL && s->step_inner == 1) {
                    transpose_block(from, VL, VL, to, s->step_outer);
                    continue;
                }
                for (int64_t j = 0; j < terms; j++)
                    for (int64_t o = 0; o < used; o++) to[o * s->step_outer + j * s->step_inner] = from[j * VL + o];
            }
        }
}

static int conv_backward_weights(const Shape *s, const float *x, const float *dy, float *slope) {
    if (s->inner < FEW) return backward_weights_of_few(s, x, dy, slope);
    int64_t lanes = s->lanes, wide = ROUNDED(s->outer, VL), m = s->tile;
    int64_t places = m ? (m + 2) * (m + 2) : s->kernel_height * s->kernel_width;
    int64_t row = s->out_width * lanes * wide, strip = (32 << 10) / row, work_size;
    if (strip < 1) strip = 1;
    if (strip > s->out_height) strip = s->out_height;
    if (m) {
        int64_t run = weights_run(m, s, wide);
        work_size = places * (apart(run * s->inner * lanes) + apart(run * wide * lanes)) + m * m * lanes * wide;
    } else work_size = strip * row;
    int64_t sums_size = places * apart(s->inner * wide), nothing_size = s->inner * lanes;
    int64_t taps_size = s->kernel_height * s->kernel_width * VL * VL;
    float *sums = scratch(&for_steps, taps_size + sums_size + nothing_size + work_size);
    if (!sums) return 1;
    vec *taps = (vec *)sums;
    sums += taps_size;
    float *nothing = sums + sums_size, *work = nothing + nothing_size;
    for (int64_t g = 0; g < s->groups; g++) {
        const float *from = x + g * s->inner * lanes, *slopes = dy + g * s->outer * lanes;
        float *to = slope + g * s->outer * s->step_outer;
        memset(sums, 0, (sums_size + nothing_size) * sizeof(float));
        if (m == 4) weights_winograd(4, s, from, slopes, wide, nothing, work, sums), write_slope(4, s, sums, wide, taps, to);
        else if (m == 2) weights_winograd(2, s, from, slopes, wide, nothing, work, sums), write_slope(2, s, sums, wide, taps, to);
        else weights_direct(s, from, slopes, wide, strip, work, sums), write_slope(0, s, sums, wide, taps, to);
    }
    return 0;
}

/* --- GroupNorm or BatchNorm, ReLU and 2 x 2 maximum --------------------------------------------------------------- */

/* The same order as in functions.py. */
typedef struct {
    int64_t lanes, channels, sets; /* sets: groups of channels with statistics of their own */
    int64_t height, width, relu, pool; /* pool: 2 for the maximum of 2 x 2 pixels, else 1 */
    int64_t batch;                     /* BatchNorm: how many examples share statistics, a set per channel; else 0 */
} Norm;

/* From each example's means and sums of squares to the batch's mean and variance, the same in all lanes; mean and
 * unbiased variance also in `moments`, [2][channels]. */
static void share_statistics(const Norm *s, float count, float *mean, float *squares, float *moments) {
    for (int64_t c = 0; c < s->channels; c++, mean += s->lanes, squares += s->lanes) {
        double middle = 0, sum = 0;
        for (int64_t b = 0; b < s->batch; b++) middle += mean[b];
        middle /= s->batch;
        for (int64_t b = 0; b < s->batch; b++) sum += squares[b] + count * (mean[b] - middle) * (mean[b] - middle);
        float all = count * s->batch, variance = sum / all;
        moments[c] = middle, moments[s->channels + c] = sum / (all - 1);
        for (int64_t b = 0; b < s->lanes; b++) mean[b] = middle, squares[b] = variance;
    }
}

/* Means and 1 / deviations, [sets][lanes] each. Rows are joined by the formula of Chan, Golub & LeVeque (1979). */
static void statistics(const Norm *s, const float *y, float eps, float *mean, float *rate, float *moments, float *row) {
    int64_t lanes = s->lanes, members = s->channels / s->sets, size = s->sets * lanes;
    float each = s->width * members, count = 0;
    float *row_square = row + size;
    memset(mean, 0, size * sizeof(float));
    memset(rate, 0, size * sizeof(float)); /* holds the sum of squares until the end */
    for (int64_t h = 0; h < s->height; h++, y += s->width * s->channels * lanes) {
        memset(row, 0, 2 * size * sizeof(float));
        for (int pass = 0; pass < 2; pass++) {
            const float *from = y;
            for (int64_t w = 0; w < s->width; w++)
                for (int64_t g = 0; g < size; g += lanes, from += members * lanes)
                    for (int64_t v = 0; v < lanes; v += VL) {
                        vec sum = zero(), centre = load(row + g + v);
                        for (int64_t c = 0; c < members; c++) {
                            vec value = load(from + c * lanes + v);
                            sum += pass ? (value - centre) * (value - centre) : value;
                        }
                        float *to = (pass ? row_square : row) + g + v;
                        store(to, load(to) + sum);
                    }
            if (pass == 0)
                for (int64_t i = 0; i < size; i += VL) store(row + i, load(row + i) * (1 / each));
        }
        for (int64_t i = 0; i < size; i += VL) {
            vec gap = load(row + i) - load(mean + i);
            store(mean + i, load(mean + i) + gap * (each / (count + each)));
            store(rate + i, load(rate + i) + load(row_square + i) + gap * gap * (count * each / (count + each)));
        }
        count += each;
    }
    if (s->batch) share_statistics(s, count, mean, rate, moments);
    else
        for (int64_t i = 0; i < size; i++) rate[i] /= count;
    for (int64_t i = 0; i < size; i++) rate[i] = 1 / sqrtf(rate[i] + eps);
}

/* NaN stays NaN, as in torch. */
INLINE vec rectified(vec z) { return pick(z <= 0, zero(), z); }
INLINE mask beats(vec z, vec best) { return ~(z <= best) & (best == best); }

/* out [height / pool][width / pool][channels][lanes] */
static int normalised(const Norm *s, double eps, const float *y, const float *gain, const float *bias, float *mean,
                      float *rate, float *moments, float *out) {
    int64_t lanes = s->lanes, members = s->channels / s->sets, pixel = s->channels * lanes, row = s->width * pixel;
    int64_t rows = 2 * s->sets * lanes;
    float *scales = scratch(&for_steps, 2 * pixel + rows), *shifts = scales + pixel;
    if (!scales) return 1;
    statistics(s, y, eps, mean, rate, moments, shifts + pixel);
    for (int64_t c = 0; c < s->channels; c++)
        for (int64_t v = 0; v < lanes; v += VL) {
            int64_t at = c / members * lanes + v;
            vec scale = gain[c] * load(rate + at);
            store(scales + c * lanes + v, scale);
            store(shifts + c * lanes + v, bias[c] - load(mean + at) * scale);
        }
    for (int64_t h = 0; h + s->pool <= s->height; h += s->pool)
        for (int64_t w = 0; w + s->pool <= s->width; w += s->pool, out += pixel) {
            const float *from = y + h * row + w * pixel;
            for (int64_t i = 0; i < pixel; i += VL) {
                vec scale = load(scales + i), shift = load(shifts + i), z = load(from + i) * scale + shift;
                if (s->pool == 2) {
                    vec b = load(from + pixel + i) * scale + shift, c = load(from + row + i) * scale + shift;
                    vec d = load(from + row + pixel + i) * scale + shift;
                    z = pick(beats(b, z), b, z), z = pick(beats(c, z), c, z), z = pick(beats(d, z), d, z);
                }
                store(out + i, s->relu ? rectified(z) : z);
            }
        }
    return 0;
}

typedef struct {
    vec value; /* of y at the winner */
    vec slope; /* on the normalised value */
    mask first, second, third; /* whether a later pixel has won over 0, 1, 2 */
} Won;

/* Which pixel gave the output, and the slope that reaches it. */
INLINE Won winner(const float *from, int64_t pixel, int64_t row, int pool, int relu, vec scale, vec shift, vec slope) {
    Won won = {.value = load(from)};
    vec z = won.value * scale + shift;
    if (pool == 2) {
        vec yb = load(from + pixel), yc = load(from + row), yd = load(from + row + pixel);
        vec b = yb * scale + shift, c = yc * scale + shift, d = yd * scale + shift;
        won.first = beats(b, z), z = pick(won.first, b, z), won.value = pick(won.first, yb, won.value);
        won.second = beats(c, z), z = pick(won.second, c, z), won.value = pick(won.second, yc, won.value);
        won.third = beats(d, z), z = pick(won.third, d, z), won.value = pick(won.third, yd, won.value);
    }
    won.slope = relu ? pick(z <= 0, zero(), slope) : slope;
    return won;
}

/* dy from dout; the slopes on gain and bias [channels]. Lanes beyond the batch must be zero in dout. */
INLINE void norm_backward(const Norm *s, int pool, int relu, const float *y, const float *gain, const float *bias,
                          const float *mean, const float *rate, const float *dout, float *dy, float *gain_slope,
                          float *bias_slope, float *work) {
    int64_t lanes = s->lanes, members = s->channels / s->sets, pixel = s->channels * lanes, row = s->width * pixel;
    float *scales = work, *shifts = scales + pixel, *means = shifts + pixel, *rates = means + pixel;
    float *sums = rates + pixel, *products = sums + pixel, *row_sums = products + pixel, *row_products = row_sums + pixel;
    for (int64_t c = 0; c < s->channels; c++)
        for (int64_t v = 0; v < lanes; v += VL) {
            int64_t at = c / members * lanes + v, to = c * lanes + v;
            vec scale = gain[c] * load(rate + at);
            store(scales + to, scale), store(shifts + to, bias[c] - load(mean + at) * scale);
            store(means + to, load(mean + at)), store(rates + to, load(rate + at));
        }
    memset(sums, 0, 2 * pixel * sizeof(float));
    const float *slopes = dout;
    for (int64_t h = 0; h + pool <= s->height; h += pool) {
        memset(row_sums, 0, 2 * pixel * sizeof(float));
        for (int64_t w = 0; w + pool <= s->width; w += pool, slopes += pixel) {
            const float *from = y + h * row + w * pixel;
            for (int64_t i = 0; i < pixel; i += VL) {
                Won won = winner(from + i, pixel, row, pool, relu, load(scales + i), load(shifts + i), load(slopes + i));
                store(row_sums + i, load(row_sums + i) + won.slope);
                store(row_products + i, load(row_products + i) + won.slope * (won.value - load(means + i)));
            }
        }
        for (int64_t i = 0; i < 2 * pixel; i += VL) store(sums + i, load(sums + i) + load(row_sums + i));
    }
    for (int64_t i = 0; i < pixel; i += VL) store(products + i, load(products + i) * load(rates + i));
    for (int64_t c = 0; c < s->channels; c++) {
        vec sum = zero(), product = zero();
        for (int64_t v = 0; v < lanes; v += VL)
            sum += load(sums + c * lanes + v), product += load(products + c * lanes + v);
        bias_slope[c] = total(sum), gain_slope[c] = total(product);
    }
    /* dy = scale dz - rate (mean of gain dz + normalised y x mean of gain dz x normalised y) */
    float each = 1.f / (members * s->height * s->width);
    float *levels = row_sums, *tilts = row_products;
    if (s->batch) {
        each /= s->batch;
        memset(levels, 0, 2 * pixel * sizeof(float));
        for (int64_t c = 0; c < s->channels; c++)
            for (int64_t b = 0; b < s->batch; b++) {
                float own = rate[c * lanes + b], scale = -each * own * gain[c];
                levels[c * lanes + b] = scale * bias_slope[c];
                tilts[c * lanes + b] = scale * own * gain_slope[c];
            }
    } else for (int64_t g = 0; g < s->sets; g++)
        for (int64_t v = 0; v < lanes; v += VL) {
            vec sum = zero(), product = zero();
            for (int64_t c = g * members; c < (g + 1) * members; c++)
                sum += gain[c] * load(sums + c * lanes + v), product += gain[c] * load(products + c * lanes + v);
            vec own = load(rate + g * lanes + v);
            for (int64_t c = g * members; c < (g + 1) * members; c++) {
                store(levels + c * lanes + v, -each * own * sum);
                store(tilts + c * lanes + v, -each * own * own * product);
            }
        }
    slopes = dout;
    for (int64_t h = 0; h < s->height; h += pool)
        for (int64_t w = 0; w < s->width; w += pool) {
            const float *from = y + h * row + w * pixel;
            float *to = dy + h * row + w * pixel;
            if (h + pool > s->height || w + pool > s->width) { /* pixels that no output covers */
                for (int64_t p = 0; p < pool * pool; p++) {
                    if (h + p / pool >= s->height || w + p % pool >= s->width) continue;
                    int64_t at = p / pool * row + p % pool * pixel;
                    for (int64_t i = 0; i < pixel; i += VL)
                        store(to + at + i, load(levels + i) + load(tilts + i) * (load(from + at + i) - load(means + i)));
                }
                continue;
            }
            for (int64_t i = 0; i < pixel; i += VL) {
                vec scale = load(scales + i), level = load(levels + i), tilt = load(tilts + i), middle = load(means + i);
                Won won = winner(from + i, pixel, row, pool, relu, scale, load(shifts + i), load(slopes + i));
                vec reach = scale * won.slope;
#define REST(at) (level + tilt * (load(from + (at) + i) - middle))
                if (pool == 1) store(to + i, reach + REST(0));
                else {
                    mask later = won.second | won.third;
                    store(to + i, pick(won.first | later, zero(), reach) + REST(0));
                    store(to + pixel + i, pick(won.first & ~later, reach, zero()) + REST(pixel));
                    store(to + row + i, pick(won.second & ~won.third, reach, zero()) + REST(row));
                    store(to + row + pixel + i, pick(won.third, reach, zero()) + REST(row + pixel));
                }
            }
            slopes += pixel;
        }
}

static int normalised_backward(const Norm *s, const float *y, const float *gain, const float *bias, const float *mean,
                     const float *rate, const float *dout, float *dy, float *gain_slope, float *bias_slope) {
    float *work = scratch(&for_steps, 8 * s->channels * s->lanes);
    if (!work) return 1;
#define BACKWARD(pool, relu) \
    norm_backward(s, pool, relu, y, gain, bias, mean, rate, dout, dy, gain_slope, bias_slope, work)
    if (s->pool == 2 && s->relu) BACKWARD(2, 1);
    else if (s->pool == 2) BACKWARD(2, 0);
    else if (s->relu) BACKWARD(1, 1);
    else BACKWARD(1, 0);
    return 0;
}

/* --- a convolution and what follows it ---------------------------------------------------------------------------- */

/* y = x * weights + bias; with a norm also out, and mean and rate [sets][lanes]; with BatchNorm also moments
 * [2][channels]. Returns 1 if memory is short. */
int fm_stage_forward(const Shape *s, const Norm *norm, double eps, const float *x, const float *weights,
                     const float *bias, const float *gain, const float *shift, float *y, float *mean, float *rate,
                     float *moments, float *out) {
    if (convolve(s, 0, x, weights, y)) return 1;
    if (bias) add_bias(s->out_height * s->out_width, s->groups * s->outer, s->lanes, bias, y);
    return norm ? normalised(norm, eps, y, gain, shift, mean, rate, moments, out) : 0;
}

/* Slopes from dout, on whatever is not NULL; without a norm dout is dy. Returns 1 if memory is short. */
int fm_stage_backward(const Shape *s, const Norm *norm, const float *x, const float *weights, const float *gain,
                      const float *shift, const float *y, const float *mean, const float *rate, const float *dout,
                      float *dx, float *dweights, float *dbias, float *dgain, float *dshift) {
    int64_t pixels = s->out_height * s->out_width, channels = s->groups * s->outer;
    const float *dy = dout;
    if (norm) {
        float *inside = scratch(&for_slopes, pixels * channels * s->lanes);
        if (!inside || normalised_backward(norm, y, gain, shift, mean, rate, dout, inside, dgain, dshift)) return 1;
        dy = inside;
    }
    if (dbias && bias_slope_of(pixels, channels, s->lanes, dy, dbias)) return 1;
    if (dweights && conv_backward_weights(s, x, dy, dweights)) return 1;
    return dx ? convolve(s, 1, dy, weights, dx) : 0;
}

/* The maximum over all pixels, [size] of [pixels][size], and where it was first. NaN wins, as in torch. */
void fm_peak_forward(int64_t pixels, int64_t size, const float *x, float *peak, int32_t *place) {
    for (int64_t i = 0; i < size; i += VL) {
        vec best = load(x + i);
        mask at = {0};
        for (int64_t p = 1; p < pixels; p++) {
            vec value = load(x + p * size + i);
            mask won = beats(value, best);
            best = pick(won, value, best), at = (at & ~won) | (won & (int32_t)p);
        }
        store(peak + i, best);
        memcpy(place + i, &at, sizeof at);
    }
}

void fm_peak_backward(int64_t pixels, int64_t size, const int32_t *place, const float *slope, float *dx) {
    for (int32_t p = 0; p < pixels; p++)
        for (int64_t i = 0; i < size; i += VL) {
            mask at;
            memcpy(&at, place + i, sizeof at);
            store(dx + p * size + i, pick(at == p, load(slope + i), zero()));
        }
}
