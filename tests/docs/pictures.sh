#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The pictures of the documentation are what their scripts draw. Exits with 77 where there is no Graphviz.
#
#     tests/docs/pictures.sh CONCERTINA PYTHON
set -euo pipefail

[ $# = 2 ] || { echo "usage: pictures.sh CONCERTINA PYTHON" >&2; exit 2; }
command -v dot >/dev/null || { echo "skipped: there is no dot"; exit 77; }
source=$(cd "$(dirname "$0")/../.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cp -r "$source/docs/results/figures" "$scratch/results"
mkdir "$scratch/figures"
cd "$scratch/figures"

"$source/scripts/draw_concepts" .
"$1" contract "$source/examples/data/models/repvgg.onnx" -o ../contracted.onnx >/dev/null
"$2" -B "$source/scripts/draw_models" "$source/examples/data/models/repvgg.onnx" ../contracted.onnx -o repvgg.svg
diff -r . "$source/docs/figures"

cd ../results
rm -f figure-*.svg figure-*.png
for figure in *.gp; do gnuplot "$figure"; done
diff -r --exclude '*.png' . "$source/docs/results/figures"  # a PNG has its machine's fonts
