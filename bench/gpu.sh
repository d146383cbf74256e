#!/usr/bin/env bash
# Everything there is to learn from a machine with a GPU, in under ten minutes:
#
#     bench/gpu.sh                    results in bench/results/<gpu>/, or in $OUT
#     bench/gpu.sh merge-step         instead: one step of a merge of LLaMA-3-8B and of LLaVA-1.5-7B, in five minutes more
#     DRY_RUN=1 OUT=/tmp/x bench/gpu.sh    the same on a CPU at tiny sizes, to try the scripts
#
# Every stage is bounded in time and leaves its rows as it goes, so that a later one may die. Needs no installed package:
# torch, triton and the sources here are enough; the CUDA C++ kernels take part where their library is built, or nvcc and
# cmake are there to build it. Exits with 0 if every GPU backend that ran was shown correct.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false
OUT=${OUT:-bench/results/$("$PYTHON" -c 'from gpu_common import slug; print(slug())')}
mkdir -p "$OUT"
WORKERS=$(($(nproc) > 12 ? 12 : $(nproc)))
FLAGS=()
if [ -n "${DRY_RUN:-}" ]; then
    export TRITON_INTERPRET=1
    FLAGS=(--dry-run)
    WORKERS=2
fi

# stage NAME SECONDS COMMAND...: a bounded command, its output in NAME.log.
stage() {
    local name=$1 seconds=$2 start=$SECONDS code=0
    shift 2
    timeout --kill-after=5 "$seconds" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    echo "$name: exit $code after $((SECONDS - start)) s"
    if [ "$code" -ne 0 ]; then tail -n 5 "$OUT/$name.log"; fi
}

if [ "${1:-}" = merge-step ]; then
    # Needs transformers and peft.
    export PYTHONPATH="$PWD/python:$PYTHONPATH"
    stage merge-step 300 "$PYTHON" bench/gpu_merge_step.py --out "$OUT/merge-step.jsonl" "${FLAGS[@]}"
    cat "$OUT/merge-step.log"
    [ -s "$OUT/merge-step.jsonl" ]
    exit
fi

stage environment 45 "$PYTHON" bench/gpu_environment.py --out "$OUT/environment.jsonl" "${FLAGS[@]}"
if [ -z "${DRY_RUN:-}" ] && command -v nvcc >/dev/null && command -v cmake >/dev/null; then
    stage cuda-build 60 bash -c "cmake -S . -B '$OUT/build' -DNSC_BUILD_CPU=OFF -DNSC_BUILD_CUDA=ON \\
        -DNSC_BUILD_CUDA_TESTS=ON -DNSC_TORCH_DIR=\$('$PYTHON' -c 'import torch; print(torch.__path__[0])') \\
        -DCMAKE_INSTALL_PREFIX='$PWD' && cmake --build '$OUT/build' -j $(nproc) && cmake --install '$OUT/build'"
    if [ -x "$OUT/build/nsc_cuda_test" ]; then stage cuda-host-test 20 "$OUT/build/nsc_cuda_test"; fi
    rm -rf "$OUT/build"
fi
stage correctness 180 "$PYTHON" bench/gpu_check.py --workers "$WORKERS" --out "$OUT/correctness.jsonl" "${FLAGS[@]}"
stage launches 40 "$PYTHON" bench/gpu_launches.py --out "$OUT/launches.jsonl" "${FLAGS[@]}"
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        stage "sanitizer-$tool" 25 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" bench/gpu_check.py --smallest --out "$OUT/sanitizer-$tool.jsonl" "${FLAGS[@]}"
    done
else
    echo "sanitizer: compute-sanitizer is not on the PATH"
fi
stage bench 180 "$PYTHON" bench/gpu_bench.py --out "$OUT/bench.jsonl" "${FLAGS[@]}"
timeout 20 "$PYTHON" bench/gpu_report.py "$OUT" | tee "$OUT/report.txt"
exit "${PIPESTATUS[0]}"
