# The micro world and its shards, in build/micro; sourced from the checkout's root by demo.sh, and by
# `make claims`. What is there already is not made again.
world=build/micro
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

step "micro world: speech, encoder, LLM" python -m examples.micro.world $world
step "corpus to shards (LibriSpeech layout)" \
  python -m data.build librispeech $world/corpus/LibriSpeech $world/shards --language en
step "corpus to shards (JSONL manifest, other languages)" \
  python -m data.build manifest $world/corpus/train.jsonl $world/shards
step "corpus to shards (held-out sentences and voices)" \
  python -m data.build manifest $world/corpus/test.jsonl $world/shards
