# What all calls share, sourced by them with the pack's folder and the seconds that the call may take;
# results go to $OUT, in files named by letters, digits, '.', '_' and '-' alone.
# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
set -uo pipefail

pack=$1 deadline=$2
OUT=$(realpath -m "${OUT:-device_results}")
work=${TMPDIR:-/tmp}/concertina-device  # all calls' on one machine
mkdir -p "$OUT" "$work/data"
[[ ! -f $pack/programs.tar.gz ]] || tar -C "$work" -xzf "$pack/programs.tar.gz"
cp -r "$pack/src" "$work"
[[ ! -d $pack/data ]] || cp -r "$pack/data/." "$work/data"
cd "$work/bin" || exit 1
export PYTHONUNBUFFERED=1 CUDA_DEVICE_ORDER=PCI_BUS_ID
rm -rf "$work/steps" && mkdir "$work/steps"

# cuBLAS is that of a CUDA Toolkit, or of PyTorch, wherever they are.
blas=$(ldd bench_cuda_contraction | awk '/libcublas.*not found/ {print $1; exit}')
if [[ -n $blas ]]; then
  found=$(timeout 20 find / -xdev -name "$blas" -print -quit 2>/dev/null)
  [[ -z $found ]] || LD_LIBRARY_PATH=$(dirname "$found")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  [[ -z ${LD_LIBRARY_PATH-} ]] || export LD_LIBRARY_PATH
fi

report() { python3 "$work/src/report.py" "$work" "$OUT" || echo 'no report can be written' >&2; }

# record NAME STATUS SECONDS: for the report, which is written again.
record() {
  printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$work/steps/list"
  report
}
skip() { record "$1" "skipped: $2" 0; }

# step NAME SECONDS COMMAND...: its output is in steps/NAME.out and .err, the end of both in $OUT. What
# is left until the deadline may be less than its seconds.
step() {
  local name=$1 most=$2 start=$SECONDS code status
  shift 2
  ((most <= deadline - start)) || most=$((deadline - start))
  if [[ -n ${no_device-} && $name != info ]]; then
    skip "$name" "$no_device"
    return
  elif ((most < 3)); then
    skip "$name" 'no time is left'
    return
  fi
  timeout --kill-after 5 "$most" "$@" >"$work/steps/$name.out" 2>"$work/steps/$name.err" </dev/null
  code=$?
  case $code in
    0) status=passed ;;
    124 | 137) status="failed: more than $most s" ;;
    *) status="failed: exit code $code" ;;
  esac
  ! grep -q '^skipped: no CUDA device' "$work/steps/$name.out" || status='skipped: no CUDA device'
  tail -c 200000 "$work/steps/$name.out" "$work/steps/$name.err" >"$work/steps/$name.log"
  record "$name" "$status" $((SECONDS - start))
}

# needs NAME WHAT COMMAND...: false, and the step skipped, where the command fails.
needs() {
  local name=$1 what=$2
  shift 2
  [[ -z ${no_device-} ]] && ! "$@" >/dev/null 2>&1 || return 0
  skip "$name" "there is no $what"
  return 1
}

# A step for which PyTorch is needed.
with_torch() {
  needs "$1" PyTorch python3 -c 'import sys, importlib.util as util; sys.exit(not util.find_spec("torch"))' ||
    return
  step "$@"
}

finish() {
  report  # steps side by side may have missed each other
  cat "$work"/steps/*.log 2>/dev/null | tail -c 8000000 >"$OUT/$1.log"
  cat "$OUT/results.md"
  ! grep -q $'\tfailed' "$work/steps/list" || exit 1
  [[ -z ${no_device-} ]] || exit 3
}

# The tests know best whether there is a device.
probe=$(timeout 60 ./test_cuda_program_device 'every scalar*' 2>&1)
code=$?
if [[ $probe == *"skipped: no CUDA device"* ]]; then
  no_device='no CUDA device'
elif ((code > 125)); then
  no_device="the programs do not start: $(tail -n 1 <<<"$probe")"
fi
