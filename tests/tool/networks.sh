#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The command line on whole networks that other people's code trained and contracted.
#
#     tests/tool/networks.sh BIN REFERENCE_DIR
#
# BIN is the program, REFERENCE_DIR has trained/ and imagenet/ of the large reference data; skipped (77) where it is empty.
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
. "$(dirname "$0")/expect.sh"

network="$reference/trained/cifar10-k3-cl-fc.safetensors"
expect 0 verify "$network" "$reference/imagenet/shufflenet-v2-x0-5-expand.safetensors"
says out '4 contracted layers'
says out '20 contracted layers'
expect 0 contract "$network" -o compact-network.safetensors
says out '4 expanded layers contracted, 3 batch norms folded; 314,766 -> 14,938 parameters'
expect 0 verify compact-network.safetensors
expect 0 contract compact-network.safetensors
says out '0 expanded layers contracted, 0 batch norms folded; 14,938 -> 14,938 parameters'
expect 2 contract "$network" --interior
expect 3 info "$network"
says err 'a whole network, of which info shows nothing'
expect 3 bench "$network"
says err 'type "normalize" is not linear'

finish
