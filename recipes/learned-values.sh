#!/bin/sh
# An eraser in the paper's own form (nothing is recomputed) for Qwen2.5-Coder-0.5B-Instruct, with learned values. It does not ship:
# at the cost of its pass, recomputing readers leaves less (docs/log.md, "Values that the LoRA makes alone").
#
#   recipes/learned-values.sh TEXT OUTPUT           an hour and a half on two CPU cores with AVX512-BF16; `make backbones` first
#   recipes/learned-values.sh --dry TEXT OUTPUT     print the commands, run nothing
#   recipes/learned-values.sh --tiny TEXT OUTPUT    every command with a step or two, to see that all is in order
#
# TEXT is the text around the spans: the passages of 2WikiMultiHopQA (Apache-2.0), which are not in the repository. The second run goes
# over the first one's contexts again, which are kept in OUTPUT/lessons.
set -eu

. "$(dirname "$0")/common.sh"
[ $# -eq 2 ] || { echo "usage: $0 [--dry] [--tiny] TEXT OUTPUT" >&2; exit 2; }
TEXT=$1 OUTPUT=$2

train() { # folder, options
    folder=$1
    shift
    [ -z "$TINY" ] || set -- "$@" --set finetune.steps=2 --set finetune.contexts=1 --set "finetune.tokens=[24,60]" \
        --set finetune.spacing=40 --set finetune.validate_every=2 --set finetune.validation_contexts=1
    run "$KVERASER" train finetune --output "$folder" --model qwen2.5-coder-0.5b-instruct --dtype bf16 --text "$TEXT" --seed 42 \
        --store "$OUTPUT/lessons" --set eraser.repair=0 --set eraser.values=learned --set eraser.hidden=3 --set finetune.chat=true \
        --set "finetune.tasks=[tool-observation,needle-multikey,derived-direct,needle,preference]" --set "finetune.tokens=[96,400]" \
        --set finetune.weights.other=0 --set finetune.weights.continuation=0 --set finetune.weights.cue=0 \
        --set finetune.steps=58 --set finetune.contexts=12 --set finetune.average=0.9 --set finetune.warmup=5 \
        --set finetune.validate_every=8 --set finetune.validation_contexts=20 "$@"
}

train "$OUTPUT/1" --set finetune.learning_rate=5e-4
train "$OUTPUT/2" --start "$OUTPUT/1/eraser" --set finetune.learning_rate=4e-4
