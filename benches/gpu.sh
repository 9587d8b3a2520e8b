#!/usr/bin/env bash
# The torch engine on a GPU: is it right, and how fast is it beside what the device could do?
#
#   benches/gpu.sh build              here: builds the program against torch 2.11's headers and strips it
#   benches/gpu.sh run [DEVICE] [SHAPE…]   there: parity of every family and type with f32 on the processor,
#                                     then speeds beside the device's own limits and `transformers`
#
# DEVICE is cuda:0 unless given; with cpu it shows that the script works. SHAPE: tiny, 135m, 8b.
# What `build` makes lies in target/gpu (under 64 MiB); carry it with this repository to a machine
# that has PyTorch 2.11 and a GPU; neither Rust nor a compiler nor a network is needed there, and weights
# are made there. `run` prints tables, and keeps them in benches/results.
set -euo pipefail
cd "$(dirname "$0")/.."
carried=target/gpu

build() {
    if [ -z "${LIBTORCH:-}" ]; then
        exports=$(deploy/libtorch.sh)
        eval "$exports"
    fi
    cargo build --locked ${PROFILE:---release} --features torch -p millrace-torch --example gpu
    local folder=release
    [ "${PROFILE:---release}" = --release ] || folder=debug
    mkdir -p "$carried"
    strip -o "$carried/gpu" "${CARGO_TARGET_DIR:-target}/$folder/examples/gpu"
    # Streams and graphs; found beside the program.
    node/torch/shim/build.sh "$carried/libmillrace_cuda.so" "$LIBTORCH"
    printf 'carry these with the repository:\n'
    find "$carried" -type f -printf '  %p  %s bytes\n'
}

run() {
    local device=${1:-cuda:0}
    shift || true
    [ $# -gt 0 ] || set -- 135m 8b
    [ -x "$carried/gpu" ] || { echo "no $carried/gpu: run 'benches/gpu.sh build' first" >&2; exit 1; }
    local python=${PYTHON:-python3}
    local exports
    exports=$(deploy/libtorch.sh --python "$python")
    eval "$exports"
    "$carried/gpu" check "$device"
    local name
    name=$(case "$device" in
        cuda*) nvidia-smi --query-gpu=name --format=csv,noheader -i "${device#*:}" || echo "$device" ;;
        *) sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1 ;;
    esac)
    mkdir -p benches/results
    local out
    out="benches/results/torch-$(tr -c 'A-Za-z0-9\n' '-' <<<"$name")-$(date -u +%F).md"
    {
        printf '# The torch engine on %s, %s\n\n' "$name" "$(date -u +%F)"
        printf '## Parity with f32 on the processor: largest deviation of a logit, relative to the largest\n\n'
        "$carried/gpu" parity "$device" || printf '\n**Some are too far off.**\n'
        printf '\n## Speed\n\n'
        "$carried/gpu" bench "$device" "$@"
        printf '\n## transformers on the same device, random weights of the same shape\n\n'
        "$python" benches/peers/transformers_generate.py "$device" "$@" || printf 'not measured\n'
    } 2>&1 | tee "$out"
    printf '\nkept in %s\n' "$out"
}

case "${1:-}" in
    build) build ;;
    run) shift; run "$@" ;;
    *) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 2 ;;
esac
