#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Programs killed at every call that writes, completes, names or removes a file, while they write a model over another:
# what is there is the one before or the one after, with its data, and the next write leaves nothing else.
#
#     tests/tool/kills.sh BIN PRELOAD
#
# BIN is the program concertina, PRELOAD the library that kills (kill_at.cpp).
set -uo pipefail

[ $# = 2 ] || { echo "usage: kills.sh BIN PRELOAD" >&2; exit 2; }
bin=$(realpath "$1") preload=$(realpath "$2")
scratch=$(realpath "$(mktemp -d)")
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 2

# Two models of the same names, and each again with its data beside it.
"$bin" expand --network smallnet3 --seed 1 -o before.onnx >before.txt &&
  "$bin" expand --network smallnet3 --seed 2 -o after.onnx >after.txt || exit 1
# same MODEL: it is what there is in the folder, whether written so or with data by another name
same() { diff -rq "written-$1" folder >/dev/null || "$bin" verify "$1" folder/out.onnx >/dev/null 2>&1; }
if "$bin" verify before.onnx after.onnx >/dev/null; then echo "the models are equal"; exit 1; fi

killed=0 before=0 after=0 wrong=0
# kills OPTION...: what is written over a model that was written so too, and where there is none
kills() {
  local at status was
  for was in before.onnx after.onnx; do
    rm -rf "written-$was" && mkdir "written-$was"
    "$bin" contract "$was" -o "written-$was/out.onnx" "$@" >/dev/null || exit 1
  done
  for was in before.onnx ''; do
    for ((at = 1;; ++at)); do
      rm -rf folder
      if [ -n "$was" ]; then cp -r "written-$was" folder; else mkdir folder; fi
      LD_PRELOAD=$preload KILL_AT=$at "$bin" contract after.onnx -o folder/out.onnx "$@" >/dev/null
      status=$?
      if [ $status = 0 ] && same after.onnx; then
        break
      elif [ $status != 137 ]; then
        wrong=$((wrong + 1)) && echo "call $at of '$*' over '$was': status $status" && break
      elif [ ! -e folder/out.onnx ] && [ -z "$was" ]; then
        before=$((before + 1))
      elif [ -n "$was" ] && same "$was"; then
        before=$((before + 1))
      elif same after.onnx; then
        after=$((after + 1))
      else
        wrong=$((wrong + 1)) && echo "killed at call $at of '$*' over '$was':" && ls -lA folder
      fi
      killed=$((killed + 1))
      "$bin" contract after.onnx -o folder/out.onnx "$@" >/dev/null && same after.onnx &&
        ! find folder -mindepth 1 ! -name 'out.onnx*' | grep . || { wrong=$((wrong + 1)) && ls -lA folder; }
    done
  done
}
{ kills && kills --external-data out.onnx.data; } 2>stderr

echo "$killed killed: $before before, $after after, $wrong wrong or with files left"
[ "$wrong" = 0 ] && [ "$before" -gt 0 ] && [ "$after" -gt 0 ]
