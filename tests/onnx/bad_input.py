# SPDX-License-Identifier: Apache-2.0
"""Files that are not what they should be, and paths that cannot be written: a line that says so, and nothing else."""

import json
import os
import pathlib
import shutil
import subprocess

import models
import numpy as np
import onnx
from models import Builder
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

USAGE, BAD_FILE, FAILED_IO = 2, 3, 5


def good(name="good", **more):
    g = Builder(name, **more)
    x = g.input("x", [1, 8, 9, 11])
    y = g.norm(g.conv(g.conv(x, 8, 8, 1, 1), 16, 8, 3, 3), 16)
    g.output(g.add("Relu", y))
    return g.model()


def with_external_data(path, location="in.data"):
    onnx.save_model(good(), path, save_as_external_data=True, location=location, size_threshold=0)


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checks(run, require, program, folder):
    """(name, check) of every hostile input."""
    result = []

    def refused(code, name, says, *arguments, command="contract", prepare=None):
        """The command must fail with this code and one line that says `says`, and change no file."""
        def check():
            if prepare:
                prepare()
            before = snapshot(folder)
            given = arguments or (folder / "in.onnx", "-o", folder / "out.onnx")
            found, output, error = run(program, command, *given)
            require(found == code, f"exit code {found} instead of {code}: {error.strip()[:300]}")
            lines = error.splitlines()
            require(len(lines) == 1 and lines[0].startswith("concertina: error: "),
                    f"not one line of an error: {error!r:.300}")
            require(says in error, f"\"{says}\" is not in {error.strip()}")
            require(output == "", f"something on standard output: {output[:100]}")
            require(snapshot(folder) == before, "files have changed")
        result.append(("bad/" + name, check))

    def saved(model, path=folder / "in.onnx"):
        def prepare():
            path.write_bytes((model() if callable(model) else model).SerializeToString())
        return prepare

    def edited(change, **more):
        """A good model after a change that onnx would not make."""
        def make():
            model = good(**more)
            change(model)
            return model
        return saved(make)

    # ---- bytes

    def bytes_of(content):
        return lambda: (folder / "in.onnx").write_bytes(content() if callable(content) else content)

    refused(BAD_FILE, "empty", "in.onnx", prepare=bytes_of(b""))
    refused(BAD_FILE, "text", "in.onnx", prepare=bytes_of(b"This is no model.\n" * 10))
    refused(BAD_FILE, "zeros", "in.onnx", prepare=bytes_of(bytes(4096)))
    refused(BAD_FILE, "ones", "in.onnx", prepare=bytes_of(b"\xff" * 4096))
    refused(BAD_FILE, "no_graph", "in.onnx", prepare=bytes_of(b"\x08\x08"))
    refused(BAD_FILE, "random", "in.onnx", prepare=bytes_of(lambda: np.random.default_rng(1).bytes(4096)))
    size = len(good().SerializeToString())
    for at in sorted({1, 2, 3, 10, 60, 200, size // 4, size // 2, size - 300, size - 100, size - 3, size - 1}):
        refused(BAD_FILE, f"truncated_at_{at}_of_{size}", "in.onnx",
                prepare=bytes_of(lambda at=at: good().SerializeToString()[:at]))
    refused(FAILED_IO, "missing", "in.onnx")
    refused(FAILED_IO, "folder", "folder", folder, "-o", folder / "out.onnx")
    result.pop()  # a folder is not an ONNX model by name; whatever is said of it is said elsewhere

    # ---- external data

    def external(change, location="in.data"):
        def prepare():
            with_external_data(folder / "in.onnx", location)
            change()
        return prepare

    data = folder / "in.data"
    refused(BAD_FILE, "external_missing", "in.data", prepare=external(data.unlink))
    refused(BAD_FILE, "external_short", "in.data", prepare=external(lambda: os.truncate(data, 100)))
    refused(BAD_FILE, "external_empty", "in.data", prepare=external(lambda: os.truncate(data, 0)))

    def moved(location):
        def change():
            model = onnx.load(folder / "in.onnx", load_external_data=False)
            for tensor in model.graph.initializer:
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = location
            (folder / "in.onnx").write_bytes(model.SerializeToString())
        return change

    def outside():
        external(lambda: None)()
        (folder / "inner").mkdir(exist_ok=True)
        moved("../in.data")()
        shutil.move(folder / "in.onnx", folder / "inner" / "in.onnx")

    refused(BAD_FILE, "external_outside", "outside", folder / "inner" / "in.onnx", "-o", folder / "out.onnx",
            prepare=outside)
    refused(BAD_FILE, "external_absolute", "", prepare=external(moved("/etc/hostname")))
    refused(BAD_FILE, "external_no_location", "", prepare=external(moved("")))
    refused(BAD_FILE, "external_folder", "", prepare=external(moved(".")))
    refused(BAD_FILE, "external_device", "", prepare=external(lambda: (data.unlink(), data.symlink_to("/dev/zero"))))
    refused(BAD_FILE, "external_link_outside", "",
            prepare=external(lambda: (data.unlink(), data.symlink_to("/etc/hostname"))))

    def offset(key, value):
        def change():
            model = onnx.load(folder / "in.onnx", load_external_data=False)
            tensor = model.graph.initializer[0]
            for entry in tensor.external_data:
                if entry.key == key:
                    entry.value = value
            (folder / "in.onnx").write_bytes(model.SerializeToString())
        return change

    for key in ("offset", "length"):
        for value in ("-1", "many", "18446744073709551615", "9223372036854775807", "1000000000000", "1"):
            if (key, value) != ("offset", "1"):
                refused(BAD_FILE, f"external_{key}_{value}", "", prepare=external(offset(key, value)))

    # ---- graphs

    def set_opset(version):
        def change(model):
            model.opset_import[0].version = version
        return change

    refused(BAD_FILE, "opset_6", "opset 6", prepare=edited(set_opset(6)))
    refused(BAD_FILE, "no_opset", "opset", prepare=edited(lambda model: model.ClearField("opset_import")))

    def cycle(model):
        model.graph.node[0].input[0] = model.graph.node[1].output[0]

    def order(model):
        nodes = list(reversed(model.graph.node))
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    def missing(model):
        model.graph.node[1].input[1] = "nowhere"

    def twice(model):
        model.graph.node[1].output[0] = model.graph.node[0].output[0]

    def output_missing(model):
        model.graph.output[0].name = "nowhere"

    refused(BAD_FILE, "cycle", "", prepare=edited(cycle))
    refused(BAD_FILE, "order", "", prepare=edited(order))
    refused(BAD_FILE, "missing_tensor", "nowhere", prepare=edited(missing))
    refused(BAD_FILE, "made_twice", "", prepare=edited(twice))
    refused(BAD_FILE, "missing_output", "nowhere", prepare=edited(output_missing))

    def constant(index, values):
        def change(model):
            tensor = model.graph.initializer[index]
            tensor.CopyFrom(models.tensor_of(tensor.name, values(models.array_of(tensor)), tensor.data_type))
        return change

    def attribute(node, name, value):
        def change(model):
            for each in list(model.graph.node[node].attribute):
                if each.name == name:
                    model.graph.node[node].attribute.remove(each)
            model.graph.node[node].attribute.append(helper.make_attribute(name, value))
        return change

    def elements(index, count):
        def change(model):
            tensor = model.graph.initializer[index]
            tensor.raw_data = tensor.raw_data[:4 * count]
        return change

    def dims(index, *extents):
        def change(model):
            model.graph.initializer[index].dims[:] = extents
        return change

    refused(BAD_FILE, "weight_of_other_channels", "channels", prepare=edited(constant(0, lambda w: w[:, :5])))
    refused(BAD_FILE, "second_weight_of_other_channels", "channels", prepare=edited(constant(2, lambda w: w[:, :5])))
    refused(BAD_FILE, "bias_of_other_channels", "", prepare=edited(constant(1, lambda b: b[:5])))
    refused(BAD_FILE, "statistics_of_other_channels", "", prepare=edited(constant(4, lambda b: b[:5])))
    refused(BAD_FILE, "fewer_elements", "", prepare=edited(elements(0, 10)))
    refused(BAD_FILE, "negative_dims", "", prepare=edited(dims(0, -8, -8, 1, 1)))
    refused(BAD_FILE, "huge_dims", "", prepare=edited(dims(0, 2**62, 2**62, 1, 1)))
    refused(BAD_FILE, "group_that_does_not_divide", "group", prepare=edited(attribute(0, "group", 3)))
    refused(BAD_FILE, "group_0", "group", prepare=edited(attribute(0, "group", 0)))
    refused(BAD_FILE, "strides_0", "", prepare=edited(attribute(1, "strides", [0, 1])))
    refused(BAD_FILE, "dilations_negative", "", prepare=edited(attribute(1, "dilations", [-1, 1])))
    refused(BAD_FILE, "three_pads", "", prepare=edited(attribute(1, "pads", [1, 1, 1])))
    refused(BAD_FILE, "kernel_shape_of_another", "kernel_shape", prepare=edited(attribute(1, "kernel_shape", [5, 5])))
    refused(BAD_FILE, "strides_of_another_type", "strides", prepare=edited(attribute(1, "strides", "two")))
    for value in (np.nan, np.inf):
        def not_finite(w, value=value):
            w = np.array(w)
            w.flat[3] = value
            return w

        refused(BAD_FILE, f"weight_{value}", "not finite", prepare=edited(constant(0, not_finite)))

    # ---- the command line

    refused(USAGE, "output_is_input", "-o", folder / "in.onnx", "-o", folder / "in.onnx", prepare=saved(good))
    refused(USAGE, "output_links_to_input", "-o", folder / "in.onnx", "-o", folder / "link.onnx",
            prepare=lambda: (saved(good)(), (folder / "link.onnx").symlink_to(folder / "in.onnx")))
    refused(FAILED_IO, "output_folder_missing", "nowhere", folder / "in.onnx", "-o", folder / "nowhere" / "out.onnx",
            prepare=saved(good))
    refused(FAILED_IO, "output_is_a_folder", "", folder / "in.onnx", "-o", folder, prepare=saved(good))
    refused(FAILED_IO, "output_is_a_device", "", folder / "in.onnx", "-o", folder / "full",
            prepare=lambda: (saved(good)(), (folder / "full").symlink_to("/dev/full")))
    refused(USAGE, "input_unknown", "--input", folder / "in.onnx", "--input", "z=1x8x9x9", prepare=saved(good))
    refused(USAGE, "input_of_another_shape", "--input", folder / "in.onnx", "--input", "x=1x8x9x9", prepare=saved(good))
    refused(USAGE, "input_malformed", "--input", folder / "in.onnx", "--input", "x=1x8xx", prepare=saved(good))
    refused(USAGE, "only_unknown", "--only", folder / "in.onnx", "--only", "nowhere", prepare=saved(good))
    refused(USAGE, "keep_unknown", "--keep", folder / "in.onnx", "--keep", "nowhere", prepare=saved(good))
    refused(USAGE, "when_unknown", "--when", folder / "in.onnx", "--when", "never", prepare=saved(good))
    refused(USAGE, "chain_of_a_model", "--chain", folder / "in.onnx", "--chain", "a", prepare=saved(good))
    refused(USAGE, "external_data_elsewhere", "", folder / "in.onnx", "-o", folder / "out.onnx", "--external-data",
            "../out.data", prepare=saved(good))
    refused(USAGE, "external_data_is_output", "", folder / "in.onnx", "-o", folder / "out.onnx", "--external-data",
            "out.onnx", prepare=saved(good))
    refused(USAGE, "external_data_is_input", "", folder / "in.onnx", "-o", folder / "out.onnx", "--external-data",
            "in.data", prepare=external(lambda: None))
    refused(USAGE, "verify_of_one", "OUT", folder / "in.onnx", command="verify", prepare=saved(good))
    refused(FAILED_IO, "verify_of_missing", "out.onnx", folder / "in.onnx", folder / "out.onnx", command="verify",
            prepare=saved(good))

    # ---- full devices

    def full_output():
        saved(good)()
        with open("/dev/full", "w") as full:
            done = subprocess.run([program, "contract", folder / "in.onnx", "--json"], stdout=full,
                                  stderr=subprocess.PIPE, text=True, timeout=100)
        require(done.returncode == FAILED_IO and len(done.stderr.splitlines()) == 1,
                f"standard output full: exit code {done.returncode}: {done.stderr[:200]}")
    result.append(("bad/standard_output_full", full_output))

    def file_too_large():
        """No more than a block may be written: nothing must be left."""
        saved(good)()
        before = snapshot(folder)
        for more in ([], ["--external-data", "out.data"]):
            done = subprocess.run(["bash", "-c", 'trap "" XFSZ; ulimit -f 1; exec "$@"', "-", program, "contract",
                                   folder / "in.onnx", "-o", folder / "out.onnx", *more],
                                  capture_output=True, text=True, timeout=100)
            require(done.returncode == FAILED_IO and len(done.stderr.splitlines()) == 1,
                    f"a full disk: exit code {done.returncode}: {done.stderr[:200]}")
            require(snapshot(folder) == before, "a full disk: files have changed")
    result.append(("bad/no_space", file_too_large))

    # ---- not bad: external data comes and goes

    def external_data():
        with_external_data(folder / "in.onnx")
        before = snapshot(folder)
        code, _, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify")
        require(code == 0, error)
        require((folder / "out.onnx.data").exists(), "there is no out.onnx.data")
        model = onnx.load(folder / "out.onnx")
        onnx.checker.check_model(folder / "out.onnx", full_check=True)
        require([node.op_type for node in model.graph.node] == ["Conv", "Relu"], "it is not contracted")
        after = snapshot(folder)
        require(all(after[path] == content for path, content in before.items()), "the input has changed")
        code, _, error = run(program, "verify", folder / "in.onnx", folder / "out.onnx")
        require(code == 0, error)
        # What no region takes in goes to the new file too.
        elsewhere = pathlib.Path(folder / "elsewhere")
        elsewhere.mkdir()
        try:
            for name in ("out.onnx", "out.onnx.data"):
                shutil.copy(folder / name, elsewhere)
            onnx.load(elsewhere / "out.onnx")
        finally:
            shutil.rmtree(elsewhere)
    result.append(("external_data", external_data))

    def external_data_named():
        saved(lambda: good(opset=20))()
        code, _, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify",
                             "--external-data", "weights.bin")
        require(code == 0, error)
        model = onnx.load(folder / "out.onnx", load_external_data=False)
        require(any(each.data_location == TensorProto.EXTERNAL for each in model.graph.initializer),
                "nothing is external")
        require((folder / "weights.bin").exists(), "there is no weights.bin")
        onnx.checker.check_model(folder / "out.onnx", full_check=True)
    result.append(("external_data_named", external_data_named))

    # ---- outputs that are stored beside a model

    def stored_outputs():
        saved(good)()
        data = folder / "test_data_set_0"
        data.mkdir()

        def store(name, values):
            (data / name).write_bytes(numpy_helper.from_array(np.asarray(values, np.float32)).SerializeToString())

        def report(*more):
            code, output, error = run(program, *(more or ("contract", folder / "in.onnx", "--verify")), "--json")
            require(code == 0, error)
            text = run(program, *(more or ("contract", folder / "in.onnx", "--verify")))[1]
            return json.loads(output)["outputs"], text

        try:
            x = np.random.default_rng(1).standard_normal([1, 8, 9, 11])
            y = ReferenceEvaluator(good()).run(None, {"x": x.astype(np.float32)})[0]
            store("input_0.pb", x)
            outputs, text = report()
            require(outputs["stored"] == [] and outputs["notes"] == ["test_data_set_0 has no output_0.pb"] and
                    "  test_data_set_0 has no output_0.pb" in text, f"no output: {outputs}")
            store("output_0.pb", y)
            store("output_1.pb", y)
            outputs, text = report()
            require([each["model"] for each in outputs["stored"]] == ["model", "result"], f"models: {outputs}")
            scale = np.max(np.abs(y))
            for each in outputs["stored"]:
                require(each["largest"] < 1e-5 * scale and abs(each["magnitude"] - scale) < 1e-6 and each["nans"] == 0,
                        f"a difference: {each}")
            require(len(outputs["notes"]) == 1 and "output_1.pb" in outputs["notes"][0], f"notes: {outputs['notes']}")
            # Far off, or not a number: shown, and judged by nobody.
            run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx")
            for value, shown in ((y[0, 2, 3, 4] + 5, "differs from stored output_0.pb by at most 5 at [0][2][3][4]"),
                                 (np.nan, "differs from stored output_0.pb by NaN at [0][2][3][4]")):
                changed = np.array(y)
                changed[0, 2, 3, 4] = value
                store("output_0.pb", changed)
                outputs, text = report("verify", folder / "in.onnx", folder / "out.onnx")
                require(text.count(shown) == 2, f"not shown: {shown}: {text}")
                for each in outputs["stored"]:
                    nan = np.isnan(value)
                    require(each["where"] == "[0][2][3][4]" and each["nans"] == nan and
                            (each["largest"] is None if nan else abs(each["largest"] - 5) < 1e-3), f"wrong: {each}")
            store("output_0.pb", y[:, :3])
            outputs, _ = report()
            require(outputs["stored"] == [] and "1x3x" in outputs["notes"][0], f"another shape: {outputs}")
            (data / "output_0.pb").write_bytes(b"no tensor")
            outputs, _ = report()
            require(outputs["stored"] == [] and "output_0.pb" in outputs["notes"][0], f"no tensor: {outputs}")
            require(len(outputs["differences"]) == 1, f"differences of the models: {outputs}")
            (data / "input_0.pb").unlink()
            outputs, _ = report()
            require("input_0.pb" in outputs["skipped"], f"no input: {outputs}")
        finally:
            shutil.rmtree(data)
    result.append(("stored_outputs", stored_outputs))
    return result
