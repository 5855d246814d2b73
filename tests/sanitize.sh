#!/usr/bin/env bash
# The native routine under AddressSanitizer and UBSan (all of test_native.py), then under valgrind (a driver in C).
#
#   tests/sanitize.sh            about 40 s on two cores; CI runs this
#   tests/sanitize.sh --all      and all of test_native.py under valgrind: ten minutes; complaints about others do not count
#
# PYTHON and CC name others than python and gcc. A tool that is missing is told and its part skipped; with
# DTL_REQUIRE_NATIVE=1 that is an error. Everything happens in a temporary copy: no file of the project is touched.
# valgrind knows no AVX-512, so it sees the fma path and the generic one; the sanitizers see them all. It runs one thread at a
# time, so that the tests of other threads running, of building and of the floating point mode are left to the sanitizers.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python} cc=${CC:-gcc}
work=$(mktemp -d)
trap 'cat "$work"/report.* 2>/dev/null || true; rm -rf "$work"' EXIT  # a sanitizer's report; pytest would swallow it
cp "$root"/{dtl.py,build_native.py,_gc_native.c} "$work"
cp -r "$root/tests" "$work"
[ -f "$root/pyproject.toml" ] && cp "$root/pyproject.toml" "$work"
cd "$work"
skip() {
  echo "sanitize: $1: SKIPPED, $2"
  [ "${DTL_REQUIRE_NATIVE:-}" != 1 ] || exit 1
}
took() { echo "sanitize: $1: clean, $((SECONDS - started)) s"; }

started=$SECONDS
asan=$("$cc" -print-file-name=libasan.so 2>/dev/null || true)
if [ ! -f "$asan" ]; then
  skip "AddressSanitizer and UBSan" "$cc has no libasan"
else
  flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g"
  # libstdc++ beside libasan: without it torch's C++ exceptions meet an interceptor that has nothing to call.
  # Leaks are off, for Python itself leaves much behind; valgrind below looks for the routine's own.
  sanitized=(env "LD_PRELOAD=$asan $("$cc" -print-file-name=libstdc++.so)"
    "ASAN_OPTIONS=detect_leaks=0:log_path=$work/report"
    "UBSAN_OPTIONS=print_stacktrace=1:log_path=$work/report" DTL_REQUIRE_NATIVE=1)
  "${sanitized[@]}" CC="$cc" DTL_NATIVE_CFLAGS="$flags" LDFLAGS="-fsanitize=address,undefined" "$python" build_native.py
  "${sanitized[@]}" "$python" -m pytest -q -p no:cacheprovider tests/test_native.py
  took "AddressSanitizer and UBSan"
fi

cat >driver.c <<'C'
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int gc_best_path(void);
int gc_gram_f32(const void *const *rows, size_t n, size_t p, int threads, int path, double *gram);
int gc_gram_f64(const void *const *rows, size_t n, size_t p, int threads, int path, double *gram);

/* Rows of exactly p values each, at odd addresses, every seventh of them NULL: all paths against the naive one (4). */
static int try(size_t n, size_t p, size_t size, int threads)
{
    void *rows[64], *blocks[64];
    double *expected = calloc(n * n, sizeof *expected), *gram = malloc(n * n * sizeof *gram);
    int bad = 0;
    for (size_t i = 0; i < n; i++) {
        blocks[i] = malloc(p * size + 1);
        rows[i] = i % 7 == 6 ? NULL : (char *)blocks[i] + 1;
        for (size_t k = 0; rows[i] && k < p; k++) {
            double d = rand() / (double)RAND_MAX - .5;
            float f = (float)d;
            memcpy((char *)rows[i] + k * size, size == 4 ? (void *)&f : (void *)&d, size);
        }
    }
    int (*run)(const void *const *, size_t, size_t, int, int, double *) = size == 4 ? gc_gram_f32 : gc_gram_f64;
    bad |= run((const void *const *)rows, n, p, 1, 4, expected);
    for (int path = 0; path <= gc_best_path(); path++) {
        memset(gram, 0, n * n * sizeof *gram);
        bad |= run((const void *const *)rows, n, p, threads, path, gram);
        for (size_t e = 0; e < n * n; e++)
            bad |= !(fabs(gram[e] - expected[e]) <= 1e-12 * (double)p);
    }
    for (size_t i = 0; i < n; i++)
        free(blocks[i]);
    free(expected);
    free(gram);
    return bad;
}

int main(void)
{
    static const size_t ns[] = {1, 2, 3, 4, 5, 8, 17, 32, 33, 40}, ps[] = {0, 1, 7, 16, 127, 128, 255, 256, 257, 600};
    int bad = 0;
    for (size_t i = 0; i < sizeof ns / sizeof *ns; i++)
        for (size_t k = 0; k < sizeof ps / sizeof *ps; k++)
            bad |= try(ns[i], ps[k], 4, 1) | try(ns[i], ps[k], 8, 1);
    bad |= try(5, 70001, 4, 2) | try(5, 70001, 8, 2); /* enough values for two threads */
    puts(bad ? "driver: WRONG" : "driver: right");
    return bad;
}
C
started=$SECONDS
"$cc" -O2 -g -std=c11 -ffp-contract=fast driver.c _gc_native.c -lm -o driver && ./driver
if ! command -v valgrind >/dev/null; then
  skip valgrind "it is not installed"
else
  valgrind -q --error-exitcode=9 --leak-check=full --show-leak-kinds=all ./driver
  took "valgrind, driver"
  if [ "${1:-}" = --all ]; then
    started=$SECONDS
    CC=$cc "$python" build_native.py
    PYTHONMALLOC=malloc DTL_REQUIRE_NATIVE=1 valgrind -q --trace-children=no --log-file="$work/valgrind" \
      "$python" -m pytest -q -p no:cacheprovider tests/test_native.py -k "not build and not floating_point_mode and not python_threads_run"
    echo "valgrind: $(grep -c "^==[0-9]*== [A-Z]" "$work/valgrind") complaints about torch, Python and the loader"
    if grep _gc_native "$work/valgrind"; then exit 1; fi  # a frame of ours in any of them
    took "valgrind, test_native.py"
  fi
fi
