/* _gc_native.c - Gram matrices of gradients, read where they lie, for Gradient Collision.
 *
 *     gram[i*n + j] += sum over k < p of rows[i][k] * rows[j][k]          i, j = 0 .. n-1
 *
 * Layout         rows: n pointers, each to p contiguous values (float or double, by function); NULL: zeros.
 *                gram: n x n doubles, ADDED INTO: zero it, then call per parameter tensor. Stays symmetric.
 * Preconditions  1 <= n <= 1024, 0 <= p <= 2^40. Rows may start at any byte. Rounding is to nearest.
 * Aliasing       rows may overlap or be one another; gram overlaps none of them.
 * Errors         the return value: 0, or GC_ENULL .. GC_EPATH below; gram is then untouched.
 * Threads        as many as asked for (below 1: as OpenMP likes), but at most 64, and one per 131,072 values;
 *                one without OpenMP. Same input, thread count and CPU: same bits. Reentrant. 100 KB of stack.
 * Accuracy       about 1e-15 |rows[i]||rows[j]|, never over 2e-14 (p <= 2^36). Products of floats are exact.
 *                Infinity and NaN spread as in plain arithmetic; doubles beyond 1e154 overflow as in it.
 * Needs          GCC or Clang, and -ffp-contract=fast (a*b+c in one instruction); never -ffast-math.
 */
#include <stddef.h>
#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#else
#define omp_get_max_threads() 1
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#endif
#ifdef __x86_64__
#define LANES 4  /* of a vector. 8 takes AVX2 six times as long: GCC keeps vectors it must split in memory */
#define HAS(cpu) __builtin_cpu_supports(cpu)
#define FOR(cpu) __attribute__((target(cpu)))
#else
#define LANES 2
#define HAS(cpu) 0
#define FOR(cpu)
#endif
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define INLINE static inline __attribute__((always_inline))
enum { GC_OK = 0, GC_ENULL = -1, GC_EROWS = -2, GC_ESIZE = -3, GC_EPATH = -4 };
enum { GC_AUTO = 0, GC_GENERIC = 1, GC_FMA = 2, GC_AVX512 = 3, GC_NAIVE = 4 };
enum { PANEL = 16, COLUMNS = 256, MAX_N = 1024, MAX_THREADS = 64, VALUES_A_THREAD = 1 << 17 };
typedef double vec __attribute__((vector_size(LANES * sizeof(double)), may_alias));
typedef double any_double __attribute__((aligned(1), may_alias));  /* at any byte */
typedef float any_float __attribute__((aligned(1), may_alias));

/* Columns from .. to-1 of na rows a: with themselves (nb = 0), or with nb = PANEL rows b. */
struct part {
    const void *const *a, *const *b;
    size_t na, nb, from, to;
    vec sum[PANEL][PANEL], rest[PANEL][PANEL];      /* rest: what rounding took from sum */
    _Alignas(64) double block[2 * PANEL][COLUMNS];  /* the next 1 KB of rows b, then a, as doubles */
};

INLINE double value_at(size_t size, const void *row, size_t k)
{
    return !row ? 0 : size == sizeof(float) ? ((const any_float *)row)[k] : ((const any_double *)row)[k];
}

/* The reference, which all of the rest must equal. */
static int naive(size_t size, const void *const *rows, size_t n, size_t p, double *gram)
{
    for (size_t e = 0; e < n * n; e++) {
        double sum = 0;
        for (size_t k = 0; k < p; k++)
            sum += value_at(size, rows[e / n], k) * value_at(size, rows[e % n], k);
        gram[e] += sum;
    }
    return GC_OK;
}

/* Rows g .. g+3 of a with rows h .. h+3. A corner, g = h of one panel, has j <= i only, and meanwhile fetches
 * its rows' next block. rest is exact where |dot| <= |old|, else but for a few 2^-53 |dot|, and all |dot| add
 * up to no more than |rows[i]||rows[j]|. */
INLINE void tile(int corner, size_t size, struct part *part, size_t g, size_t h, size_t next)
{
#define EACH_PAIR for (size_t i = 0; i < 4; i++) for (size_t j = 0; j < (corner ? i + 1 : 4); j++)
    const double *x = part->block[part->nb + g], *y = part->block[h];
    vec dot[4][4] = {{{0}}};
    for (size_t k = 0, line = 0; k < COLUMNS * sizeof(float) / size; k += LANES) {
        for (size_t l = 0; corner && l < (LANES * size + 15) / 16; l++, line++)
            __builtin_prefetch((void *)((uintptr_t)part->a[MIN(g + line % 4, part->na - 1)]
                                        + next + line / 4 * 64));  /* an integer: it may lie past the row */
        EACH_PAIR
            dot[i][j] += *(const vec *)&x[i * COLUMNS + k] * *(const vec *)&y[j * COLUMNS + k];
    }
    EACH_PAIR {
        const vec old = part->sum[g + i][h + j], now = old + dot[i][j];
        part->rest[g + i][h + j] += dot[i][j] - (now - old);
        part->sum[g + i][h + j] = now;
    }
}

INLINE void multiply(size_t size, struct part *part)
{
    const size_t whole = COLUMNS * sizeof(float) / size, na = part->na, nb = part->nb;
    for (size_t k = part->from; k < part->to; k += whole) {
        const size_t width = MIN(part->to - k, whole), next = (k + whole) * size;
        for (size_t r = 0; r < nb + na; r++) {
            const void *row = r < nb ? part->b[r] : part->a[r - nb];
            for (size_t c = 0; c < width; c++)
                part->block[r][c] = value_at(size, row, k + c);
            for (size_t c = width; c < whole; c++)
                part->block[r][c] = 0;
        }
        for (size_t g = 0; g < na; g += 4) {
            for (size_t h = 0; h < (nb ? nb : g); h += 4)
                tile(0, size, part, g, h, next);
            if (!nb)
                tile(1, size, part, g, g, next);
        }
    }
}

#define KERNEL(name, target)                                                                      \
    target static void name(size_t size, struct part *part)                                       \
    { size == sizeof(float) ? multiply(sizeof(float), part) : multiply(sizeof(double), part); }
KERNEL(on_generic, )
KERNEL(on_fma, FOR("fma"))
KERNEL(on_avx512, FOR("avx512f,avx512vl"))

int gc_best_path(void)
{
    return HAS("avx512f") && HAS("avx512vl") ? GC_AVX512 : HAS("fma") ? GC_FMA : GC_GENERIC;
}

static int run(size_t size, const void *const *rows, size_t n, size_t p, int threads, int path, double *gram)
{
    const int error = !rows || !gram                                          ? GC_ENULL
        : n < 1 || n > MAX_N                                                  ? GC_EROWS
        : p > (uint64_t)1 << 40 || p > (size_t)PTRDIFF_MAX / size / n         ? GC_ESIZE
        : path < GC_AUTO || path > (path == GC_NAIVE ? path : gc_best_path()) ? GC_EPATH : GC_OK;
    if (error)
        return error;
    if (path == GC_NAIVE)
        return naive(size, rows, n, p, gram);
    path = path == GC_AUTO ? gc_best_path() : path;
    const int asked = threads < 1 ? omp_get_max_threads() : threads;
    threads = (int)MIN((size_t)MIN(asked, MAX_THREADS), 1 + n * p / VALUES_A_THREAD);
    for (size_t i = 0; i < n; i += PANEL)
        for (size_t j = 0; j <= i; j += PANEL)
#pragma omp parallel for ordered schedule(static, 1) num_threads(threads) if (threads > 1)
            for (int t = 0; t < threads; t++) {  /* a stretch of columns each, added up in their order */
                const size_t share = p / (size_t)threads / COLUMNS * COLUMNS, from = share * (size_t)t;
                struct part part = {.a = rows + i, .na = MIN(n - i, PANEL), .b = rows + j,
                    .nb = j < i ? PANEL : 0, .from = from, .to = t + 1 < threads ? from + share : p};
                (path == GC_AVX512 ? on_avx512 : path == GC_FMA ? on_fma : on_generic)(size, &part);
#pragma omp ordered
                for (size_t r = i; r < i + part.na; r++)
                    for (size_t c = j; c <= r && c < j + PANEL; c++) {
                        const vec sum = part.sum[r - i][c - j], rest = part.rest[r - i][c - j];
                        double dot = 0;
                        for (int l = 0; l < LANES; l++)  /* beside an infinity, rest is NaN */
                            dot += rest[l] == rest[l] ? sum[l] + rest[l] : sum[l];
                        gram[r * n + c] += dot;
                        gram[c * n + r] += r == c ? 0 : dot;
                    }
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
