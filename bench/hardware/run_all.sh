#!/usr/bin/env bash
# Everything there is to learn from a machine with a GPU, stage by stage (docs/gpu.md says what comes out):
#
#     bench/hardware/run_all.sh                    every stage in turn, an hour at most
#     bench/hardware/run_all.sh correctness        Triton: every trial, launches counted              each of these alone takes
#     bench/hardware/run_all.sh bench              speed of each available backend against the rest   less than ten minutes,
#     bench/hardware/run_all.sh merge-step         one step of a merge of LLaMA-3-8B and LLaVA-1.5-7B and run again it goes on
#     bench/hardware/run_all.sh cuda               CUDA C++: build, host test, every trial            where it stopped
#     bench/hardware/run_all.sh tune               configurations and variants beside the committed ones
#     bench/hardware/run_all.sh profile            ncu on four shapes, compute-sanitizer on a small case
#     bench/hardware/run_all.sh report             the tables of what is there
#     DRY_RUN=1 RESULTS=/tmp/x bench/hardware/run_all.sh     all of it on a CPU at tiny sizes, to try the scripts
#
#     RESULTS   folder of the rows and logs, bench/results/<gpu> unless set; a stage goes on from what is there
#     OUT       folder for one archive per stage, <stage>.tgz, written anew after every step; none unless set
#     BUDGET    seconds for the trials of a stage, 330 unless set: with all its other steps at their bounds a stage
#               then ends within ten minutes
#     PYTHON    the interpreter, python3 unless set; needs torch and triton, and nothing installed (merge-step:
#               transformers and peft)
#
# Exits with 0 if no step of it failed; a stage with trials left to another run has not failed.
set -u
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE
BUDGET=${BUDGET:-330}
# Triton compiles a kernel in one thread of one process: as many processes as cores, but not more than share 80 GB.
WORKERS=$(($(nproc) > 13 ? 13 : $(nproc)))
FLAGS=()
if [ -n "${DRY_RUN:-}" ]; then
    export TRITON_INTERPRET=1
    FLAGS=(--dry-run)
    RESULTS=${RESULTS:-/tmp/nsc-dry-run}
fi
RESULTS=${RESULTS:-bench/results/$("$PYTHON" -c 'from nsc_kernels.bench.measuring import slug; print(slug())')}
mkdir -p "$RESULTS" || exit 2
STAGE=
FAILED=0

archive() {
    if [ -n "${OUT:-}" ]; then
        tar czf "$OUT/.$STAGE.tgz" --exclude="./.*" -C "$RESULTS" . && mv "$OUT/.$STAGE.tgz" "$OUT/$STAGE.tgz"
    fi
}

# step NAME SECONDS LINES COMMAND...: bounded, its output in NAME.log, the last LINES of it shown.
step() {
    local name=$1 seconds=$2 lines=$3 start=$SECONDS code=0
    shift 3
    timeout --kill-after=5 "$seconds" "$@" >"$RESULTS/$name.log" 2>&1 || code=$?
    echo "$name: exit $code after $((SECONDS - start)) s"
    tail -n "$lines" "$RESULTS/$name.log" | cut -c1-300
    archive
    if [ "$code" -ne 0 ] && [ "$code" -ne 3 ]; then FAILED=1; fi
    return "$code"
}

# rows NAME SECONDS MODULE ARGUMENT...: a script that starts no new trial after SECONDS, and goes on from NAME.jsonl.
rows() {
    local name=$1 seconds=$2 module=$3 log=$1
    shift 3
    if [ "$name" != "$STAGE" ]; then log="$STAGE-$name"; fi
    step "$log" $((seconds + 30)) 25 \
        "$PYTHON" -m "bench.$module" --out "$RESULTS/$name.jsonl" --seconds "$seconds" "${FLAGS[@]}" "$@"
}

# checks STAGE SECONDS BACKEND: the trials of nsc_kernels.verify, which go on from STAGE.jsonl.
checks() {
    local log=$1
    if [ "$1" != "$STAGE" ]; then log="$STAGE-$1"; fi
    step "$log" $(($2 + 30)) 25 "$PYTHON" -m bench.hardware.check --stage "$1" --out "$RESULTS" --seconds "$2" \
        --backends "$3" --workers "$WORKERS" "${FLAGS[@]}"
}

environment() {
    if [ ! -s "$RESULTS/environment.jsonl" ]; then
        step environment 45 2 "$PYTHON" -m bench.hardware.environment --out "$RESULTS/environment.jsonl" "${FLAGS[@]}"
    fi
}

report() {
    timeout 30 "$PYTHON" -m bench.hardware.report "$RESULTS" >"$RESULTS/report.txt" 2>&1
    cut -c1-200 "$RESULTS/report.txt" | tail -n "${1:-20}"
    archive
}

cuda_built() {
    "$PYTHON" -c 'from nsc_kernels import verified_hardware, native; import sys
sys.exit(native.cuda_source() != verified_hardware.checkout_source("cuda"))' 2>/dev/null
}

cuda_build() {
    local build="$RESULTS/.build"
    step cuda-build 100 3 bash -c "cmake -S . -B '$build' -DCMAKE_BUILD_TYPE=Release -DNSC_BUILD_CPU=OFF \\
        -DNSC_BUILD_CUDA=ON -DNSC_BUILD_CUDA_TESTS=ON -DCMAKE_INSTALL_PREFIX='$PWD' \\
        -DNSC_TORCH_DIR=\$('$PYTHON' -c 'import torch; print(torch.__path__[0])') \\
        && cmake --build '$build' -j $(nproc) && cmake --install '$build' && cp '$build/nsc_cuda_test' '$RESULTS/.nsc_cuda_test'"
    rm -rf "$build"
}

run_correctness() {
    environment
    step truncation 40 12 "$PYTHON" -m bench.hardware.truncation --out "$RESULTS/truncation.jsonl" "${FLAGS[@]}"
    checks correctness "$BUDGET" triton
    checks launches 45 triton
    report
}

run_bench() {
    environment
    rows bench $((BUDGET + 90)) hardware.operator_speed
    report 90
}

run_merge_step() {
    environment
    rows merge-step $((BUDGET + 90)) merging.merge_step_gpu
    report 40
}

run_cuda() {
    environment
    if [ -n "${DRY_RUN:-}" ]; then
        echo "cuda: nothing to run on a CPU; tests/cuda runs its source on an emulator"
        return
    fi
    cuda_built || cuda_build || return
    if [ -x "$RESULTS/.nsc_cuda_test" ]; then step cuda-host-test 60 5 "$RESULTS/.nsc_cuda_test"; fi
    checks correctness $((BUDGET - 120)) cuda
    checks launches 45 cuda
    report
}

run_tune() {
    environment
    rows clusters 100 hardware.clusters
    rows tune $((BUDGET - 30)) hardware.tune --table "$RESULTS/table.json"
}

run_profile() {
    if [ -n "${DRY_RUN:-}" ]; then
        echo "profile: nothing to look at on a CPU"
        return
    fi
    local backend index tool
    for tool in memcheck racecheck; do
        step "sanitizer-$tool" 90 4 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$PYTHON" -m bench.hardware.check --smallest
    done
    for backend in triton cuda; do
        for index in 1 0 6 9; do
            step "ncu-$backend-$index" 40 0 ncu --clock-control none --cache-control all --set full \
                -k regex:merged_lora -s 4 -c 2 "$PYTHON" -m bench.hardware.one_shape "$backend" "$index"
            grep -E "merged_lora|Duration|DRAM Throughput|L2 Cache Throughput|Achieved Occ|Registers Per|Waves Per" \
                "$RESULTS/ncu-$backend-$index.log" | cut -c1-100
        done
    done
}

for STAGE in "${@:-all}"; do
    case "$STAGE" in
    correctness | bench | merge-step | cuda | tune | profile) "run_${STAGE//-/_}" ;;
    report) report 200 ;;
    all) for STAGE in correctness bench merge-step cuda bench tune profile report; do "$0" "$STAGE" || FAILED=1; done ;;
    *)
        echo "unknown stage $STAGE: correctness, bench, merge-step, cuda, tune, profile, report" >&2
        exit 2
        ;;
    esac
done
exit "$FAILED"
