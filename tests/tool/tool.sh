#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What a user of the command line sees: results, exit codes, one-line errors, files that are whole or not there.
#
#     tests/tool/tool.sh BIN
#
# BIN is the program.
set -uo pipefail

if [ $# != 1 ]; then
  echo "usage: tool.sh BIN" >&2
  exit 2
fi
bin=$(realpath "$1")
. "$(dirname "$0")/expect.sh"

# make FILE METADATA TENSOR=SHAPE...: a safetensors file of F64 tensors of small numbers; shapes are 4,3,1,1.
# METADATA is a JSON object, or a Python expression that gives one.
make() {
  python3 - "$@" <<'PYTHON'
import json, math, struct, sys
path, metadata, *tensors = sys.argv[1:]
header, data = {"__metadata__": {k: v if isinstance(v, str) else json.dumps(v) for k, v in eval(metadata).items()}}, b""
for tensor in tensors:
    name, shape = tensor.split("=")
    shape = [int(n) for n in shape.split(",")]
    count = math.prod(shape)
    header[name] = {"dtype": "F64", "shape": shape, "data_offsets": [len(data), len(data) + 8 * count]}
    data += struct.pack(f"<{count}d", *((n % 7 - 3) / 8 for n in range(count)))
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
open(path, "wb").write(struct.pack("<Q", len(text)) + text + data)
PYTHON
}

# tensors_of FILE: dtypes, shapes and metadata on one line
tensors_of() {
  python3 -c '
import json, struct, sys
f = open(sys.argv[1], "rb")
h = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
m = h.pop("__metadata__")
print(" ".join("%s:%s%s" % (n, h[n]["dtype"], h[n]["shape"]) for n in sorted(h)), json.dumps(m, sort_keys=True))' "$1"
}

# ---- help and usage
expect 0 --help
says out 'Exit codes'
for command in contract verify bench info; do
  expect 0 "$command" --help
  says out 's2p1g4'
done
expect 2
expect 2 nonsense
expect 2 contract
expect 2 contract --no-such-option x
expect 2 verify

# ---- verify and contract
expect 5 verify no-such-file.safetensors
says err 'no-such-file'
mkdir empty
expect 5 verify empty
make linear.safetensors "{'chain': {'kind': 'chain', 'layers': [{'name': 'a', 'type': 'linear'}]}}" a.weight=4,3
expect 0 contract linear.safetensors
says out 'nothing written'
cp linear.safetensors own.safetensors
expect 2 contract own.safetensors -o own.safetensors
checks=$((checks + 1))
cmp -s linear.safetensors own.safetensors || fail "the input was overwritten"
for dtype in F64 F32 F16 BF16; do
  expect 0 contract linear.safetensors --dtype $dtype -o typed.safetensors
  checks=$((checks + 1))
  [[ "$(tensors_of typed.safetensors)" = *"weight:$dtype["* ]] || fail "--dtype $dtype: $(tensors_of typed.safetensors)"
  expect 0 verify typed.safetensors
done
expect 2 contract linear.safetensors --dtype F8

# ---- refusals at the border
inexact=inexact.safetensors odd=odd.safetensors
make $inexact "{'chain': {'kind': 'chain', 'layers': [{'name': 'a', 'padding': 1}, {'name': 'b', 'padding': 1}]}}" \
  a.weight=4,2,3,3 b.weight=3,4,3,3
make $odd "{'chain': {'kind': 'chain', 'layers': [{'name': 'a', 'padding': 1}, {'name': 'b', 'stride': 2, 'padding': 0, 'padding_end': 1}]}}" \
  a.weight=4,2,3,3 a.bias=4 b.weight=3,4,3,3
expect 4 contract "$inexact" -o refused.safetensors
says err 'layer 2'
says err '--interior'
says err '--input-size'
expect 4 contract "$inexact" --input-size 7,7 -o refused.safetensors
says err '--interior'
expect 4 contract "$odd" -o refused.safetensors
expect 4 contract "$odd" --input-size 8,8 -o refused.safetensors
expect 0 contract "$odd" --input-size 9
expect 0 contract "$odd" --input-size 9x7
says out 'exact at input size 9x7'
for size in 9,9,9 0,7 -3,7 9,x 9, ' '; do
  expect 2 contract "$odd" --input-size "$size"
done
expect 2 contract "$odd" --input-size 7 --interior
expect 2 contract linear.safetensors --input-size 7
expect 3 contract "$odd" --input-size 1,1
checks=$((checks + 1))
[ -e refused.safetensors ] && fail "a refused contraction was written"

# ---- nothing half-written
echo precious >kept.safetensors
expect 4 contract "$inexact" -o kept.safetensors
expect 5 contract "$odd" --interior -o no/such/folder/out.safetensors
expect 5 contract "$odd" --interior -o empty
mkdir full && (ulimit -f 0; trap '' XFSZ; "$bin" contract "$odd" --interior -o full/out.safetensors) >out 2>err
checks=$((checks + 1))
[ "$(cat kept.safetensors)" = precious ] || fail "a file was lost"
[ -z "$(ls -A full)" ] || fail "half-written: $(ls -A full)"
[ -z "$(find . -name '*.tmp')" ] || fail "left behind: $(find . -name '*.tmp')"

# ---- files without metadata: --chain
make plain.safetensors '{}' a.weight=4,3,1,1 a.bias=4 b.weight=6,2,3,3 c.x.weight=5,6,1,1
expect 3 contract plain.safetensors
says err '--chain'
expect 0 contract plain.safetensors --chain 'a:p1,b:s2g2,c.x'
says out 'conv2d 3->5 @3x3 s2x2 p1x1 +bias, exact'
expect 0 contract plain.safetensors --chain 'a:p1x2e0,b:s2x1d1x2g2' -o chained.safetensors
says out 'conv2d 3->6 @3x3 s2x1 p1x2:0x0 d1x2 +bias'
expect 0 contract chained.safetensors
says out 'conv2d 3->6 @3x3 s2x1 p1x2:0x0 d1x2 +bias'
expect 0 contract plain.safetensors --chain 'a:p-1,b:g2'
expect 0 verify plain.safetensors --chain 'a:p1,b:s2g2,c.x'
expect 0 info plain.safetensors --chain 'a:p1,b:s2g2,c.x'
for grammar in ',a' 'a,' 'a:' 'a:q1' 'a:s' 'a:sx' 'a:s1x' 'a:s1s2' 'a:g1x2' 'a:g0' 'a:g-1' 'a:s2y' 'a:s99999999999999999999' ':s1'; do
  expect 2 contract plain.safetensors --chain "$grammar"
done
for grammar in 'a,nothing' 'a,c.x' 'a:s0' 'a:d0' 'a:s1x1x1' 'a,b' 'a:g3'; do
  expect 3 contract plain.safetensors --chain "$grammar"
done
expect 4 contract plain.safetensors --chain 'a,b:p1g2'

# ---- metadata that nobody should write
chain() { # chain LAYERS [MORE]: a file whose chain has these layers, as Python expressions
  make bad.safetensors "{'chain': {'kind': 'chain', 'layers': [$1], ${2:-}}}" a.weight=4,3,1,1 b.weight=6,4,3,3 \
    c.weight=2,6,3,3 v.weight=4,3,5 e.weight=4,0,1,1 r.weight=1,1,1,1,1,1,1 a.bias=4 wrong.weight=2,2 wrong.bias=3
}
refused() { # refused TEXT
  for command in contract verify info bench; do
    expect 3 "$command" bad.safetensors
    says err "$1"
  done
}
chain "{'name': 'a'}, {'name': 'b'}"
expect 0 contract bad.safetensors
chain "{'kind': 'chain', 'layers': [{'name': 'a', 'padding': 1}, {'kind': 'chain', 'layers': []}, {'name': 'b'}]}"
expect 0 verify bad.safetensors
chain "{'kind': 'sum', 'branches': []}";                  refused 'needs at least one branch'
chain "{'type': 'batch_norm', 'name': 'a', 'eps': 0}";    refused '"a.running_mean"'
chain "{'type': 'dropout', 'name': 'a'}";                 refused 'channel_shuffle'
chain "";                                                 refused 'no layers'
chain "7";                                                refused 'found 7, expected an object'
chain "{'type': 'conv'}";                                 refused 'no name'
chain "{'name': 7}";                                      refused 'expected a string'
chain "{'name': 'nothing'}";                              refused '"nothing.weight"'
chain "{'name': 'a', 'stride': 'x'}";                     refused 'expected an integer'
chain "{'name': 'a', 'stride': 1.5}";                     refused 'expected an integer'
chain "{'name': 'a', 'stride': [1, [2]]}";                refused 'expected an integer'
chain "{'name': 'a', 'stride': [1, 1, 1]}";               refused '2 spatial axes'
chain "{'name': 'a', 'stride': [0, 1]}";                  refused 'expected at least 1'
chain "{'name': 'a', 'dilation': -1}";                    refused 'expected at least 1'
chain "{'name': 'a', 'groups': 0}";                       refused 'groups start at 1'
chain "{'name': 'a', 'groups': 3}";                       refused 'groups must divide'
chain "{'name': 'a', 'groups': 2**40}";                   refused 'groups must divide'
chain "{'name': 'a', 'stride': 2**64}";                   refused 'at most 2^40'
chain "{'name': 'a', 'strides': 2}";                      refused 'field "strides"'
chain "{'name': 'a', 'type': 'linear'}";                  refused '[out, in]'
chain "{'name': 'v'}, {'name': 'b'}";                     refused 'spatial axes'
chain "{'name': 'e'}";                                    refused 'channel'
chain "{'name': 'r'}";                                    refused '7 axes'
chain "{'name': 'wrong'}";                                refused 'bias'
chain "{'name': 'b'}, {'name': 'a'}";                     refused 'reads 3 channels'
chain "{'name': 'b', 'stride': 2**40}, {'name': 'c'}";    refused 'overflows'
chain "{'name': 'b', 'stride': 2**20}, {'name': 'c'}";    expect 3 contract bad.safetensors
chain "{'name': 'a', 'stride': 2**31}, {'name': 'b'}";    expect 3 verify bad.safetensors
chain "{'name': 'a', 'padding': 2**40}, {'name': 'b', 'padding': 2**40}"; expect 3 contract bad.safetensors
chain "{'name': 'a', 'padding': 2**40}, {'name': 'b'}";   expect 3 verify bad.safetensors
chain "{'name': 'a', 'padding': -2**40}, {'name': 'b', 'padding': 2**40}"; expect 3 verify bad.safetensors
chain "{'name': 'a', 'padding': -2**63}, {'name': 'b', 'padding': 1}"; refused 'at most 2^40'
chain "{'name': 'a', 'padding': 10**9}, {'name': 'b'}";   expect 3 verify bad.safetensors
chain "*[{'name': 'a'}] * 300";                           refused 'more than 256 layers'
chain "{'name': 'a'}" "'exact': 'maybe'";                 refused 'found "maybe"'
chain "{'name': 'a'}" "'exact': 'interior'";              expect 1 verify bad.safetensors
chain "{'name': 'a'}" "'expected': 'nothing'";            expect 3 verify bad.safetensors
chain "{'name': 'a'}" "'expected': 'a'";                  expect 0 verify bad.safetensors
chain "{'name': 'a'}" "'expected': 'b'";                  expect 1 verify bad.safetensors
chain "{'name': 'a'}" "'expected': 'a', 'expected_geometry': {'stride': [2, 1]}"; expect 1 verify bad.safetensors
chain "{'kind': 'chain', 'layers': [{'name': 'a'}, {'name': 'b', 'padding': 1}], 'expected': 'b'}, {'type': 'relu'}"
expect 4 contract bad.safetensors
says err 'pad its first layer instead'
make bad.safetensors "{'chain': '[' * 100000}" a.weight=4,3,1,1;              refused 'not valid JSON'
make bad.safetensors "{'chain': '[' * 100000 + ']' * 100000}" a.weight=4,3,1,1; refused 'found a list'
make bad.safetensors "{'chain': '{\"kind\":\"chain\",\"layers\":[' * 10000 + ']}' * 10000}" a.weight=4,3,1,1
refused 'nested more than 32'
make bad.safetensors "{'conv': 'null'}" weight=4,3,1,1;                       refused 'expected an object'
make bad.safetensors "{'conv': '{\"padding_mode\": 1}'}" weight=4,3,1,1;      refused 'padding_mode'
make bad.safetensors "{'conv': '{}'}" other=4,3,1,1;                          refused '"weight"'
make bad.safetensors "{'conv': '{}'}" weight=4,3,1,1 input=2,5,4,4 output=2,4,4,4; expect 3 verify bad.safetensors
make bad.safetensors "{'conv': '{}'}" weight=4,3,1,1 input=2,3,4,4 output=2,4,4,5; expect 3 verify bad.safetensors
make bad.safetensors "{'conv': '{}'}" weight=4,3,1,1 input=3,4,4 output=3,4,4;     expect 3 verify bad.safetensors
printf 'not a safetensors file at all' >bad.safetensors
refused 'bad.safetensors'

# ---- bench and info
expect 0 info $odd --input-size 9
says out 'multiply-adds on an input of'
expect 0 info --json $odd --input-size 32
is_json
expect 0 bench $odd
says out 'GEMM peak'
expect 0 bench --json $odd linear.safetensors
is_json

# ---- the paper's networks
expect 0 networks
says out 'ShuffleNetV2 0.5x'
expect 0 networks --json
is_json
expect 0 info --network mobilenet --expand cl --rate 4 --stride last
says out '1,764,775,568'
expect 0 info --network mobilenet --expand cl --json
is_json
expect 0 info --network smallnet7 --expand ck --layers conv2,conv3
says out 'conv3.2'
expect 2 info --network vgg
says err 'smallnet7, smallnet3, mobilenet'
expect 2 info --network mobilenet --expand ck
says err 'it has layers for cl, fc'
expect 2 info --network smallnet7 --expand ck --stride last
for rate in 0 -1 nan 1e300; do
  expect 2 info --network unet --expand cl --rate "$rate"
  says err 'rate'
done
expect 2 info --network mobilenet --rate 3
expect 2 info
expect 0 expand --network smallnet7 --expand cl+fc --seed 2 -o wide.safetensors
expect 0 verify wide.safetensors
says out '4 contracted layers'
expect 0 contract wide.safetensors -o compact.safetensors
says out '66,074 parameters'
expect 0 verify compact.safetensors
expect 3 info wide.safetensors
says err 'a whole network'
expect 5 expand --network smallnet7 -o no/such/folder/wide.safetensors

finish
