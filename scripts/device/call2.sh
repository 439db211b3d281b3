#!/usr/bin/env bash
# On the machine with the device: training rates beside PyTorch, and two trainings of SmallNet.
# SPDX-License-Identifier: Apache-2.0
folder=$(dirname "$(realpath "$0")")
# shellcheck source=scripts/device/steps.sh
source "$folder/steps.sh" "$(dirname "$folder")" 90
rm -rf "$work/runs"

for batch in 128 512; do
  step "rate_k7_b$batch" 15 ./cifar bench --device cuda --kernel 7 --batch $batch --seconds 0.5 --json
done
step rate_k3_b128 8 ./cifar bench --device cuda --kernel 3 --models compact,cl --seconds 0.5 --json
rate_torch() {
  with_torch "rate_torch_$1" 20 python3 "$work/src/train_torch_graph.py" --json --cudnn "$1" --batches 128 \
    --ways graph --seconds 0.2 --within "$2"
}
rate_torch heuristics 8

train() {  # on generated images; alone: its time is reported
  step "train_$1" "$2" ./cifar train --device cuda --kernel 7 --model "$1" --epochs 150 \
    --seed 1 --out "$work/runs/$1"
  cp "$work/runs/$1/log.csv" "$OUT/log-${1//+/-}.csv" 2>/dev/null
}
train compact 25
train cl 38
rate_torch search 12
finish call2
