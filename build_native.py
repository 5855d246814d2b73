"""Build the optional native routine: `python build_native.py` puts it next to this file.

cffi's API mode: cdef() says what Python may call, set_source() what the C compiler sees, and the
compiler checks one against the other. THE TRAP: the module must not be called `_gc_native`, for
cffi writes its wrapper to <module>.c and would overwrite our source. Hence `_gc_native_ext`, and
`pip install .` uses the same `ffibuilder`.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
DECLARATIONS = """
    int gc_best_path(void);
    int gc_gram_f32(const void *const *rows, size_t n, size_t p, int threads, int path,
                    double *gram);
    int gc_gram_f64(const void *const *rows, size_t n, size_t p, int threads, int path,
                    double *gram);
"""


def openmp_flag() -> list[str]:
    """["-fopenmp"] where the compiler, and the linker, can do it; [] (one thread) where not."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    with tempfile.TemporaryDirectory() as scratch:
        probe = os.path.join(scratch, "probe.so")
        command = [*compiler, "-fopenmp", "-shared", "-fPIC", "-x", "c", "-", "-o", probe]
        program = b"#include <omp.h>\nint probe(void) { return omp_get_max_threads(); }\n"
        try:
            ran = subprocess.run(command, input=program, capture_output=True, check=False)
            works = ran.returncode == 0
        except OSError:
            works = False
    return ["-fopenmp"] if works else []


def make_ffibuilder(optional: bool):
    from cffi import FFI

    ffi = FFI()
    ffi.cdef(DECLARATIONS)
    openmp = openmp_flag()
    # fp-contract: a*b+c in one instruction, which -std=c11 alone forbids. Never -ffast-math: it
    # breaks the summation, and linked with it, a library switches denormal numbers off everywhere.
    more = shlex.split(os.environ.get("DTL_NATIVE_CFLAGS", ""))
    flags = ["-O3", "-std=c11", "-ffp-contract=fast", *more]
    ffi.set_source(
        "_gc_native_ext",
        DECLARATIONS,
        sources=["_gc_native.c"],
        optional=optional,
        extra_compile_args=flags + openmp,
        extra_link_args=openmp,
    )
    return ffi


@contextlib.contextmanager
def compiler_output_in(path: str):
    """The compiler writes to file descriptors 1 and 2 themselves; send them to a file meanwhile."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with open(path, "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, descriptor in zip(kept, (1, 2), strict=True):
            os.dup2(saved, descriptor)
            os.close(saved)


def build() -> str:
    """Build in a temporary folder, try it, move the one file here; -> its path. Or RuntimeError."""
    try:
        ffi = make_ffibuilder(optional=False)
    except ImportError as error:
        raise RuntimeError(f"cffi is missing ({error}): pip install cffi setuptools") from None
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(os.path.join(HERE, "_gc_native.c"), scratch)
        log = os.path.join(scratch, "log")
        try:
            with compiler_output_in(log):
                built = ffi.compile(tmpdir=scratch)
            subprocess.run(
                [sys.executable, "-c", "import _gc_native_ext"],
                cwd=scratch,
                check=True,
                capture_output=True,
                env={**os.environ, "PYTHONPATH": scratch},
            )
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode().splitlines()[-1]
            raise RuntimeError(f"it was built but does not load: {said}") from None
        except Exception as error:  # noqa: BLE001 - a missing setuptools, a failing compiler: one answer
            with open(log, errors="replace") as lines:
                said = [line.strip() for line in lines if "error" in line.lower()] or [str(error)]
            hint = "is there a C compiler? CC names it; on Debian: apt install gcc libc6-dev"
            if "Python.h" in said[0]:
                hint = "Python's headers are missing; on Debian: apt install python3-dev"
            raise RuntimeError(f"{said[0][:120]} ({hint})") from None
        target = os.path.join(HERE, os.path.basename(built))
        shutil.copy(built, target + ".new")
        os.replace(target + ".new", target)  # another process never sees half a file
    return target


def main() -> int:
    try:
        target = build()
    except RuntimeError as error:
        print(f"build_native: not built: {error}; dtl.py works without it, slower", file=sys.stderr)
        return 1
    print(f"build_native: {target}, {'OpenMP' if openmp_flag() else 'one thread, no OpenMP'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
if __name__ == "__cffi__":  # setup.py: cffi runs this file under this name
    ffibuilder = make_ffibuilder(optional=True)  # a failure is a warning, and the install goes on
