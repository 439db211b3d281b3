# SPDX-License-Identifier: Apache-2.0
"""The figures: the numbers as CSV, a gnuplot script beside them, and what gnuplot draws from both."""

import csv
import math
import os
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path

from experiments import Failure
from results import log_of, similarities_of, write_text

# Colours that the colour-blind tell apart too. Source: Okabe, Ito, "Color universal design", 2008
COLOURS = ["#000000", "#e69f00", "#0072b2", "#56b4e9", "#d55e00", "#cc79a7", "#009e73"]


def quoted(text):
    return "'" + text.replace("'", "''") + "'"


def run_gnuplot(folder, script, inputs, outputs):
    """Draws pictures into a folder, from files of it; one that is there is replaced by one that is whole."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name in inputs:
            shutil.copy(folder / name, scratch)
        try:
            ended = subprocess.run(["gnuplot"], cwd=scratch, input=script, text=True, stderr=subprocess.PIPE)
        except FileNotFoundError:
            raise Failure("gnuplot is missing (Debian: apt install gnuplot-nox); the numbers are there") from None
        for name in outputs:
            path, end = Path(scratch, name), b"</svg>" if name.endswith(".svg") else b"IEND"
            if ended.returncode != 0 or not path.exists() or end not in path.read_bytes()[-16:]:
                raise Failure(f"{folder / name}: gnuplot did not draw it: {ended.stderr.strip()[-300:]}")
        for name in outputs:
            os.replace(Path(scratch, name), folder / name)


def draw(folder, name, width, height, inputs, body):
    """Writes NAME.gp into the folder and has it drawn as NAME.svg and NAME.png."""
    size = f" size {width},{height}"
    script = f"""# gnuplot {name}.gp, in this folder, draws {name}.svg and {name}.png.
set datafile separator ','
set key off
do for [format in "svg png"] {{
  if (format eq "svg") {{ set terminal svg{size} font 'sans,13' background 'white' }}
  else {{ set terminal pngcairo{size} font 'sans,10' background 'white' }}
  set output {quoted(name + '.')}.format
{body}  unset multiplot
  unset output
}}
"""
    write_text(folder / f"{name}.gp", script)
    run_gnuplot(folder, script, inputs, [f"{name}.png", f"{name}.svg"])


def spread_labels(heights, gap):
    """Where labels go that want to stand at these heights: in order, each at least `gap` above the one below."""
    result, above = [0.0] * len(heights), -math.inf
    for place in sorted(range(len(heights)), key=heights.__getitem__):
        above = result[place] = max(heights[place], above + gap)
    return result


def chart(title, x_label, file, first, titles, heights, low, high):
    """A graph of the file's columns from `first` on, counted from 1, one for each title, labelled at these heights."""
    margin = 0.04 * (high - low)
    text = f"  unset label\n  set title {quoted(title)}\n  set xlabel {quoted(x_label)}\n"
    text += f"  set yrange [{low - margin}:{high + margin}]\n"
    for label, height, colour in zip(titles, spread_labels(heights, 0.055 * (high - low)), COLOURS):
        text += f"  set label {quoted(label)} at graph 1.02, first {height} textcolor rgb '{colour}' noenhanced\n"
    plots = [
        f"{quoted(file)} skip 1 using 1:{first + place} with lines linewidth 1.5 linecolor rgb '{colour}'"
        for place, colour in zip(range(len(titles)), COLOURS)
    ]
    return text + "  plot " + ", \\\n       ".join(plots) + "\n"


def density(samples, points):
    """The kernel density estimate at some points, with Gaussian kernels of Silverman's bandwidth.

    Source: Silverman, "Density estimation for statistics and data analysis", 1986, equation 3.31
    """
    deviation = statistics.stdev(samples) if len(samples) > 1 else 0
    if not deviation > 0:
        raise Failure("similarities that do not differ have no density; compare more batches")
    first, _, third = statistics.quantiles(samples, method="inclusive")
    bandwidth = 0.9 * (min(deviation, (third - first) / 1.34) or deviation) * len(samples) ** -0.2
    kernel = statistics.NormalDist(0, bandwidth)
    return [statistics.fmean(kernel.pdf(point - sample) for sample in samples) for point in points]


def write_columns(path, head, rows):
    write_text(path, "".join(",".join(map(str, row)) + "\n" for row in [head, *rows]))


def plot_training(folder, name, title, curves, compares):
    """A figure of trainings, of pairs of a title and the training's folder; `compares` the gradients of batches.

    Writes NAME-curves.csv (epoch, and for each curve training and test error in percent and, if they are compared, the
    least similarity of gradients) and NAME-density.csv (the density of the similarities at the end).
    """
    titles, logs = [title for title, _ in curves], [log_of(path) for _, path in curves]
    measures = [
        ("training error", "Training error, %", lambda epoch: 100 * (1 - epoch["train_accuracy"])),
        ("test error", "Test error, %", lambda epoch: 100 * (1 - epoch["test_accuracy"])),
    ]
    if compares:
        label = "Least cosine between gradients of batches"
        measures.append(("least similarity", label, lambda epoch: epoch["min_gradient_similarity"]))
        for (_, path), log in zip(curves, logs):
            if not all(-1 <= epoch.get("min_gradient_similarity", 2) <= 1 for epoch in log):
                raise Failure(f"{path / 'log.csv'}: an epoch has no similarity of gradients")
    file, charts = f"{name}-curves.csv", []
    head = ["epoch", *(f"{title} {measure}" for measure, _, _ in measures for title in titles)]
    epochs = [
        [f"{at[0]['epoch']:.0f}", *(of(epoch) for _, _, of in measures for epoch in at)]
        for at in zip(*logs, strict=True)
    ]
    write_columns(folder / file, head, epochs)
    inputs = [file]
    for place, (_, label, of) in enumerate(measures):
        numbers = [[of(epoch) for epoch in log] for log in logs]
        low, high = min(map(min, numbers)), max(map(max, numbers))
        ends, first = [curve[-1] for curve in numbers], 2 + place * len(curves)
        charts.append(chart(label, "epoch", file, first, titles, ends, low, max(high, low + 1e-9)))
    if compares:
        samples = [similarities_of(path) for _, path in curves]
        least, most = min(map(min, samples)), max(map(max, samples))
        beyond = 0.1 * (most - least)  # for the tails
        least, most = max(-1, least - beyond), min(1, most + beyond)
        points = [least + (most - least) * place / 400 for place in range(401)]
        columns = [density(sample, points) for sample in samples]
        file = f"{name}-density.csv"
        write_columns(folder / file, ["cosine", *titles], zip(points, *columns))
        inputs.append(file)
        label, peaks = "Density of these cosines at the end, labelled at its peak", list(map(max, columns))
        charts.append(chart(label, "cosine", file, 2, titles, peaks, 0, max(peaks)))
    head = "  set border 3\n  set tics nomirror\n  set grid\n  set rmargin 18\n"
    head += f"  set multiplot layout {(len(charts) + 1) // 2},2 title {quoted(title)}\n"
    draw(folder, name, 1300, 900 if len(charts) > 2 else 480, inputs, head + "".join(charts))


def plot_landscapes(folder, name, title, panels):
    """Landscapes side by side in one logarithmic scale, to 20 times the least loss: pairs of a title and the name of a
    file in the folder that `cifar landscape` wrote."""
    losses = []
    for _, file in panels:
        with open(folder / file, newline="") as lines:
            losses += [float(line["loss"]) for line in csv.DictReader(lines)]
    least = min(losses)
    most = max(min(max(losses), 20 * least), 1.01 * least)  # what is beyond is white-hot anyway
    columns = 3 if len(panels) > 4 else min(len(panels), 2)
    rows = -(-len(panels) // columns)
    title += "; loss, with lines at 0.7, 1, 1.4, 2, 2.8, 4, 5.6 and 8"
    body = f"""  set multiplot layout {rows},{columns} title {quoted(title)}
  set size ratio 1
  set logscale cb
  set cbrange [{least}:{most}]
  set palette defined (0 '#440154', 1 '#3b528b', 2 '#21908d', 3 '#5dc963', 4 '#fde725')
  set cbtics (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 11, 16)
  set autoscale xfix
  set autoscale yfix
  set tics out nomirror
"""
    for panel, file in panels:
        # Contours are tables without commas, so the image beside them becomes one as well.
        body += f"""  set datafile separator comma
  set table $image
  plot {quoted(file)} skip 1 using 1:2:3 with table
  set contour base
  unset surface
  set cntrparam levels discrete 0.7,1,1.4,2,2.8,4,5.6,8
  set table $lines
  splot {quoted(file)} skip 1 using 1:2:3
  unset table
  unset contour
  set surface
  set datafile separator whitespace
  set title {quoted(panel)} noenhanced
  plot $image using 1:2:3 with image, $lines using 1:2 with lines linewidth 0.7 linecolor rgb 'white'
"""
    draw(folder, name, 420 * columns, 60 + 380 * rows, [file for _, file in panels], body)


PICTURE = """set terminal svg size 1000,460 font 'sans,12' background 'white'
set output 'accuracy.svg'
set multiplot layout 1,2
set key tmargin center horizontal maxcols 2
set grid y
set rmargin 6
set ylabel 'best test accuracy, %'
set xtics rotate by -35
set xrange [-0.5:{last}.5]
set offsets 0, 0, 1, 1
"""


def draw_accuracy(tables, folder, models):
    """What expansion is worth: SmallNet, its expansions and the paper's, on both data sets, of two tables as CSV."""
    lines = [line for table in tables for line in csv.DictReader(table.splitlines())]
    rows = {
        (line["dataset"], line["kernel"], line["model"]): line
        for line in lines
        if line["setting"] == "none" and line["model"] in models
    }
    script = PICTURE.format(last=len(models) - 1)
    for dataset in ("CIFAR-10", "CIFAR-100"):
        script += f"set title '{dataset}'\n"
        plots = []
        for kernel, colour in (("3", "#0072b2"), ("7", "#d55e00")):
            own = [(at, rows[key]) for at, model in enumerate(models) if (key := (dataset, kernel, model)) in rows]
            if not own:
                continue
            for who, mean, deviation, shift, point in (
                ("ours", "mean", "std", -0.1, 7),
                ("paper", "paper_mean", "paper_std", 0.1, 6),
            ):
                block = f"${dataset.replace('-', '')}k{kernel}{who}"
                script += f"{block} << end\n"
                script += "".join(f"{at + shift} {row[mean]} {row[deviation] or 0}\n" for at, row in own)
                script += "end\n"
                style = f"with yerrorbars pt {point} lc rgb '{colour}' title 'kernel {kernel}, {who}'"
                plots.append(f"{block} using 1:2:3 {style}")
        ticks = ", ".join(f"'{model.removeprefix('ExpandNet-')}' {at}" for at, model in enumerate(models))
        script += f"set xtics ({ticks})\nplot {', '.join(plots)}\n"
    run_gnuplot(folder, script, [], ["accuracy.svg"])
