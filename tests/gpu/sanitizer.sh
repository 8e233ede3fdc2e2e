#!/usr/bin/env bash
# The kernels' tests under compute-sanitizer: no access outside an allocation (memcheck), no race over shared memory
# (racecheck). The runs of a tool go on side by side, each for LIMIT_S seconds at most; logs go to OUT.
#
#     tests/gpu/sanitizer.sh [PYTHON [TOOL [NAME …]]]
#
# PYTHON must have slora, torch and pytest; TOOL is memcheck, racecheck or both (the default); NAMEs are those of RUNS, by
# default all. So a tool takes ten minutes at most. A run that was not done is not clean: repeat it alone, or with more time.
#
# cuDNN's kernels are not looked at: racecheck has complaints about them. Nor is anything but the kernels of cuda/ where
# LoRA's reference would take most of the time. Not so elsewhere: racecheck breaks down in a cuBLAS kernel that it passes by.
#
# Every tensor is an allocation of its own here, so that a kernel that reads past one's end is seen. Graphs cannot be
# recorded that way: what they would hold is launched instead.
set -uo pipefail

PYTHON=${1:-python3} TOOLS=${2:-both}
NAMES=("${@:3}")
LIMIT_S=${LIMIT_S:-540}
OUT=${OUT:-target/sanitizer}
cd "$(dirname "$0")/../.."

# name | file | tests | the only tool, if there is one: whole steps take hours under racecheck, and those of their kernels
# that have shared memory have runs of their own
RUNS=(
  "lora|tests/gpu/test_lora.py|neighbours"
  "lora-finite|tests/gpu/test_lora.py|non_finite"
  "lora-consumer|tests/gpu/test_lora.py|consumer"
  "lora-odd|tests/gpu/test_lora.py|mixes and odd and bfloat16"
  "lora-ranks|tests/gpu/test_lora.py|beyond"
  "lora-large|tests/gpu/test_lora.py|large"
  "elementwise|tests/gpu/test_ops.py|rms_norm or silu_mul or rope_kv or greedy"
  "attention|tests/gpu/test_ops.py|decode_does_not"
  "attention-paged|tests/gpu/test_ops.py|test_paged_attention and False"
  "chunks|tests/gpu/test_ops.py|test_paged_attention and True"
  "sample|tests/gpu/test_ops.py|(sample_equals and 301) or random_rows"
  "steps|tests/gpu/test_runner.py|tokens_of_the_cpu and device|memcheck"
  "steps-lora|tests/gpu/test_runner.py|adapters_give|memcheck"
  "pool|tests/gpu/test_engine.py|random_steps|memcheck"
)

fail() {
  echo "$1" >&2
  exit 2
}

case $TOOLS in
  both) TOOLS=(memcheck racecheck) ;;
  memcheck | racecheck) TOOLS=("$TOOLS") ;;
  *) fail "there is no tool $TOOLS; hint: memcheck, racecheck or both" ;;
esac
for name in "${NAMES[@]}"; do
  [[ " ${RUNS[*]%%|*} " == *" $name "* ]] || fail "there is no run $name; hint: ${RUNS[*]%%|*}"
done
PATH=$PATH:/usr/local/cuda/bin
command -v compute-sanitizer > /dev/null || fail "compute-sanitizer is not on the PATH; hint: it comes with the CUDA toolkit"
"$PYTHON" -c 'import pytest, slora, torch' || fail "$PYTHON lacks a package; hint: make sanitize-gpu, or PYTHONPATH=python"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || fail "there is no CUDA device"
KERNELS=$("$PYTHON" -c 'import glob, re
sources = (open(path).read() for path in glob.glob("cuda/*.cu"))
print("|".join(name for text in sources for name in re.findall(r"__global__ void(?:\s+__launch_bounds__\([^)]*\))?\s+(\w+)\(", text)))')
[[ "|$KERNELS|" == *"|lora_cluster|"* ]] || fail "found no kernels in cuda/, only: $KERNELS"
mkdir -p "$OUT"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# One run, and its line of the table; 1 unless it is clean.
check() {
  local tool=$1 name=$2 file=$3 tests=$4
  local kernels=(--kernel-name-exclude kernel_substring=cudnn)
  [[ $file == *lora* ]] && kernels=(--kernel-name "regex=^($KERNELS)\$")
  local log="$OUT/$tool-$name.txt" start=$SECONDS verdict
  timeout -k 10 "$LIMIT_S" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
    "${kernels[@]}" \
    "$PYTHON" -m pytest "$file" -q -x -p no:cacheprovider -k "$tests" > "$log" 2>&1
  local code=$?
  case $code in
    0) verdict=clean ;;
    124 | 137) verdict="not done in $LIMIT_S s" ;;
    *) verdict="failed ($code): see $log" ;;
  esac
  if [[ $verdict == clean ]] && ! grep -qE '[0-9]+ passed' "$log"; then
    verdict="nothing was run: see $log"
  elif [[ $verdict == not* ]] && grep -qE '^========= (Invalid|Error:|Warning: Race|ERROR SUMMARY: [1-9])' "$log"; then
    verdict="errors: see $log"
  fi
  printf '%-10s %-12s %4d s  %s\n' "$tool" "$name" $((SECONDS - start)) "$verdict"
  grep -m 3 -E '^========= (Invalid|Error:|Warning: Race)|^FAILED|^E  ' "$log"
  [[ $verdict == clean ]]
}

status=0
for tool in "${TOOLS[@]}"; do
  pids=()
  for run in "${RUNS[@]}"; do
    IFS='|' read -r name file tests only <<< "$run"
    [[ ${#NAMES[@]} == 0 || " ${NAMES[*]} " == *" $name "* ]] || continue
    if [[ -n $only && $only != "$tool" ]]; then
      printf '%-10s %-12s only under %s\n' "$tool" "$name" "$only"
      continue
    fi
    check "$tool" "$name" "$file" "$tests" &
    pids+=($!)
    sleep 1 # each looks for a free port when it starts
  done
  for pid in "${pids[@]}"; do wait "$pid" || status=1; done
done
exit $status
