#!/usr/bin/env bash
# Everything that wants a GPU: builds csrc/, runs the tests marked gpu, the sanitizer and the
# benchmarks, section by section.
#
#     benchmarks/gpu.sh OUT [SECTION ...]
#
# Sections, in the order in which all of them run where none is named:
#
#     build                               the library of csrc/, its registers and spills
#     tests[:ops|:kernels|:runs]          what is marked gpu
#     sanitizer[:memcheck|:racecheck]     every access of the kernels, in layouts that tests draw
#     ops, loss                           benchmarks.ops, benchmarks.loss
#     step[:SIZE[:MIX]]                   benchmarks.step --tune
#     memory[:test|:zero2|:zero3]         benchmarks.memory, and its test
#
# OUT gets each section's JSON as soon as it is there, gpu.log with all that was printed, and gpu.md,
# the tables of all JSON files in OUT. Where a command may not last, name the sections in several of
# them, the narrow ones each in one; `python -m benchmarks.report OUT ...` joins what they left.
#
# Ready to run on a machine with a GPU, nvcc and torch of the version in constraints.txt; sets up
# no environment (PYTHON names the interpreter, .venv/bin/python or python3 where it is not set).
# build, ops and loss want torch and transformers alone; the others also pydantic, webdataset and
# soundfile, tests pytest and hypothesis, memory DeepSpeed, tests:runs DeepSpeed and MLflow.
set -euo pipefail

out=${1:?usage: benchmarks/gpu.sh OUT [SECTION ...]}
shift
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
sizes=(mms-1b-bloomz-7b1 whisper-large-llama-8b)
mixes=(librispeech blsp)
status=0

# Runs a command into the log; goes on when it fails, and remembers that it did.
record() {
  echo "== $*" | tee -a "$out/gpu.log"
  if ! "$@" 2>&1 | tee -a "$out/gpu.log"; then
    echo "FAILED: $*" | tee -a "$out/gpu.log"
    status=1
  fi
}

# compute-sanitizer sees every access of the kernels, in the small layouts that the tests draw.
sanitize() {
  if command -v compute-sanitizer >/dev/null; then
    record timeout 280 compute-sanitizer --tool "$1" --error-exitcode 1 \
      "$python" -m pytest -m gpu tests/ops/test_cuda.py
  else
    echo 'compute-sanitizer is not installed: not run' | tee -a "$out/gpu.log"
  fi
}

# What a run of Whisper-small and Llama-2-7B holds, the weights being random.
memory() {
  local weights
  weights=$(mktemp -d)
  record "$python" -m benchmarks.memory configs/blsp.yaml --random "$weights" \
    --set "train.engine=configs/ds/$1.json" --json "$out/memory-$1.json"
  rm -rf "$weights"
}

run() {
  local size mix rest
  case $1 in
    build)
      record env HEARKEN_CUDA=1 "$python" csrc/build.py
      record "$python" csrc/resources.py
      ;;
    tests) run tests:ops && run tests:kernels && run tests:runs ;;
    tests:ops) record "$python" -m pytest -m gpu tests/ops ;;
    tests:kernels | tests:runs) record "$python" -m pytest -m gpu "tests/train/test_${1#*:}.py" ;;
    sanitizer) sanitize memcheck && sanitize racecheck ;;
    sanitizer:memcheck | sanitizer:racecheck) sanitize "${1#*:}" ;;
    ops | loss) record "$python" -m "benchmarks.$1" --device cuda --json "$out/$1.json" ;;
    step) for size in "${sizes[@]}"; do run "step:$size"; done ;;
    step:*:*)
      rest=${1#*:}
      size=${rest%:*} mix=${rest#*:}
      record "$python" -m benchmarks.step --device cuda --size "$size" --mix "$mix" --tune \
        --json "$out/step-$size-$mix.json"
      ;;
    step:*) for mix in "${mixes[@]}"; do run "$1:$mix"; done ;;
    memory) run memory:test && run memory:zero2 && run memory:zero3 ;;
    memory:test) record "$python" -m pytest -m gpu tests/train/test_memory.py ;;
    memory:zero2 | memory:zero3) memory "${1#*:}" ;;
  esac
  if compgen -G "$out/*.json" >/dev/null; then
    "$python" -m benchmarks.report "$out" >"$out/gpu.md" || status=1
  fi
}

[ $# -gt 0 ] || set -- build tests sanitizer ops loss step memory
known='^(build|tests(:(ops|kernels|runs))?|sanitizer(:(memcheck|racecheck))?|ops|loss'
known+='|step(:[a-z0-9-]+(:[a-z]+)?)?|memory(:(test|zero2|zero3))?)$'
for section; do
  if ! [[ $section =~ $known ]]; then
    echo "$0 has no section $section; its head lists them" >&2
    exit 2
  fi
done
if command -v nvidia-smi >/dev/null; then record nvidia-smi; fi
for section; do run "$section"; done
exit $status
