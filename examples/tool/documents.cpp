// SPDX-License-Identifier: Apache-2.0
#include "documents.hpp"

#include <vector>

namespace tool {

namespace {

std::vector<const CLI::App*> subcommands(const CLI::App& app) {
  return app.get_subcommands([](const CLI::App*) { return true; });
}

std::vector<const CLI::Option*> options(const CLI::App& app) {
  return app.get_options([](const CLI::Option*) { return true; });
}

/// "-o, --output"
std::string flags(const CLI::Option& option, const std::string& separator) {
  std::string text;
  for (const std::string& name : option.get_snames())
    text += (text.empty() ? "-" : separator + "-") + name;
  for (const std::string& name : option.get_lnames())
    text += (text.empty() ? "--" : separator + "--") + name;
  return text;
}

/// "everywhere size interior" of "TEXT:{everywhere,size,interior}"; empty where any value will do.
std::string choices(const CLI::Option& option) {
  const std::string type = option.get_type_name();
  const auto begin = type.find('{'), end = type.rfind('}');
  if (begin == std::string::npos || end == std::string::npos) return "";
  std::string list = type.substr(begin + 1, end - begin - 1);
  for (char& c : list) c = c == ',' ? ' ' : c;
  return list;
}

bool takes_value(const CLI::Option& option) { return option.get_items_expected_max() > 0; }

std::string value_name(const CLI::Option& option) {
  std::string list = choices(option);
  for (char& c : list) c = c == ' ' ? '|' : c;
  return list.empty() ? option.get_type_name() : list;
}

/// Text for roff: a line of it, with nothing that roff would take for its own.
std::string roff(const std::string& text) {
  std::string result;
  for (const char c : text) {
    if (c == '\\') {
      result += "\\e";
    } else if (c == '-') {
      result += "\\-";
    } else if (c == '\n') {
      result += "\n.br\n";
    } else {
      result += c;
    }
  }
  return result.starts_with('.') || result.starts_with('\'') ? "\\&" + result : result;
}

std::string bold(const std::string& text) { return "\\fB" + roff(text) + "\\fR"; }
std::string italic(const std::string& text) { return "\\fI" + roff(text) + "\\fR"; }

std::string described(const CLI::Option& option) {
  std::string text = ".TP\n";
  if (option.get_positional()) {
    text += italic(option.get_name());
  } else {
    text += bold(flags(option, ", "));
    if (takes_value(option)) text += " " + italic(value_name(option));
  }
  text += "\n" + roff(option.get_description());
  const std::string standard = option.get_default_str();
  if (!standard.empty()) text += " (by default " + roff(standard) + ")";
  return text + "\n";
}

}  // namespace

std::string man_page(const CLI::App& app, const std::string& version) {
  const std::string name = app.get_name();
  std::string page = ".TH " + name + " 1 \"\" \"" + name + " " + version +
                     "\" \"User Commands\"\n" + ".SH NAME\n" + name +
                     " \\- contract linear layers of networks to one\n" + ".SH SYNOPSIS\n.B " +
                     name + "\n.I COMMAND\n[\\fIOPTION\\fR...]\n" + ".SH DESCRIPTION\n" +
                     roff(app.get_description()) + "\n.SH OPTIONS\n";
  for (const CLI::Option* option : options(app)) page += described(*option);
  page += ".SH COMMANDS\n";
  for (const CLI::App* command : subcommands(app)) {
    page += ".SS " + name + " " + command->get_name();
    for (const CLI::Option* option : options(*command)) {
      if (option->get_positional()) page += " " + option->get_name();
    }
    page += "\n" + roff(command->get_description()) + "\n";
    for (const CLI::Option* option : options(*command)) {
      if (option != command->get_help_ptr()) page += described(*option);
    }
  }
  return page + ".SH EXIT STATUS\n" + roff(app.get_footer()) + "\n";
}

std::string bash_completion(const CLI::App& app) {
  std::string commands, of_commands, of_options;
  for (const CLI::Option* option : options(app)) commands += flags(*option, " ") + " ";
  for (const CLI::App* command : subcommands(app)) {
    commands += command->get_name() + " ";
    std::string words;
    for (const CLI::Option* option : options(*command)) {
      if (option->get_positional()) continue;
      words += (words.empty() ? "" : " ") + flags(*option, " ");
      if (!takes_value(*option)) continue;
      const bool file = option->get_type_name() == "FILE";
      for (std::size_t i = 0; i < option->get_snames().size() + option->get_lnames().size(); ++i) {
        const auto& shorts = option->get_snames();
        const std::string flag =
            i < shorts.size() ? "-" + shorts[i] : "--" + option->get_lnames()[i - shorts.size()];
        of_options += "    " + command->get_name() + "/" + flag + ") words='" + choices(*option) +
                      "' files=" + (file ? "1" : "") + " ;;\n";
      }
    }
    of_commands += "    " + command->get_name() + "/*) words='" + words + "' files=1 ;;\n";
  }
  commands.pop_back();
  return "# bash completion for " + app.get_name() + R"(
_concertina() {
  local current=${COMP_WORDS[COMP_CWORD]} words files=
  COMPREPLY=()
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W ')" +
         commands + R"(' -- "$current"))
    return
  fi
  case ${COMP_WORDS[1]}/${COMP_WORDS[COMP_CWORD - 1]} in
)" + of_options +
         of_commands + R"(  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  if [[ $files && $current != -* ]]; then
    local IFS=$'\n'
    compopt -o filenames
    COMPREPLY=($(compgen -f -- "$current"))
  fi
}
complete -F _concertina concertina
)";
}

}  // namespace tool
