#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes linear layers of a PyTorch model to a file that `concertina` contracts and verifies. Needs torch only.

As a module:

    from export_torch import export
    export(torch.nn.Sequential(squeeze, spatial, widen), "block.safetensors", example_input=torch.randn(2, 64, 8, 8))

    $ concertina verify block.safetensors
    $ concertina contract block.safetensors -o layer.safetensors

As a program it writes an ExpandNet-CL block: export_torch.py [block.safetensors]
"""

import ctypes
import json
import os
import struct
import sys

import torch

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


def export(sequential, path, example_input=None):
    """Writes Conv1d, Conv2d, Conv3d and Linear layers in a row; with `example_input` also the output that they give on
    it, computed layer by layer, which `concertina verify` compares with the contraction's.

    Layers keep their names in `sequential`. Raises ValueError naming the module that is not supported.
    """
    nodes, tensors = [], {}
    for name, layer in _layers(sequential):
        nodes.append(_node(name, layer))
        tensors[f"{name}.weight"] = layer.weight
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias
    if not nodes:
        raise ValueError("the model has no layers")
    if example_input is not None:
        with torch.no_grad():
            tensors |= {"input": example_input, "output": sequential(example_input)}
    chain = {"kind": "chain", "layers": nodes}
    _write_safetensors(path, tensors, {"chain": json.dumps(chain), "source": f"PyTorch {torch.__version__}"})


def _layers(sequential, prefix=""):
    """The layers with their names, those of nested Sequentials in their place. A layer used twice comes twice."""
    for name, layer in sequential._modules.items():
        if isinstance(layer, torch.nn.Sequential):
            yield from _layers(layer, f"{prefix}{name}.")
        elif not isinstance(layer, torch.nn.Identity):
            yield prefix + name, layer


def _node(name, layer):
    where = f"layer {name!r} ({type(layer).__name__})"
    if type(layer) is torch.nn.Linear:
        return {"name": name, "type": "linear"}
    if type(layer) not in CONVOLUTIONS:
        raise ValueError(f"{where} is not supported; only Conv1d, Conv2d, Conv3d and Linear are")
    if layer.padding_mode != "zeros":
        raise ValueError(f"{where} pads with {layer.padding_mode!r}; only zeros are linear in one layer")
    node = {"name": name, "type": "conv", "stride": list(layer.stride), "dilation": list(layer.dilation),
            "groups": layer.groups}
    if layer.padding == "valid":
        node["padding"] = [0] * len(layer.stride)
    elif layer.padding == "same":  # PyTorch puts the odd one at the end
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        node["padding"] = [t // 2 for t in total]
        node["padding_end"] = [t - t // 2 for t in total]
    else:
        node["padding"] = list(layer.padding)
    return node


def _write_safetensors(path, tensors, metadata):
    header, data, offset = {"__metadata__": metadata}, [], 0
    # Largest elements first, so that every tensor is aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}; only {', '.join(map(str, DTYPES))} are supported")
        values = tensor.detach().cpu().contiguous()
        data.append(ctypes.string_at(values.data_ptr(), values.numel() * values.element_size()))
        end = offset + len(data[-1])
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = f"{path}.part"  # the file appears when it is complete
    with open(part, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(data)
    os.replace(part, path)


def main():
    torch.manual_seed(0)
    path = sys.argv[1] if len(sys.argv) > 1 else "block.safetensors"
    block = torch.nn.Sequential(torch.nn.Conv2d(16, 64, 1, padding=1), torch.nn.Conv2d(64, 128, 3),
                                torch.nn.Conv2d(128, 32, 1))
    export(block, path, example_input=torch.randn(2, 16, 8, 8))
    print(f"wrote {path}; next: concertina verify {path}")


if __name__ == "__main__":
    main()
