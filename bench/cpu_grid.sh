#!/usr/bin/env bash
# The rows of a CPU in bench/results/cpu, on two quiet cores; goes on where it stopped. bench/cpu_grid.sh REPORT.jsonl
set -eu
cd "$(dirname "$0")/.."
report=${1:?which report to write, as bench/results/cpu/NAME.jsonl}
measure() {
    "${PYTHON:-python3}" -m nsc_kernels.bench operator --device cpu --samples 11 --sample-ms 15 --out "$report" "$@"
}
families=vit-b,llama3-8b.q,llama3-8b.kv,llama3-8b.up,llama3-8b.down
measure --shapes "$families" --tokens 1,32,256,1536 --contenders fused,concat,peft
measure --shapes vit-b.q,llama3-8b.q --tokens 1,32,256,1536 --adapters 20x16 --contenders fused,concat,peft
measure --shapes vit-b.q,llama3-8b.q,llama3-8b.kv --tokens 1,32,256,1536 --threads 2 --contenders fused,concat,peft
measure --shapes vit-b.q,llama3-8b.kv --tokens 1,32,256 --dtype bf16 --contenders fused,concat,peft
# Many adapters in bfloat16, and a layer so narrow that a dot product has few steps.
measure --shapes vit-b.q,llama3-8b.q --tokens 512,1536 --adapters 20x16 --dtype bf16 --contenders fused,concat
measure --shapes 128x128 --tokens 1536,6304 --contenders fused,concat
# How it grows: with tokens, with the rank of all adapters, with how many they are.
measure --shapes vit-b.q --tokens 1,4,16,64,256,1024 --contenders fused,concat,peft
measure --shapes vit-b.q --tokens 256 --adapters 6x4,6x8,6x16,6x32,6x64 --contenders fused,concat,peft
measure --shapes vit-b.q --tokens 256 --adapters 1x96,2x48,3x32,6x16,12x8,24x4 --contenders fused,concat,peft
# What is compiled takes half a minute for each.
measure --shapes vit-b.q,llama3-8b.kv --tokens 32,256,1536 --contenders fused,compiled
