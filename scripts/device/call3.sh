#!/usr/bin/env bash
# On the machine with the device: data sets, of which each of several calls brings a part; the last
# one trains what is wanted most, for $MINUTES minutes.
# SPDX-License-Identifier: Apache-2.0
folder=$(dirname "$(realpath "$0")")
# shellcheck source=scripts/device/steps.sh
source "$folder/steps.sh" "$(dirname "$folder")" $((60 * ${MINUTES:=5} + 120))

files=$(<"$pack/data_files") here=$(find "$work/data" -type f | wc -l)
if ((here < files)); then
  echo "$here of $files files are here; the next call brings more"
  exit 0
fi
if [[ -f $pack/data_unpack ]]; then
  step images 100 bash -c "cd '$work/data' && $(<"$pack/data_unpack") '$work/images'"
else
  ln -sfn "$work/data" "$work/images"
fi
[[ -e $work/images ]] || finish call3
out=$work/trained
for dataset in cifar10 cifar100; do  # the tables' teachers
  teacher=$dataset-resnet18-w16-e60-s1
  step "$teacher" $((60 * MINUTES)) ./cifar train --device cuda --data "$work/images" --dataset $dataset \
    --model resnet18 --width 16 --epochs 60 --learning-rate 0.1 --keep-momentum --weight-decay 5e-4 \
    --out "$out/runs/$teacher" --resume &
done
step trainings $((60 * MINUTES + 20)) \
  python3 "$work/src/reproduce.py" next --minutes "$MINUTES" --device cuda --jobs 8 \
  --cifar ./cifar --data "$work/images" --out "$out" --figures "$OUT" --paper "$work/src/accuracy.csv" \
  --wanted "$work/src/wanted.csv" --trainings "$work/src/trainings.csv" --commit "$(<"$work/src/commit")" \
  --machine "$(nvidia-smi --query-gpu=name --format=csv,noheader)"
wait
cp "$work/src/trainings.csv" "$OUT"
for teacher in "$out"/runs/*resnet18*; do
  [[ ! -f $teacher/best.onnx ]] || cp "$teacher/best.onnx" "$OUT/$(basename "$teacher").onnx"
done
finish call3
