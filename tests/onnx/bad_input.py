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

        def report(*more, expected=0):
            code, output, error = run(program, *(more or ("contract", folder / "in.onnx", "--verify")), "--json")
            require(code == expected, f"exit code {code}: {error}")
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
                require(each["largest"] < 1e-5 * scale and 0 < each["magnitude"] <= scale + 1e-6 and each["nans"] == 0,
                        f"a difference: {each}")
            require(len(outputs["notes"]) == 1 and "output_1.pb" in outputs["notes"][0], f"notes: {outputs['notes']}")
            # As far off as no rounding is, or not a number: a failure.
            run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx")
            for value, shown in ((y[0, 2, 3, 4] + 5, "differs from stored output_0.pb by at most 5 at [0][2][3][4]"),
                                 (np.nan, "differs from stored output_0.pb by NaN at [0][2][3][4]")):
                changed = np.array(y)
                changed[0, 2, 3, 4] = value
                store("output_0.pb", changed)
                outputs, text = report("verify", folder / "in.onnx", folder / "out.onnx", expected=1)
                require(text.count(shown) == 2, f"not shown: {shown}: {text}")
                for each in outputs["stored"]:
                    nan = np.isnan(value)
                    require(each["where"] == "[0][2][3][4]" and each["nans"] == nan and each["failed"] and
                            (each["largest"] is None if nan else abs(each["largest"] - 5) < 1e-3), f"wrong: {each}")
            scale = np.max(np.abs(y), axis=(0, 2, 3), keepdims=True)
            store("output_0.pb", y + 1e-4 * scale)
            outputs, text = report("verify", folder / "in.onnx", folder / "out.onnx")
            require(text.count("WRONG") == 0 and not any(each["failed"] for each in outputs["stored"]), f"{outputs}")
            store("output_0.pb", y + 2e-3 * scale)
            outputs, text = report(expected=1)
            require(text.count("WRONG") == 2 and "nothing written" in text, f"a file that is wrong: {text}")
            # Each channel by its own numbers.
            g = Builder("channels")
            g.output(g.conv(g.input("x", [1, 1, 2, 2]), 2, 1, 1, 1, bias=False,
                            weight=g.constant(np.array([1e6, 1]).reshape(2, 1, 1, 1))))
            saved(g.model())()
            for wrong, expected in ((0, 0), (77, 1)):
                store("input_0.pb", np.ones([1, 1, 2, 2]))
                store("output_0.pb", np.array([[[[1e6, 1e6], [1e6, 1e6]], [[1 + wrong, 1], [1, 1]]]]))
                outputs, text = report(expected=expected)
                require("WRONG" not in text or "[0][1][0][0], of values up to 78" in text, text)
            saved(good)()
            store("input_0.pb", x)
            store("output_0.pb", y[:, :3])
            outputs, _ = report()
            require("output_0.pb is not compared" in outputs["notes"][0], f"not named: {outputs}")
            require(outputs["stored"] == [] and "1x3x" in outputs["notes"][0], f"another shape: {outputs}")
            (data / "output_0.pb").write_bytes(b"no tensor")
            outputs, _ = report()
            require(outputs["stored"] == [] and "output_0.pb" in outputs["notes"][0], f"no tensor: {outputs}")
            require(len(outputs["differences"]) == 1, f"differences of the models: {outputs}")
            # Other files, an empty batch, numbers that leave out some: named.
            store("labels.pb", [1])
            store("input_0.pb", x[:0])
            store("output_0.pb", y[:0])
            data.rename(folder / "test_data_set_3")
            outputs, text = report()
            require(outputs["differences"] == [] and outputs["skipped"] == "no test data could be read" and
                    "so nothing was compared" in text and "test_data_set_3" in text, f"an empty batch: {outputs}")
            store_there = folder / "test_data_set_3" / "input_0.pb"
            store_there.write_bytes(numpy_helper.from_array(x.astype(np.float32)).SerializeToString())
            outputs, text = report()
            require(len(outputs["differences"]) == 1 and "test_data_set_3/labels.pb is of no input" in text,
                    f"test data that do not begin at 0: {outputs}")
            (folder / "elsewhere").mkdir()
            shutil.copy(folder / "in.onnx", folder / "elsewhere" / "out.onnx")
            text = report("verify", folder / "elsewhere" / "out.onnx", folder / "in.onnx")[1]
            require("test data beside" in text, f"test data of the other model: {text}")
            store_there.unlink()
            outputs, _ = report()
            require("input_0.pb" in outputs["notes"][0], f"no input: {outputs}")
        finally:
            for each in (data, folder / "test_data_set_3", folder / "elsewhere"):
                shutil.rmtree(each, ignore_errors=True)
    result.append(("stored_outputs", stored_outputs))

    def stored_labels():
        """Integers are compared to the last, and not with floats."""
        g = Builder("labels")
        g.output(g.add("ArgMax", g.conv(g.input("x", [1, 3, 1, 1]), 2000, 3, 1, 1), axis=1), type=TensorProto.INT64)
        saved(g.model())()
        data = folder / "test_data_set_0"
        data.mkdir()
        try:
            x = np.random.default_rng(1).standard_normal([1, 3, 1, 1]).astype(np.float32)
            (data / "input_0.pb").write_bytes(numpy_helper.from_array(x).SerializeToString())
            label = ReferenceEvaluator(onnx.load(folder / "in.onnx")).run(None, {"x": x})[0]
            for value, expected, says in ((label, 0, "proved"), (label + 1, 1, "differs from stored output_0.pb"),
                                          (label.astype(np.float32), 0, "it is of float32")):
                (data / "output_0.pb").write_bytes(numpy_helper.from_array(value).SerializeToString())
                code, output, error = run(program, "verify", folder / "in.onnx", folder / "in.onnx")
                require(code == expected and says in output, f"exit code {code}: {output}{error}")
        finally:
            shutil.rmtree(data)
    result.append(("stored_labels", stored_labels))

    # ---- nothing in silence

    def verified(name, first, second, expected, says, *more):
        """What verify says of two models."""
        def check():
            saved(first)()
            saved(second, folder / "out.onnx")()
            code, output, error = run(program, "verify", folder / "in.onnx", folder / "out.onnx", *more)
            require(code == expected and says in output, f"exit code {code}: {output}{error}")
        result.append(("silence/" + name, check))

    def of_size(*size):
        g = Builder("size")
        g.output(g.add("Relu", g.conv(g.input("x", [1, 8, *size]), 16, 8, 3, 3)))
        return g.model()

    def overloaded(name):
        g = Builder("overload", opset=20)
        g.output(g.add("f", g.input("x", [1, 4]), domain="d"), [1, 4])
        g.domains = {"d": 1}
        g.functions = [helper.make_function("d", "f", ["a"], ["b"], [helper.make_node(op, ["a"], ["b"])],
                                            [helper.make_opsetid("", 20)], overload=overload)
                       for overload, op in (("one", "Relu"), ("two", "Neg"))]
        g.nodes[0].overload = name
        return g.model()

    def nan_of_large(first):
        """Both differ by rounding only where nothing overflows: infinity less infinity is NaN."""
        g = Builder("overflow")
        x = g.input("x", [1, 1])
        y = g.add("Mul", x, g.constant(np.array([[0.0]])))
        huge = g.add("Add", y, g.constant(np.array([[3e38]])))
        huge = g.add("Mul", g.add("Relu", huge), g.constant(np.array([[4.0 if first else 1.0]])))
        g.output(g.add("Sub", huge, huge))
        return g.model()

    def unnamed(op):
        """Of which the first output is left out, in an operator that the tool does not know."""
        g = Builder("unnamed")
        x = g.input("x", [3, 1, 4])
        g.nodes.append(helper.make_node(op, [x] + [g.constant(np.ones(each, np.float32))
                                                   for each in ([1, 8, 4], [1, 8, 2])], ["", "h"], hidden_size=2))
        g.output("h", [1, 1, 2])
        return g.model()

    def part_of(split, factor=1):
        """The second part of a layer's channels, of which nothing reads the first; or made for itself."""
        g = Builder("parts")
        x, weight = g.input("x", [1, 3, 4, 4]), g.random_values([4, 3, 1, 1])
        if split:
            g.add("Split", g.conv(x, 4, 3, 1, 1, weight=g.constant(weight), bias=False), outputs=2, made=["p", "q"],
                  axis=1)
        else:
            g.add("Conv", x, g.constant(factor * weight[2:]), made="q")
        g.output(g.add("Relu", "q", made="y"))
        return g.model()

    def cancelling(first, last):
        """Two layers whose product is [1 0; 0 1], of numbers that a sum in float cannot tell from others; or that."""
        g = Builder("cancelling")
        x = g.input("x", [1, 2])
        weights = ([[1e7 + 1, 0], [1e7, 0], [0, 1]], [[1, -1, 0], [0, 0, 1]]) if first else ([[last, 0], [0, 1]],)
        for i, weight in enumerate(weights):
            made = "z" if i + 1 == len(weights) else None
            x = g.add("Gemm", x, g.constant(np.array(weight, np.float32)), made=made, transB=1)
        g.output(g.add("Relu", x, made="y"), [1, 2])
        return g.model()

    def inflated(factor):
        """A layer, and an identity after it of two that cancel each other: its bound in float is as wide as these."""
        g = Builder("inflated")
        x, weight = g.input("x", [1, 4, 6, 6]), g.random_values([4, 4, 3, 3])
        made = "y" if factor is None else None
        x = g.add("Conv", x, g.constant((weight * (factor or 1)).astype(np.float32)), made=made)
        if factor is not None:
            one = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1)
            x = g.add("Conv", x, g.constant(np.concatenate([3e5 * one, (3e5 - 1) * one])))
            x = g.add("Conv", x, g.constant(np.concatenate([one, -one], 1)), made="y")
        g.output(x, [1, 4, 4, 4])
        return g.model()

    def of_faint_channel(contracted):
        """Of 16 bits, of which a channel's weights are no longer one."""
        g = Builder("faint", type=TensorProto.FLOAT16)
        x, random = g.input("x", [1, 4, 3, 3]), np.random.default_rng(5)
        first = (1e-2 * random.uniform(0.5, 1, (4, 4, 1, 1))).astype(np.float16)
        second = random.standard_normal((4, 4, 1, 1))
        second[0] *= 1e-6
        second = second.astype(np.float16)
        product = np.einsum("omxy,micd->oicd", second.astype(float), first.astype(float)).astype(np.float16)
        product[0] = 0
        layers = (product,) if contracted else (first, second)
        for i, weight in enumerate(layers):
            made = "z" if i + 1 == len(layers) else None
            x = g.add("Conv", x, g.constant(weight), made=made)
        for _ in range(2):
            x = g.add("Mul", g.add("Relu", x), g.constant(np.float16(1e3)))
        g.output(x, [1, 4, 3, 3])
        return g.model()

    for factor, expected, says in ((1, 0, "proved: 1 of 1"), (0.8, 6, "its bound allows it"),
                                   (1.1, 6, "its bound allows it")):
        verified(f"inflated_bound_{factor}", inflated(None), inflated(factor), expected, says)
    verified("faint_channel", of_faint_channel(False), of_faint_channel(True), 6, "weight of output channel 0 is small")
    verified("first_output_left_out", unnamed("LSTM"), unnamed("LSTM"), 0, "1 node identical")
    for factor, expected in ((1, 0), (-1, 1)):
        verified(f"part_{expected}", part_of(True), part_of(False, factor), expected, "1 region that differ")
        verified(f"part_of_the_other_{expected}", part_of(False, factor), part_of(True), expected,
                 "1 region that differ")
    verified("one_element_is_lost", cancelling(True, 1), cancelling(False, 1), 0, "proved: 1 of 1")
    verified("one_element_is_wrong", cancelling(True, 1), cancelling(False, -1), 6, "its bound allows it")
    verified("input_shapes", of_size(9, 9), of_size(20, 20), 6, "of other types or shapes")
    verified("same_shapes", of_size(9, 9), of_size(9, 9), 0, "proved: 0 of 0")
    verified("open_shapes", of_size(9, 9), of_size("h", "w"), 0, "proved: 0 of 0")
    verified("overload", overloaded("one"), overloaded("two"), 6, "not proved")
    verified("same_overload", overloaded("one"), overloaded("one"), 0, "1 node identical")
    verified("one_is_nan", nan_of_large(True), nan_of_large(False), 1, "NaN in 1 element")
    verified("both_are_nan", nan_of_large(True), nan_of_large(True), 1, "NaN in 1 element")

    refused(BAD_FILE, "metadata_twice", "there twice", prepare=edited(
        lambda model: model.metadata_props.add(key="author", value="another")))
    refused(BAD_FILE, "opset_twice", "there twice", prepare=edited(
        lambda model: model.opset_import.add(domain="", version=11)))
    refused(BAD_FILE, "opset_of_both_names", "under both names", prepare=edited(
        lambda model: model.opset_import.add(domain="ai.onnx", version=11)))
    refused(BAD_FILE, "attribute_twice", "there twice", prepare=edited(
        lambda model: model.graph.node[0].attribute.extend([helper.make_attribute("group", 1)] * 2)))
    refused(USAGE, "input_twice", "--input", folder / "in.onnx", "--input", "x=1x8x9x11", "--input", "x=1x8x9x11",
            prepare=saved(good))

    def border():
        """Off the border means: where no path leaves a map between. A map that is all border has no such place."""
        def padded(size):
            g = Builder("padded")
            y = g.conv(g.conv(g.input("x", [1, 4, size, size]), 4, 4, 3, 3, pads=1), 4, 4, 3, 3, pads=1)
            g.output(g.add("Relu", y))
            return g.model()

        for size, regions in ((2, 0), (3, 1), (8, 1)):
            saved(padded(size))()
            options = ("--border", "interior", "--when", "always", "--json")
            code, output, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", *options)
            require(code == 0 and len(json.loads(output)["regions"]) == regions, f"{size}: {output}{error}")
            require(regions > 0 or "the border covers all" in output, f"{size}: {output}")
            (folder / "other.onnx").write_bytes((folder / "out.onnx").read_bytes())
        # Shapes decide, not numbers: layers that happen to be equal at the border are equal off it.
        chance = padded(8)
        for tensor in chance.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
        # All is border in one of two models, of which nothing is claimed then.
        for path, rows in (("in.onnx", [(1, 0), (1, 0), (3, 1)]), ("out.onnx", [(1, 0), (3, 1)])):
            g = Builder("bordered")
            y = g.input("x", [1, 4, 2, 2])
            for i, (kernel, pad) in enumerate(rows):
                y = g.conv(y, 4, 4, kernel, kernel, pads=pad, bias=path == "out.onnx" or kernel == 3,
                           made="z" if i + 1 == len(rows) else f"{path}{i}")
            g.output(g.add("Relu", y, made="y"))
            saved(g.model(), folder / path)()
        for pair in (("in.onnx", "out.onnx"), ("out.onnx", "in.onnx")):
            code, output, error = run(program, "verify", *(folder / path for path in pair), "--border", "interior")
            require(code == 6 and "the border covers all" in output, f"{pair}: exit code {code}: {output}{error}")
        saved(chance)()
        code, output, error = run(program, "contract", folder / "in.onnx", "--when", "always")
        require(code == 0 and "off the border" not in output and "nodes 3 -> 3" in output, f"{output}{error}")
        code, output, error = run(program, "contract", folder / "in.onnx", *options[:4], "--verify")
        require(code == 0 and "off the border" in output and "proved: 1 of 1" in output, f"{output}{error}")
        # A shift before padding is right off the border alone, and a wrong weight is found there.
        g = Builder("shifted")
        g.output(g.add("Relu", g.conv(g.norm(g.input("x", [1, 4, 8, 8]), 4), 4, 4, 3, 3, pads=1)))
        saved(g.model())()
        code, output, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify",
                                  *options[:4])
        require(code == 0 and "off the border" in output and "proved: 1 of 1" in output, f"{output}{error}")
        wrong = onnx.load(folder / "out.onnx")
        weight = next(tensor for tensor in wrong.graph.initializer if len(tensor.dims) == 4)
        weight.CopyFrom(numpy_helper.from_array(1.001 * numpy_helper.to_array(weight), weight.name))
        saved(wrong, folder / "out.onnx")()
        code, output, error = run(program, "verify", folder / "in.onnx", folder / "out.onnx", "--border", "interior")
        require(code == 1, f"exit code {code}: {output}{error}")
        # The layer of a large map, in a model whose map is all border.
        layer = onnx.load(folder / "other.onnx")
        for info in [*layer.graph.input, *layer.graph.output]:
            for dim in info.type.tensor_type.shape.dim[2:]:
                dim.dim_value = 2
        saved(padded(2))()
        saved(layer, folder / "out.onnx")()
        code, output, error = run(program, "verify", folder / "in.onnx", folder / "out.onnx", "--border", "interior")
        require(code == 6 and "the border covers all" in output, f"exit code {code}: {output}{error}")
        (folder / "other.onnx").unlink()
    result.append(("silence/border", border))

    def zero():
        def change(model):
            for tensor in model.graph.initializer[:2]:
                tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
        edited(change)()
        code, output, error = run(program, "contract", folder / "in.onnx", "-o", folder / "out.onnx", "--verify")
        require(code == 0 and "proved: 1 of 1" in output, f"exit code {code}: {output}{error}")
    result.append(("silence/zero", zero))

    # ---- small files that ask for much

    def pooled(channels, size, kernel):
        g = Builder("pool")
        g.output(g.conv(g.add("AveragePool", g.input("x", [1, channels, size, size]), kernel_shape=[kernel, kernel]),
                        4, channels, 1, 1))
        return g.model()

    def plain(count, channels):
        g = Builder("plain")
        y = g.input("x", [1, channels, 200, 200])
        for _ in range(count):
            y = g.conv(y, channels, channels, 3, 3)
        g.output(g.add("Relu", y))
        return g.model()

    def apart(**geometry):
        g = Builder("apart")
        y = g.conv(g.input("x", [1, 2, "h", "w"]), 2, 2, 3, 3, strides=geometry.get("stride", 1))
        g.output(g.conv(y, 2, 2, 3, 3, dilations=geometry.get("dilation", 1)), [1, 2, "i", "j"])
        return g.model()

    def wide(channels):
        g = Builder("wide")
        y = g.input("x", [1, channels, 4, 4])
        for _ in range(2):
            y = g.add("AveragePool", y, kernel_shape=[2, 2])
        g.output(g.add("Mul", y, g.constant(np.float32(2))))
        return g.model()

    def grown(op, values):
        g = Builder("grown")
        if op == "Expand":
            weight = g.add(op, g.constant(np.ones(1)), g.constant(np.array(values)))
            g.output(g.add("Conv", g.input("x", [1, values[1], 8, 8]), weight), [1, values[0], 6, 6])
        else:
            g.output(g.add(op, g.input("x", [1, 4, 2, 2]), g.constant(np.array(values))))
        return g.model()

    def repeated(op, count, *more):
        g = Builder("repeated")
        y = g.input("x", [1, 4, 20, 20])
        for _ in range(count):
            y = g.add("Add", y, g.conv(y, 4, 4, 1, 1)) if op == "Add" else g.add(op, y, *more)
        g.output(y)
        return g.model()

    def many(block, count):
        """Small layers that share their weights, of which many fit a small file."""
        g = Builder("many")
        y = g.input("x", [1, 2, "h", "w"])
        kernel, point = g.weight(2, 2, 3, 3), g.constant(1e-3 * g.random_values([2, 2, 1, 1]))
        for _ in range(count):
            if block == "pools":
                y = g.add("AveragePool", y, kernel_shape=[3, 3])
                continue
            first = g.conv(y, 2, 2, 3, 3, weight=kernel, bias=False, pads=1) if block != "skips" else y
            y = first if block == "row" else g.add("Add", first, g.conv(y, 2, 2, 1, 1, weight=point, bias=False))
        g.output(y, [1, 2, "i", "j"])
        return g.model()

    def mapped(channels, kernel, size):
        g = Builder("mapped")
        y = g.conv(g.input("x", [1, 1, size, size]), channels, 1, kernel, kernel, bias=False)
        g.output(g.add("Relu", g.conv(y, 1, channels, kernel, kernel, bias=False)))
        return g.model()

    def unchecked(g, result, dims=None):
        """As ONNX's own checks would not have it, or in no time."""
        outputs = [helper.make_tensor_value_info(result, TensorProto.FLOAT, dims)]
        graph = helper.make_graph(g.nodes, "graph", g.inputs, outputs, g.initializers)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", g.opset)], ir_version=g.ir)

    def folded(op, count, shape, *more):
        """Constants of constants, each of which is kept."""
        g = Builder("folded")
        first = g.constant(np.ones(shape, np.float32))
        second = g.constant(np.ones(more, np.float32)) if more else first
        made = []
        for _ in range(count):
            inputs = [made[-1] if made and not more else first] + ([second] if op in ("Add", "Div") else [])
            made.append(g.add(op, *(inputs if op != "Concat" else [first] * 10), name="",
                              **({"axis": 0} if op == "Concat" else {})))
        return unchecked(g, g.add("Add", g.input("x", [1] * len(shape)), made[-1]))

    def axes(count, relus):
        g = Builder("axes")
        y = g.input("x", [1] * count)
        for _ in range(relus):
            y = g.add("Relu", y, name="")
        return unchecked(g, y)

    def run_of(op, count, size, *more, **attributes):
        """Of which the operator takes much longer than an addition, or of which many arrays are alive at once."""
        g = Builder("run")
        y = g.input("x", size)
        if op == "alive":
            return unchecked(g, g.add("Sum", *[g.add("Relu", y, name="") for _ in range(count)]))
        constants = [g.constant(each) for each in more]
        for _ in range(count):
            y = g.add(op, y, *constants, name="", **attributes)
        return unchecked(g, y)

    def parted(outputs, listed):
        g = Builder("parted")
        sizes = [g.constant(np.ones(outputs, np.int64))] if listed else []
        parts = g.add("Split", g.input("x", [1, outputs, 2, 2]), *sizes, outputs=outputs, axis=1)
        return unchecked(g, g.add("Concat", *parts, axis=1))

    def listed(op, channels, count=1):
        """Whose channels are listed, as many as the file says that there are."""
        g = Builder("listed")
        y = g.input("x", [1, channels, 1, 1])
        if op == "Split":
            return unchecked(g, g.add("Add", *g.add(op, y, outputs=2, axis=1)))
        if op == "Reshape":
            y = g.add("Transpose", g.reshape(y, 1, 2, channels // 2, 1, 1), perm=[0, 2, 1, 3, 4])
            return unchecked(g, g.reshape(y, 1, channels, 1, 1))
        if op == "Slice":
            more = [g.constant(np.array([each])) for each in (0, 2**62, 1)]
        else:
            more = [g.constant(np.arange(channels))]
        for _ in range(count):
            y = g.add(op, y, *more, name="", **({"axis": 1} if op == "Gather" else {}))
        return unchecked(g, y)

    def depths(op, channels, size, block, count=1):
        """Whose layers would have far more elements than the file says."""
        g = Builder("depths")
        y = g.input("x", [1, channels, size, size])
        for _ in range(count):
            y = g.add(op, y, name="", blocksize=block)
        return unchecked(g, g.add("Neg", y))

    def read_by_many(count):
        g = Builder("read")
        x, two = g.input("x", [1, 4, 4, 4]), g.constant(np.float32(2))
        return unchecked(g, g.add("Sum", *[g.add("Mul", x, two, name="") for _ in range(count)]))

    def multiplied(count):
        g = Builder("multiplied")
        y, factor = g.input("x", [1, 4, 8, 8]), g.constant(np.float32(1.001))
        for _ in range(count):
            y = g.add("Mul", y, factor, name="")
        return unchecked(g, y)

    map_of_9e6 = [1, 1, 3000, 3000]
    hostile = {
        "fold_sums": lambda: folded("Add", 2500, [300, 500], 1),
        "fold_outer_products": lambda: folded("Add", 3000, [4000, 1], 1, 4000),
        "fold_joined": lambda: folded("Concat", 2000, [100000]), "fold_roots": lambda: folded("Sqrt", 3000, [200000]),
        "fold_quotients": lambda: folded("Div", 20000, [2]),
        "axes": lambda: axes(100000, 1), "axes_of_relus": lambda: axes(50000, 10000),
        "read_by_15000": lambda: read_by_many(15000), "20000_products": lambda: multiplied(20000),
        "mish": lambda: run_of("Mish", 200, map_of_9e6), "tanh": lambda: run_of("Tanh", 200, map_of_9e6),
        "softmax": lambda: run_of("Softmax", 200, map_of_9e6),
        "short_softmax": lambda: run_of("Softmax", 30, [3000000, 1]),
        "power": lambda: run_of("Pow", 100, map_of_9e6, np.float32(1.5)),
        "transposes": lambda: run_of("Transpose", 200, map_of_9e6), "alive": lambda: run_of("alive", 60, map_of_9e6),
        "narrow_pools": lambda: run_of("MaxPool", 30, [1, 1, 4000000, 1], kernel_shape=[1, 1]),
        "parts": lambda: parted(20000, False), "listed_parts": lambda: parted(20000, True),
        "pool_4096": lambda: pooled(1, 8192, 4096), "pool_512": lambda: pooled(1, 1024, 512),
        "pool_of_256": lambda: pooled(256, 128, 64), "40_convolutions": lambda: plain(40, 8),
        "20_convolutions": lambda: plain(20, 16), "dilation": lambda: apart(dilation=1000),
        "stride": lambda: apart(stride=1000), "channels": lambda: wide(2**40), "some_channels": lambda: wide(2**22),
        "expand": lambda: grown("Expand", [2**20, 4, 3, 3]), "tile": lambda: grown("Tile", [1, 1, 20000, 20000]),
        "residuals": lambda: repeated("Add", 30), "relus": lambda: repeated("Relu", 12000),
        "9000_convolutions": lambda: many("row", 9000), "4500_skips": lambda: many("skips", 4500),
        "3000_blocks": lambda: many("blocks", 3000),
        "3000_pools": lambda: many("pools", 3000),
        **{f"{op}_of_channels": lambda op=op: listed(op, 2**40) for op in ("Slice", "Split", "Reshape")},
        "50_slices": lambda: listed("Slice", 2**22, 50), "2_slices": lambda: listed("Slice", 2**26, 2),
        "6000_gathers": lambda: listed("Gather", 60000, 6000),
        "space_to_depth": lambda: depths("SpaceToDepth", 1, 256, 256),
        "spaces_to_depth": lambda: depths("SpaceToDepth", 2**22, 4, 2, 2),
        "depth_to_space": lambda: depths("DepthToSpace", 2**18, 2, 256),
        "large_kernels": lambda: mapped(100, 30, 256),
    }

    def renamed(model):
        """The same, with all names but those of inputs and outputs others, which sort the other way round."""
        result = onnx.ModelProto()
        result.CopyFrom(model)
        names = {name for node in result.graph.node for name in node.output} - {o.name for o in result.graph.output}
        others = dict(zip(sorted(names), sorted(("r" + name for name in names), reverse=True)))
        for node in result.graph.node:
            for field in (node.input, node.output):
                field[:] = [others.get(name, name) for name in field]
        return result

    def bounded(make):
        def check():
            model = make()
            saved(model)()
            saved(renamed(model), folder / "renamed.onnx")()
            require((folder / "in.onnx").stat().st_size < 1000000, "the file is large")
            always = ("--when", "always", "--border", "interior")
            for arguments in (("info", folder / "in.onnx"), ("info", folder / "in.onnx", *always),
                              ("contract", folder / "in.onnx", "-o", folder / "out.onnx", *always),
                              ("contract", folder / "in.onnx", "--verify", *always),
                              ("verify", folder / "in.onnx", folder / "in.onnx"),
                              ("verify", folder / "in.onnx", folder / "renamed.onnx")):
                with open(folder / "said", "w") as said:
                    process = subprocess.Popen([program, *arguments], stdout=said, stderr=said)
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                seconds, megabytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000
                print(f"    {arguments[0]}: exit {process.returncode}, {seconds:.2f} s, {megabytes:.0f} MB")
                require(process.returncode in (0, 3, 6), f"exit code {process.returncode}")
                said = (folder / "said").read_text()
                require(process.returncode != 3 or "--effort " in said or "--memory " in said, said[:300])
                require(seconds < 5 and megabytes < 1000, f"{arguments[0]}: {seconds:.1f} s, {megabytes:.0f} MB: "
                                                          f"{said[:300]}")
            (folder / "said").unlink()
        return check
    for name, make in hostile.items():
        result.append(("hostile/" + name, bounded(make)))

    def allowed():
        """The number that a refusal names is enough."""
        saved(lambda: plain(5, 8))()
        command = ["contract", folder / "in.onnx", "--verify", "--when", "always"]
        code, output, _ = run(program, *command, "--effort", "1e5")
        while code != 0:
            require("--effort " in output + _, f"no number: {output}{_}")
            number = (output + _).split("--effort ")[1].split()[0].rstrip(";,.")
            require(float(number) > 1e5, f"no more: {number}")
            code, output, _ = run(program, *command, "--effort", str(2 * float(number)))
        require("proved: 1 of 1" in output, output)
        code, _, error = run(program, *command, "--memory", "much")
        require(code == USAGE and "--memory" in error, error)
        # That for planning is about what all there is to plan takes.
        saved(lambda: many("skips", 700))()
        command = ["info", folder / "in.onnx", "--when", "always"]
        code, _, error = run(program, *command, "--effort", "3e7")
        require(code == BAD_FILE and "planning" in error, f"exit code {code}: {error}")
        code, _, error = run(program, *command, "--effort", str(2 * float(error.split("--effort ")[1].split()[0])))
        require(code == 0, f"exit code {code}: {error}")
        # A run stops before the operator that would take too many.
        saved(lambda: mapped(100, 30, 256))()
        command = ["verify", folder / "in.onnx", folder / "in.onnx"]
        code, output, error = run(program, *command)
        require(code == 0 and "not run: " in output and "--effort " in output, f"exit code {code}: {output}{error}")
        for _ in range(3):  # an operator further each time
            if "--effort " in output:
                number = output.split("--effort ")[1].split()[0]
                code, output, error = run(program, *command, "--effort", str(2 * float(number)))
        require(code == 0 and "differs by nothing" in output, f"exit code {code}: {output}{error}")
        # What constants make is folded where there is room for it, and left as it is where there is none.
        saved(lambda: folded("Add", 1, [3000, 1], 1, 3000))()
        for option, least in (("--memory", "100MB"), ("--effort", "1e7")):
            code, output, error = run(program, "info", folder / "in.onnx", option, least)
            require(code == 0 and option + " " in output, f"exit code {code}: {output}{error}")
            for _ in range(3):  # what holds it, and what it becomes
                if option + " " in output:
                    number = output.split(option + " ")[1].split()[0].rstrip(");,.")
                    code, output, error = run(program, "info", folder / "in.onnx", option, number)
            require(code == 0 and option not in output, f"exit code {code}: {output}{error}")
    result.append(("hostile/allowed", allowed))
    return result
