// concertina verify: files and folders, one line each.
// SPDX-License-Identifier: Apache-2.0
#include "commands.hpp"
#include "proofs.hpp"

#include <algorithm>
#include <filesystem>
#include <iostream>

namespace tool {
namespace {

using Json = nlohmann::json;

/// The paths with folders replaced by the safetensors files in them, sorted. Throws IoError for an
/// empty folder.
std::vector<std::string> files_in(const std::vector<std::string>& paths) {
  namespace fs = std::filesystem;
  std::vector<std::string> files;
  for (const std::string& path : paths) {
    std::error_code error;
    if (!fs::is_directory(path, error)) {
      files.push_back(path);
      continue;
    }
    std::vector<std::string> found;
    fs::recursive_directory_iterator entry(path, fs::directory_options::skip_permission_denied,
                                           error),
        end;
    for (; !error && entry != end; entry.increment(error)) {
      if (entry->path().extension() == ".safetensors") found.push_back(entry->path().string());
    }
    if (error) throw concertina::IoError("cannot read folder " + path + ": " + error.message());
    if (found.empty()) throw concertina::IoError("there is no .safetensors file in folder " + path);
    std::ranges::sort(found);
    files.insert(files.end(), found.begin(), found.end());
  }
  return files;
}

Json json_of(const Finding& finding) {
  const concertina::Report& report = finding.report;
  const auto number = [](long double x) { return static_cast<double>(x); };
  if (!finding.skipped.empty()) return {{"name", report.proof}, {"skipped", finding.skipped}};
  Json result{{"name", report.proof},          {"holds", finding.holds()},
              {"compared", report.compared},   {"worst", report.worst},
              {"error", number(report.error)}, {"bound", number(report.bound)},
              {"ulps", number(report.ulps)},   {"fraction", number(report.fraction())}};
  if (!finding.holds()) result["failure"] = report.failure;
  return result;
}

Json json_of(const std::string& path, const FileProof& proof) {
  Json findings = Json::array();
  for (const Finding& finding : proof.findings) findings.push_back(json_of(finding));
  return {{"file", path},         {"holds", proof.holds()}, {"layers", proof.layers},
          {"exact", proof.exact}, {"border", proof.border}, {"contracted", proof.contracted},
          {"findings", findings}};
}

std::string line_of(const std::string& path, const FileProof& proof) {
  const concertina::Report& rounding = proof.finding("rounding").report;
  std::string line = std::string(proof.holds() ? "ok    " : "FAIL  ") + path + ": " +
                     counted(proof.layers, "layer") + " -> " + proof.contracted + ", " +
                     proof.border + "; worst error " + brief(rounding.fraction()) +
                     " of its bound (" + brief(rounding.ulps) + " ulp)";
  std::string agree, held, failures, skipped;
  const auto append = [](std::string& list, const std::string& item) {
    list += (list.empty() ? "" : ", ") + item;
  };
  for (const Finding& finding : proof.findings) {
    const concertina::Report& report = finding.report;
    const bool is_proof =
        report.proof == "algebra" || report.proof == "rounding" || report.proof == "structure";
    if (!finding.skipped.empty()) {
      skipped += "; " + report.proof + " skipped: " + finding.skipped;
    } else if (!finding.holds()) {
      failures += "; " + report.proof + " FAILS: " + report.failure;
    } else if (is_proof) {
      append(held, report.proof);
    } else if (report.proof != "exact") {
      append(agree, report.proof + " " + brief(report.fraction()));
    }
  }
  if (!agree.empty()) line += "; agrees with " + agree;
  if (!held.empty()) line += "; " + held + " proved";
  return line + failures + skipped;
}

}  // namespace

ExitCode verify(const FilesOptions& options) {
  const std::vector<std::string> files = files_in(options.paths);
  Json results = Json::array();
  std::ptrdiff_t held = 0, number = 0;
  const ExitCode code = for_each_file(files, results, [&](const std::string& path) {
    Progress progress;
    progress.show("[" + std::to_string(++number) + "/" + std::to_string(files.size()) + "] " +
                  path);
    const auto file = concertina::io::read_safetensors(path);
    const FileProof proof = prove(file, graph_of(file, options.chain), progress);
    progress.clear();
    held += proof.holds() ? 1 : 0;
    if (options.json) {
      results.push_back(json_of(path, proof));
    } else {
      std::cout << printable(line_of(path, proof)) << std::endl;
    }
    return proof.holds() ? ok : failed;
  });
  for (Json& result : results) result.emplace("holds", false);  // where an error came before
  if (options.json) {
    std::cout << results.dump(2) << '\n';
  } else if (files.size() > 1) {
    std::cout << held << " of " << counted(std::ssize(files), "file") << " verified\n";
  }
  return code;
}

}  // namespace tool
