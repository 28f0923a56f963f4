#!/usr/bin/env bash
# The kernels' tests with the C++ built for a sanitizer: `address` (with undefined behaviour) or
# `thread`. All is built and run in a temporary folder; the installed extension stays as it is.
set -euo pipefail
kind=${1:?usage: sanitize.sh address|thread [pytest arguments]}
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(cd "$root" && "${PYTHON:-.venv/bin/python}" -c 'import sys; print(sys.executable)')
cxx=${CXX:-g++}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

case $kind in
  address)
    flags=(-fsanitize=address,undefined -fno-sanitize-recover=all)
    # The matrix unit in plain C++: tests run where there is none, and a tile's loads are looked at.
    flags+=("-I$root/tests/sanitize" '-DLLMSERVE_EMULATED_TILES="emulated_tiles.h"')
    runtimes=(libasan.so libubsan.so libstdc++.so.6)
    tests=(tests/unit/native tests/property/test_native_sampler.py)
    # What the interpreter and numpy keep until the process ends is no leak of ours.
    export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1
    ;;
  thread)
    flags=(-fsanitize=thread)
    runtimes=(libtsan.so libstdc++.so.6)
    tests=(tests/unit/native/test_{team,linear,attention,experts,independence,not_finite}.py)
    # Python and numpy are not instrumented: what they do between themselves is not looked at.
    export TSAN_OPTIONS=halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1
    export OPENBLAS_NUM_THREADS=1
    ;;
  *)
    echo "sanitize.sh: address or thread, not '$kind'" >&2
    exit 2
    ;;
esac

cp "$root/pyproject.toml" "$place"
(cd "$root" && tar c --exclude=__pycache__ --exclude='*.so' llmserve tests) | tar x -C "$place"
cd "$place"

arguments() { # of the extension in pyproject.toml
  "$python" -c 'import sys, tomllib
settings = tomllib.load(open("pyproject.toml", "rb"))["tool"]["setuptools"]["ext-modules"][0]
print(*settings[sys.argv[1]], sep="\n")' "$1"
}
mapfile -t sources < <(arguments sources)
mapfile -t options < <(arguments extra-compile-args)
options+=(-O1 -g1 -fno-omit-frame-pointer -fPIC "${flags[@]}")
options+=("-I$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')")
echo "building the kernels for the $kind sanitizer"
printf '%s\n' "${sources[@]}" |
  xargs -P "$(nproc)" -I{} sh -c '"$@" -c "{}" -o "$(basename "{}").o"' sh "$cxx" "${options[@]}"
"$cxx" -shared "${flags[@]}" ./*.o -o llmserve/native/_kernels.abi3.so -lpthread

preload=
for runtime in "${runtimes[@]}"; do preload+="$("$cxx" -print-file-name="$runtime") "; done
# A fixed layout of memory: the thread sanitizer's map knows no other. -s: what a sanitizer says
# before it ends the process is not captured.
LD_PRELOAD=$preload setarch "$(uname -m)" -R "$python" -m pytest -q -s -p no:cacheprovider \
  -o timeout=600 "${tests[@]}" "$@"
