"""Writes docs/settings.md from the settings in kernel_utils.py; run it when a setting changes.

python tools/dev/settings_page.py
"""

import dataclasses
import inspect
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernel_utils"))
import kernel_utils as ku

PAGE = ROOT / "docs" / "settings.md"
HEADER = "| setting | default | what it does | accepted values |\n|---|---|---|---|"
INTRO = """# Settings

`tools/dev/settings_page.py` writes this page from `Config` and `InferConfig`, and a test keeps it
current.

The first cell of `train.ipynb` holds the settings that people change. Every other one works in the
same way: add a line to that cell, or give `-p NAME VALUE` to papermill. A misspelt name or a bad
value stops the run with one message that lists every problem. `recipe` is no setting of its own: it
names [settings to start from](recipes-regularisers.md).
"""


def groups(config):
    """(heading, fields) for each comment line that opens a group in the source of `config`."""
    fields = {field.name: field for field in dataclasses.fields(config)}
    found = [("general", [])]
    for line in inspect.getsource(config).splitlines():
        if comment := re.fullmatch(r" {4}# (.+)", line):
            found.append((comment[1], []))
        setting = re.match(r" {4}(\w+): ", line)
        if setting and setting[1] in fields:
            found[-1][1].append(fields.pop(setting[1]))
    assert not fields, f"not found in the source of {config.__name__}: {', '.join(fields)}"
    return [(heading, members) for heading, members in found if members]


def accepted(field):
    """The values that a setting takes: names, or a range of numbers."""
    if field.metadata.get("choices"):
        return " ".join(f"`{name}`" for name in field.metadata["choices"])
    low, high = field.metadata.get("low", -math.inf), field.metadata.get("high", math.inf)
    if high < 2**31:  # the seeds' bound says nothing to a reader
        return f"{low:g} to {high:g}"
    return f"from {low:g}" if low > -math.inf else ""


def default(field):
    value = str(field.default)
    if isinstance(field.default, float):
        value = f"{field.default:g}"
    if isinstance(field.default, tuple):
        value = ",".join(map(str, field.default))
    return f"`{value}`" if value else "empty"


def row(field):
    cells = [f"`{field.name}`", default(field), field.metadata["help"], accepted(field)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(fields):
    return "\n".join([HEADER, *map(row, fields)])


def page():
    parts = [INTRO]
    for heading, fields in groups(ku.Config):
        parts.append(f"## {heading[0].upper()}{heading[1:]}\n\n{table(fields)}\n")
    parts.append(
        "## Settings of infer.ipynb\n\n" + table(dataclasses.fields(ku.InferConfig)) + "\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
