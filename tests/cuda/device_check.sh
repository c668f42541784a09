#!/usr/bin/env bash
# What a machine with a GPU must show, in about six minutes on 16 cores:
#     tests/cuda/device_check.sh [FOLDER]
# Builds for its GPU alone; compares every kind of call with the CPU's bytes, from C++ and from PyTorch, graphs
# included; runs compute-sanitizer on a sample; then measures (bench/cuda.py). FOLDER, a new one unless named,
# gets the logs and cuda.json. Needs nvcc 12.4 or newer, CMake, ninja, g++, and a Python with PyTorch for CUDA,
# NumPy, ml_dtypes, pytest, hypothesis, rich, scikit-build-core, pybind11. With MEASURE=0 nothing is measured.
set -uo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
out=$(cd "$folder" && pwd)
python=${PYTHON:-python3}
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
jobs=$(nproc)
failed=0

step() { # step NAME COMMAND...: its output to a log, its end to the screen
    local name=$1 start=$SECONDS status
    shift
    "$@" > "$out/$name.log" 2>&1
    status=$?
    echo "== $name: $([ $status = 0 ] && echo held || echo "FAILED ($status)"), $((SECONDS - start)) s: $(tail -n 1 "$out/$name.log")"
    [ $status = 0 ] || { failed=1; tail -n 30 "$out/$name.log"; }
}

build() { # both at once: the C++ test, and the Python package in $out/site
    (
        cmake -S "$root" -B "$out/build" -G Ninja -DBATCHNORM_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES="$arch-real" -DBATCHNORM_TESTS=ON &&
            cmake --build "$out/build" --target test_cuda -j "$jobs"
    ) &
    local cpp=$!
    CMAKE_BUILD_PARALLEL_LEVEL=$jobs "$python" -m pip install --quiet --no-deps --no-build-isolation --target "$out/site" \
        -C build-dir="$out/python-build" -C cmake.define.BATCHNORM_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$arch-real" "$root" &&
        wait $cpp && echo built
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/machine.txt"
nvcc --version | tail -n 2 | tee -a "$out/machine.txt"
export PYTHONPATH=$out/site OMP_WAIT_POLICY=passive
step build build
[ $failed = 0 ] || exit 1
step bytes "$out/build/test_cuda" a_gpu
step python "$python" -m pytest -q -p no:cacheprovider -rs "$root/tests/cuda"
if command -v compute-sanitizer > /dev/null && compute-sanitizer "$out/build/test_cuda" a_gpu_says > /dev/null 2>&1; then
    export BATCHNORM_APART=1 # each array an allocation of its own
    for tool in memcheck racecheck synccheck; do
        step $tool timeout 90 compute-sanitizer --tool $tool --error-exitcode 9 "$out/build/test_cuda" a_gpu_takes
    done
    unset BATCHNORM_APART
else
    echo "== compute-sanitizer: left out, it is missing or may not see this GPU"
fi
if [ "${MEASURE:-1}" != 0 ]; then
    step small timeout 60 "$python" "$root/bench/cuda.py" --small --rounds 3 --json "$out/small.json"
    step speed timeout 200 "$python" "$root/bench/cuda.py" --rounds 3 --json "$out/cuda.json"
    cat "$out/small.log" "$out/speed.log"
fi
exit $failed
