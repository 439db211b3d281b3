#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What a user of the CIFAR program sees: a training that is killed at any moment and goes on to the bit, files that the
# other tools read, exit codes and one-line errors.
#
#     tests/cifar.sh CIFAR CONCERTINA CLASSIFY [COUNT]
#
# COUNT is how often trainings are killed at least, by default once.
set -uo pipefail

source=$(cd "$(dirname "$0")/../.." && pwd)
if [ $# -lt 3 ]; then
  echo "usage: cifar.sh CIFAR CONCERTINA CLASSIFY [COUNT]" >&2
  exit 2
fi
cifar=$(realpath "$1") concertina=$(realpath "$2") classify=$(realpath "$3") wanted=${4:-1}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 2
failures=0 checks=0

fail() {
  failures=$((failures + 1))
  echo "FAILED: $*"
  sed 's/^/    /' out err 2>/dev/null | cut -c1-300
}

# expect CODE COMMAND...: its output is in the files out and err
expect() {
  local code=$1
  shift
  checks=$((checks + 1))
  timeout 300 "$@" >out 2>err </dev/null
  local got=$?
  [ "$got" = "$code" ] || fail "exit code $got instead of $code: $*"
  if [ "$code" -gt 1 ] && ! { [ "$(wc -l <err)" = 1 ] && grep -q '^cifar: error: ' err; }; then
    fail "not a one-line error: $*"
  fi
}

# says FILE TEXT: the text is in the file
says() {
  checks=$((checks + 1))
  grep -qF -- "$2" "$1" || fail "\"$2\" is not in $1"
}

# ---- a small set in CIFAR-10's layout ------------------------------------------------------------

python3 - <<'PYTHON'
import os, random
random.seed(1)
os.makedirs("data/cifar-10-batches-bin")
def batch(name, count):
    with open("data/cifar-10-batches-bin/" + name, "wb") as file:
        for i in range(count):
            label = i % 10
            pixels = [(random.randrange(64) + 19 * label + (40 * label if c == label % 3 else 0)) % 256
                      for c in range(3) for _ in range(1024)]
            file.write(bytes([label] + pixels))
for b in range(1, 6):
    batch(f"data_batch_{b}.bin", 400)
batch("test_batch.bin", 200)
PYTHON

# ---- kill -9 at any moment, resume: the weights of an uninterrupted training -----------------------

train=(train --data data --model cl --kernel 3 --epochs 10 --batch 64 --seed 3 --threads 2)
start=$(date +%s%N)
expect 0 "$cifar" "${train[@]}" --out whole
whole_ms=$((($(date +%s%N) - start) / 1000000))
says out "best test accuracy"
cp whole/checkpoint.safetensors expected

kills=0 trainings=0
until [ "$kills" -ge "$wanted" ]; do
  rm -rf killed
  trainings=$((trainings + 1))
  for attempt in $(seq 1 200); do
    "$cifar" "${train[@]}" --out killed --resume >out 2>err </dev/null &
    pid=$!
    ms=$((whole_ms * (RANDOM % 40 + 5) / 100))  # some way into what a whole training takes
    sleep "$((ms / 1000)).$(printf %03d $((ms % 1000)))"
    kill -KILL $pid 2>/dev/null
    wait $pid 2>/dev/null
    code=$?
    [ "$code" = 0 ] && break
    [ "$code" = 137 ] || { fail "attempt $attempt ended with $code"; break; }
    kills=$((kills + 1))
    # Whatever the moment, what is there is whole.
    [ -e killed/checkpoint.safetensors ] && expect 0 "$cifar" eval --data data killed/checkpoint.safetensors
    [ -e killed/best.onnx ] && expect 0 "$cifar" eval --data data killed/best.onnx
    # A machine so slow that no epoch ends in time is given all of it.
    [ "$attempt" -gt 60 ] && "$cifar" "${train[@]}" --out killed --resume >out 2>err </dev/null && break
  done
  checks=$((checks + 4))
  cmp -s killed/checkpoint.safetensors expected ||
    fail "after $kills kills the weights are not those of an uninterrupted training"
  cmp -s <(grep -v '^#' killed/log.csv | cut -d, -f1-7) <(grep -v '^#' whole/log.csv | cut -d, -f1-7) ||
    fail "after $kills kills the log is not that of an uninterrupted training"
  cmp -s killed/best.onnx whole/best.onnx || fail "after $kills kills the best network is another one"
  [ "$(ls -A killed)" = "$(ls -A whole)" ] || fail "after $kills kills files are left: $(ls -A killed)"
done
echo "killed $kills times in $trainings trainings"

# ---- the number of threads does not matter --------------------------------------------------------

expect 0 "$cifar" train --data data --model cl --kernel 3 --epochs 10 --batch 64 --seed 3 --threads 1 --out alone
cmp -s alone/checkpoint.safetensors expected || fail "one thread computes other weights than two"

# ---- files for the other tools --------------------------------------------------------------------

expect 0 "$cifar" contract --data data whole/checkpoint.safetensors -o checkpoint.onnx
says out "Identical accuracy"
expect 0 "$cifar" contract --data data whole/best.onnx -o compact.onnx
says out "Identical accuracy"
expect 0 "$cifar" eval --data data compact.onnx --json
python3 -m json.tool out >/dev/null || fail "not JSON"
right=$(python3 -c 'import json; print(json.load(open("out"))["correct"])')
expect 0 "$concertina" contract whole/best.onnx -o by_tool.onnx
for other in compact by_tool; do
  expect 0 "$classify" whole/best.onnx $other.onnx data/cifar-10-batches-bin/test_batch.bin
  checks=$((checks + 1))
  [ "$(grep -c " $right " out)" = 2 ] || fail "not $right images are right"
  says out "images on which the two models differ: 0"
done

for model in acnet ck+fc; do
  expect 0 "$cifar" train --data data --model "$model" --kernel 5 --epochs 1 --batch 128 --out "$model"
  expect 0 "$cifar" contract --data data "$model/best.onnx" -o "$model.onnx"
  says out "Identical accuracy"
done

# ---- without data; double; bench --------------------------------------------------------------------

expect 0 "$cifar" train --model compact --kernel 3 --epochs 1 --double --out generated
says err "generated images"
says generated/log.csv "data set generated"
expect 0 "$cifar" eval generated/best.onnx
expect 0 "$cifar" train --data data --model ck --kernel 5 --compute nonlinear --epochs 1 --out nonlinear
expect 0 "$cifar" train --data data --model ck --kernel 5 --epochs 1 --init nonlinear/best.onnx --out initialised
expect 0 "$cifar" train --data data --model ck --kernel 5 --epochs 1 --init nonlinear/best.onnx --double --out widened
expect 3 "$cifar" train --data data --model ck --kernel 5 --epochs 1 --init widened/best.onnx --out none
says err "F64 does not fit F32"
expect 0 "$cifar" train --data data --model ck --kernel 5 --epochs 1 --out random
cmp -s initialised/checkpoint.safetensors random/checkpoint.safetensors && fail "--init changes nothing"
expect 3 "$cifar" train --data data --model cl --kernel 5 --epochs 1 --init nonlinear/checkpoint.safetensors --out none
expect 0 "$cifar" drift --model ck --kernel 5 --steps 3 --batch 16
says out "double, contracted and layered"
expect 0 "$cifar" train --data data --model resnet18 --width 2 --epochs 1 --keep-momentum --out teacher
expect 0 "$cifar" eval --data data teacher/best.onnx
expect 0 "$cifar" bench --models resnet18 --width 2 --batch 16 --seconds 0.1
plain=(train --data data --model cl --kernel 3 --epochs 1)
expect 0 "$cifar" "${plain[@]}" --out plain
for other in "--corrupt 0.5" "--weight-decay 0.1" "--weight-decay 0.1 --decay-of product" \
  "--optimizer adam" "--batch 64" \
  "--transfer kd --teacher teacher/best.onnx" "--transfer kd --teacher teacher/best.onnx --temperature 1" \
  "--transfer kd --teacher teacher/best.onnx --transfer-weight 0.5" \
  "--transfer hint --teacher teacher/best.onnx" \
  "--transfer hint --teacher teacher/best.onnx --projection learned" \
  "--transfer pkt --teacher teacher/best.onnx"; do
  # Every option changes what is trained.
  rm -rf other
  expect 0 "$cifar" "${plain[@]}" $other --out other
  sum=$("$concertina" contract other/best.onnx -o other.onnx >/dev/null && sha256sum <other.onnx)
  echo "$sum" >>sums
done
checks=$((checks + 1))
[ "$(sort -u sums | wc -l)" = 11 ] || fail "two of the options train the same network"
expect 0 "$cifar" "${plain[@]}" --similarities 3 --out compared
expect 0 "$cifar" "${plain[@]}" --similarities 3 --trained-gradients --out compared_expanded
checks=$((checks + 2))
[ "$(wc -l <compared/similarities.csv)" = 4 ] || fail "three gradients have three similarities"
cmp -s compared/similarities.csv compared_expanded/similarities.csv && fail "--trained-gradients changes nothing"
cmp -s compared/best.onnx plain/best.onnx || fail "comparing gradients changes the training"
expect 0 "$cifar" landscape plain/best.onnx --data data --points 3 --images 100 -o landscape.csv
says out "9 points"
expect 0 "$cifar" landscape plain/best.onnx --data data --points 3 --images 100 --expanded -o expanded.csv
checks=$((checks + 1))
cmp -s landscape.csv expanded.csv && fail "--expanded changes nothing"
expect 0 "$cifar" bench --kernel 3 --batch 16 --seconds 0.1
expect 0 "$cifar" bench --models compact,cl --kernel 3 --batch 16 --seconds 0.1 --json
python3 -m json.tool out >/dev/null || fail "not JSON"

# ---- mistakes -----------------------------------------------------------------------------------------

expect 2 "$cifar"
expect 2 "$cifar" train --model resnet
expect 2 "$cifar" train --dataset svhn
says err "cifar10,cifar100,mnist"
expect 2 "$cifar" train --nonsense
says err "--nonsense"
expect 2 "$cifar" train --rate four
says err "--rate"
expect 3 "$cifar" "${train[@]}" --out whole
says err "--resume"
expect 3 "$cifar" "${train[@]/64/65}" --out whole --resume
says err "another training"
expect 2 "$cifar" train --model ck --kernel 3 --out none
expect 2 "$cifar" train --kernel 4 --out none
expect 2 "$cifar" train --rate 0 --out none
expect 2 "$cifar" train --epochs 0 --out none
for seed in -1 010 9223372036854775808 18446744073709551615 99999999999999999999999999; do
  expect 2 "$cifar" train --seed $seed --out none
done
expect 2 "$cifar" train --batch 99999999999999999999 --out none
says err "99999999999999999999"
expect 2 "$cifar" train --data "" --out none
expect 2 "$cifar" train --out ""
expect 2 "$cifar" train --corrupt 2 --out none
expect 2 "$cifar" train --transfer osmosis --out none
expect 2 "$cifar" train --kernel 3 --transfer kd --out none
says err "needs a teacher"
expect 2 "$cifar" landscape plain/best.onnx --data data --points 4 -o none.csv
expect 2 "$cifar" landscape plain/best.onnx --data data -o plain/best.onnx
says err "which would be lost"
expect 3 "$cifar" landscape teacher/best.onnx --data data -o none.csv
says err "--expanded"
for unused in "--width 8" "--model resnet18 --kernel 3" "--model compact --rate 2" "--model acnet --rate 2" \
  "--model cl --decay-of product" "--optimizer adam --keep-momentum" "--temperature 2" "--projection learned" \
  "--trained-gradients" "--dataset mnist"; do
  expect 2 "$cifar" train $unused --out none
done
for undone in "--model acnet --compute contracted" "--model dbb"; do
  expect 2 "$cifar" train $undone --device cuda --out none
  says err "is not computed on a device"
done
expect 2 "$cifar" train --device tpu --out none
expect 2 "$cifar" train --device cuda --threads 2 --out none
says err "it is for --device cpu"
expect 2 "$cifar" eval --data data compact.onnx --threads 5000
expect 2 "$cifar" contract --data data whole/best.onnx -o compact.safetensors
touch file
expect 5 "$cifar" train --data data --kernel 3 --out file/folder
says err "file/folder"
checks=$((checks + 1))
"$cifar" eval whole/checkpoint.safetensors 2>err && fail "a network is evaluated on images of another normalisation"
says err "normalised otherwise"
expect 5 "$cifar" train --data nowhere --out none
says err "nowhere"
checks=$((checks + 1))
[ ! -e none ] || fail "a refused training left a folder"
head -c 1000 whole/checkpoint.safetensors >torn.safetensors
expect 3 "$cifar" eval torn.safetensors
head -c 1000 whole/best.onnx >torn.onnx
expect 3 "$cifar" eval torn.onnx
expect 3 "$cifar" eval --data data by_tool.onnx
says err "by_tool.onnx: there is no tensor"
expect 5 "$cifar" eval missing.safetensors
expect 5 "$cifar" eval missing.onnx
head -c 5000 /dev/zero >data/cifar-10-batches-bin/data_batch_3.bin
expect 3 "$cifar" train --data data --out none
says err "data_batch_3.bin"

# ---- output that cannot be written
examples=$(dirname "$cifar")
for command in "$cifar --help" "$cifar train --help" "$classify --help" "$examples/complexity --help" \
  "$examples/complexity --paper $source/examples/data/complexity.csv" "$examples/contract_networks smallnet3" \
  "$examples/train --help"; do
  checks=$((checks + 2))
  $command >/dev/full 2>/dev/null
  [ $? = 5 ] || fail "$command: standard output is full"
  $command >&- 2>/dev/null
  [ $? = 5 ] || fail "$command: standard output is closed"
done
for lesson in first_steps blocks border your_memory preserving_expansion training_step toeplitz_solver own_scalar; do
  checks=$((checks + 3))
  "$examples/$lesson" >/dev/full 2>err && fail "$lesson: standard output is full"
  [ "$(cat err)" = 'standard output: not all of it could be written' ] || fail "$lesson does not say why: $(cat err)"
  "$examples/$lesson" >&- 2>/dev/null && fail "$lesson: standard output is closed"
done
for command in train drift landscape; do expect 2 "$cifar" $command --seed -1; done

echo "$checks checks, $failures failed"
[ "$failures" = 0 ]
