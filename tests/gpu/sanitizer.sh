#!/usr/bin/env bash
# The kernels' tests under compute-sanitizer: no access outside an allocation (memcheck), no race over shared memory
# (racecheck). Each tool and file gets LIMIT_S seconds; logs go to OUT, a table is printed last.
#
#     tests/gpu/sanitizer.sh [PYTHON]
#
# Every tensor is an allocation of its own here, so that a kernel that reads past one's end is seen. Graphs cannot be
# recorded that way: tests that do are left out, their kernels are the same.
set -uo pipefail

PYTHON=${1:-python3}
LIMIT_S=${LIMIT_S:-240}
OUT=${OUT:-target/sanitizer}
cd "$(dirname "$0")/../.."
if ! command -v compute-sanitizer > /dev/null; then
  echo "compute-sanitizer is not on the PATH; hint: it comes with the CUDA toolkit" >&2
  exit 2
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "there is no CUDA device" >&2
  exit 2
fi
mkdir -p "$OUT"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1

# name | file | tests
RUNS=(
  "lora|tests/gpu/test_lora.py|neighbours or non_finite or (mixes and odd)"
  "lora-large|tests/gpu/test_lora.py|large"
  "elementwise|tests/gpu/test_ops.py|rms_norm or silu_mul or rope_kv or greedy"
  "attention|tests/gpu/test_ops.py|decode_does_not or (test_paged_attention and False)"
  "sample|tests/gpu/test_ops.py|(sample_equals and 301) or random_rows"
)
table="" status=0
for tool in memcheck racecheck; do
  for run in "${RUNS[@]}"; do
    IFS='|' read -r name file tests <<< "$run"
    log="$OUT/$tool-$name.txt" start=$SECONDS
    timeout -k 10 "$LIMIT_S" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$PYTHON" -m pytest "$file" -q -x -p no:cacheprovider -k "$tests" > "$log" 2>&1
    code=$?
    case $code in
      0) verdict=clean ;;
      124 | 137) verdict="not done in $LIMIT_S s" ;;
      *) verdict="failed ($code): see $log" status=1 ;;
    esac
    # Running out of time with an error found is a failure, too.
    if [[ $verdict == not* ]] && grep -qE '^========= (Invalid|Error:|Warning: Race|ERROR SUMMARY: [1-9])' "$log"; then
      verdict="errors: see $log" status=1
    fi
    table+=$(printf '%-10s %-12s %4d s  %s' "$tool" "$name" $((SECONDS - start)) "$verdict")$'\n'
    grep -m 3 -E '^========= (Invalid|Error:|Warning: Race)|^FAILED|^E  ' "$log"
  done
done
printf '%s' "$table"
exit $status
