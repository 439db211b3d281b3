#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The queue of the wanted trainings and the drawing of the finished ones: what is done is not done again, what does not
# end in time is not started, what was interrupted goes on.
#
#     tests/cifar/trainings.sh CIFAR
set -uo pipefail

source=$(cd "$(dirname "$0")/../.." && pwd)
if [ $# != 1 ]; then
  echo "usage: trainings.sh CIFAR" >&2
  exit 2
fi
cifar=$(realpath "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 2
failures=0 checks=0

# check TEXT COMMAND...
check() {
  checks=$((checks + 1))
  "${@:2}" && return
  failures=$((failures + 1))
  echo "FAILED: $1"
  sed 's/^/    /' out err 2>/dev/null | cut -c1-300
}
says() { grep -qE -- "$2" "$1"; }
lines() { [ "$(wc -l <"$1")" = "$2" ]; }

python3 - <<'PYTHON'
import os, random
random.seed(1)
os.makedirs("data/cifar-10-batches-bin")
for name in [f"data_batch_{b}" for b in range(1, 6)] + ["test_batch"]:
    with open(f"data/cifar-10-batches-bin/{name}.bin", "wb") as file:
        for i in range(40):
            file.write(bytes([i % 10]) + random.randbytes(3072))
PYTHON
header="training,seed,epochs,best,best_epoch,last,train_error,contracted,seconds,commit,machine"
{
  echo "$header"
  echo "cifar10-k3-compact,1,2,70,1,69,30,yes,1,abc,host"
  echo "cifar10-k7-compact,1,2,70,1,69,30,yes,100000,abc,host"
} >trainings.csv
cat >wanted.csv <<'CSV'
options,rows,seeds,minutes
--table S1 --epochs 2,cifar10-k7-compact,2,1
--table S3 --epochs 2,cifar10-k3-compact cifar10-k3-cl+fc-r4-init,2,1
CSV
mkdir figures
next() {
  timeout 300 "$source/scripts/train_next" --data data --out out-folder --cifar "$cifar" --wanted wanted.csv \
    --trainings trainings.csv --figures figures --commit def --machine other "$@" >out 2>err </dev/null
}

# ---- the queue ----------------------------------------------------------------------------------------

check "what is missing is listed" next --minutes 0 --list
check "not what is done" lines out 4
check "by the rate of its kind" says out "^ *1667 cifar10-k7-compact-e2-s2$"
check "by the guess, with what it starts from" says out "^ *2 cifar10-k3-cl\+fc-r4-init-e2-s1$"
check "no minutes" next --minutes 0
check "nothing was started" [ ! -e out-folder ]
check "the queue" next --minutes 5
check "what does not end in time is not started" [ ! -e out-folder/runs/cifar10-k7-compact-e2-s2 ]
check "three rows and what two of them started from are appended" lines trainings.csv 8
check "with seed, epochs, commit and machine" \
  says trainings.csv "^cifar10-k3-compact,2,2,[0-9.]+,[12],[0-9.]+,[0-9.]+,yes,[0-9]+,def,other$"
check "a nonlinear network is not contracted" says trainings.csv "^cifar10-k3-cl\+fc-r4-nonlinear,1,2,.*,,[0-9]+,def"
check "what is done is not done again" [ ! -e out-folder/runs/cifar10-k3-compact-e2-s1 ]
cp trainings.csv first.csv
rm -r out-folder
check "again" next --minutes 5
check "nothing was missing" cmp -s trainings.csv first.csv
head -n 3 first.csv >trainings.csv
check "side by side" next --minutes 5 --jobs 2
check "all of every line, whatever it takes" lines trainings.csv 9
check "two lines, two starts" lines out 8
rm -r out-folder
cp first.csv trainings.csv

echo "--table S3 --epochs 20000,cifar10-k3-fc-r4,1,0.001" >>wanted.csv
check "a training that is longer than thought" next --minutes 0.05
folder=out-folder/runs/cifar10-k3-fc-r4-e20000-s1
check "is interrupted" says $folder/log.csv "^1,"
check "and is not finished" lines trainings.csv 8
sed -i '$d' wanted.csv

echo "--figure S4 --kernel 3 --epochs 1,,1,1" >>wanted.csv
check "a figure" next --minutes 5
check "is kept" [ -s figures/figure-S4-cifar10-k3.svg ]
check "its trainings too" says trainings.csv "^cifar10-k3-cl-r4-decayed-product,1,1,"
check "a figure that is there" next --minutes 5 --list
check "is not wanted" lines out 1

# ---- tables -------------------------------------------------------------------------------------------

draw=("$cifar" reproduce --paper "$source/examples/data/accuracy.csv" --table S3 --epochs 2 --out drawn)
"${draw[@]}" --trainings trainings.csv --seeds 2 >out 2>err
check "a table is drawn without data" says out "SmallNet \| none \| 1 \| best test accuracy \| 2 \| 2 \|"
check "and nothing is trained" [ ! -e drawn/runs ]
"${draw[@]}" --data data --trainings trainings.csv --seeds 1 --rows 'cifar10-k3-compact,cifar10-k3-fc-r4' >out 2>err
check "one row was missing" [ "$(ls drawn/runs)" = cifar10-k3-fc-r4-e2-s1 ]
check "the other is in the table" says out "SmallNet .* 70.00 \|"

cp -r "$source/docs/results" results
check "page and picture" "$source/scripts/draw_results" --cifar "$cifar" --results results
check "the page is as it was drawn" diff -r "$source/docs/results" results

# ---- mistakes -----------------------------------------------------------------------------------------

refused() {
  next --minutes 1 "${@:2}" && return 1
  says err "$1"
}
check "no program" refused "No such file or directory: '/nowhere'" --cifar /nowhere
cp trainings.csv good.csv
echo "cut,short" >>trainings.csv
check "a damaged file" refused "^train_next: error: .*trainings.csv: line [0-9]+: expected 11 fields$"
cp good.csv trainings.csv
echo "--table S3,cifar10-k9-*,1,1" >wanted.csv
check "no header" refused "line 1: expected"
printf 'options,rows,seeds,minutes\n--table S3,cifar10-k9-*,1,1\n' >wanted.csv
check "no such row" refused "cifar refuses \"--table S3\"$"

echo "$checks checks, $failures failed"
[ "$failures" = 0 ]
