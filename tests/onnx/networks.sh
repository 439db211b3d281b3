#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The command line on whole networks that other people's code trained and contracted.
#
#     tests/onnx/networks.sh BIN REFERENCE_DIR
#
# BIN is the program, REFERENCE_DIR has trained/ and imagenet/ of the large reference data; skipped (77) where it is
# empty.
set -uo pipefail

if [ $# != 2 ]; then
  echo "usage: networks.sh BIN REFERENCE_DIR" >&2
  exit 2
fi
if [ -z "$2" ]; then
  echo "skipped: CONCERTINA_REFERENCE is empty"
  exit 77
fi
bin=$(realpath "$1") reference=$(realpath "$2")
. "$(dirname "$0")/../tool/expect.sh"

# contracted NAME PARAMETERS REGIONS PUBLISHED: regions contracted and proved, by the program and by the source
contracted() {
  local network="$reference/$1"
  expect 0 contract "$network/model.onnx" -o contracted.onnx --verify
  says out "parameters $2 "
  says out "proved: $3 of $3 regions that differ"
  says out 'stored output_0.pb'
  expect 0 verify "$network/model.onnx" contracted.onnx
  expect 0 contract contracted.onnx
  checks=$((checks + 1))
  grep -qE 'parameters .* \(0.0%\); multiply-adds .* \(0.0%\)' out || fail "$1: the contraction is contracted again"
  expect 0 verify "$network/model.onnx" "$network/expected.onnx"
  says out "proved: $4 of $4 regions that differ"
}
contracted trained/cifar10-k3-cl-fc '314,773 -> 14,938' 4 4
contracted trained/cifar10-k7-ck-fc '1.7 M -> 65,585' 5 4
contracted trained/cifar10-k7-cl-fc '2.1 M -> 66,077' 4 4
contracted imagenet/mobilenetv1-expand '5.0 M -> 4.2 M' 27 14
contracted imagenet/mobilenetv2-expand '3.7 M -> 3.5 M' 50 5
contracted imagenet/shufflenet-v2-x0-5-expand '1.5 M -> 1.4 M' 56 20

finish
