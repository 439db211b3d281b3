# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does beside: the reference, made of the public headers' docstrings; and files outside of docs/ that pages
link to, which become part of the site, sources as pages."""

import importlib.machinery
import importlib.util
import logging
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).resolve().parent.parent
DOCS, INCLUDE = ROOT / "docs", ROOT / "include/concertina"
log = logging.getLogger("mkdocs.hooks.concertina")

FIELD = re.compile(r"(Shapes|Requires|Ensures|Cost|Throws|Gradient|Source|Lifetime|Reach) +(.*)")
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
CODE = re.compile(r"^```.*?^```$|^<!--.*?-->$|`[^`]*`", re.S | re.M)
LANGUAGES = {".cpp": "cpp", ".hpp": "cpp", ".cu": "cpp", ".py": "python", ".sh": "bash", "python3": "python",
             "bash": "bash"}
copied = {}  # the files of the repository that are pages, by their place in the site


def public_names():
    loader = importlib.machinery.SourceFileLoader("public_names", str(ROOT / "scripts/public_names"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("public_names", loader))
    loader.exec_module(module)
    return lambda header: [name.rpartition("::")[2] for name in module.names(header)]


def prose(lines):
    """A docstring as Markdown: its fields as a list, indented text as code."""
    result, field = [], False
    for line in lines:
        if match := FIELD.match(line):
            result += [] if field else [""]
            result.append(f"- **{match[1]}** {match[2]}")
            field = True
        elif field and line.startswith("  "):
            result.append("  " + line.strip())
        else:
            result.append(line)
            field = field and bool(line)
    parts = "\n".join(result).split("`")  # every other one is code
    return "`".join(part if at % 2 else part.replace("<", "&lt;") for at, part in enumerate(parts))


def declaration(lines):
    """The head of what is declared, up to its body, its initialisers, or its semicolon, and in how many lines."""
    text, depth = "\n".join(lines), 0
    for at, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0 and (character in ";{" or re.match(r"\s+: ", text[at:at + 12])):
            return text[:at].rstrip(), text.count("\n", 0, at)
    return text, len(lines) - 1


def entries(header):
    """(docstring, declaration) of each that has one; namespace detail is left out."""
    lines, hidden, doc, at = header.read_text().split("\n"), 0, [], 0
    while at < len(lines):
        line = lines[at]
        if re.match(r"namespace (concertina::)?detail \{", line):
            hidden = 1
        elif re.match(r"\}  // namespace (concertina::)?detail", line):
            hidden = 0
        if not hidden and re.match(r"\s*///(?!<)", line):
            doc.append(re.sub(r"^\s*/// ?", "", line))
        elif doc:
            indent = len(line) - len(line.lstrip())
            heads, count = [], 0
            while True:  # the declarations right below, with no line between, are documented with it
                at += count
                head, count = declaration([text[indent:] for text in lines[at:at + 20]])
                heads.append(head)
                ends = lines[at + count].endswith(";")
                count += 1
                below = (lines[at + count:] or [""])[0]
                if not ends or not re.match(rf"\s{{{indent}}}(?!namespace|//|#|\}})\S", below):
                    break
            yield indent, doc, "\n".join(heads)
            doc = []
            at += count - 1
        at += 1


def title(head):
    head = re.sub(r"template <.*?>\n", "", head, flags=re.S) if "\n" in head else head
    for pattern in (r"\b(?:class|struct|concept|enum class) (\w+)", r"#define (\w+)", r"\busing (\w+)",
                    r"(operator ?[^\s(]+)\(", r"(\w+)\(", r"(operator \w+)", r"(\w+)(?: =.*)?$"):
        if match := re.search(pattern, head):
            return match[1]
    return head.split("\n")[-1]


def reference():
    """The page, and the public names that have no entry on it."""
    names, page, missing = public_names(), ["# Reference", "", "From the headers' own documentation.", ""], []
    for header in sorted([*INCLUDE.glob("*.hpp"), *INCLUDE.glob("io/*.hpp"), *INCLUDE.glob("cuda/*.hpp"),
                          *INCLUDE.glob("cuda/*.cuh")]):
        text = header.read_text()
        purpose = " ".join(line[3:] for line in text.split("// SPDX")[0].strip().split("\n"))
        page += [f"## {header.relative_to(INCLUDE)}", "", purpose, ""]
        shown = ""
        for indent, doc, head in entries(header):
            name = title(head).replace("<", "&lt;").replace("*", "&#42;")
            shown += f" {head}"
            page += [f"{'####' if indent else '###'} {name}", "", f"```cpp\n{head}\n```", "", prose(doc), ""]
        missing += [f"{header.name}: {name}" for name in names(header)
                    if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", f"{shown} {purpose}")]
    return "\n".join(page), missing


def on_files(files, config):
    page, missing = reference()
    for name in missing:
        log.warning("no docstring: %s", name)
    files.append(File.generated(config, "reference.md", content=page))
    for source in linked_files(Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path):
        copied[uri(source)] = source
        content = source.read_bytes() if uri(source).endswith(source.name) else listing(source)
        files.append(File.generated(config, uri(source), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def linked_files(pages):
    """The files outside of docs/ that pages link to, and so on from the pages among them."""
    reached, found = list(pages), []
    for page in reached:
        for target, _ in (destination(page, link) for _, link in links(page.read_text())):
            if target and target.is_file() and DOCS not in target.parents and target not in found:
                found.append(target)
                reached += [target] if target.suffix == ".md" else []
    return found


def links(text):
    """(start, target) of each link, outside of code."""
    text = CODE.sub(lambda match: " " * len(match[0]), text)
    return [(match.start(1), match[1]) for match in LINK.finditer(text) if not re.match(r"[a-z]+:|#", match[1])]


def destination(page, link):
    """The file or folder, and what follows it."""
    path, *anchor = link.partition("#")
    target = (page.parent / path).resolve()
    if target.is_dir() and (target / "README.md").is_file():
        target /= "README.md"
    return target if target.exists() else None, "".join(anchor)


def uri(source):
    """Where a file is in the site; one of code is a page."""
    if DOCS in source.parents:
        return str(source.relative_to(DOCS))
    path = f"repository/{source.relative_to(ROOT)}"
    return path if source.suffix in (".md", ".csv", ".onnx", ".svg") else f"{path}.md"


def listing(source):
    text = source.read_text()
    script = re.match(r"#!.*?(\w+)\n", text)
    language = LANGUAGES.get(source.suffix) or (LANGUAGES.get(script[1], "") if script else "")
    return f"# {source.relative_to(ROOT)}\n\n``````{language}\n{text}``````\n"


def on_page_markdown(markdown, page, config, files):
    here = page.file.src_uri
    source = copied.get(here) or (Path(page.file.abs_src_path) if page.file.abs_src_path else None)
    if source is None or source.suffix != ".md":
        return markdown
    for start, link in reversed(links(markdown)):
        target, anchor = destination(source, link)
        if target and target.is_file():
            inward = posixpath.relpath(uri(target), posixpath.dirname(here))
            markdown = markdown[:start] + inward + anchor + markdown[start + len(link):]
        elif target:  # a folder: nothing that the site has
            opening = markdown.rindex("[", 0, start)
            markdown = markdown[:opening] + markdown[opening + 1:start - 2] + markdown[start + len(link) + 1:]
    return markdown
