# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel: of the Python files with nothing but Python, with the operators by scikit-build-core (PEP 517).

An editable install (PEP 660) reads the Python files where they are.
"""

import base64
import hashlib
import pathlib
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).parent
SOURCES = ROOT / "src"


def _with_operators(config_settings):
    given = (config_settings or {}).get("operators", "off")
    if given not in ("on", "off"):
        raise ValueError(f"operators={given}: on or off")
    return given == "on"


def get_requires_for_build_wheel(config_settings=None):
    return ["scikit-build-core", "torch>=2.10"] if _with_operators(config_settings) else []


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    if _with_operators(config_settings):
        from scikit_build_core.build import build_wheel

        others = {key: value for key, value in config_settings.items() if key != "operators"}
        return build_wheel(wheel_directory, others, metadata_directory)
    sources = sorted(SOURCES.rglob("*.py"))
    return _write(wheel_directory, {str(path.relative_to(SOURCES)): path.read_bytes() for path in sources})


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    if _with_operators(config_settings):
        raise ValueError("the compiled operators cannot be in an editable install; install without -e, or without them")
    return _write(wheel_directory, {"concertina.pth": f"{SOURCES.resolve()}\n".encode()})


def _write(wheel_directory, files):
    """A wheel of these files: its name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = f"{project['name']}-{project['version']}"
    metadata = [
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {project['version']}",
        f"Summary: {project['description']}",
        f"License-Expression: {project['license']}",
        f"Requires-Python: {project['requires-python']}",
        *(f"Requires-Dist: {each}" for each in project["dependencies"]),
    ]
    files[f"{base}.dist-info/METADATA"] = "\n".join([*metadata, ""]).encode()
    files[f"{base}.dist-info/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: concertina\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = f"{base}.dist-info/RECORD"
    lines = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip('=')},{len(data)}"
        for name, data in files.items()
    ]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    with zipfile.ZipFile(
        pathlib.Path(wheel_directory) / f"{base}-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED
    ) as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return f"{base}-py3-none-any.whl"
