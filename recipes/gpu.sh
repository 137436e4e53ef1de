#!/bin/sh
# Erasers for larger backbones, on one GPU or several: training, evaluation, latency. What it does and takes: gpu.md.
#
#   recipes/gpu.sh TEXT OUTPUT [BACKBONE ...]              0.5B, 1.5B and Qwen3-8B where none are named
#   recipes/gpu.sh --dry TEXT OUTPUT [BACKBONE ...]        print the commands, run nothing
#   recipes/gpu.sh --tiny TEXT OUTPUT [BACKBONE ...]       every command with a step or two, to see that all is in order
#
# TEXT is the text around the spans: a file, a folder, or hf:DATASET. QUESTIONS may name a HotpotQA, 2WikiMultiHopQA or MuSiQue
# file to evaluate on; PROCESSES is the number of GPUs.
set -eu

. "$(dirname "$0")/common.sh"
[ $# -ge 2 ] || { echo "usage: $0 [--dry] [--tiny] TEXT OUTPUT [BACKBONE ...]" >&2; exit 2; }
TEXT=$1 OUTPUT=$2
shift 2
[ $# -gt 0 ] || set -- qwen2.5-coder-0.5b-instruct qwen2.5-coder-1.5b-instruct Qwen/Qwen3-8B
QUESTIONS=${QUESTIONS:-} PROCESSES=${PROCESSES:-1}

launch() { # kveraser's arguments, on all GPUs
    if [ "$PROCESSES" -gt 1 ]; then
        run accelerate launch --num_processes "$PROCESSES" -m kveraser "$@"
    else
        run "$KVERASER" "$@"
    fi
}

train() { # backbone, name of the arm, options
    backbone=$1 arm=$2
    shift 2
    for stage in pretrain finetune; do
        [ -z "$TINY" ] || set -- "$@" --set "$stage.steps=2" --set "$stage.contexts=1" --set "$stage.tokens=[24,60]" \
            --set "$stage.spacing=40" --set "$stage.validate_every=2" --set "$stage.validation_contexts=1"
    done
    launch train all --model "$backbone" --output "$OUTPUT/$(basename "$backbone")/$arm" --preset gpu --text "$TEXT" --seed 42 \
        --set finetune.chat=true "$@"
}

evaluate() { # backbone, name of the arm, name of the table, options
    folder=$OUTPUT/$(basename "$1")/$2 table=$3
    shift 3
    [ -z "$QUESTIONS" ] || set -- "$@" --data "$QUESTIONS"
    [ -z "$TINY" ] || set -- --limit 1 --lengths 64 --tasks needle --methods kveraser --max-new-tokens 4
    run "$KVERASER" eval --model "$backbone" --eraser "$folder/eraser" --text "$TEXT" --chat --seed 1 "$@" --output "$folder/eval/$table"
}

for backbone; do
    train "$backbone" steering --set "finetune.repair=[0,64,128]"
    train "$backbone" learned-values --set eraser.repair=0 --set eraser.values=learned --set eraser.hidden=3
    train "$backbone" learned-repair --set eraser.acts_on=readers --set "finetune.repair=[64,128]"
    for arm in steering learned-values learned-repair; do
        evaluate "$backbone" $arm 1K --limit 100 --lengths 1024
        evaluate "$backbone" $arm 4K --limit 20 --lengths 4096
        evaluate "$backbone" $arm 8K --limit 10 --lengths 8192
        evaluate "$backbone" $arm 32K --limit 3 --lengths 16384 --lengths 32768
    done
    sizes="--length 1024 --length 8192 --length 32768"
    [ -z "$TINY" ] || sizes="--length 256 --repeats 1"
    # shellcheck disable=SC2086
    run "$PYTHON" benchmarks/latency.py --exact --model "$backbone" --eraser "$OUTPUT/$(basename "$backbone")/steering/eraser" \
        $sizes --output "$OUTPUT/$(basename "$backbone")/latency"
done
