#!/usr/bin/env bash
# Builds libmillrace_cuda.so, the torch engine's streams and graphs, from headers alone:
#
#   node/torch/shim/build.sh OUT LIBTORCH [CUDA]   OUT: the file to make; LIBTORCH: a folder with include/ of
#                                                  PyTorch 2.11; CUDA: one with cuda_runtime_api.h (13.x),
#                                                  else NVIDIA's wheels on PyPI are fetched once (2.4 MB)
#
# Neither a GPU nor CUDA's libraries nor nvcc are needed: undefined names are libtorch's, found at run time.
set -euo pipefail
fail() { echo "build.sh: $*" >&2; exit 1; }
[ $# -ge 2 ] || { sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//' >&2; exit 2; }
out=$1 libtorch=$2 cuda=${3:-}

# The headers of two wheels, in the cache folder.
fetch() {
    cuda=${XDG_CACHE_HOME:-$HOME/.cache}/millrace-cuda-headers/13.0
    [ ! -e "$cuda/crt/host_config.h" ] || return 0
    local new
    new=$(mktemp -d)
    trap "rm -rf '$new'" EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.11 --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 \
        --dest "$new" nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 >&2 ||
        fail "pip cannot fetch CUDA's headers; name a folder that has them"
    (cd "$new" && sha256sum --quiet -c -) <<'SUMS' || fail "the wheels of CUDA's headers are damaged"
7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548  nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
2c8043c7c9e02492716426e9919fc78d2c5b3b2a7a768a88e952676b08aa55a4  nvidia_cuda_crt-13.0.88-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
SUMS
    for wheel in "$new"/*.whl; do
        python3 -m zipfile -e "$wheel" "$new/all"
    done
    mkdir -p "$(dirname "$cuda")"
    rm -rf "$cuda"
    mv "$new/all/nvidia/cu13/include" "$cuda"
}

[ -n "$cuda" ] || fetch
for header in "$libtorch/include/ATen/cuda/CUDAGraph.h" "$cuda/cuda_runtime_api.h"; do
    [ -e "$header" ] || fail "$header is not there"
done
mkdir -p "$(dirname "$out")"
"${CXX:-g++}" -std=c++20 -O1 -fPIC -shared -Wall -Wextra -Werror -D_GLIBCXX_USE_CXX11_ABI=1 \
    -isystem "$libtorch/include" -isystem "$libtorch/include/torch/csrc/api/include" -isystem "$cuda" \
    -o "$out" "$(dirname "$0")/graphs.cpp"
