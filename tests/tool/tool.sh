#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# What a user of the command line sees: results, exit codes, one-line errors, files that are whole or not there.
#
#     tests/tool/tool.sh BIN DATA_DIR REFERENCE_DIR
#
# BIN is the program, DATA_DIR is examples/data, REFERENCE_DIR is tests/reference.
set -uo pipefail

if [ $# != 3 ]; then
  echo "usage: tool.sh BIN DATA_DIR REFERENCE_DIR" >&2
  exit 2
fi
bin=$(realpath "$1") data=$(realpath "$2") reference=$(realpath "$3")
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

# ---- verify
expect 0 verify "$data/chains"
says out '10 of 10 files verified'
says out 'agrees with F '
says out 'interior at 7x7'
says out 'exact at 7x7'
expect 0 verify --json "$data/chains"
is_json
expect 0 verify "$reference"/listing-*.safetensors "$reference/chains" "$reference/inexact"
says out '43 of 43 files verified'
expect 0 verify "$reference/blocks"
says out '34 of 34 files verified'
expect 5 verify no-such-file.safetensors
says err 'no-such-file'
mkdir empty
expect 5 verify empty

# A wrong number must be found: the last byte but one of a float changed in each tensor in turn.
for name in F2.weight F.weight output input; do
  python3 - "$data/chains/cl-1-3-1.safetensors" "$name" <<'PYTHON'
import json, struct, sys
data = bytearray(open(sys.argv[1], "rb").read())
n = struct.unpack("<Q", data[:8])[0]
at = 8 + n + json.loads(data[8:8 + n])[sys.argv[2]]["data_offsets"][0]
data[at + 2] ^= 0x10
open("wrong.safetensors", "wb").write(data)
PYTHON
  expect 1 verify wrong.safetensors
  says out FAIL
done
expect 1 verify --json wrong.safetensors
is_json

# A number that is none is found before it spreads: the first of a tensor becomes NaN or infinite.
for name in F2.weight F.weight; do
  for bits in 0x7fc00000 0xff800000; do
    python3 - "$data/chains/cl-1-3-1.safetensors" "$name" $bits <<'PYTHON'
import json, struct, sys
data = bytearray(open(sys.argv[1], "rb").read())
n = struct.unpack("<Q", data[:8])[0]
tensor = json.loads(data[8:8 + n])[sys.argv[2]]
assert tensor["dtype"] == "F32"
at = 8 + n + tensor["data_offsets"][0]
data[at:at + 4] = struct.pack("<I", int(sys.argv[3], 16))
open("nan.safetensors", "wb").write(data)
PYTHON
    expect 3 verify nan.safetensors
    says err "nan.safetensors: layer \"${name%.weight}\": tensor \"$name\" is not finite, element 0 is"
  done
done

# An expected layer may be stored in 16 bits, coarser than the layers; then half an ulp of those is
# allowed in addition, and no more.
# store CHAIN LAYERS DTYPE ULPS: its layers as LAYERS (F32 or F64), what is expected as DTYPE, the
# first weight off by so many ulps
store() {
  python3 - "$data/chains/$1.safetensors" "${@:2}" <<'PYTHON'
import json, math, struct, sys
path, layers, dtype, ulps = *sys.argv[1:4], int(sys.argv[4])
data = open(path, "rb").read()
n = struct.unpack("<Q", data[:8])[0]
header, data = json.loads(data[8:8 + n]), data[8 + n:]
def stored(f):
    if dtype == "F16":
        return struct.unpack("<H", struct.pack("<e", f))[0]
    bits = struct.unpack("<I", struct.pack("<f", f))[0]
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16
out = b""
for name, tensor in header.items():
    if name == "__metadata__":
        continue
    begin, end = tensor["data_offsets"]
    piece = data[begin:end]
    numbers = struct.unpack(f"<{math.prod(tensor['shape'])}f", piece)
    if name.startswith("F."):
        bits = [stored(f) for f in numbers]
        bits[0] += ulps if name == "F.weight" else 0
        piece, tensor["dtype"] = struct.pack(f"<{len(bits)}H", *bits), dtype
    elif name.startswith("F") and layers == "F64":
        piece, tensor["dtype"] = struct.pack(f"<{len(numbers)}d", *numbers), layers
    tensor["data_offsets"] = [len(out), len(out) + len(piece)]
    out += piece
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
open("stored.safetensors", "wb").write(struct.pack("<Q", len(text)) + text + out)
PYTHON
}
for chain in cl-1-3-1 linear; do
  for dtypes in 'F32 F16' 'F32 BF16' 'F64 BF16'; do
    store $chain $dtypes 0
    expect 0 verify stored.safetensors
    says out 'agrees with F '
    for ulps in 1 -1; do
      store $chain $dtypes $ulps
      expect 1 verify stored.safetensors
      says out 'F FAILS'
    done
  done
done
expect 1 verify "$data/chains/linear.safetensors" wrong.safetensors no-such-file.safetensors 2>/dev/null
says out '1 of 3 files verified'

# ---- contract, and its own output as input
for file in "$data"/chains/*.safetensors; do
  name=$(basename "$file" .safetensors)
  leave=()
  case $name in
    inexact-*) leave=(--interior) ;;
    exact-at-*) leave=(--input-size 7,7) ;;
  esac
  expect 0 contract "$file" -o "$name.safetensors" "${leave[@]}"
  expect 0 contract --json "$file" "${leave[@]}"
  is_json
  expect 0 verify "$name.safetensors"
  expect 0 contract "$name.safetensors" -o again.safetensors
  checks=$((checks + 1))
  cmp -s "$name.safetensors" again.safetensors || fail "$name: contracting the contraction changed it"
done
checks=$((checks + 1))
[ "$(tensors_of 1d-padding-end.safetensors)" = 'bias:F64[3] weight:F64[3, 2, 6] {"conv": "{\"dilation\":[1],\"groups\":1,\"padding\":[1],\"padding_end\":[2],\"stride\":[3]}"}' ] ||
  fail "1d-padding-end: $(tensors_of 1d-padding-end.safetensors)"
checks=$((checks + 1))
[ "$(tensors_of depthwise-cl.safetensors)" = 'weight:F64[4, 1, 3, 3] {"conv": "{\"dilation\":[1,1],\"groups\":4,\"padding\":[1,1],\"stride\":[1,1]}"}' ] ||
  fail "depthwise-cl: $(tensors_of depthwise-cl.safetensors)"
for dtype in F64 F32 F16 BF16; do
  expect 0 contract "$data/chains/cl-1-3-1-bf16.safetensors" --dtype $dtype -o typed.safetensors
  checks=$((checks + 1))
  [[ "$(tensors_of typed.safetensors)" = *"weight:$dtype["* ]] || fail "--dtype $dtype: $(tensors_of typed.safetensors)"
  expect 0 verify typed.safetensors
done
checks=$((checks + 1))
[[ "$(tensors_of cl-1-3-1-bf16.safetensors)" = *"weight:F32["* ]] || fail "BF16 gives F32 by default"
expect 2 contract "$data/chains/linear.safetensors" --dtype F8
expect 0 contract "$data/chains/linear.safetensors"
says out 'nothing written'
cp "$data/chains/linear.safetensors" own.safetensors
expect 2 contract own.safetensors -o own.safetensors
checks=$((checks + 1))
cmp -s "$data/chains/linear.safetensors" own.safetensors || fail "the input was overwritten"

# ---- refusals at the border
inexact=$data/chains/inexact-padded-twice.safetensors odd=$data/chains/exact-at-odd-sizes.safetensors
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
expect 2 contract "$data/chains/linear.safetensors" --input-size 7
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
expect 0 info "$data/chains"/*.safetensors
says out 'multiply-adds on an input of 6x5'
expect 0 info --json "$data/chains/cl-1-3-1.safetensors" --input-size 32
is_json
expect 0 bench "$data/chains/cl-1-3-1.safetensors"
says out 'GEMM peak'
expect 0 bench --json "$data/chains/depthwise-cl.safetensors" "$data/chains/linear.safetensors"
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
