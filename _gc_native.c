/* _gc_native.c - Gram matrices of gradients, read where they lie, at about the speed of memory.
 *
 *     gram[i*n + j] += sum over k < p of rows[i][k] * rows[j][k]          i, j = 0 .. n-1
 *
 * Gradient Collision compares the gradients g_1 .. g_n of n chunks of a mini-batch: every <g_i, g_j> is in this matrix.
 * Call it once per parameter tensor: the matrix is ADDED INTO, so the calls add up to the Gram matrix of the whole
 * gradients, and nothing is ever flattened or copied.
 *
 * Layout         rows: n pointers, each to p contiguous values (float or double, by function); NULL is a row of zeros.
 *                gram: n x n doubles, row-major, symmetric on return if it was on entry. Zero it before the first call.
 * Preconditions  1 <= n <= 1024, 0 <= p <= 2^40. Rows may start at any byte. Round-to-nearest, as every program has it.
 * Aliasing       rows may overlap or be one another; gram overlaps none of them.
 * Errors         the return value: 0, or GC_ENULL, GC_EROWS, GC_ESIZE, GC_EPATH below; gram is then untouched.
 * Threads        `threads` of them where built with OpenMP (0: OpenMP's own choice). The same input, thread count and
 *                CPU give the same bits. Several callers at once are fine. About 150 KB of stack in every thread.
 * Paths          GC_AUTO picks the widest vectors this CPU has; tests ask for each by name.
 *
 * Accuracy: against the exact value, errors are below 1e-9 |g_i||g_j| for float and 1e-14 |g_i||g_j| for double, for
 * any values. Floats are multiplied as doubles: such products are exact and can neither overflow nor underflow.
 * Doubles are summed in short runs and the runs added with their rounding errors kept. Infinities and NaN spread
 * as in plain arithmetic; doubles beyond 1e154 overflow as it does.
 *
 * Speed: blocks of 256 columns are widened to double in the caches, and tiles of 4 x 4 rows multiplied in registers;
 * while a block is worked on, the next one is fetched from memory. Up to 32 rows are read from memory once.
 *
 * Needs GCC or Clang (vector extensions) and -ffp-contract=fast (a*b+c in one instruction); -ffast-math would break it.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __FAST_MATH__
#error "the summation below relies on rounding errors: build without -ffast-math"
#endif

enum { GC_OK = 0, GC_ENULL = -1, GC_EROWS = -2, GC_ESIZE = -3, GC_EPATH = -4 };
enum { GC_AUTO = 0, GC_GENERIC = 1, GC_FMA = 2, GC_AVX512 = 3, GC_NAIVE = 4 };

enum {
    MAX_N = 1024,
    ROWS = 32,              /* rows in one pass over memory */
    COLUMNS = 256,          /* floats in a block of one row; of doubles, half as many: 1 KB either way */
    LINES = 16,             /* cache lines in that 1 KB */
    AHEAD = 1,              /* blocks from the one worked on to the one fetched */
    TILES = 36,             /* pairs of groups of four rows: 8 * 9 / 2 */
    RUN = 1 << 22,          /* columns of floats that lanes of doubles add up unaided: error < 2^21 * 2^-53 */
    PARALLEL = 1 << 17      /* values below which waking a thread costs more than it saves */
};

typedef float any_float __attribute__((aligned(1), may_alias));            /* a float at any byte */
typedef double any_double __attribute__((aligned(1), may_alias));

#define INLINE static inline __attribute__((always_inline))   /* so that sizes and flags below are constants */

/* Which rows meet which in one pass: all pairs of `count` rows, or (square) the rest of them with the first half. */
struct pass {
    const char *rows[ROWS];
    size_t index[ROWS];     /* their places in the whole matrix */
    int count, groups, square;
};

/* The tiles of a pass in their one order: row group g in first..groups-1 with row groups 0 .. ends(g)-1. */
INLINE int first(const struct pass *pass) { return pass->square ? pass->groups / 2 : 0; }
INLINE int ends(const struct pass *pass, int g) { return pass->square ? pass->groups / 2 : g + 1; }

/* sum + rest += x, exactly: rest collects what rounding takes away (Knuth's TwoSum; Ogita, Rump and Oishi's Sum2). */
INLINE void add_exactly(double *sum, double *rest, double x)
{
    const double old = *sum, now = old + x, part = now - old;
    *rest += (old - (now - part)) + (x - part);
    *sum = now;
}

/* Fetch one cache line of a later block into L2. By integers, since the address may lie past a row, or in none; without
 * a branch, which would keep the compiler from mixing this with the arithmetic around it. */
INLINE void fetch(const struct pass *pass, size_t offset, int line)
{
    const int row = line / LINES < pass->count ? line / LINES : pass->count - 1;
    __builtin_prefetch((const void *)((uintptr_t)pass->rows[row] + offset + (size_t)(line % LINES) * 64), 0, 2);
}

/* One tile of one block: sums[4*i + j] += <a_i, b_j> for four rows each, lane by lane; of a diagonal tile, j <= i only.
 * The sixteen accumulators are registers. Some tiles fetch, on the way, four rows of the block at offset. */
#define TILE(LANES)                                                                                                  \
    typedef double vec##LANES __attribute__((vector_size(LANES * sizeof(double)), may_alias));                       \
    INLINE void tile##LANES(int size, int diagonal, int fetching, const double *a, const double *b, int steps,       \
                            double *sums, double *rests, const struct pass *pass, size_t offset, int line)           \
    {                                                                                                                \
        const vec##LANES *va = (const vec##LANES *)a, *vb = (const vec##LANES *)b;                                   \
        vec##LANES acc[4][4], *sum = (vec##LANES *)sums, *rest = (vec##LANES *)rests;                                \
        for (int i = 0; i < 4; i++)   /* only those in use: an initializer would clear all of them, in memory */     \
            for (int j = 0; j < (diagonal ? i + 1 : 4); j++)                                                         \
                acc[i][j] = (vec##LANES){0};                                                                         \
        for (int k = 0; k < steps; k++) {                                                                            \
            for (int l = 0; fetching && l < (LANES * size + 15) / 16; l++)                                           \
                fetch(pass, offset, line++);                                                                         \
            for (int i = 0; i < 4; i++)                                                                              \
                for (int j = 0; j < (diagonal ? i + 1 : 4); j++)                                                     \
                    acc[i][j] += va[i * (COLUMNS / LANES) + k] * vb[j * (COLUMNS / LANES) + k];                      \
        }                                                                                                            \
        for (int i = 0; i < 4; i++)                                                                                  \
            for (int j = 0; j < (diagonal ? i + 1 : 4); j++) {                                                       \
                const vec##LANES old = sum[4 * i + j], now = old + acc[i][j], part = now - old;                      \
                if (size == sizeof(double))   /* add_exactly, all lanes at once */                                   \
                    rest[4 * i + j] += (old - (now - part)) + (acc[i][j] - part);                                    \
                sum[4 * i + j] = now;                                                                                \
            }                                                                                                        \
    }
TILE(2)
TILE(4)
TILE(8)

/* to[0 .. width-1] = the row's values from the k-th on. */
INLINE void widen(int size, const char *row, size_t k, int width, double *restrict to)
{
    const any_float *f = (const any_float *)row + k;
    const any_double *d = (const any_double *)row + k;
    for (int c = 0; c < width; c++)
        to[c] = size == sizeof(float) ? (double)f[c] : d[c];
}

/* Columns [from, to) of a pass, added into sums (and rests): widen a block of every row, then tile over it. */
INLINE void columns(int lanes, int size, const struct pass *pass, size_t from, size_t to, double *sums, double *rests)
{
    const size_t whole = COLUMNS * sizeof(float) / (size_t)size;
    _Alignas(64) double block[ROWS][COLUMNS];
    memset(block, 0, (size_t)pass->groups * 4 * sizeof *block);   /* rows that are NULL or beyond count stay zero */
    for (size_t k = from; k < to; k += whole) {
        const int width = (int)(to - k < whole ? to - k : whole), steps = (width + lanes - 1) / lanes;
        for (int i = 0; i < pass->count; i++) {
            if (!pass->rows[i])
                continue;
            widen(size, pass->rows[i], k, width, block[i]);
            for (int c = width; c < steps * lanes; c++)
                block[i][c] = 0;
        }
        const size_t offset = (k + AHEAD * whole) * (size_t)size;
        int t = 0;
        for (int g = first(pass); g < pass->groups; g++)
            for (int h = 0; h < ends(pass, g); h++, t++) {
                const double *a = block[4 * g], *b = block[4 * h];
                double *sum = sums + 16 * lanes * t, *rest = rests + 16 * lanes * t;
#define RUN_TILE(LANES, diagonal, fetching, group) \
    tile##LANES(size, diagonal, fetching, a, b, steps, sum, rest, pass, offset, (group) * 4 * LINES)
#define ANY_TILE(LANES)                    \
    if (g == h)                            \
        RUN_TILE(LANES, 1, 1, g);          \
    else if (pass->square && t % 2 == 0)   \
        RUN_TILE(LANES, 0, 1, t / 2);      \
    else                                   \
        RUN_TILE(LANES, 0, 0, 0)
                if (lanes == 8) {
                    ANY_TILE(8);
                } else if (lanes == 4) {
                    ANY_TILE(4);
                } else {
                    ANY_TILE(2);
                }
            }
    }
}

/* The same source for every kind of CPU, with the vectors that it has. */
typedef void columns_of_pass(const struct pass *pass, size_t from, size_t to, double *sums, double *rests);
struct kernel { columns_of_pass *run; int lanes; };
#define KERNEL(name, lanes, size, target)                                                                            \
    target static void name(const struct pass *pass, size_t from, size_t to, double *sums, double *rests)            \
    {                                                                                                                \
        columns(lanes, size, pass, from, to, sums, rests);                                                           \
    }
KERNEL(generic_f32, 2, 4, )
KERNEL(generic_f64, 2, 8, )
#ifdef __x86_64__
KERNEL(fma_f32, 4, 4, __attribute__((target("fma"))))
KERNEL(fma_f64, 4, 8, __attribute__((target("fma"))))
KERNEL(avx512_f32, 8, 4, __attribute__((target("avx512f"))))
KERNEL(avx512_f64, 8, 8, __attribute__((target("avx512f"))))
#endif

/* One pass over memory: each thread its own stretch of columns, the stretches added up in their order. */
static void run_pass(const struct pass *pass, struct kernel kernel, size_t p, size_t n, int threads, double *gram)
{
    double sum[TILES * 16] = {0}, rest[TILES * 16] = {0};
    const int used = 16 * (pass->square ? pass->groups * pass->groups / 4 : pass->groups * (pass->groups + 1) / 2);
    if (p * (size_t)pass->count < PARALLEL)
        threads = 1;
#ifdef _OPENMP
#pragma omp parallel for ordered schedule(static, 1) num_threads(threads) if (threads > 1)
#endif
    for (int w = 0; w < threads; w++) {
        const size_t share = p / (size_t)threads / 16 * 16, from = share * (size_t)w;
        const size_t to = w == threads - 1 ? p : from + share;
        _Alignas(64) double lane_sums[TILES * 16 * 8], lane_rests[TILES * 16 * 8];
        double my_sum[TILES * 16] = {0}, my_rest[TILES * 16] = {0};
        for (size_t k = from; k < to; k += RUN) {
            memset(lane_sums, 0, (size_t)(used * kernel.lanes) * sizeof(double));
            memset(lane_rests, 0, (size_t)(used * kernel.lanes) * sizeof(double));
            kernel.run(pass, k, to - k < RUN ? to : k + RUN, lane_sums, lane_rests);
            for (int e = 0; e < used * kernel.lanes; e++) {
                add_exactly(&my_sum[e / kernel.lanes], &my_rest[e / kernel.lanes], lane_sums[e]);
                my_rest[e / kernel.lanes] += lane_rests[e];
            }
        }
#ifdef _OPENMP
#pragma omp ordered
#endif
        for (int e = 0; e < used; e++) {
            add_exactly(&sum[e], &rest[e], my_sum[e]);
            rest[e] += my_rest[e];
        }
    }
    const double *s = sum, *r = rest;
    for (int g = first(pass); g < pass->groups; g++)
        for (int h = 0; h < ends(pass, g); h++)
            for (int i = 4 * g; i < 4 * g + 4; i++)
                for (int j = 4 * h; j < 4 * h + 4; j++, s++, r++) {
                    if (i >= pass->count || j > i)   /* no such row; or the other half of a diagonal tile, all 0 */
                        continue;
                    const double value = *r == *r ? *s + *r : *s;   /* at infinity rest is NaN, and sum has it all */
                    const size_t row = pass->index[i], column = pass->index[j];
                    gram[row * n + column] += value;
                    if (row != column)
                        gram[column * n + row] += value;
                }
}

static double value_at(size_t size, const void *row, size_t k)
{
    if (!row)
        return 0;
    return size == sizeof(float) ? (double)((const any_float *)row)[k] : ((const any_double *)row)[k];
}

/* The reference: what all of the above must equal. */
static void naive(size_t size, const void *const *rows, size_t n, size_t p, double *gram)
{
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            double sum = 0;
            for (size_t k = 0; k < p; k++)
                sum += value_at(size, rows[i], k) * value_at(size, rows[j], k);
            gram[i * n + j] += sum;
        }
}

/* The widest path that this CPU has. */
int gc_best_path(void)
{
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512f") ? GC_AVX512 : __builtin_cpu_supports("fma") ? GC_FMA : GC_GENERIC;
#else
    return GC_GENERIC;
#endif
}

/* Check the arguments, choose the kernel, and split more rows than a pass holds into pairs of half-passes. */
static int run(size_t size, const void *const *rows, size_t n, size_t p, int threads, int path, double *gram)
{
    if (!rows || !gram)
        return GC_ENULL;
    if (n < 1 || n > MAX_N)
        return GC_EROWS;
    if (p > (uint64_t)1 << 40 || p > (size_t)PTRDIFF_MAX / size / n)
        return GC_ESIZE;
    if (path < GC_AUTO || path > GC_NAIVE || (path != GC_NAIVE && path > gc_best_path()))
        return GC_EPATH;
    if (path == GC_NAIVE) {
        naive(size, rows, n, p, gram);
        return GC_OK;
    }
    if (path == GC_AUTO)
        path = gc_best_path();
    struct kernel kernel = {size == sizeof(float) ? generic_f32 : generic_f64, 2};
#ifdef __x86_64__
    if (path == GC_FMA)
        kernel = (struct kernel){size == sizeof(float) ? fma_f32 : fma_f64, 4};
    if (path == GC_AVX512)
        kernel = (struct kernel){size == sizeof(float) ? avx512_f32 : avx512_f64, 8};
#endif
#ifdef _OPENMP
    if (threads < 1)
        threads = omp_get_max_threads();
#else
    threads = 1;
#endif
    const size_t panel = n <= ROWS ? ROWS : ROWS / 2;            /* panel i with panel j of the rows, each pair once */
    for (size_t i = 0; i < n; i += panel)
        for (size_t j = 0; j <= i; j += panel) {
            struct pass pass = {.square = j < i};
            for (size_t r = 0; r < n; r++)
                if ((r >= j && r < j + panel) || (r >= i && r < i + panel)) {
                    pass.rows[pass.count] = rows[r];
                    pass.index[pass.count++] = r;
                }
            pass.groups = (pass.square ? ROWS : pass.count + 3) / 4;
            run_pass(&pass, kernel, p, n, threads, gram);
        }
    return GC_OK;
}

int gc_gram_f32(const void *const *rows, size_t n, size_t p, int threads, int path, double *gram)
{
    return run(sizeof(float), rows, n, p, threads, path, gram);
}

int gc_gram_f64(const void *const *rows, size_t n, size_t p, int threads, int path, double *gram)
{
    return run(sizeof(double), rows, n, p, threads, path, gram);
}
