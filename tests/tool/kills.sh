#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Programs killed while they write a model over another: it is the one before or the one after, and nothing is left.
#
#     tests/tool/kills.sh BIN [COUNT]
#
# BIN is the program concertina, COUNT how often it is killed, by default 100.
set -uo pipefail

[ $# -ge 1 ] || { echo "usage: kills.sh BIN [COUNT]" >&2; exit 2; }
bin=$(realpath "$1") count=${2:-100}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 2

"$bin" expand --network smallnet7 --expand fc --rate 8 -o in.onnx >/dev/null && mkdir folder &&
  "$bin" contract in.onnx -o after.onnx >/dev/null && echo before >before.onnx || exit 1
write() { exec "$bin" contract in.onnx -o folder/out.onnx >/dev/null 2>&1; }
start=$(date +%s%N)
(write)
whole=$((($(date +%s%N) - start) / 1000000))
killed=0 before=0 after=0 wrong=0
while ((killed < count)); do
  cp before.onnx folder/out.onnx
  write &
  delay=$((RANDOM * (whole + whole / 4) / 32768))
  sleep "$((delay / 1000)).$(printf %03d $((delay % 1000)))"
  kill -9 $! 2>/dev/null && killed=$((killed + 1))
  wait $! 2>/dev/null
  if cmp -s folder/out.onnx before.onnx; then
    before=$((before + 1))
  elif cmp -s folder/out.onnx after.onnx; then
    after=$((after + 1))
  else
    wrong=$((wrong + 1))
  fi
  [ "$(ls -A folder)" = out.onnx ] || { wrong=$((wrong + 1)) && ls -A folder; rm -f folder/.* 2>/dev/null; }
done
echo "$killed killed in up to $((whole + whole / 4)) ms: $before before, $after after, $wrong wrong or with files left"
[ "$wrong" = 0 ]
