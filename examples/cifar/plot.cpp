// SPDX-License-Identifier: Apache-2.0
#include "plot.hpp"

#include "similarity.hpp"
#include "text_file.hpp"

#include <concertina/error.hpp>

#include <spawn.h>
#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

extern char** environ;

namespace cifar {
namespace {

namespace fs = std::filesystem;

/// Colours that the colour-blind tell apart too.
/// Source  Okabe, Ito, "Color universal design", 2008
constexpr std::array colours = {"#000000", "#e69f00", "#0072b2", "#56b4e9",
                                "#d55e00", "#cc79a7", "#009e73"};

std::string colour(std::size_t line) { return colours[line % colours.size()]; }

std::string quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? std::string("''") : std::string(1, c);
  return result + "'";
}

/// A graph of one column for each line, labelled on the right at these heights or near them.
struct Chart {
  std::string title, x_label, csv;
  std::size_t first_column;  // of the CSV file, counted from 1; one column a line
  std::vector<double> labels;
  double low, high;  // of y
};

std::string script_of(const Chart& chart, const std::vector<Line>& lines) {
  const double margin = 0.04 * (chart.high - chart.low);
  std::string text = "  unset label\n  set title " + quoted(chart.title) + "\n  set xlabel " +
                     quoted(chart.x_label) + "\n  set yrange [" + shortest(chart.low - margin) +
                     ':' + shortest(chart.high + margin) + "]\n";
  const auto heights = spread_labels(chart.labels, 0.055 * (chart.high - chart.low));
  for (std::size_t l = 0; l < lines.size(); ++l) {
    text += "  set label " + quoted(lines[l].title) + " at graph 1.02, first " +
            shortest(heights[l]) + " textcolor rgb '" + colour(l) + "' noenhanced\n";
  }
  text += "  plot ";
  for (std::size_t l = 0; l < lines.size(); ++l) {
    text += (l > 0 ? ", \\\n       " : "") + quoted(chart.csv) +
            " skip 1 using 1:" + std::to_string(chart.first_column + l) +
            " with lines linewidth 1.5 linecolor rgb '" + colour(l) + "'";
  }
  return text + "\n";
}

/// A script that draws both formats: `body` draws the graphs.
std::string script_of(const std::string& name, int width, int height, const std::string& body) {
  const std::string size = " size " + std::to_string(width) + "," + std::to_string(height);
  return "# gnuplot " + name + ".gp, in this folder, draws " + name + ".svg and " + name +
         ".png.\nset datafile separator ','\nset key off\ndo for [format in \"svg png\"] {\n"
         "  if (format eq \"svg\") { set terminal svg" +
         size + " font 'sans,13' background 'white' }\n  else { set terminal pngcairo" + size +
         " font 'sans,10' background 'white' }\n  set output " + quoted(name + ".") + ".format\n" +
         body + "  unset multiplot\n  unset output\n}\n";
}

void run_gnuplot(const fs::path& folder, const std::string& script) {
  const std::string gnuplot = "gnuplot", change = "CDPATH= cd -- \"$1\" && exec gnuplot \"$2\"",
                    shell = "sh", flag = "-c";
  std::string directory = folder.string(), file = script;
  std::array<char*, 7> arguments{};
  std::vector<std::string> words = {shell, flag, change, gnuplot, directory, file};
  for (std::size_t w = 0; w < words.size(); ++w) arguments[w] = words[w].data();
  pid_t child = 0;
  const int failure = posix_spawnp(&child, "sh", nullptr, nullptr, arguments.data(), environ);
  int status = -1;
  if (failure == 0) waitpid(child, &status, 0);
  if (failure == 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
  const std::string again =
      "; the numbers are in " + folder.string() + ", and gnuplot draws them there from " + script;
  if (failure == 0 && WIFEXITED(status) && WEXITSTATUS(status) == 127) {
    throw concertina::Error("gnuplot is missing (Debian: apt install gnuplot-nox)" + again);
  }
  throw concertina::Error("gnuplot failed" + again);
}

/// The least and the largest of what `of` gives for the lines' epochs.
std::pair<double, double> range_of(const std::vector<Line>& lines,
                                   const std::function<double(const EpochRecord&)>& of) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  for (const Line& line : lines) {
    for (const EpochRecord& epoch : line.epochs) {
      low = std::min(low, of(epoch)), high = std::max(high, of(epoch));
    }
  }
  if (!(low < high)) high = low + 1;
  return {low, high};
}

void check(const std::vector<Line>& lines) {
  for (const Line& line : lines) {
    if (line.epochs.empty() || line.epochs.size() != lines.front().epochs.size() ||
        line.similarities.empty() != lines.front().similarities.empty()) {
      throw concertina::ShapeError(
          line.title + ": a curve of " + std::to_string(line.epochs.size()) + " epochs and " +
          std::to_string(line.similarities.size()) + " similarities beside one of " +
          std::to_string(lines.front().epochs.size()) + " and " +
          std::to_string(lines.front().similarities.size()));
    }
  }
}

}  // namespace

std::vector<double> spread_labels(const std::vector<double>& heights, double gap) {
  std::vector<std::size_t> order(heights.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::sort(order, {}, [&](std::size_t i) { return std::pair(heights[i], i); });
  // Clusters of labels that touch, each around the mean of what its labels want.
  struct Cluster {
    double wanted;  // of its lowest label, the mean over its labels
    std::size_t count;
  };
  std::vector<Cluster> clusters;
  for (const std::size_t i : order) {
    clusters.push_back({heights[i], 1});
    while (clusters.size() > 1) {
      const Cluster above = clusters.back(), below = clusters[clusters.size() - 2];
      const double top = below.wanted + gap * static_cast<double>(below.count);
      if (above.wanted >= top) break;
      clusters.pop_back();
      const auto a = static_cast<double>(above.count), b = static_cast<double>(below.count);
      clusters.back() = {(below.wanted * b + (above.wanted - gap * b) * a) / (a + b),
                         above.count + below.count};
    }
  }
  std::vector<double> result(heights.size());
  auto next = order.begin();
  for (const Cluster& cluster : clusters) {
    for (std::size_t k = 0; k < cluster.count; ++k) {
      result[*next++] = cluster.wanted + gap * static_cast<double>(k);
    }
  }
  return result;
}

void plot_training(const fs::path& folder, const std::string& name, const std::string& title,
                   const std::vector<Line>& lines) {
  check(lines);
  const std::string curves = name + "-curves.csv", densities = name + "-density.csv";
  const bool similarities = !lines.front().similarities.empty();
  struct Measure {
    std::string name, title;
    std::function<double(const EpochRecord&)> of;
  };
  std::vector<Measure> measures = {
      {"training error", "Training error, %",
       [](const EpochRecord& epoch) { return 100 * (1 - epoch.train_accuracy); }},
      {"test error", "Test error, %",
       [](const EpochRecord& epoch) { return 100 * (1 - epoch.test_accuracy); }}};
  if (similarities) {
    measures.push_back({"least similarity", "Least cosine between gradients of batches",
                        [](const EpochRecord& epoch) { return epoch.min_similarity.value_or(0); }});
  }
  std::string csv = "epoch";
  for (const Measure& measure : measures) {
    for (const Line& line : lines) csv += ',' + line.title + ' ' + measure.name;
  }
  csv += '\n';
  for (std::size_t e = 0; e < lines.front().epochs.size(); ++e) {
    csv += shortest(lines.front().epochs[e].epoch);
    for (const Measure& measure : measures) {
      for (const Line& line : lines) csv += ',' + shortest(measure.of(line.epochs[e]));
    }
    csv += '\n';
  }
  write_text(folder / curves, csv);

  std::vector<Chart> charts;
  for (std::size_t m = 0; m < measures.size(); ++m) {
    const auto [low, high] = range_of(lines, measures[m].of);
    Chart chart{.title = measures[m].title,
                .x_label = "epoch",
                .csv = curves,
                .first_column = 2 + m * lines.size(),
                .labels = {},
                .low = low,
                .high = high};
    for (const Line& line : lines) chart.labels.push_back(measures[m].of(line.epochs.back()));
    charts.push_back(std::move(chart));
  }
  if (similarities) {
    double least = 1, most = -1;
    for (const Line& line : lines) {
      const auto [low, high] = std::ranges::minmax(line.similarities);
      least = std::min(least, low), most = std::max(most, high);
    }
    const double beyond = 0.1 * (most - least);  // for the tails
    least = std::max(-1.0, least - beyond), most = std::min(1.0, most + beyond);
    std::vector<double> points;
    for (int i = 0; i <= 400; ++i) points.push_back(least + (most - least) * i / 400);
    Chart chart{.title = "Density of these cosines at the end, labelled at its peak",
                .x_label = "cosine",
                .csv = densities,
                .first_column = 2,
                .labels = {},
                .low = 0,
                .high = 0};
    std::vector<std::vector<double>> columns;
    std::string text = "cosine";
    for (const Line& line : lines) {
      const auto& column = columns.emplace_back(density(line.similarities, points));
      chart.labels.push_back(std::ranges::max(column));
      chart.high = std::max(chart.high, chart.labels.back());
      text += ',' + line.title;
    }
    text += '\n';
    for (std::size_t i = 0; i < points.size(); ++i) {
      text += shortest(points[i]);
      for (const auto& column : columns) text += ',' + shortest(column[i]);
      text += '\n';
    }
    write_text(folder / densities, text);
    charts.push_back(std::move(chart));
  }
  std::string body =
      "  set border 3\n  set tics nomirror\n  set grid\n  set rmargin 18\n"
      "  set multiplot layout " +
      std::to_string((charts.size() + 1) / 2) + ",2 title " + quoted(title) + "\n";
  for (const Chart& chart : charts) body += script_of(chart, lines);
  const int height = charts.size() > 2 ? 900 : 480;
  write_text(folder / (name + ".gp"), script_of(name, 1300, height, body));
  run_gnuplot(folder, name + ".gp");
}

void plot_landscapes(const fs::path& folder, const std::string& name, const std::string& title,
                     const std::vector<Panel>& panels) {
  const auto columns = panels.size() > 4 ? 3 : std::min(static_cast<int>(panels.size()), 2);
  const auto rows = (static_cast<int>(panels.size()) + columns - 1) / columns;
  double least = std::numeric_limits<double>::infinity(), most = 0;
  for (const Panel& panel : panels) {
    least = std::min(least, panel.least), most = std::max(most, panel.most);
  }
  most = std::max(std::min(most, 20 * least), 1.01 * least);  // what is beyond is white-hot anyway
  std::string body =
      "  set multiplot layout " + std::to_string(rows) + "," + std::to_string(columns) + " title " +
      quoted(title + "; loss, with lines at 0.7, 1, 1.4, 2, 2.8, 4, 5.6 and 8") +
      "\n  set size ratio 1\n  set logscale cb\n  set cbrange [" + shortest(least) + ":" +
      shortest(most) +
      "]\n  set palette defined (0 '#440154', 1 '#3b528b', 2 '#21908d', 3 '#5dc963', 4 '#fde725')\n"
      "  set cbtics (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 11, 16)\n  set autoscale xfix\n  set "
      "autoscale yfix\n  set tics out nomirror\n";
  for (const Panel& panel : panels) {
    // Contours are tables without commas, so the image beside them becomes one as well.
    body += "  set datafile separator comma\n  set table $image\n  plot " + quoted(panel.csv) +
            " skip 1 using 1:2:3 with table\n  set contour base\n  unset surface\n"
            "  set cntrparam levels discrete 0.7,1,1.4,2,2.8,4,5.6,8\n  set table $lines\n"
            "  splot " +
            quoted(panel.csv) +
            " skip 1 using 1:2:3\n  unset table\n  unset contour\n  set surface\n"
            "  set datafile separator whitespace\n  set title " +
            quoted(panel.title) +
            " noenhanced\n  plot $image using 1:2:3 with image, $lines using 1:2 with lines "
            "linewidth 0.7 linecolor rgb 'white'\n";
  }
  write_text(folder / (name + ".gp"), script_of(name, 420 * columns, 60 + 380 * rows, body));
  run_gnuplot(folder, name + ".gp");
}

}  // namespace cifar
