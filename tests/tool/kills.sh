#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Programs killed while they write a model over another: it is the one before or the one after, and nothing is left.
#
#     tests/tool/kills.sh BIN [COUNT]
#
# BIN is the program concertina, COUNT how often it is killed, by default 100: every other time at any moment, else
# from when it has begun to write. Some must have been killed before it was done with that.
set -uo pipefail

[ $# -ge 1 ] || { echo "usage: kills.sh BIN [COUNT]" >&2; exit 2; }
bin=$(realpath "$1") count=${2:-100}
[ -d /proc/self/fd ] || { echo "kills.sh: there is no /proc, which tells what a program writes" >&2; exit 2; }
scratch=$(realpath "$(mktemp -d)")
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 2

# 14 MB that nothing contracts: it is written for about as long as it is read.
"$bin" expand --network alexnet512 -o in.onnx >/dev/null && mkdir folder &&
  "$bin" contract in.onnx -o after.onnx >/dev/null && echo before >before.onnx || exit 1
write() { exec "$bin" contract in.onnx -o folder/out.onnx >/dev/null 2>&1; }

# is_writing PID: it has a file in the folder open
is_writing() {
  local file
  for file in /proc/"$1"/fd/*; do
    [[ -f $file && ! $file -ef in.onnx && $(readlink "$file") == "$scratch"/folder/* ]] && return 0
  done
  return 1
}

start=$(date +%s%N)
(write)
whole=$((($(date +%s%N) - start) / 1000000))
killed=0 writing=0 before=0 after=0 wrong=0
for ((round = 0; killed < count && round < 10 * count; round++)); do
  cp before.onnx folder/out.onnx
  write &
  if ((round % 2 == 0)); then
    delay=$((RANDOM * (whole + whole / 4) / 32768))
    sleep "$((delay / 1000)).$(printf %03d $((delay % 1000)))"
  else
    until is_writing $! || ! kill -0 $! 2>/dev/null; do :; done
    for ((i = RANDOM / 8; i > 0; i--)); do :; done
  fi
  kill -STOP $! 2>/dev/null
  is_writing $! && amid=1 || amid=0
  kill -9 $! 2>/dev/null && killed=$((killed + 1))
  wait $! 2>/dev/null
  if cmp -s folder/out.onnx before.onnx; then
    before=$((before + 1)) writing=$((writing + amid))
  elif cmp -s folder/out.onnx after.onnx; then
    after=$((after + 1))
  else
    wrong=$((wrong + 1))
  fi
  [ "$(ls -A folder)" = out.onnx ] || { wrong=$((wrong + 1)) && ls -A folder; rm -f folder/.* 2>/dev/null; }
done
echo "$killed killed in up to $((whole + whole / 4)) ms, $writing while they wrote: $before before, $after after," \
  "$wrong wrong or with files left"
[ "$wrong" = 0 ] && [ "$killed" = "$count" ] && [ "$writing" -ge $((count / 10 > 0 ? count / 10 : 1)) ]
