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
bin=$(realpath "$1") here=$(realpath "$(dirname "$0")")
. "$(dirname "$0")/expect.sh"

# make FILE CHAIN TENSOR=SHAPE[:DTYPE]...: a safetensors file of small numbers; shapes are 4,3,1,1, dtypes F64 if not
# said. CHAIN is its metadata chain; - for none.
make() {
  python3 - "$@" <<'PYTHON'
import json, math, os, struct, sys
path, chain, *tensors = sys.argv[1:]
def bf16(f):
    return struct.pack("<H", struct.unpack("<I", struct.pack("<f", f))[0] >> 16)
pack = {"F64": lambda f: struct.pack("<d", f), "F32": lambda f: struct.pack("<f", f),
        "F16": lambda f: struct.pack("<e", f), "BF16": bf16, "I32": lambda f: struct.pack("<i", round(8 * f))}
header, data = {} if chain == "-" else {"__metadata__": {"chain": chain}}, b""
for i, tensor in enumerate(tensors):
    name, shape = tensor.split("=")
    shape, dtype = shape.split(":") if ":" in shape else (shape, "F64")
    shape = [int(n) for n in shape.split(",")]
    scale = float(os.environ.get("SCALE", 1)) / 8
    numbers = [((5 * n + i) % 7 - 3) * scale for n in range(math.prod(shape))]
    if name.endswith("running_var"):
        numbers = [abs(n) + 0.5 for n in numbers]
    piece = b"".join(map(pack[dtype], numbers))
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(piece)]}
    data += piece
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

# is FILE TEXT: what tensors_of prints of it
is() {
  checks=$((checks + 1))
  [ "$(tensors_of "$1")" = "$2" ] || fail "$1: $(tensors_of "$1")"
}

# contracts FILE RESULT OPTIONS...: to layer.safetensors, which is RESULT as tensors_of prints it; proved, read again,
# and the same again
contracts() {
  local file=$1 result=$2
  shift 2
  rm -f layer.safetensors
  expect 0 contract "$file" --verify -o layer.safetensors "$@"
  says out 'wrote layer.safetensors'
  is layer.safetensors "$result"
  expect 0 contract layer.safetensors -o again.safetensors
  checks=$((checks + 1))
  cmp -s layer.safetensors again.safetensors || fail "$file: contracting the contraction changed it"
  expect 0 contract "$file" --verify -o model.onnx "$@"
  is_json_of contract "$file" -o model.onnx "$@"
}
is_json_of() {
  expect 0 "$1" --json "${@:2}"
  is_json
}

# ---- help and usage
expect 0 --help
says out 'Exit codes'
expect 0 --version
says out 'concertina '
for command in contract verify info; do
  expect 0 "$command" --help
  says out 's2p1g4'
done
expect 2
expect 2 nonsense
expect 2 contract
expect 2 contract --no-such-option x
expect 2 verify
expect 2 verify one
expect 0 --completion
says out 'everywhere size interior'
checks=$((checks + 1))
bash -n out || fail "the completion is not bash"
# completed WORD...: what bash offers for the last word
completed() {
  bash -c '. ./out; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); compopt() { :; }; _concertina; echo "${COMPREPLY[*]}"' \
    bash concertina "$@"
}
checks=$((checks + 4))
[ "$(completed cont)" = contract ] || fail "completed: $(completed cont)"
[ "$(completed contract x --bo)" = --border ] || fail "completed: $(completed contract x --bo)"
[ "$(completed info --border s)" = size ] || fail "completed: $(completed info --border s)"
[ "$(completed info ou)" = out ] || fail "completed: $(completed info ou)"
expect 0 --man
checks=$((checks + 1))
cp out page.1
if command -v man >/dev/null; then
  warnings=$(LC_ALL=C.UTF-8 MANROFFSEQ='' man --warnings -E UTF-8 -l -Tutf8 -Z ./page.1 2>&1 >/dev/null)
  [ -z "$warnings" ] || fail "the man page: $warnings"
fi

# ---- chains that contract to one layer
make cl.safetensors 'a:p1,b,c' a.weight=8,3,1,1:F32 a.bias=8:F32 b.weight=8,8,3,3:F32 c.weight=4,8,1,1:F32 c.bias=4:F32
contracts cl.safetensors 'bias:F32[4] weight:F32[4, 3, 3, 3] {"chain": ":p1"}'
expect 0 contract cl.safetensors
says out 'conv2d 3->4 @3x3 p1x1 +bias'
says out 'nothing written'
expect 0 info cl.safetensors
says out 'conv2d 3->4 @3x3 p1x1 +bias'
is_json_of info cl.safetensors
# pictures FILE COUNT OPTIONS...: info prints a picture of so many taps, which is XML
pictures() {
  expect 0 info "$1" --svg "${@:3}"
  checks=$((checks + 1))
  [ "$(python3 -c 'import xml.dom.minidom as m; print(len(m.parse("out").getElementsByTagName("rect")))')" = "$2" ] ||
    fail "a picture of $1"
}
pictures cl.safetensors 20  # 1x1, 3x3, 1x1, and the 3x3 that they are
says out '>conv2d 8-&gt;8<'
expect 2 info cl.safetensors --svg --json
expect 2 info --network smallnet3 --svg
make single.safetensors a a.weight=4,3,3,3
expect 2 info single.safetensors --svg
make wide.safetensors a,b a.weight=1,1,200,200 b.weight=1,1,1,1
expect 2 info wide.safetensors --svg
says err '80,001 taps'
make solid.safetensors a,b a.weight=2,1,2,3,4 b.weight=2,2,1,1,1
pictures solid.safetensors 49
expect 0 expand --network smallnet3 --expand cl -o expanded.onnx
python3 -c 'data = open("expanded.onnx", "rb").read()
open("hostile.onnx", "wb").write(data.replace(b"conv1", b"c<&n]"))'
pictures hostile.onnx 63
says out 'c&lt;&amp;n]'
make ends.safetensors 'a:p1e2,b:s3' a.weight=4,2,2 b.weight=3,4,5 b.bias=3
contracts ends.safetensors 'bias:F64[3] weight:F64[3, 2, 6] {"chain": ":s3p1e2"}'
make depthwise.safetensors 'a:p1g4,b:g4,c:g4' a.weight=8,1,1,1 b.weight=8,2,3,3 c.weight=4,2,1,1
contracts depthwise.safetensors 'weight:F64[4, 1, 3, 3] {"chain": ":p1g4"}'
make grouped.safetensors 'a:p2d2g2,b:s2x1g3' a.weight=6,2,3,3 b.weight=6,2,2,3
contracts grouped.safetensors 'weight:F64[6, 4, 6, 7] {"chain": ":s2x1p2"}'
make volume.safetensors 'a:p1,b:s1x2x1' a.weight=3,2,1,3,3:F32 b.weight=2,3,3,1,1:F32
contracts volume.safetensors 'weight:F32[2, 2, 3, 3, 3] {"chain": ":s1x2x1p1"}'
make linear.safetensors 'a,n,b' a.weight=6,5:F32 a.bias=6:F32 b.weight=2,6:F32 \
  n.weight=6:F32 n.bias=6:F32 n.running_mean=6:F32 n.running_var=6:F32
contracts linear.safetensors 'bias:F32[2] weight:F32[2, 5] {"chain": ""}'
says out '"linear.safetensors"'
make crop.safetensors 'a:p-1,b' a.weight=4,3,3,3 b.weight=2,4,1,1 b.bias=2
contracts crop.safetensors 'bias:F64[2] weight:F64[2, 3, 3, 3] {"chain": ":p-1"}'
make crop.safetensors 'a:p1x-1e2x0,b' a.weight=4,3,3,3 b.weight=2,4,1,1
contracts crop.safetensors 'weight:F64[2, 3, 3, 3] {"chain": ":p1x-1e2x0"}'
make crop.safetensors 'a:p1,b:p-1' a.weight=4,3,3,3 b.weight=2,4,3,3
contracts crop.safetensors 'weight:F64[2, 3, 5, 5] {"chain": ""}'
make norms.safetensors 'a:p1,n:eps1e-3,s,m' a.weight=4,3,3,3:F32 n.running_mean=4:F32 n.running_var=4:F32 \
  s.weight=4:F32 s.bias=4:F32 m.weight=4:F32 m.bias=4:F32 m.running_mean=4:F32 m.running_var=4:F32
contracts norms.safetensors 'bias:F32[4] weight:F32[4, 3, 3, 3] {"chain": ":p1"}'
make norms.safetensors 'n,a' a.weight=4,3,3 n.running_mean=3 n.running_var=3
contracts norms.safetensors 'bias:F64[4] weight:F64[4, 3, 3] {"chain": ""}'
make pool.safetensors 'a,avg_pool:k2' a.weight=4,3,3,3
contracts pool.safetensors 'weight:F64[4, 3, 4, 4] {"chain": ":s2"}'
make pool.safetensors 'avg_pool:k3x1s2x1p1x0,a' a.weight=4,3,2,2
contracts pool.safetensors 'weight:F64[4, 3, 5, 2] {"chain": ":s2x1p1x0"}'
make single.safetensors - weight=4,3,3,3 bias=4
contracts single.safetensors 'bias:F64[4] weight:F64[4, 3, 3, 3] {"chain": ":s2p1"}' --chain :s2p1
contracts single.safetensors 'bias:F64[4] weight:F64[4, 3, 3, 3] {"chain": ""}' --chain ''
# What is proved is what is written: halves of 1e-7 hold next to nothing, those of the same layers larger do.
for dtype in F16 BF16 F32; do
  SCALE=0.7 make scaled.safetensors 'a:p1,b,n' a.weight=8,3,3,3:F32 b.weight=4,8,1,1:F32 n.running_mean=4:F32 \
    n.running_var=4:F32
  rm -f layer.safetensors
  expect 0 contract scaled.safetensors --dtype $dtype -o layer.safetensors --verify --json
  is_json
  expect 0 verify scaled.safetensors layer.safetensors
  expect 0 contract scaled.safetensors --dtype $dtype -o layer.onnx --verify
done
SCALE=2e-4 make scaled.safetensors 'a:p1,b' a.weight=8,3,3,3 b.weight=4,8,1,1
rm -f layer.safetensors
expect 6 contract scaled.safetensors --dtype F16 -o layer.safetensors --verify
says out 'not proved'
checks=$((checks + 1))
[ ! -e layer.safetensors ] || fail "what could not be proved was written"
expect 0 contract scaled.safetensors --dtype F32 -o layer.safetensors --verify
# A norm that stays is rounded number by number, which is not wrong, and not proved.
SCALE=0.9 make norm.safetensors n n.weight=16 n.bias=16 n.running_mean=16 n.running_var=16
expect 6 contract norm.safetensors --dtype BF16 -o norm.onnx --verify
says out 'not proved'
make twice.safetensors 'a,a' a.weight=3,3,3 a.bias=3
contracts twice.safetensors 'bias:F64[3] weight:F64[3, 3, 5] {"chain": ""}'
make norm.safetensors 'n' n.running_mean=4 n.running_var=4 n.weight=4
contracts norm.safetensors 'bias:F64[4] weight:F64[4, 1, 1, 1] {"chain": ":g4"}'
contracts norm.safetensors 'bias:F64[4] weight:F64[4, 1, 1] {"chain": ":g4"}' --input input=1x4x9
make factor.safetensors 's' s.weight=4:F32 s.bias=4:F32
contracts factor.safetensors 'bias:F32[4] weight:F32[4, 1, 1, 1] {"chain": ":g4"}'

# ---- dtypes
make half.safetensors 'a,b' a.weight=4,3,1,1:F16 b.weight=2,4,3,3:BF16
contracts half.safetensors 'weight:F32[2, 3, 3, 3] {"chain": ""}'
for dtype in F32 F16 BF16; do
  expect 0 contract half.safetensors --dtype $dtype -o layer.safetensors
  is layer.safetensors "weight:$dtype[2, 3, 3, 3] {\"chain\": \"\"}"
  expect 0 contract layer.safetensors --dtype $dtype -o again.safetensors
  checks=$((checks + 1))
  cmp -s layer.safetensors again.safetensors || fail "$dtype: contracting the contraction changed it"
  expect 0 contract half.safetensors --dtype $dtype -o model.onnx
  expect 0 contract model.onnx -o again.safetensors
  checks=$((checks + 1))
  cmp -s layer.safetensors again.safetensors || fail "$dtype: the model has another layer"
done
make mixed.safetensors 'a,b' a.weight=4,3,1,1:F16 b.weight=2,4,3,3:F64
contracts mixed.safetensors 'weight:F64[2, 3, 3, 3] {"chain": ""}'
contracts mixed.safetensors 'weight:F32[2, 3, 3, 3] {"chain": ""}' --dtype F32
expect 2 contract cl.safetensors --dtype F8
make integers.safetensors 'a' a.weight=4,3,1,1:I32
expect 3 contract integers.safetensors
says err 'F64, F32, F16 and BF16'

# ---- a layer's file beside a model of other names
expect 0 contract cl.safetensors -o layer.safetensors
expect 0 contract cl.safetensors -o model.onnx
python3 -c 'import sys; data = open(sys.argv[1], "rb").read()
open(sys.argv[2], "wb").write(data.replace(b"input", b"image").replace(b"output", b"logits"))' model.onnx named.onnx
expect 0 verify named.onnx layer.safetensors
says out 'proved: 0 of 0'
expect 0 verify layer.safetensors named.onnx
expect 0 verify cl.safetensors named.onnx
says out 'proved: 1 of 1'
make other.safetensors - weight=4,3,3,3:F32 bias=4:F32
expect 1 verify named.onnx other.safetensors --chain :p1

# ---- verify
expect 0 contract cl.safetensors -o layer.safetensors
expect 0 contract cl.safetensors -o model.onnx
for result in layer.safetensors model.onnx cl.safetensors; do
  expect 0 verify cl.safetensors "$result"
done
is_json_of verify cl.safetensors layer.safetensors
expect 0 verify model.onnx layer.safetensors
expect 0 verify cl.safetensors layer.safetensors --input input=1x3x8x8
says out 'run on random input'
# A sample of rows is named, and what it may miss; without the option there is none.
if grep -q sampled out; then fail "a sample that nobody asked for"; fi
says out 'proved: 1 of 1 region that differ; '
expect 0 verify cl.safetensors layer.safetensors --sample 4
says out 'structure: holds for'
says out 'sampled 4 of'
says out 'rows: were a share of 0.968 of them wrong, that is missed with probability at most 1e-06'
says out 'proved: 1 of 1 region that differ, 1 not by all proofs in full'
expect 0 verify cl.safetensors layer.safetensors --sample 4 --json
checks=$((checks + 1))
python3 -c '
import json
proofs = json.load(open("out"))["regions"][0]["proofs"]
assert [proof["sampled"]["rows"] for proof in proofs if "sampled" in proof] == [4]
assert all(proof["sampled"]["of"] > 4 for proof in proofs if "sampled" in proof)' || fail "no sample in the JSON"
expect 0 verify cl.safetensors layer.safetensors --sample 1000000
if grep -q sampled out; then fail "all rows are no sample"; fi
for rows in 0 -1 many 99999999999999999999; do expect 2 verify cl.safetensors layer.safetensors --sample $rows; done
for type in F16 BF16; do  # whoever made one of the other
  expect 0 contract cl.safetensors --dtype $type -o narrow.safetensors --verify
  expect 0 verify cl.safetensors narrow.safetensors
  expect 0 verify narrow.safetensors cl.safetensors
done
expect 2 contract cl.safetensors --sample 4
for effort in nan inf -1 0 1e999 much; do
  expect 2 info cl.safetensors --effort $effort
  says err "--effort: is no finite number above 0"
done
for memory in -1 -1GB GB 99999999999999999999; do
  expect 2 info cl.safetensors --memory $memory
  says err "is no number of bytes"
done
expect 0 info cl.safetensors --memory 8GB
expect 2 contract cl.safetensors -o ''
says err "--output: is empty"
for option in --only --keep --input; do expect 2 contract cl.safetensors $option ''; done
expect 2 bogus
says err bogus
expect 6 verify cl.safetensors pool.safetensors
expect 5 verify cl.safetensors no-such-file.safetensors
says err 'no-such-file'
mkfifo pipe.onnx
expect 5 info pipe.onnx
says err 'not a regular file'
# Of 16 bits that hold no digit of the weights nothing is proved.
SCALE=1e-9 make faint.safetensors a a.weight=4,3,1,1:F32
SCALE=1e-9 make lost.safetensors '' weight=4,3,1,1:F16
expect 6 verify faint.safetensors lost.safetensors --input input=1x3x1x1
says out 'smaller than a unit in the last place'
# Rounded to 16 bits too a layer is right; and wrong with a sign changed.
for dtype in F32 F16 BF16; do
  expect 0 contract cl.safetensors --verify --dtype $dtype -o rounded.safetensors
  expect 0 verify cl.safetensors rounded.safetensors
  expect 0 verify model.onnx rounded.safetensors
  python3 - <<'PYTHON'
import json, struct
data = bytearray(open("rounded.safetensors", "rb").read())
n = struct.unpack("<Q", data[:8])[0]
weight = json.loads(data[8:8 + n])["weight"]
size = {"F32": 4, "F16": 2, "BF16": 2}[weight["dtype"]]
data[8 + n + weight["data_offsets"][0] + size - 1] ^= 0x80
open("rounded.safetensors", "wb").write(data)
PYTHON
  expect 1 verify cl.safetensors rounded.safetensors
done
# A wrong number is found: a byte of a float changed.
for tensor in weight bias; do
  python3 - $tensor <<'PYTHON'
import json, struct, sys
data = bytearray(open("layer.safetensors", "rb").read())
n = struct.unpack("<Q", data[:8])[0]
at = 8 + n + json.loads(data[8:8 + n])[sys.argv[1]]["data_offsets"][0]
data[at + 2] ^= 0x10
open("wrong.safetensors", "wb").write(data)
PYTHON
  expect 1 verify cl.safetensors wrong.safetensors
  says out WRONG
done
# A number that is none is found before it spreads: the first of a tensor becomes NaN or infinite.
for name in b.weight a.bias; do
  for bits in 0x7fc00000 0xff800000; do
    python3 - "$name" $bits <<'PYTHON'
import json, struct, sys
data = bytearray(open("cl.safetensors", "rb").read())
n = struct.unpack("<Q", data[:8])[0]
at = 8 + n + json.loads(data[8:8 + n])[sys.argv[1]]["data_offsets"][0]
data[at:at + 4] = struct.pack("<I", int(sys.argv[2], 16))
open("nan.safetensors", "wb").write(data)
PYTHON
    for command in contract info 'verify cl.safetensors'; do
      expect 3 $command nan.safetensors
      says err "tensor \"$name\" is not finite, element 0 is"
    done
  done
done

# ---- refusals at the border
make inexact.safetensors 'a:p1,b:p1' a.weight=4,3,3,3 a.bias=4 b.weight=2,4,3,3
make odd.safetensors 'a:p1,b:s2e1' a.weight=4,3,3,3 b.weight=2,4,3,3
expect 4 contract inexact.safetensors -o refused.safetensors
says err 'layer 2'
says err '--border interior'
says err '--input input=1x3xHxW'
expect 4 contract inexact.safetensors --input input=1x3x7x7 -o refused.safetensors
says err '--border interior'
expect 4 contract odd.safetensors -o refused.safetensors
says err '--input input=1x3xHxW'
expect 4 contract odd.safetensors --input input=1x3x8x8 -o refused.safetensors
contracts odd.safetensors 'weight:F64[2, 3, 5, 5] {"chain": ":s2p1e2"}' --input input=1x3x9x9
contracts odd.safetensors 'weight:F64[2, 3, 5, 5] {"chain": ":s2p1e2"}' --input input=1x3x9x7
says out 'at this size'
contracts inexact.safetensors 'bias:F64[2] weight:F64[2, 3, 5, 5] {"chain": ":p2"}' --border interior
expect 4 contract odd.safetensors --input input=1x3x9x9 --border everywhere -o refused.safetensors
expect 0 contract inexact.safetensors -o kept.onnx
for size in 9,9,9 0x7 -3x7 9xx '' ' '; do
  expect 2 contract odd.safetensors --input "input=$size"
done
expect 2 contract odd.safetensors --input input=1x4x9x9
expect 2 contract odd.safetensors --input image=1x3x9x9
expect 2 contract linear.safetensors --input input=1x5x1x1
expect 3 contract odd.safetensors --input input=1x3x1x1
make norm.safetensors n,n n.running_mean=3 n.running_var=3
expect 3 contract norm.safetensors -o refused.safetensors
says err '.onnx'
expect 0 contract norm.safetensors -o norm.onnx
checks=$((checks + 1))
[ -e refused.safetensors ] && fail "a refused contraction was written"

# ---- nothing half-written, nothing lost
echo precious >kept.safetensors
expect 4 contract inexact.safetensors -o kept.safetensors
mkdir empty.safetensors
expect 5 contract cl.safetensors -o no/such/folder/out.safetensors
expect 5 contract cl.safetensors -o empty.safetensors
ln -s led-to.safetensors dangling.safetensors
ln -s loop-2.safetensors loop-1.safetensors
ln -s loop-1.safetensors loop-2.safetensors
expect 0 contract cl.safetensors -o dangling.safetensors
expect 5 contract cl.safetensors -o loop-1.safetensors
says err 'links'
checks=$((checks + 1))
[ -L dangling.safetensors ] && [ -f led-to.safetensors ] && [ -L loop-1.safetensors ] || fail "links were not followed"
mkdir full
for out in out.safetensors out.onnx; do
  checks=$((checks + 1))
  (ulimit -f 0; trap '' XFSZ; "$bin" contract cl.safetensors -o full/$out) >/dev/null 2>&1 && fail "the disk is full"
done
for command in networks --help --version --man --completion 'expand --help' 'info cl.safetensors'; do
  checks=$((checks + 2))
  # shellcheck disable=SC2086
  "$bin" $command >/dev/full 2>/dev/null
  [ $? = 5 ] || fail "$command: standard output is full"
  # shellcheck disable=SC2086
  "$bin" $command >&- 2>/dev/null
  [ $? = 5 ] || fail "$command: standard output is closed"
done
expect 2 expand --network smallnet3 --seed -1 -o negative.onnx
checks=$((checks + 1))
[ "$(cat kept.safetensors)" = precious ] || fail "a file was lost"
[ -z "$(ls -A full)" ] || fail "half-written: $(ls -A full)"
[ -z "$(find . -name '*.tmp')" ] || fail "left behind: $(find . -name '*.tmp')"
# Paths are bytes: what is no UTF-8, a newline or an escape is neither JSON nor for a terminal.
odd=$'p\377\nq\033[31m.safetensors'
cp cl.safetensors "$odd"
for command in contract info "verify cl.safetensors"; do
  # shellcheck disable=SC2086
  expect 0 $command "$odd" --json
  is_json
  # shellcheck disable=SC2086
  expect 0 $command "$odd"
  checks=$((checks + 1))
  LC_ALL=C grep -q $'[\033\377]' out && fail "a path as it is: $command"
done
expect 0 contract cl.safetensors -o "$odd"
says out 'wrote p\xff\x0aq\x1b[31m.safetensors'
expect 3 contract "$odd" --chain nothing
expect 5 contract "no-$odd"
cp cl.safetensors own.safetensors
expect 2 contract own.safetensors -o own.safetensors
checks=$((checks + 1))
cmp -s cl.safetensors own.safetensors || fail "the input was overwritten"
expect 2 contract cl.safetensors -o out.txt
expect 2 contract cl.safetensors -o out.safetensors --external-data data
expect 0 contract cl.safetensors -o model.onnx
expect 2 contract model.onnx -o out.onnx --dtype F32
expect 2 contract cl.safetensors --dtype F16
expect 2 contract model.onnx --external-data data
for command in contract info 'verify model.onnx'; do
  expect 2 $command model.onnx --chain a
done
expect 0 contract model.onnx -o from-model.safetensors
is from-model.safetensors 'bias:F32[4] weight:F32[4, 3, 3, 3] {"chain": ":p1"}'

# ---- the grammar
make plain.safetensors - a.weight=4,3,1,1 a.bias=4 b.weight=6,2,3,3 c.x.weight=5,6,1,1 n.running_mean=3 n.running_var=3
expect 3 contract plain.safetensors
says err '--chain'
contracts plain.safetensors 'bias:F64[5] weight:F64[5, 3, 3, 3] {"chain": ":s2p1"}' --chain 'a:p1,b:s2g2,c.x' \
  --border interior
contracts plain.safetensors 'bias:F64[6] weight:F64[6, 3, 3, 3] {"chain": ":s2x1d1x2"}' --chain 'a,b:s2x1d1x2g2'
expect 0 info plain.safetensors --chain 'a,b:s2g2,c.x'
expect 0 verify plain.safetensors plain.safetensors --chain 'a,b:s2g2,c.x'
# A layer's own metadata come before --chain, which is for files without any.
expect 0 contract plain.safetensors --chain 'a,b:s2g2,c.x' -o layer.safetensors
expect 0 verify plain.safetensors layer.safetensors --chain 'a,b:s2g2,c.x'
says out 'proved: 1 of 1'
says out 'not read: 2 tensors of plain.safetensors that the chain does not name, such as "n.running_mean"'
expect 0 contract plain.safetensors --chain 'n,a,b:s2g2,c.x'
checks=$((checks + 1))
grep -q 'not read' out && fail "all tensors are read"
# 70,000 is more than half precision holds: nothing is written.
make large.safetensors 'a,b' a.weight=512,512 b.weight=512,512
python3 - <<'PYTHON'
import struct
data = bytearray(open("large.safetensors", "rb").read())
begin = 8 + struct.unpack("<Q", data[:8])[0]
data[begin:] = struct.pack("<d", 300) * ((len(data) - begin) // 8)
open("large.safetensors", "wb").write(data)
PYTHON
rm -f layer.safetensors
expect 3 contract large.safetensors --dtype F16 -o layer.safetensors --verify
says err 'float16 does not hold'
checks=$((checks + 1))
[ ! -e layer.safetensors ] || fail "infinities were written"
make twice.safetensors 'c,n:eps1e-9,n:eps1e-7' c.weight=3,3,1,1 n.running_mean=3 n.running_var=3
expect 3 contract twice.safetensors
says err 'another epsilon'
grammars=(',a' 'a,' 'a:' 'a:q1' 'a:s' 'a:sx' 'a:s1x' 'a:s1x1x1x1' 'a:s1s2' 'a:g1x2' 'a:g0' 'a:g-1' 'a:s2y' 'a:s1.5'
  'a:s99999999999999999999' 'a:s1099511627777' 'a:p-9223372036854775808' 'n:eps' 'n:eps-1' 'n:epsnan' 'n:epsinf'
  'n:eps1e39' 'n:eps1s1' "a$(printf ',a%.0s' {1..100})")
wrong=('a,nothing' 'a,c.x' 'a:s0' 'a:d0' 'a:s1x1x1' 'a,b' 'a:g3' 'a:k3' 'a:eps1e-5' 'n:s1' 'avg_pool' 'avg_pool:s2'
  'avg_pool:k2' 'a,avg_pool:k2d2' 'a,avg_pool:k0' 'a,avg_pool:k2p-1' 'a,avg_pool:k2x2x2' ':s1' 'a,n' 'x')
for grammar in "${grammars[@]}"; do
  expect 2 contract plain.safetensors --chain "$grammar"
  says err '--chain: '
done
for grammar in "${wrong[@]}"; do
  expect 3 contract plain.safetensors --chain "$grammar"
done

# ---- metadata that nobody should write
refused() { # refused TEXT
  for command in contract info 'verify cl.safetensors'; do
    expect 3 $command bad.safetensors
    says err "$1"
  done
}
bad() { # bad CHAIN: a file with this chain
  make bad.safetensors "$1" a.weight=4,3,1,1 b.weight=6,4,3,3 c.weight=2,6,3,3 v.weight=4,3,5 e.weight=4,0,1,1 \
    r.weight=1,1,1,1,1,1,1 a.bias=4 wrong.weight=2,2 wrong.bias=3 n.weight=4 n.running_mean=4 n.running_var=3 \
    m.running_mean=4
}
for grammar in "${grammars[@]}" '{"kind": "chain", "layers": []}'; do
  bad "$grammar"
  refused 'bad.safetensors: metadata chain: '
done
for grammar in "${wrong[@]/#a,b/b,b}" "$(printf '[%.0s' {1..100000})"; do
  bad "$grammar"
  refused 'bad.safetensors: '
done
bad '';                   refused '"weight"'
bad nothing;              refused '"nothing.weight"'
bad a:s1x1x1;             refused '2 spatial axes'
bad a:s0x1;               refused 'start at 1'
bad a:d-1;                refused 'start at 1'
bad a:g3;                 refused 'groups must divide'
bad a:g1099511627776;     refused 'groups must divide'
bad v,b;                  refused 'spatial axes'
bad e;                    refused 'channel'
bad r;                    refused '7 axes'
bad wrong;                refused 'wrong.bias'
bad a,n;                  refused 'n.running_var'
bad a,m;                  refused '"m.running_var"'
bad b,a;                  refused 'reads 3 channels'
for grammar in b:s1099511627776,c b:s1048576,c a:p1099511627776,b:p1099511627776 \
  a:p-1099511627776,b:p1099511627776 a:p1000000000,b:p1 b:d1048576,c; do
  bad $grammar
  expect 3 contract bad.safetensors -o refused.safetensors
  checks=$((checks + 1))
  [ ! -e refused.safetensors ] || fail "a refused contraction was written"
done
printf 'not a safetensors file at all' >bad.safetensors
refused 'bad.safetensors'

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
expect 2 info --network mobilenet cl.safetensors
expect 2 info --network mobilenet --chain a
expect 0 expand --network smallnet7 --expand cl+fc --seed 2 -o wide.onnx
expect 0 contract wide.onnx -o compact.onnx --verify
says out '66,074'
says out 'proved: 4 of 4 regions that differ'
expect 0 verify wide.onnx compact.onnx
expect 2 expand --network smallnet7 -o wide.safetensors
expect 5 expand --network smallnet7 -o no/such/folder/wide.onnx

# ---- the models that come with the repository
models=$here/../../examples/data/models
for model in "$models"/*.onnx; do
  expect 0 contract "$model" --verify
  says out 'proved: '
  says out 'run one operator after another: '
done
for name in repvgg mobileone; do
  expect 0 expand --network $name -o again.onnx
  checks=$((checks + 1))
  cmp -s again.onnx "$models/$name.onnx" || fail "$name.onnx is not what concertina expand writes"
done

finish
