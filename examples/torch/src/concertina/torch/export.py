# SPDX-License-Identifier: Apache-2.0
"""Layers in a row, written to a file that the program `concertina` contracts."""

import ctypes
import json
import os
import struct

import torch

from .shapes import ShapeError
from .tracing import hooked, trace

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
BATCH_NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
POOLS = (torch.nn.AvgPool1d, torch.nn.AvgPool2d, torch.nn.AvgPool3d)


def save(model, path):
    """Writes convolutions, Linear layers, batch norms (as in inference) and average pools in a row, as safetensors.

    `model` is an nn.Sequential or whatever else runs its layers one after another. These keep their names in it, and
    the metadata `chain` has their geometry:

        concertina contract block.safetensors -o layer.safetensors --verify

    Throws ShapeError naming the module that is not supported, or what is no chain.
    """
    chain, tensors = [], {}
    for name, layer in _layers(model):
        chain.append(_described(name, layer))
        for suffix in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(layer, suffix, None)
            if tensor is not None:
                tensors[f"{name}.{suffix}"] = tensor
    if not chain:
        raise ShapeError("the model has no layers")
    _write_safetensors(path, tensors, {"chain": ",".join(chain), "source": f"PyTorch {torch.__version__}"})


def _layers(model):
    """The layers with their names, in the order in which they run. A layer used twice comes twice."""
    traced = None if hooked(model) else trace(model)
    if traced is None:
        raise ShapeError(
            f"{type(model).__name__} is no chain that torch.fx can trace; save an nn.Sequential of its layers"
        )
    (first, *nodes), modules = traced.graph.nodes, dict(traced.root.named_modules())
    for node in nodes:
        if node.args != (first,) or node.kwargs or node.op not in ("call_module", "output"):
            raise ShapeError(
                f"{type(model).__name__} is no chain: {node} is not a module that reads what the one before it wrote "
                "and nothing else; save an nn.Sequential of the layers that are in a row"
            )
        first = node
        if node.op == "call_module" and type(modules[node.target]) is not torch.nn.Identity:
            yield node.target, modules[node.target]


def _described(name, layer):
    """NAME:GEOMETRY, as `concertina contract --help` describes it."""
    where = f"layer {name!r} ({type(layer).__name__})"
    if hooked(layer):
        raise ShapeError(f"{where} has hooks, which a file cannot hold; remove them first")
    if set(name) & set(",:") or name == "avg_pool":
        raise ShapeError(f"{where} cannot have this name in a chain")
    if type(layer) is torch.nn.Linear:
        return name
    if type(layer) in BATCH_NORMS:
        if layer.running_mean is None:
            raise ShapeError(f"{where} has no running statistics; without them it is not linear")
        return f"{name}:eps{layer.eps!r}"
    if type(layer) in POOLS:
        if layer.ceil_mode or not layer.count_include_pad or getattr(layer, "divisor_override", None) is not None:
            raise ShapeError(f"{where} has ceil_mode, divisor_override or no count_include_pad, which is not supported")
        return "avg_pool:k" + _numbers(layer.kernel_size) + "s" + _numbers(layer.stride) + "p" + _numbers(layer.padding)
    if type(layer) not in CONVOLUTIONS:
        raise ShapeError(f"{where} is not supported; only convolutions, Linear, batch norms and AvgPool are")
    if layer.padding_mode != "zeros":
        raise ShapeError(f"{where} pads with {layer.padding_mode!r}; only zeros are linear in one layer")
    begin = end = (0,) if layer.padding == "valid" else layer.padding
    if layer.padding == "same":  # PyTorch puts the odd one at the end
        total = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        begin, end = [t // 2 for t in total], [t - t // 2 for t in total]
    return (
        f"{name}:s{_numbers(layer.stride)}p{_numbers(begin)}e{_numbers(end)}d{_numbers(layer.dilation)}g{layer.groups}"
    )


def _numbers(values):
    return "x".join(map(str, values)) if isinstance(values, (tuple, list)) else str(values)


def _write_safetensors(path, tensors, metadata):
    header, data, offset = {"__metadata__": metadata}, [], 0
    # Largest elements first, so that every tensor is aligned.
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in DTYPES:
            raise ShapeError(f"tensor {name!r} is {tensor.dtype}; only {', '.join(map(str, DTYPES))} are supported")
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
