#!/usr/bin/env bash
# From nothing to a trained, evaluated speech LLM. Run by `make demo`; every step keeps what it
# made, so a second run takes up where the first one ended.
set -euo pipefail
cd "$(dirname "$0")/../.."

world=build/micro
config=configs/micro/blsp.yaml
ranks=${RANKS:-2}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export MLFLOW_DISABLE_TELEMETRY=true
# Where there is no GPU, DeepSpeed otherwise says so once per process.
command -v nvidia-smi > /dev/null || export DS_ACCELERATOR=cpu

step() {
  local began=$SECONDS title=$1
  shift
  printf '\n== %s\n   %s\n' "$title" "$*"
  "$@"
  printf '   %d s\n' $((SECONDS - began))
}
on_ranks() { deepspeed --num_accelerators "$ranks" --log_level error "$@"; }

began=$SECONDS
step "micro world: speech, encoder, LLM" python -m examples.micro.world $world
step "corpus to shards (LibriSpeech layout)" \
  python -m data.build librispeech $world/corpus/LibriSpeech $world/shards --language en
step "corpus to shards (JSONL manifest, other languages)" \
  python -m data.build manifest $world/corpus/train.jsonl $world/shards
step "corpus to shards (held-out sentences and voices)" \
  python -m data.build manifest $world/corpus/test.jsonl $world/shards
step "stage 1: the LLM continues the transcripts" on_ranks train/behave.py $config
step "stage 2: the adapter learns to make it continue the speech" on_ranks train/main.py $config
step "evaluation on tasks the adapter never saw" \
  on_ranks train/evaluate.py $config --json runs/micro/blsp/evaluation.json
step "a new recording" python -m examples.micro.record runs/micro/new.wav --seed 14
step "listen" python train/listen.py runs/micro/blsp runs/micro/new.wav \
  --instruction "repeat the sentence"
printf '\nAll of it took %d s. To look at the runs: .venv/bin/mlflow ui\n' $((SECONDS - began))
