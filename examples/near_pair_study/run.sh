#!/usr/bin/env bash
# Runs the study that docs/near_pair_study.md registers, two interventions at a time. Resumable: run it again.
#
#   examples/near_pair_study/run.sh           # the registered part
#   examples/near_pair_study/run.sh further   # then: 3 % of the tokens, and the near pair at lower rates
set -euo pipefail
export CUDA_VISIBLE_DEVICES=
STUDY=${STUDY:-runs/near_pair_study}
TIP=${TIP:-.venv/bin/megatron-tip}
FURTHER=
export STUDY TIP

# Prints the settings, one per line, of a pair.
pair() {
    case $1 in
        near) printf '%s\n' 'model.drop_layers=[14]' ;;
        far) printf '%s\n' 'model.drop_layers=[20,21,22,23,24,25]' ;;
        healed) printf '%s\n' 'model.drop_layers=[]' "model.path=$STUDY/healed/hf" ;;
    esac
}

# Prints the settings of a prompt source.
source_of_prompts() {
    case $1 in
        arithmetic) printf '%s\n' 'prompts.tasks=["basic_arithmetic"]' ;;
        english)
            printf '%s\n' \
                'prompts.tasks=["family_relationships","syllogism","sentence_reordering","letter_counting"]'
            ;;
    esac
}

# The far student after 60 steps of plain distillation on both prompt sources.
heal() {
    [ -e "$STUDY/healed/summary.json" ] || "$TIP" train examples/pruned_pair/pruned_pair.toml \
        run.folder="$STUDY/healed" run.seed=3 selection.rule=full training.steps=60 \
        model.tensor_parallel_size=1 teacher.tensor_parallel_size=1 training.max_tokens_per_micro_batch=1024 \
        'prompts.tasks=["basic_arithmetic","family_relationships","syllogism","sentence_reordering","letter_counting"]'
}

# one PAIR SOURCE RATE RATIOS: bank, scores, advice, arms, tables.
one() {
    local name="$1_$2_$3" folder="$STUDY/$1_$2_$3" settings
    mapfile -t settings < <(
        pair "$1"
        source_of_prompts "$2"
        printf '%s\n' "run.folder=$folder/arms" "diagnostics.bank=$folder/bank" "optimizer.lr=$3" \
            "optimizer.min_lr=$3" "diagnostics.retention_ratios=[$4]"
    )
    set -- examples/near_pair_study/study.toml "${settings[@]}"
    mkdir -p "$folder"
    [ -e "$folder/bank/manifest.json" ] || "$TIP" diagnose bank "$@"
    [ -e "$folder/bank/scores/start.parquet" ] || "$TIP" diagnose score "$@"
    "$TIP" diagnose advise "$folder/bank" >"$folder/advice.txt"
    "$TIP" diagnose intervene "$@"
    "$TIP" diagnose report "$folder/bank" --arms "$folder/arms" --out "$STUDY/tables/$name"
}
export -f pair source_of_prompts one

# Runs one line of its input per core.
all() { xargs -L 1 -P 2 bash -euo pipefail -c 'one "$@"' _; }

if [ "${1:-}" = further ]; then
    FURTHER=yes
fi
printf '%s\n' 'near arithmetic 1e-5 0.1' 'near english 1e-5 0.1' | all
heal
for pair in far healed; do
    printf '%s\n' "$pair arithmetic 1e-5 0.1" "$pair english 1e-5 0.1" | all
done
if [ -n "$FURTHER" ]; then
    for pair in near far healed; do
        printf '%s\n' "$pair arithmetic 1e-5 0.1,0.03" "$pair english 1e-5 0.1,0.03" | all
    done
    printf '%s\n' 'near arithmetic 3e-6 0.1' 'near english 3e-6 0.1' | all
    printf '%s\n' 'near arithmetic 1e-6 0.1' 'near english 1e-6 0.1' | all
fi
