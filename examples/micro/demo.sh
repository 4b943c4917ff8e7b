#!/usr/bin/env bash
# From nothing to a trained, evaluated speech LLM. Run by `make demo`; every step keeps what it
# made, so a second run takes up where the first one ended.
set -euo pipefail
cd "$(dirname "$0")/../.."

config=configs/micro/blsp.yaml
ranks=${RANKS:-2}
on_ranks() { deepspeed --num_accelerators "$ranks" --log_level error "$@"; }

began=$SECONDS
. examples/micro/world.sh
step "stage 1: the LLM continues the transcripts" on_ranks train/behave.py $config
step "stage 2: the adapter learns to make it continue the speech" on_ranks train/main.py $config
step "evaluation on tasks the adapter never saw" \
  on_ranks train/evaluate.py $config --json runs/micro/blsp/evaluation.json
for language in en es de; do
  step "a new recording" \
    python -m examples.micro.record runs/micro/new-$language.wav --language $language --seed 14
done
for instruction in "repeat the sentence" "translate to english"; do
  step "listen" python train/listen.py runs/micro/blsp runs/micro/new-{en,es,de}.wav \
    --instruction "$instruction"
done
printf '\nAll of it took %d s. To look at the runs: .venv/bin/mlflow ui\n' $((SECONDS - began))
