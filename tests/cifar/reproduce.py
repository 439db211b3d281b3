#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and figures: what their rows mean, what is made of results, and trainings run to the end.

tests/cifar/reproduce.py CIFAR [TEST...]
"""

import argparse
import contextlib
import csv
import filecmp
import fcntl
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
REPRODUCE = ROOT / "examples/cifar/reproduce.py"
sys.path.insert(0, str(REPRODUCE.parent))

import figures  # noqa: E402
import reproduce  # noqa: E402
import results  # noqa: E402
from experiments import Budget, Failure, Row, contracts, curves_of, read_rows, runs_of  # noqa: E402

PAPER = ROOT / "examples/data/accuracy.csv"
CIFAR = None
HEADER = ",".join(results.COLUMNS) + "\n"
DONE = "cifar10-k3-compact,1,2,70,1,69,30,yes,1,abc,host\n"


class InFolder(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="cifar reproduce's ")
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)

    def file(self, text, name="file.csv"):
        path = self.folder / name
        path.write_text(text)
        return path

    def refused(self, read, text, message):
        with self.assertRaisesRegex(Failure, f"^{re.escape(str(self.folder))}.*{message}"):
            read(self.file(text))


class Rows(InFolder):
    def runs(self, line, seed=1, budget=Budget()):
        header = "table,dataset,kernel,model,rate,setting,metric,mean,std\n"
        return runs_of(read_rows(self.file(header + line + "\n"))[0], seed, budget)

    def test_every_published_row_is_a_training(self):
        rows = read_rows(PAPER)
        self.assertEqual(len(rows), 28 + 18 + 10 + 74 + 21 + 21 + 24)
        self.assertEqual(len({(row.table, row.name) for row in rows}), len(rows))
        self.assertEqual(sum(len(row.published) for row in rows), 328)
        commands = {}
        for row in rows:
            for run in runs_of(row, 3, Budget()):
                self.assertIn(run.options["seed"], (3, 1) if run.options["model"] == "resnet18" else (3,))
                # A name says all that tells a training from others.
                self.assertEqual(commands.setdefault(run.name, run), run)
        self.assertEqual(len({str(run) for run in commands.values()}), len(commands))

    def test_a_row_says_what_is_trained(self):
        budget = Budget(epochs=10, teacher_width=8, teacher_epochs=12)
        (plain,) = self.runs("S1,CIFAR-10,7,ExpandNet-CK+FC,4,none,top1,80.31,0.27", 2, budget)
        self.assertEqual(plain.name, "cifar10-k7-ck+fc-r4-e10-s2")
        network = {"dataset": "cifar10", "model": "ck+fc", "kernel": 7, "rate": 4, "compute": "contracted"}
        self.assertEqual(plain.options, network | {"epochs": 10, "seed": 2})
        self.assertTrue(contracts(plain.name))
        (deeper,) = self.runs("S5,CIFAR-100,9,ExpandNet-CL,8,none,top1,48.85,0.42")
        self.assertEqual(deeper.name, "cifar100-deeper-k9-cl-r8-e150-s1")
        self.assertEqual((deeper.options["blocks"], deeper.options["weight-decay"]), (4, 5e-4))
        start, teacher, own = self.runs("S4,CIFAR-10,3,ExpandNet-CL+FC+Init,4,Hint,top1,58.27,3.83", 1, budget)
        self.assertEqual(start.options["compute"], "nonlinear")
        self.assertFalse(contracts(start.name) or contracts(teacher.name))
        self.assertNotIn("transfer", start.options)
        self.assertEqual(teacher.name, "cifar10-resnet18-w8-e12-s1")
        self.assertEqual((teacher.options["width"], teacher.options["epochs"]), (8, 12))
        self.assertEqual(own.name, "cifar10-k3-cl+fc-r4-init-hint-w8-e12-e10-s1")
        self.assertEqual((own.init, own.teacher), (start.name, teacher.name))
        adam = {"transfer": "hint", "optimizer": "adam", "learning-rate": 1e-4}
        self.assertEqual(own.options, own.options | adam)
        self.assertNotIn("optimizer", self.runs("S1,CIFAR-10,7,SmallNet,,KD,top1,78.97,0.37")[1].options)
        self.assertEqual(self.runs("S1,CIFAR-10,7,ACNet,,none,top1,79,1")[0].options["compute"], "auto")
        (uniform,) = self.runs("S1,CIFAR-10,7,SmallNet,,none,top1,78.47,0.2", 1, Budget(uniform_norms=True))
        self.assertEqual(uniform.name, "cifar10-k7-compact-uniform-e150-s1")
        self.assertIs(uniform.options["uniform-norms"], True)
        (corrupted,) = self.runs("S7,CIFAR-10,7,SmallNet,,corrupted-20%,train_error,3,4", 1, budget)
        self.assertEqual(corrupted.options["corrupt"], 0.2)
        self.assertEqual((Budget().marks, budget.marks), ("", "-e10-w8-e12"))

    def test_curves_are_trainings_of_their_own(self):
        behaviour = curves_of("S2", "cifar10", 3, 150)
        titles = ["SmallNet", "FC(Arora18)", "ExpandNet-CL", "ExpandNet-CL+FC"]
        self.assertEqual([title for title, _ in behaviour], titles)
        self.assertEqual(behaviour[2][1].name, "cifar10-k3-cl-r4-similarities-e150-s1")
        self.assertEqual(behaviour[2][1].options["similarities"], 100)
        self.assertEqual(len(curves_of("S1", "cifar10", 7, 150)), 6)
        decays = curves_of("S4", "cifar10", 7, 20)
        self.assertEqual(len({run.name for _, run in decays}), 5)
        for title, run in decays:
            self.assertEqual(run.options["weight-decay"], 5e-4)
            self.assertEqual("product" in title, run.options.get("decay-of") == "product")

    def test_rows_that_say_nothing_are_refused_with_their_line(self):
        header = "table,dataset,kernel,model,rate,setting,metric,mean,std\n"
        self.refused(read_rows, "epoch\n", 'line 1: expected "table,dataset')
        self.refused(read_rows, header + "S1,CIFAR-10\n", "line 2: expected 9 fields")
        self.refused(read_rows, header + "S1,CIFAR-10,7,SmallNet,,none,top1,1,1", "does not end")
        for line, message in (
            ("S1,CIFAR-10,x,SmallNet,,none,top1,1,1", '"x" is no whole number'),
            ("S1,CIFAR-10,-3,SmallNet,,none,top1,1,1", '"-3" is no whole number from 1'),
            ("S1,CIFAR-10,7,ExpandNet-CL,0,none,top1,1,1", '"0" is no number from 0.001'),
            ("S1,CIFAR-10,7,SmallNet,,none,top1,nan,1", '"nan" is no number from 0 to 100'),
            ("S1,CIFAR-10,7,SmallNet,,none,top1,1,-5", '"-5"'),
            ("S1,CIFAR-9,7,SmallNet,,none,top1,1,1", "'CIFAR-9' is none of CIFAR-10"),
            ("S1,CIFAR-10,7,BigNet,,none,top1,1,1", "BigNet"),
            ("S1,CIFAR-10,7,SmallNet,,osmosis,top1,1,1", "osmosis"),
            ("S1,CIFAR-10,7,SmallNet,,none,top5,1,1", "top5.*train_error"),
            ("S1,CIFAR-10,7,SmallNet,,corrupted-%,top1,1,1", "corrupted-%"),
            ("S1,CIFAR-10,7,SmallNet,,corrupted-101%,top1,1,1", "corrupted-101%"),
            ("S1,CIFAR-10,7,SmallNet,,corrupted-N%,top1,1,1", "corrupted-N%"),
        ):
            self.refused(read_rows, f"{header}{line}\n", f"line 2: .*{message}")
        line = "S1,CIFAR-10,7,SmallNet,,none,top1,1,1\n"
        self.refused(read_rows, header + line + line, "line 3: top1 of cifar10-k7-compact is there twice")
        path = self.folder / "file.csv"
        path.write_bytes(b"table\xff\n")
        with self.assertRaisesRegex(Failure, "file.csv: byte 5 is not UTF-8"):
            read_rows(path)


class Results(InFolder):
    ROW = ("S1", "CIFAR-10", 7, "SmallNet", None)

    def training(self, best, contracted="yes"):
        return {"best": str(best), "last": str(best - 25), "train_error": "25", "contracted": contracted}

    def line(self, bests, budget=Budget(), setting="none"):
        row = Row(*self.ROW, setting, [("top1", 78.0, 0.5)])
        text, lines = results.results_table([(row, [self.training(best) for best in bests])], budget)
        return text.splitlines()[1], lines[2]

    def test_means_deviations_and_measures_are_those_of_the_definition(self):
        three = [self.training(best) for best in (75, 81.25, 87.5)]
        self.assertEqual(results.measured(three, "top1"), (3, 81.25, 6.25))  # n - 1
        self.assertEqual(results.measured(three, "best_test_error")[1], 18.75)
        self.assertEqual(results.measured(three, "last_test_error")[1], 43.75)
        self.assertEqual(results.measured(three, "train_error"), (3, 25, 0))
        self.assertEqual(results.measured(three[:1], "top1"), (1, 75, None))
        self.assertEqual(results.measured([{"train_error": ""}], "train_error")[0], 0)

    def test_differences_beyond_three_deviations_are_marked(self):
        self.assertEqual(
            self.line([76.75, 77.25])[1],
            "| CIFAR-10 | 7 | SmallNet | none | 1 | best test accuracy | 2 | 150 | 77.00 ± 0.35 | 78.00 ± 0.50 "
            "| -1.00 | yes | yes |",
        )
        self.assertIn("| 1 | 150 | 79.50 | 78.00 ± 0.50 | +1.50 | yes |", self.line([79.5])[1])
        self.assertIn("+1.51 | **no**, +3.0 |", self.line([79.51])[1])
        row = Row(*self.ROW, "none", [("top1", 80.31, 0.27)])
        self.assertIn("| +0.81 | yes |", results.results_table([(row, [self.training(81.12)])], Budget())[1][2])
        self.assertIn("-2.00 | **no**, -4.0 |", self.line([76])[1])
        half = 0.5 / math.sqrt(2)  # two seeds of deviation 0.5: three of both are 2.12
        self.assertIn("80.10 ± 0.50 | 78.00 ± 0.50 | +2.10 | yes |", self.line([80.1 - half, 80.1 + half])[1])
        self.assertIn("+2.15 | **no**, +3.0 |", self.line([80.15 - half, 80.15 + half])[1])
        self.assertIn("| none | 0 to 1 | best", self.line([78], Budget(uniform_norms=True))[1])
        self.assertIn("| other budget |", self.line([76], Budget(epochs=10))[1])
        teacher = Budget(teacher_width=8, teacher_epochs=12)
        text, line = self.line([78], teacher, "KD")
        self.assertIn("| KD | 1 | best test accuracy | 1 | 150 (teacher of width 8: 12) | 78.00 |", line)
        numbers = "KD,ones,top1,1,150,8,12,78.00,,78.00,0.50,+0.00,+0.00,other budget,yes"
        self.assertEqual(text, f"S1,CIFAR-10,7,SmallNet,,{numbers}")
        self.assertIn("| 1 | 150 | 78.00 |", self.line([78], teacher)[1])  # a row without
        row = Row(*self.ROW, "none", [("top1", 78.0, 0.5)])
        pair = (row, [self.training(78), self.training(78, "no")])
        self.assertTrue(results.results_table([pair], Budget())[1][2].endswith("| yes | no |"))

    def test_a_folder_says_what_its_training_came_to_once_it_has_ended(self):
        folder = self.folder / "cifar10-k3-compact-e2-s3"
        folder.mkdir()
        log = folder / "log.csv"
        self.assertIsNone(results.finished(folder))
        comments = "# cifar train\n# model compact, 1234 parameters, data set cifar10\n"
        head = "epoch,train_accuracy,test_accuracy,seconds\n"
        first = comments + head + "1,0.25,0.75,3\n"
        log.write_text(first)
        self.assertIsNone(results.finished(folder))
        log.write_text(first + "2,0.5,0.625")
        self.assertIsNone(results.finished(folder))  # cut short
        log.write_text(first + "2,0.5,0.625,4\n")
        self.assertIsNone(results.finished(folder))  # not contracted
        (folder / "compact.onnx").touch()
        self.assertIsNone(results.finished(folder))  # nor is that whole
        (folder / "compact.onnx").write_text("model")
        found = ",".join(results.finished(folder).values())
        self.assertEqual(found, "cifar10-k3-compact,3,2,75.00,1,62.50,50.00,yes,7")
        wrong = ["2,nan,0.625,4", "2,0.5,1.5,4", "2,0.5,0.625,-1", "2,0.5,0.625,inf", "x,0.5,0.625,4", "2,0.5"]
        wrong += ["1,0.5,0.625,4", "3,0.5,0.625,4", "2.5,0.5,0.625,4", "nan,0.5,0.625,4", ",0.5,0.625,4", "9" * 200_000]
        for line in wrong:
            log.write_text(f"{first}{line}\n")
            with self.assertRaisesRegex(Failure, "log.csv: this is no log of a training"):
                results.finished(folder)
        for other in ("model compact, 1 parameters, data set cifar100", "model cl, 1 parameters, data set cifar10", ""):
            log.write_text(f"# {other}\n{head}1,0.25,0.75,3\n2,0.5,0.625,4\n")
            with self.assertRaisesRegex(Failure, "its log is that of another training"):
                results.finished(folder)

    def test_finished_trainings_are_read_from_a_file(self):
        found = results.read_trainings(self.file(HEADER + DONE + "cifar10-k3-cl-r4,1,10,50,,,,,,,\n"))
        self.assertEqual(list(found), ["cifar10-k3-compact-e2-s1", "cifar10-k3-cl-r4-e10-s1"])
        again = results.read_trainings(self.file(HEADER + DONE + DONE.replace("70", "71")))
        self.assertEqual(again["cifar10-k3-compact-e2-s1"]["best"], "71")  # the last counts
        self.refused(results.read_trainings, "training,seed\n", 'line 1: expected "training,')
        self.refused(results.read_trainings, HEADER + DONE[:20], "does not end")
        for line, message in (
            ("cut,short", "expected 11 fields"),
            ("a,b,150,74,,,,,,,", '"b" is no whole number from 0'),
            ("a,-1,150,74,,,,,,,", '"-1"'),
            ("a,1,0,74,,,,,,,", '"0" is no whole number from 1'),
            ("a,1,150,174,,,,,,,", '"174" is no number from 0 to 100'),
            ("a,1,150,,,,,,,,", '"" is no number'),
            ("a,1,150,74,151,,,,,,", "the best epoch is after the last"),
            ("a,1,150,74,1.5,,,,,,", '"1.5" is no whole number'),
            ("a,1,150,74,,75,,,,,", "the last accuracy is above"),
            ("a,1,150,74,,,,maybe,,,", 'not "maybe"'),
            ("a,1,150,74,,,,,nan,,", '"nan" is no number'),
        ):
            self.refused(results.read_trainings, f"{HEADER}{DONE}{line}\n", f"line 3: .*{message}")

    def test_the_page_is_as_it_was_drawn(self):
        shutil.copytree(ROOT / "docs/results", self.folder / "results")
        subprocess.run([REPRODUCE, "draw", "--results", self.folder / "results"], check=True)
        compared = subprocess.run(["diff", "-r", ROOT / "docs/results", self.folder / "results"])
        self.assertEqual(compared.returncode, 0)

    def test_a_page_that_cannot_be_drawn_stays(self):
        folder = self.folder / "results"
        shutil.copytree(ROOT / "docs/results", folder)
        page, trainings = folder / "experiments.md", folder / "trainings.csv"
        whole = page.read_text()
        for text, lines, error in (
            (whole.replace("<!-- end -->", "", 1), None, "table-S3 has no <!-- end -->"),
            (whole.replace("<!-- table-S3 -->", "<!-- table-S2 -->"), None, "there is no table-S2; there are table-S1"),
            (whole, HEADER, "there is no table-S3; there are none"),
        ):
            page.write_text(text)
            if lines:
                trainings.write_text(lines)
            drawn = subprocess.run([REPRODUCE, "draw", "--results", folder], capture_output=True, text=True)
            self.assertEqual(drawn.returncode, 1)
            self.assertRegex(drawn.stderr, f"^reproduce: error: .*{error}.*\n$")
            self.assertEqual(page.read_text(), text)


class Figures(InFolder):
    def check_drawn(self, name):
        self.assertTrue((self.folder / f"{name}.svg").read_text().rstrip().endswith("</svg>"))
        png = (self.folder / f"{name}.png").read_bytes()
        self.assertEqual(png[1:4], b"PNG")
        self.assertGreater(len(png), 5000)

    def curves(self, similarities=True):
        for place, title in enumerate(("SmallNet", "ExpandNet-CL")):
            folder = self.folder / title
            folder.mkdir(exist_ok=True)
            lines = "epoch,train_accuracy,test_accuracy,seconds,min_gradient_similarity\n"
            for epoch in range(1, 4):
                share = 0.25 * epoch - 0.125 * place
                lines += f"{epoch},{share},{share - 0.0625},1,{share - 0.5}\n"
            (folder / "log.csv").write_text(lines)
            (folder / "similarities.csv").unlink(missing_ok=True)
            if similarities:
                numbers = (-0.5, 0.25 * place, 0.5)
                (folder / "similarities.csv").write_text("cosine_similarity\n" + "".join(f"{n}\n" for n in numbers))
            yield title, folder

    def test_a_training_is_drawn_from_its_numbers(self):
        figures.plot_training(self.folder, "figure", "CIFAR-10's", list(self.curves()), True)
        self.assertEqual(
            (self.folder / "figure-curves.csv").read_text(),
            "epoch,SmallNet training error,ExpandNet-CL training error,SmallNet test error,ExpandNet-CL test error,"
            "SmallNet least similarity,ExpandNet-CL least similarity\n"
            "1,75.0,87.5,81.25,93.75,-0.25,-0.375\n"
            "2,50.0,62.5,56.25,68.75,0.0,-0.125\n"
            "3,25.0,37.5,31.25,43.75,0.25,0.125\n",
        )
        density = (self.folder / "figure-density.csv").read_text()
        self.assertTrue(density.startswith("cosine,SmallNet,ExpandNet-CL\n-0.6,"))
        self.check_drawn("figure")
        self.assertIn("ExpandNet-CL", (self.folder / "figure.svg").read_text())
        curves = list(self.curves(similarities=False))
        figures.plot_training(self.folder, "short", "CIFAR-10", curves, False)
        self.check_drawn("short")
        self.assertFalse((self.folder / "short-density.csv").exists())

    def test_similarities_that_are_none_are_refused(self):
        curves = list(self.curves())
        log, cosines = curves[1][1] / "log.csv", curves[1][1] / "similarities.csv"
        for path, text, error in (
            (cosines, "cosine_similarity\n0.5\n70\n", 'line 3: "70" is no number from -1 to 1'),
            (cosines, "cosine_similarity\nnan\n", 'line 2: "nan"'),
            (cosines, "0.5\n", 'line 1: expected "cosine_similarity"'),
            (cosines, "cosine_similarity\n0.5\n", "do not differ"),
            (log, re.sub(r"[-0-9.]+\n$", "\n", log.read_text()), "an epoch has no similarity of gradients"),
        ):
            good = path.read_text()
            path.write_text(text)
            with self.assertRaisesRegex(Failure, error):
                figures.plot_training(self.folder, "figure", "CIFAR-10", curves, True)
            path.write_text(good)
        cosines.unlink()
        with self.assertRaisesRegex(OSError, "similarities.csv"):
            figures.plot_training(self.folder, "figure", "CIFAR-10", curves, True)

    def test_a_picture_that_is_not_whole_does_not_replace_another(self):
        svg = self.file("<svg></svg>", "figure.svg")
        with self.assertRaisesRegex(Failure, "figure.svg: gnuplot did not draw it"):
            figures.run_gnuplot(self.folder, "nonsense\n", [], ["figure.svg"])
        self.assertEqual(svg.read_text(), "<svg></svg>")
        self.assertEqual(os.listdir(self.folder), ["figure.svg"])

    def test_landscapes_are_drawn_side_by_side(self):
        losses = {-1: (3, 2, 3), 0: (2, 1, 2), 1: (3, 2, 3)}
        rows = "\n".join("".join(f"{a - 1},{b},{row[a]}\n" for a in range(3)) for b, row in losses.items())
        for name in ("a.csv", "b.csv"):
            self.file("first,second,loss\n" + rows, name)
        figures.plot_landscapes(self.folder, "figure", "CIFAR-10", [("SmallNet", "a.csv"), ("CL", "b.csv")])
        self.check_drawn("figure")

    def test_a_density_is_a_mean_of_gaussians_of_silvermans_width(self):
        # Four samples: deviation sqrt(5/3) = 1.29, quartiles 0.75 and 2.25, so 1.5 / 1.34 is less.
        samples, bandwidth = [3, 0, 2, 1], 0.9 * (1.5 / 1.34) * 4**-0.2
        points = [-5 + 0.0065 * place for place in range(2001)]
        found = figures.density(samples, points)
        for point, value in zip(points[::100], found[::100]):
            kernels = [math.exp(-(((point - sample) / bandwidth) ** 2) / 2) for sample in samples]
            self.assertAlmostEqual(value, sum(kernels) / (4 * bandwidth * math.sqrt(2 * math.pi)), delta=1e-12)
        self.assertAlmostEqual(sum(found) * 0.0065, 1, delta=1e-6)
        self.assertTrue(all(map(math.isfinite, figures.density([1, 1, 1, 1, 2], points))))  # quartiles that are equal
        with self.assertRaisesRegex(Failure, "compare more batches"):
            figures.density([1, 1, 1], points)

    def test_labels_keep_their_distance(self):
        self.assertEqual(figures.spread_labels([1, 5, 3], 1), [1, 5, 3])
        self.assertEqual(figures.spread_labels([2, 2], 1), [2, 3])
        self.assertEqual(figures.spread_labels([0, 10, 0.5, 1], 1), [0, 10, 1, 2])


class Programs(InFolder):
    """The program, on a small set in CIFAR-10's layout."""

    def setUp(self):
        super().setUp()
        generator = random.Random(1)
        (self.folder / "data/cifar-10-batches-bin").mkdir(parents=True)
        for name in (*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"):
            images = (bytes([image % 10]) + generator.randbytes(3072) for image in range(60))
            (self.folder / f"data/cifar-10-batches-bin/{name}.bin").write_bytes(b"".join(images))
        self.file(HEADER + DONE + DONE.replace("k3", "k7").replace(",1,abc", ",100000,abc"), "trainings.csv")
        (self.folder / "figures").mkdir()

    def command(self, *words):
        given = ["--data", "data", "--out", self.folder / "out", "--cifar", CIFAR]
        named = [
            word
            for option in range(0, len(given), 2)
            if given[option] not in words
            for word in given[option : option + 2]
        ]
        return [REPRODUCE, *map(str, words), *(map(str, named) if words[0] != "draw" else [])]

    def reproduce(self, *words, code=0, says="^", error="^"):
        ended = subprocess.run(self.command(*words), cwd=self.folder, capture_output=True, text=True, timeout=600)
        self.assertEqual(ended.returncode, code, f"{words}: {ended.stdout}{ended.stderr}")
        self.assertRegex(ended.stdout, says)
        self.assertRegex(ended.stderr, error)
        self.assertNotIn("Traceback", ended.stderr)
        return ended

    def next(self, *words, **expected):
        files = ["--wanted", "wanted.csv", "--trainings", "trainings.csv", "--figures", "figures"]
        machine = [] if "--machine" in words else ["--machine", "other"]
        return self.reproduce("next", *words, *files, "--commit", "def", *machine, **expected)

    def lines(self, name):
        return (self.folder / name).read_text().splitlines()

    def test_a_table_trains_what_it_lacks(self):
        short = ["--epochs", 1, "--teacher-width", 1, "--teacher-epochs", 1]
        s4 = ["table", "S4", *short, "--seeds", 2]
        self.reproduce("table", "S4", "--list", says=r"cifar10-k3-cl\+fc-r4-init-hint .* 58.27 ± 3.83")
        row = r"\| ExpandNet-CL\+FC\+Init, r = 4 \| PKT \| 1 \| best test accuracy \| 2 \| 1 \(teacher of width 1: 1"
        self.reproduce(*s4, says=row, error="cifar10-resnet18-w1-e1-s1: epoch 1/1")
        table = self.lines("out/table-S4-e1-w1-e1.csv")
        self.assertEqual(len(table), 11)
        self.assertTrue(all(line.endswith(",yes") for line in table[1:]))
        for folder in (self.folder / "out/runs").iterdir():
            contracted = "nonlinear" not in folder.name and "resnet18" not in folder.name
            self.assertEqual((folder / "compact.onnx").exists(), contracted)
        self.assertNotIn("epoch", self.reproduce(*s4).stderr)  # a finished table trains nothing
        lacking = "cifar10-k3-compact-e1-s2"
        shutil.rmtree(self.folder / "out/runs" / lacking)
        self.assertEqual(self.reproduce(*s4, "--missing").stdout, lacking + "\n")
        self.assertEqual(self.reproduce(*s4).stderr.count("epoch"), 1)
        self.assertEqual(self.lines("out/table-S4-e1-w1-e1.csv"), table)
        # A training of the folder that is another, or is damaged.
        only = ["--rows", "cifar10-k3-compact", "--seeds", 1]
        runs = self.folder / "out/runs"
        shutil.copy(runs / "cifar10-k3-compact-e1-s2/compact.onnx", runs / "cifar10-k3-compact-e1-s1/compact.onnx")
        self.reproduce("table", "S4", *short, *only, code=1, error="compact.onnx: it recognises other test images")
        text = (self.folder / "out/table-S4-e1-w1-e1.md").read_text()
        self.assertNotIn("SmallNet", text)  # a number that is not believed is not in the table
        self.assertIn("1 row of the table without a training", text)
        shutil.rmtree(runs / "cifar10-k3-compact-e1-s1")
        shutil.copytree(runs / lacking, runs / "cifar10-k3-compact-e1-s1")
        self.reproduce("table", "S4", *short, *only, code=1, error="cifar10-k3-compact-e1-s1: .*another training")

    def test_what_needs_a_training_that_failed_is_not_run(self):
        start = self.folder / "out/runs/cifar10-k3-cl+fc-r4-nonlinear-e1-s1"
        start.mkdir(parents=True)
        (start / "log.csv").write_text("text\n")
        rows = ["--rows", "cifar10-k3-cl+fc-r4-init", "cifar10-k3-cl-r4"]
        error = r"nonlinear-e1-s1: .*\n.*init-e1-s1: not run, for it needs one that failed"
        ended = self.reproduce("table", "S3", *rows, "--epochs", 1, "--seeds", 1, code=1, error=error)
        self.assertIn("ExpandNet-CL, r = 4", ended.stdout)  # the others go on
        self.assertIn("1 row of the table without a training", ended.stdout)

    def test_killed_at_any_moment_a_table_goes_on_to_what_it_would_have_been(self):
        words = ["table", "S3", "--rows", "cifar10-k3-compact", "cifar10-k3-cl-r4", "--seeds", 1, "--epochs", 80]
        self.reproduce(*words, "--out", "uncut")
        kills, generator = 0, random.Random()
        for attempt in range(100):
            process = subprocess.Popen(
                self.command(*words, "--out", self.folder / "cut"),
                cwd=self.folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                code = process.wait(generator.uniform(0.3, 1) if attempt < 30 else None)
                self.assertEqual(code, 0)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                self.wait_for_orphans()
        self.assertGreater(kills, 0)
        self.assertTrue(
            filecmp.cmp(self.folder / "cut/table-S3-e80.csv", self.folder / "uncut/table-S3-e80.csv", False)
        )

    def wait_for_orphans(self):
        """Trainings are killed with the program that began them."""
        for _ in range(200):
            commands = []
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    commands.append(path.read_bytes())
            if not any(str(self.folder).encode() in each and b"--resume" in each for each in commands):
                return
            time.sleep(0.05)
        self.fail("a training lives on")

    def test_one_program_at_a_time_is_in_a_folder(self):
        runs = self.folder / "out/runs"
        runs.mkdir(parents=True)
        held = os.open(runs, os.O_RDONLY)
        self.addCleanup(os.close, held)
        fcntl.flock(held, fcntl.LOCK_EX)
        self.reproduce("table", "S3", "--epochs", 1, code=1, error="another process trains in it")

    def test_rows_without_their_data_stay_empty(self):
        rows = ["--rows", "cifar*-k3-compact", "--seeds", 1, "--epochs", 1]
        empty = "1 row of the table without a training"
        self.reproduce("table", "S3", *rows, says=empty, error="Without CIFAR-100, whose rows stay empty")
        self.reproduce("table", "S8", code=1, error="there is none of the data sets of table S8")

    def test_rows_are_taken_from_finished_trainings(self):
        table = ["table", "S3", "--epochs", 2, "--trainings", "trainings.csv", "--seeds", 1]
        drawn = [REPRODUCE, *map(str, table), "--out", "drawn"]
        ended = subprocess.run(drawn, cwd=self.folder, check=True, capture_output=True, text=True)
        self.assertIn("SmallNet | none | 1 | best test accuracy | 1 | 2 | 70.00 |", ended.stdout)
        self.assertFalse((self.folder / "drawn/runs").exists())
        both = self.reproduce(*table, "--rows", "cifar10-k3-compact", "cifar10-k3-fc-r4", says=r"SmallNet .* 70.00 \|")
        self.assertIn("FC(Arora18)", both.stdout)
        self.assertEqual(os.listdir(self.folder / "out/runs"), ["cifar10-k3-fc-r4-e2-s1"])

    def test_blocks_stay_what_they_began_as(self):
        (run,) = runs_of(Row("S3", "CIFAR-10", 3, "ACNet", None, "none"), 1, Budget(epochs=1))
        _, compared = curves_of("S2", "cifar10", 3, 1)[2]
        for device, log, expected in (
            ("cuda", "", ("cuda", "layered")),
            ("cpu", "", ("cpu", "auto")),
            ("cuda", "# cifar train --compute layered --device cuda\n", ("cuda", "layered")),
            ("cpu", "# cifar train --compute layered --device cuda\n", ("cpu", "layered")),
            ("cuda", "# cifar train --compute auto\n", ("cpu", "auto")),
        ):
            trainings = reproduce.Trainings(argparse.Namespace(out=self.folder / "blocks", device=device))
            reproduce.folder_of(trainings.options, run.name).mkdir(parents=True, exist_ok=True)
            (reproduce.folder_of(trainings.options, run.name) / "log.csv").write_text(log)
            where, options = trainings.device(run)
            self.assertEqual((where, options["compute"]), expected)
            self.assertEqual(trainings.device(compared)[0], "cpu")

    def test_figures(self):
        for figure, name, options in (
            ("S1", "figure-S1-cifar10-k3-e1-b3", ["--batches", 3, "--points", 5]),
            ("S2", "figure-S2-cifar10-k3-e1-b3", ["--batches", 3]),
            ("S4", "figure-S4-cifar10-k3-e1", []),
        ):
            self.reproduce("figure", figure, "--epochs", 1, *options)
            for kind in ("svg", "png", "gp"):
                self.assertTrue((self.folder / f"out/{name}.{kind}").stat().st_size)
        self.assertEqual(self.reproduce("figure", "S4", "--epochs", 1, "--missing").stdout, "")

    def test_the_queue(self):
        wanted = "options,rows,seeds,minutes\n"
        wanted += "table S1 --epochs 2,cifar10-k7-compact,2,1\n"
        wanted += "table S3 --epochs 2,cifar10-k3-compact cifar10-k3-cl+fc-r4-init,2,1\n"
        self.file(wanted, "wanted.csv")
        listed = self.next("--minutes", 0, "--list").stdout.splitlines()
        self.assertEqual(len(listed), 4)  # not what is done
        self.assertEqual(listed[0].split(), ["1667", "cifar10-k7-compact-e2-s2"])  # by the rate of its kind
        self.assertIn("2 cifar10-k3-cl+fc-r4-init-e2-s1", "\n".join(listed))  # by the guess, with what it starts from
        self.next("--minutes", 0)
        self.assertFalse((self.folder / "out").exists())
        self.next("--minutes", 5)
        self.assertFalse((self.folder / "out/runs/cifar10-k7-compact-e2-s2").exists())  # it does not end in time
        self.assertFalse((self.folder / "out/runs/cifar10-k3-compact-e2-s1").exists())  # it is done
        trainings = self.lines("trainings.csv")
        self.assertEqual(len(trainings), 8)  # three, and what two of them started from
        text = "\n".join(trainings)
        self.assertRegex(text, r"cifar10-k3-compact,2,2,[0-9.]+,[12],[0-9.]+,[0-9.]+,yes,\d+,def,other")
        self.assertRegex(text, r"cifar10-k3-cl\+fc-r4-nonlinear,1,2,.*,,\d+,def")
        shutil.rmtree(self.folder / "out")
        self.next("--minutes", 5)
        self.assertEqual(self.lines("trainings.csv"), trainings)  # nothing was missing
        self.file("\n".join(trainings[:3]) + "\n", "trainings.csv")
        self.next("--minutes", 5, "--jobs", 2)
        self.assertEqual(len(self.lines("trainings.csv")), 9)  # all of both lines, whatever it takes

    def test_the_queue_is_interrupted_and_keeps_figures(self):
        wanted = "options,rows,seeds,minutes\n"
        self.file(wanted + "table S3 --epochs 20000,cifar10-k3-fc-r4,1,0.001\n", "wanted.csv")
        self.next("--minutes", 0.05)
        log = self.lines("out/runs/cifar10-k3-fc-r4-e20000-s1/log.csv")
        self.assertTrue(any(line.startswith("1,") for line in log))
        self.assertEqual(len(self.lines("trainings.csv")), 3)
        # A signal ends the training too.
        process = subprocess.Popen(
            self.command("next", "--minutes", 5, "--jobs", 1, "--wanted", "wanted.csv", "--trainings", "trainings.csv"),
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.assertIn("epoch", process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        self.assertNotEqual(process.wait(20), 0)
        process.stderr.close()
        self.wait_for_orphans()
        self.file(wanted + "figure S4 --kernel 3 --epochs 1,,1,1\n", "wanted.csv")
        self.next("--minutes", 5)
        self.assertTrue((self.folder / "figures/figure-S4-cifar10-k3-e1.svg").stat().st_size)
        with open(self.folder / "trainings.csv", newline="") as file:
            self.assertIn("cifar10-k3-cl-r4-decayed-product", [line["training"] for line in csv.DictReader(file)])
        self.assertEqual(self.next("--minutes", 5, "--list").stdout, "")  # a figure that is there is not wanted

    def test_the_queue_takes_what_is_done_and_leaves_what_cannot_be(self):
        header = "options,rows,seeds,minutes\n"
        short = "--epochs 1 --teacher-width 1 --teacher-epochs 1"
        self.file(f"{header}table S4 {short},cifar10-k3-compact-kd,1,1\n", "wanted.csv")
        self.next("--minutes", 5, "--machine", "a host, of two")
        lines = f"figure S4 --dataset mnist --epochs 1,,,1\ntable S4 {short},cifar10-k3-*-kd,1,1\n"
        self.file(header + lines, "wanted.csv")
        # A teacher that is trained already is one; a data set that is not there keeps nothing else.
        self.next("--minutes", 5, error="Without mnist: data has no such files")
        with open(self.folder / "trainings.csv", newline="") as file:
            trainings = list(csv.DictReader(file))
        names = [line["training"] for line in trainings]
        self.assertIn("cifar10-k3-cl+fc-r4-kd-w1-e1", names)
        self.assertEqual(trainings[names.index("cifar10-resnet18-w1")]["machine"], "a host, of two")
        # A figure that failed is not kept, and not another in its place.
        self.reproduce("figure", "S4", "--epochs", 1)
        damaged = self.folder / "out/runs/cifar10-k3-compact-decayed-e2-s1"
        damaged.mkdir()
        (damaged / "checkpoint.safetensors").write_text("text")
        self.file(header + "figure S4 --epochs 2,,,1\n", "wanted.csv")
        self.next("--minutes", 5, code=1, error="reproduce: cifar10-k3-compact-decayed-e2-s1: ")
        self.assertEqual(os.listdir(self.folder / "figures"), [])
        # A folder or a figure that is damaged keeps nothing else, and the program's path may be relative.
        (damaged / "log.csv").write_text("text\nline\n")
        self.file(header + "figure S4 --epochs 2,,,1\ntable S3 --epochs 1,cifar10-k3-cl-r4,1,1\n", "wanted.csv")
        (self.folder / "cifar").symlink_to(CIFAR)
        self.next(
            "--minutes", 5, "--cifar", "./cifar", code=1, error=f"reproduce: .*{damaged.name}/log.csv: this is no log"
        )
        self.assertRegex("\n".join(self.lines("trainings.csv")), r"\ncifar10-k3-cl-r4,1,1,")

    def test_the_end_of_the_time_hides_no_failure(self):
        rows = "cifar10-k3-compact cifar10-k3-fc-r4"
        self.file(f"options,rows,seeds,minutes\ntable S3 --epochs 20000,{rows},1,1\n", "wanted.csv")
        damaged = self.folder / "out/runs/cifar10-k3-compact-e20000-s1"
        damaged.mkdir(parents=True)
        (damaged / "checkpoint.safetensors").write_text("text")
        self.next("--minutes", 0.05, "--jobs", 2, code=1, error="reproduce: cifar10-k3-compact-e20000-s1: ")

    def test_interrupted_or_without_output(self):
        process = subprocess.Popen(
            self.command("table", "S3", "--rows", "cifar10-k3-fc-r4", "--epochs", 20000, "--seeds", 1),
            cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.assertIn("epoch", process.stderr.readline())
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
        self.assertEqual(process.returncode, 1)
        self.assertTrue(said.endswith("interrupted; it goes on when it is started again\n"), said)
        self.wait_for_orphans()
        for redirection in (">&-", ">/dev/full"):
            command = f"{shlex.quote(str(REPRODUCE))} table S3 --list {redirection}"
            ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
            self.assertEqual(ended.returncode, 1)
            self.assertRegex(ended.stderr, "^reproduce: error: .*\n$")

    def test_mistakes(self):
        for words in (
            ["table", "S2"], ["table", "S1", "--rows", "cifar10-k9*"], ["table", "S1", "--seeds", "0"],
            ["figure", "S2", "--kernel", "4"], ["figure", "S9"], ["figure", "S2", "--seeds", "2"],
            ["figure", "S1", "--points", "4"], ["figure", "S2", "--points", "5"], ["figure", "S4", "--batches", "3"],
            ["table", "S1", "--out", ""], ["next", "--minutes", "inf"], ["next", "--minutes", "nan"],
            ["next", "--minutes", "1", "--device", "cuda"], ["next", "--minutes", "1", "--figures", "nowhere"],
            ["table", "S1", "--kernel", "3"], ["table", "S1", "--epochs", "0"], ["table", "S1", "--data", "nowhere"],
        ):  # fmt: skip
            self.reproduce(*words, code=2, error="^reproduce: error: .*; see --help\n$")
        without = subprocess.run([REPRODUCE, "table", "S1"], capture_output=True, text=True)
        self.assertEqual(without.returncode, 2)
        self.assertIn("--data", without.stderr)
        for words, error in (
            (["table", "S1", "--paper", "nowhere.csv"], "nowhere.csv"),
            (["table", "S1", "--trainings", "nowhere.csv"], "nowhere.csv"),
            (["table", "S1", "--trainings", str(PAPER)], "accuracy.csv: line 1: expected"),
            (["table", "S1", "--cifar", "/nowhere", "--epochs", "1"], "/nowhere"),
            (["table", "S1", "--out", "trainings.csv", "--epochs", "1"], "trainings.csv"),
        ):
            self.reproduce(*words, code=1, error=f"reproduce: .*{error}")
        for text, error in (
            ("table S3,cifar10-k3-*,1,1\n", "line 1: expected"),
            ("options,rows,seeds,minutes\ntable S3,cifar10-k9-*,1,1\n", 'line 2: "table S3" is refused'),
            ("options,rows,seeds,minutes\ntable S2,cifar10-k3-*,1,1\n", 'line 2: "table S2" is refused'),
            ("options,rows,seeds,minutes\ndraw,,1,1\n", 'line 2: "draw" is refused'),
            ("options,rows,seeds,minutes\ntable S3,cifar10-k3-*,0,1\n", 'line 2: "table S3" is refused'),
            ("options,rows,seeds,minutes\ntable S3,cifar10-k3-*,1,nan\n", 'line 2: .* is refused: "nan" is no number'),
            ("options,rows,seeds,minutes\nnext --minutes 1,,1,1\n", "line 2: .* is refused"),
            ("options,rows,seeds,minutes\ntable 'S3,cifar10-k3-*,1,1\n", "line 2: .* is refused: No closing quotation"),
        ):
            self.file(text, "wanted.csv")
            self.next("--minutes", 1, code=1, error=f"reproduce: error: .*wanted.csv: {error}")


if __name__ == "__main__":
    CIFAR = str(Path(sys.argv.pop(1)).resolve())
    unittest.main()
