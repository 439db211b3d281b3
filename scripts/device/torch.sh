#!/usr/bin/env bash
# The PyTorch package on a device. torch.sh pack FOLDER BUILD copies what that takes to FOLDER, which then
# needs nothing else: its run.sh tests the operators and times training steps, and writes to $OUT. BUILD is
# where examples/torch was built with CMake.
# SPDX-License-Identifier: Apache-2.0
set -uo pipefail
here=$(dirname "$(realpath "$0")")

if [[ ${1-} == pack ]]; then
  set -e
  folder=$2 root=$here/../..
  rm -rf "$folder"
  mkdir -p "$folder/package" "$folder/tests"
  cp -r "$root/examples/torch/src/concertina" "$folder/package"
  find "$folder/package" -name __pycache__ -prune -exec rm -rf {} +
  cp "$3"/_operators.so "$3"/_operators_cuda.so "$folder/package/concertina/torch"
  cp "$root"/tests/torch/{support,test_cuda}.py "$folder/tests"
  cp "$root"/examples/torch/{benchmark,tutorial}.py "$folder"
  cp "$here/torch.sh" "$folder/run.sh"
  exit
fi

OUT=$(realpath -m "${OUT:-device_results}")
mkdir -p "$OUT"
export PYTHONPATH=$here/package PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
failed=0
step() { # step FILE SECONDS COMMAND...
  local file=$1 seconds=$2 code=0 start=$SECONDS
  shift 2
  timeout --kill-after 3 "$seconds" "$@" >"$OUT/$file" 2>&1 </dev/null || code=$? failed=1
  printf '\n%s: exit code %s after %s s\n' "$*" "$code" $((SECONDS - start)) | tee -a "$OUT/$file"
}

cd "$here/tests" || exit 1
step torch_tests.log 48 python3 -W ignore -m unittest --verbose test_cuda
cd "$here" || exit 1
rm -f "$OUT/torch_steps.json"
step torch_steps.log $((SECONDS < 96 ? 97 - SECONDS : 1)) \
  python3 -W ignore benchmark.py --device --seconds 0.15 --rounds 3 --json "$OUT/torch_steps.json"
grep -E '^(FAIL|ERROR|Ran|OK|FAILED|[A-Za-z]*Error)' "$OUT/torch_tests.log"
cat "$OUT/torch_steps.log"
exit $failed
