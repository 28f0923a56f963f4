#!/usr/bin/env bash
# The kernels' tests on an Arm processor that qemu plays, with the C++ cross-compiled for it. Needs Debian or Ubuntu
# with g++-aarch64-linux-gnu and qemu-user. What is fetched, an Arm Python and its packages, stays in .arm.
# Tests that need torch are left out.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(cd "$root" && "${PYTHON:-.venv/bin/python}" -c "import sys; print(sys.executable)")
cxx=aarch64-linux-gnu-g++
arm=$root/.arm
version=3.11

for command in $cxx qemu-aarch64 apt-get; do
  command -v $command > /dev/null || {
    echo "arm.sh: $command is missing: apt-get install g++-aarch64-linux-gnu qemu-user" >&2
    exit 2
  }
done

fetch_python() { # of the distribution, unpacked, not installed
  dpkg --print-foreign-architectures | grep -q arm64 || {
    echo "arm.sh: run 'dpkg --add-architecture arm64 && apt-get update' as root first" >&2
    exit 2
  }
  mkdir -p "$arm/debs"
  (
    cd "$arm/debs"
    apt-get download -q "python$version-minimal:arm64" {"libpython$version-"{minimal,stdlib,dev},libc6,libexpat1}:arm64 \
      {zlib1g,libssl3,libffi8,libstdc++6,libgcc-s1,liblzma5,libbz2-1.0,libuuid1,libsqlite3-0}:arm64
    for package in *.deb; do dpkg -x "$package" "$arm/root"; done
  )
}

fetch_packages() {
  "$python" -m pip download -q --no-deps --only-binary :all: -c "$root/constraints.txt" -d "$arm/wheels" \
    --python-version $version --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
    --platform manylinux_2_17_aarch64 numpy msgspec ml_dtypes safetensors hypothesis sortedcontainers attrs pytest \
    pytest-timeout pluggy iniconfig packaging pygments
  mkdir -p "$arm/site"
  for wheel in "$arm"/wheels/*.whl; do "$python" -m zipfile -e "$wheel" "$arm/site"; done
}

[ -d "$arm/root" ] || fetch_python
[ -d "$arm/site" ] || fetch_packages

settings() { # of the extension in pyproject.toml
  "$python" -c 'import sys, tomllib
settings = tomllib.load(open("pyproject.toml", "rb"))["tool"]["setuptools"]["ext-modules"][0]
print(*settings[sys.argv[1]], sep="\n")' "$1"
}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cp "$root/pyproject.toml" "$place"
(cd "$root" && tar c --exclude=__pycache__ --exclude='*.so' llmserve tests) | tar x -C "$place"
cd "$place"
options=(-O3 -g0 -fPIC "-I$arm/root/usr/include/python$version" "-I$arm/root/usr/include")
mapfile -t -O ${#options[@]} options < <(settings extra-compile-args)
echo "building the kernels for Arm"
settings sources |
  xargs -P "$(nproc)" -I{} sh -c '"$@" -c "{}" -o "$(basename "{}").o"' sh $cxx "${options[@]}"
$cxx -shared ./*.o -o llmserve/native/_kernels.abi3.so -lpthread

mapfile -t tests < <(grep -LiE 'torch|native_models|published|tuned' \
  tests/unit/native/test_*.py tests/property/test_native_sampler.py)
export PYTHONPATH=$place:$arm/site PYTHONDONTWRITEBYTECODE=1 OPENBLAS_NUM_THREADS=1
qemu-aarch64 -L "$arm/root" "$arm/root/usr/bin/python$version" -m pytest -q -p no:cacheprovider \
  -o timeout=600 "${tests[@]}" "$@"
