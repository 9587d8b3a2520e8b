#!/usr/bin/env bash
# Makes a libtorch that Millrace's torch engine builds and runs with, and prints what to export.
#
#   eval "$(deploy/libtorch.sh)"                 processors only, in the cache folder (560 MB)
#   eval "$(deploy/libtorch.sh FOLDER)"          the same in FOLDER; or PyTorch's own libtorch, unpacked there
#   eval "$(deploy/libtorch.sh --python python3)"   what an installed PyTorch has: CUDA, if it has it
#
# What is there already is checked and kept. Of the wheels on PyPI (543 MB, SHA-256 known here) only
# the half for processors is taken, and the wheels are deleted; wheels in --wheels DIR are used
# where they lie. After a failure the wheels that were fetched whole are not fetched again.
set -euo pipefail

VERSION=2.11.0
FOLDER=
PYTHON=
WHEELS=

say() { printf '%s\n' "$*" >&2; }
fail() { say "libtorch.sh: $*"; exit 1; }
exports() {
    printf 'export LIBTORCH=%q\n' "$1"
    printf 'export LD_LIBRARY_PATH=%q"${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"\n' "$1/lib"
}

while [ $# -gt 0 ]; do
    case "$1" in
        --python) PYTHON=${2:?--python needs an interpreter}; shift 2 ;;
        --wheels) WHEELS=$(realpath -- "${2:?--wheels needs a folder}"); shift 2 ;;
        -h | --help) sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        -*) fail "unknown option $1 (known: --python, --wheels, --help)" ;;
        *) FOLDER=$1; shift ;;
    esac
done

if [ -n "$PYTHON" ]; then
    found=$("$PYTHON" -c 'import torch, pathlib
print(torch.__version__.split("+")[0], pathlib.Path(torch.__file__).parent)') ||
        fail "$PYTHON has no PyTorch; install it (pip install torch==$VERSION) or leave --python out"
    [ "${found%% *}" = "$VERSION" ] ||
        fail "$PYTHON has PyTorch ${found%% *}, the engine needs $VERSION: pip install torch==$VERSION"
    exports "${found#* }"
    exit 0
fi

[ "$(uname -sm)" = "Linux x86_64" ] ||
    fail "ready-made only for Linux on x86-64; elsewhere install PyTorch $VERSION and use --python"
FOLDER=${FOLDER:-${XDG_CACHE_HOME:-$HOME/.cache}/millrace-libtorch/$VERSION}
mkdir -p "$FOLDER"
FOLDER=$(cd "$FOLDER" && pwd)
if [ -e "$FOLDER/build-version" ]; then
    have=$(cat "$FOLDER/build-version")
    # PyTorch's own archives of libtorch have this file too.
    [ "${have%%+*}" = "$VERSION" ] ||
        fail "$FOLDER holds libtorch $have, the engine needs $VERSION: name another folder, or remove it"
    files=(libtorch.so libtorch_cpu.so libc10.so)
    # That of the wheels is half of one for CUDA, whose processors' half asks for these too.
    if LC_ALL=C grep -qaF libcudart.so.13 "$FOLDER/lib/libtorch_cpu.so" 2>/dev/null; then
        files+=(libcudart.so.13 libcupti.so.13)
    fi
    for file in "${files[@]}"; do
        [ -e "$FOLDER/lib/$file" ] || fail "$FOLDER lacks lib/$file: remove the folder and try again"
    done
    exports "$FOLDER"
    exit 0
fi

# One at a time; the second finds the work of the first.
exec 9>"$FOLDER/.lock"
if ! flock -n 9; then
    say "waiting for another libtorch.sh in $FOLDER"
    flock 9
    exec 9>&-
    exec "$0" ${WHEELS:+--wheels "$WHEELS"} "$FOLDER"
fi

# Never over what is somebody else's.
if [ ! -e "$FOLDER/.unfinished" ]; then
    other=$(find "$FOLDER" -mindepth 1 -maxdepth 1 ! -name .lock | head -n 1)
    [ -z "$other" ] || fail "$FOLDER is no libtorch and not empty ($other): name another folder"
    touch "$FOLDER/.unfinished"
fi
python=$(command -v python3) || fail "needs python3 with pip to fetch wheels from PyPI"
new=$FOLDER/.new
rm -rf "$new"
mkdir -p "$new/lib" "$FOLDER/.wheels"
wheels=(
    torch-2.11.0-cp311-cp311-manylinux_2_28_x86_64.whl
    nvidia_cuda_runtime-13.0.96-py3-none-manylinux2014_x86_64.manylinux_2_17_x86_64.whl
    nvidia_cuda_cupti-13.0.85-py3-none-manylinux_2_25_x86_64.whl
)
hashes=(
    7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a
    7f82250d7782aa23b6cfe765ecc7db554bd3c2870c43f3d1821f1d18aebf0548
    4eb01c08e859bf924d222250d2e8f8b8ff6d3db4721288cf35d14252a4d933c8
)
names=(torch==2.11.0 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85)
for i in 0 1 2; do
    wheel=${WHEELS:-$FOLDER/.wheels}/${wheels[i]}
    if [ ! -e "$wheel" ]; then
        [ -z "$WHEELS" ] || fail "$WHEELS has no ${wheels[i]}"
        say "fetching ${names[i]}"
        "$python" -m pip download --quiet --disable-pip-version-check --no-deps \
            --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --abi none \
            --platform manylinux_2_28_x86_64 --platform manylinux_2_25_x86_64 \
            --platform manylinux2014_x86_64 --dest "$FOLDER/.wheels" "${names[i]}" >&2 ||
            fail "pip cannot fetch ${names[i]}; with the wheel at hand use --wheels DIR"
        [ -e "$wheel" ] || fail "pip fetched another file than ${wheels[i]}"
    fi
    found=$(sha256sum -- "$wheel")
    [ "${found%% *}" = "${hashes[i]}" ] ||
        fail "$wheel is damaged (SHA-256 ${found%% *}, not ${hashes[i]}): remove it and try again"
    say "unpacking ${names[i]}"
    "$python" - "$wheel" "$new" <<'PY'
import pathlib, shutil, sys, zipfile
wheel, to = zipfile.ZipFile(sys.argv[1]), pathlib.Path(sys.argv[2])
libraries = {"libtorch_cpu.so", "libc10.so", "libgomp.so.1"}
for name in wheel.namelist():
    first, _, rest = name.partition("/")
    if name.endswith("/"):
        continue
    if first == "torch" and rest.startswith(("include/", "share/")):
        target = to / rest
    elif (first == "torch" and rest.removeprefix("lib/") in libraries) or (
        first == "nvidia" and "/lib/" in name and ".so" in name
    ):
        target = to / "lib" / pathlib.PurePosixPath(name).name
    else:
        continue
    target.parent.mkdir(parents=True, exist_ok=True)
    with wheel.open(name) as source, open(target, "wb") as out:
        shutil.copyfileobj(source, out, 1 << 20)
PY
done
# Programs link against `torch`, whose processors' half this is.
echo 'INPUT(-ltorch_cpu)' >"$new/lib/libtorch.so"
for part in lib include share; do
    rm -rf "${FOLDER:?}/$part"
    mv "$new/$part" "$FOLDER/$part"
done
echo "$VERSION+cpu" >"$FOLDER/build-version"
rm -rf "$new" "$FOLDER/.wheels" "$FOLDER/.unfinished"
exports "$FOLDER"
