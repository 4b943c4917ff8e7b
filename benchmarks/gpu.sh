#!/usr/bin/env bash
# Everything that wants a GPU, in one go: builds csrc/, runs the tests marked gpu, the sanitizer and
# the benchmarks, and leaves one JSON and one Markdown in the folder given.
#
#     benchmarks/gpu.sh OUT
#
# Ready to run on a machine with a GPU, nvcc and torch of the version in constraints.txt; sets up
# no environment (PYTHON names the interpreter, .venv/bin/python or python3 where it is not set).
set -euo pipefail

out=${1:?usage: benchmarks/gpu.sh OUT}
cd "$(dirname "$0")/.."
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
status=0

section() { printf '\n## %s\n\n```\n' "$1" >>"$out/gpu.md"; }
end() { printf '```\n' >>"$out/gpu.md"; }
# Runs a command into the report; goes on when it fails, and remembers that it did.
record() {
  local title=$1
  shift
  section "$title"
  echo "== $title"
  if ! "$@" 2>&1 | tee -a "$out/gpu.md"; then
    echo "FAILED: $*" | tee -a "$out/gpu.md"
    status=1
  fi
  end
}

printf '# On a GPU\n\n%s\n' "$(git rev-parse --short HEAD 2>/dev/null || echo 'no git')" >"$out/gpu.md"
record 'Machine' nvidia-smi
record 'Build' env HEARKEN_CUDA=1 "$python" csrc/build.py
record 'Registers and spills' "$python" csrc/resources.py
record 'Tests' "$python" -m pytest -m gpu tests/ops tests/train/test_kernels.py
# compute-sanitizer sees every access of the kernels, in the small layouts that the tests draw.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    record "compute-sanitizer $tool" timeout 280 compute-sanitizer --tool "$tool" \
      --error-exitcode 1 "$python" -m pytest -m gpu tests/ops/test_cuda.py
  done
else
  echo 'compute-sanitizer is not installed: not run' | tee -a "$out/gpu.md"
fi
record 'Benchmark of the ops' "$python" -m benchmarks.ops --device cuda --json "$out/gpu.json"
for size in mms-1b-bloomz-7b1 whisper-large-llama-8b; do
  record "One training step: $size" "$python" -m benchmarks.step --device cuda --size "$size" \
    --tune --json "$out/step-$size.json"
done
exit $status
