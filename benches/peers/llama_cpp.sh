#!/usr/bin/env bash
# Measures llama.cpp on the same file, on this machine, for a side-by-side with `millrace bench`.
#
# usage: llama_cpp.sh DIR [MODEL.gguf]    without a model it only builds; compare.py has more to say
#   DIR  is where llama.cpp is built, from PyPI's llama-cpp-python source package, if it is not there
#        yet (about 15 minutes on 2 cores; needs pip, a C++ compiler; installs cmake and ninja by pip)
#
# Run it next to the measurement it is compared with: machines drift, only ratios within one run count.
set -euo pipefail
[ $# -eq 1 ] || [ $# -eq 2 ] || { sed -n '2,9p' "$0"; exit 2; }
mkdir -p "$1"
dir=$(realpath "$1")
model=${2:+$(realpath "$2")}
version=0.3.36

if [ -z "$(ls "$dir"/llama_cpp_python-*/vendor/llama.cpp/build/bin/llama-bench 2>/dev/null)" ]; then
    pip install --quiet cmake ninja
    cd "$dir"
    pip download --quiet --no-deps --no-binary llama-cpp-python "llama-cpp-python==$version" -d .
    tar xzf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -G Ninja -DGGML_RPC=ON -DLLAMA_CURL=OFF -DGGML_NATIVE=ON \
        -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_UI=OFF >/dev/null
    ninja -C build llama-bench llama-batched-bench llama-quantize ggml-rpc-server
fi
[ -n "$model" ] || exit 0
bin=$(dirname "$(ls "$dir"/llama_cpp_python-*/vendor/llama.cpp/build/bin/llama-bench)")
export LD_LIBRARY_PATH=$bin

echo "== single process: prefill and decode, one stream"
"$bin/llama-bench" -m "$model" -t 1,2 -p 128,512 -n 64 -r 3 2>/dev/null | grep -E '^\|'
for threads in 1 2; do
    echo "== single process, $threads threads: 1 to 32 streams, 128 prompt tokens each"
    "$bin/llama-batched-bench" -m "$model" -t "$threads" -c 16384 -b 2048 -ub 512 \
        -npp 128 -ntg 64 -npl 1,8,16,32 2>/dev/null | grep '^|'
done

echo "== RPC: two servers of one core"
taskset -c 0 "$bin/ggml-rpc-server" -H 127.0.0.1 -p 50052 -t 1 >/dev/null 2>&1 & first=$!
taskset -c 1 "$bin/ggml-rpc-server" -H 127.0.0.1 -p 50053 -t 1 >/dev/null 2>&1 & second=$!
trap 'kill "$first" "$second" 2>/dev/null || true' EXIT
for _ in $(seq 50); do
    (exec 3<>/dev/tcp/127.0.0.1/50052 4<>/dev/tcp/127.0.0.1/50053) 2>/dev/null && break
    sleep 0.1
done
rpc=(--rpc 127.0.0.1:50052,127.0.0.1:50053 -ngl 99 -ts 1/1 -t 1)
"$bin/llama-bench" -m "$model" "${rpc[@]}" -p 128,512 -n 64 -r 3 2>/dev/null | grep -E '^\|'
"$bin/llama-batched-bench" -m "$model" "${rpc[@]}" -c 16384 -b 2048 -ub 128 \
    -npp 128 -ntg 64 -npl 1,8,16,32 2>/dev/null | grep '^|'
