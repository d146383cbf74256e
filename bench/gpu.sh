#!/usr/bin/env bash
# Everything there is to learn from a machine with a GPU, in under nine minutes:
#
#     bench/gpu.sh                    results in bench/results/<gpu>/, or in $OUT
#     DRY_RUN=1 OUT=/tmp/x bench/gpu.sh    the same on a CPU at tiny sizes, to try the scripts
#
# Every stage is bounded in time and leaves its rows as it goes, so that a later one may die. Needs no installed package:
# torch, triton and the sources here are enough. Exits with 0 if the Triton kernel was shown correct.
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

stage environment 45 "$PYTHON" bench/gpu_environment.py --out "$OUT/environment.jsonl" "${FLAGS[@]}"
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
stage bench 200 "$PYTHON" bench/gpu_bench.py --out "$OUT/bench.jsonl" "${FLAGS[@]}"
timeout 20 "$PYTHON" bench/gpu_report.py "$OUT" | tee "$OUT/report.txt"
exit "${PIPESTATUS[0]}"
