# SPDX-License-Identifier: Apache-2.0
"""What the package writes, and how it is installed."""

import json
import pathlib
import re
import runpy
import struct
import subprocess
import sys
import tempfile
import tomllib
import unittest
import zipfile

from support import HAVE_TORCH, ROOT, needs, needs_torch

if HAVE_TORCH:
    import torch
    from support import small_net
    from torch import nn

    import concertina.torch as ct

PACKAGE = ROOT / "examples" / "torch"
PROJECT = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
TOOL = ROOT / "build" / "release" / "examples" / "concertina"


@needs_torch
class Save(unittest.TestCase):
    def setUp(self):
        torch.manual_seed(0)
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.path = pathlib.Path(self.folder.name) / "block.safetensors"
        conv = nn.Conv2d(2, 4, 3, 2, "valid", groups=2)
        self.block = nn.Sequential(nn.Conv2d(3, 2, 1, padding=1), conv, nn.BatchNorm2d(4), nn.AvgPool2d(2))

    def test_tensors_and_geometry(self):
        ct.save(self.block, self.path)
        data = self.path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        chain = "0:s1x1p1x1e1x1d1x1g1,1:s2x2p0e0d1x1g2,2:eps1e-05,avg_pool:k2s2p0"
        self.assertEqual(header["__metadata__"]["chain"], chain)
        begin, end = header["1.weight"]["data_offsets"]
        stored = torch.frombuffer(bytearray(data[8 + length + begin : 8 + length + end]), dtype=torch.float)
        self.assertTrue(torch.equal(stored, self.block[1].weight.detach().flatten()))

    def test_what_is_no_layer_is_named(self):
        with self.assertRaisesRegex(ct.ShapeError, "layer '0' .ReLU. is not supported"):
            ct.save(nn.Sequential(nn.ReLU()), self.path)
        with self.assertRaisesRegex(ct.ShapeError, "pads with 'reflect'"):
            ct.save(nn.Sequential(nn.Conv2d(1, 1, 3, padding_mode="reflect")), self.path)
        self.assertFalse(self.path.exists())

    def test_layers_in_the_order_in_which_they_run(self):
        class Ours(nn.Module):
            def __init__(self, forward):
                super().__init__()
                self.last, self.first, self.run = nn.Conv2d(2, 2, 1), nn.Sequential(nn.Conv2d(3, 2, 1)), forward

            def forward(self, x):
                return self.run(self, x)

        ct.save(Ours(lambda own, x: own.last(own.last(own.first(x)))), self.path)
        self.assertIn(b'"chain":"first.0:s1x1p0x0e0x0d1x1g1,last:s1x1p0x0e0x0d1x1g1,last:s1x1', self.path.read_bytes())
        self.path.unlink()
        plain, _ = ct.from_blocks(self.block.eval())
        ct.save(plain, self.path)  # a GraphModule
        self.path.unlink()
        hooked = nn.Sequential(nn.Conv2d(3, 2, 1))
        hooked[0].register_forward_hook(print)
        for pattern, model in {
            "Ours is no chain: first": Ours(lambda own, x: own.first(x) + own.last(own.first(x))),
            "Ours is no chain: relu": Ours(lambda own, x: own.first(x).relu()),
            "Ours is no chain: output": Ours(lambda own, x: (own.first(x), 1)),
            "Ours is no chain that torch.fx can trace": Ours(lambda own, x: own.first(x) if x.sum() > 0 else x),
            "layer '0' .Conv2d. has hooks": hooked,
            "Conv2d is no chain": nn.Conv2d(3, 2, 1),
        }.items():
            with self.subTest(pattern), self.assertRaisesRegex(ct.ShapeError, pattern):
                ct.save(model, self.path)
        self.assertFalse(self.path.exists())

    @unittest.skipUnless(TOOL.exists(), f"{TOOL.relative_to(ROOT)} is not built")
    def test_the_program_contracts_to_what_from_blocks_gives(self):
        norm = nn.BatchNorm2d(16)
        with torch.no_grad():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        block = nn.Sequential(nn.Conv2d(3, 8, 1, padding=1), nn.Conv2d(8, 16, 3, 2), norm, nn.Conv2d(16, 4, 1))
        ct.save(block, self.path)
        layer = self.path.with_name("layer.safetensors")
        subprocess.run([TOOL, "contract", self.path, "-o", layer, "--verify"], check=True, capture_output=True)
        data = layer.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        plain, _ = ct.from_blocks(block.eval())
        (conv,) = (module for module in plain.modules() if isinstance(module, nn.Conv2d))
        for name, ours in (("weight", conv.weight), ("bias", conv.bias)):
            begin, end = header[name]["data_offsets"]
            stored = torch.frombuffer(bytearray(data[8 + length + begin : 8 + length + end]), dtype=torch.float)
            self.assertEqual(list(ours.shape), header[name]["shape"])
            # Each is rounded once from a sum in double, so a last bit differs where that is near a tie.
            torch.testing.assert_close(stored, ours.detach().flatten(), rtol=2**-23, atol=0)


@needs("onnx", "onnxscript", "onnxruntime")
class Onnx(unittest.TestCase):
    def test_a_contracted_model_runs_in_onnxruntime(self):
        import onnxruntime

        torch.manual_seed(0)
        model = ct.contract_(ct.expand_(small_net(), "cl+fc")).eval()
        x = torch.randn(2, 3, 16, 16)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/compact.onnx"
            torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
            (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)


class Wheel(unittest.TestCase):
    """Needs Python alone, so these run everywhere."""

    def test_pure_python_is_built_without_anything(self):
        name = f"concertina-{PROJECT['version']}-py3-none-any.whl"
        with tempfile.TemporaryDirectory() as folder:
            build = f"import build_backend as b; print(b.get_requires_for_build_wheel(), b.build_wheel({folder!r}))"
            done = subprocess.run(
                [sys.executable, "-B", "-I", "-c", f"import sys; sys.path.insert(0, {str(PACKAGE)!r}); {build}"],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            self.assertEqual(done.stdout.strip(), f"[] {name}")
            with zipfile.ZipFile(f"{folder}/{name}") as wheel:
                names = set(wheel.namelist())
                self.assertIsNone(wheel.testzip())
        files = {str(path.relative_to(PACKAGE / "src")) for path in PACKAGE.glob("src/**/*.py")}
        self.assertEqual({name for name in names if name.startswith("concertina/")}, files)

    def test_an_editable_install_is_the_tree(self):
        pip = [sys.executable, "-m", "pip"]
        if subprocess.run([*pip, "--version"], capture_output=True).returncode:
            self.skipTest("pip is not installed")
        with tempfile.TemporaryDirectory() as folder:
            pip += ["install", "--quiet", "--no-index", "--no-deps", "--target", folder, "-e", PACKAGE]
            subprocess.run(pip, check=True, capture_output=True)
            code = f"import site; site.addsitedir({folder!r}); import concertina; print(concertina.__file__)"
            python = [sys.executable, "-I", "-S", "-B"]
            found = subprocess.run([*python, "-c", code], check=True, capture_output=True, text=True)
            self.assertEqual(found.stdout.strip(), str(PACKAGE / "src/concertina/__init__.py"))
        build_backend = runpy.run_path(str(PACKAGE / "build_backend.py"))
        with self.assertRaisesRegex(ValueError, "the compiled operators cannot be in an editable install"):
            build_backend["build_editable"](folder, {"operators": "on"})

    def test_the_version_is_the_headers(self):
        text = (ROOT / "include/concertina/version.hpp").read_text()
        numbers = (re.search(rf"VERSION_{part} (\d+)", text)[1] for part in ("MAJOR", "MINOR", "PATCH"))
        self.assertEqual(PROJECT["version"], ".".join(numbers))


if __name__ == "__main__":
    unittest.main()
