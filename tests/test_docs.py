"""README and docs/: links resolve, the page of settings is current."""

import importlib.util
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", flags=re.DOTALL | re.MULTILINE)


def prose(page):
    """The text of a page without its code."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in words]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: there is no {target}"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", prose(PAGES[0])))
    assert linked == {page.name for page in PAGES[1:]}


def places():
    """Names in the column `change` of the table "Where do I change ...?"."""
    text = (ROOT / "docs" / "development.md").read_text(encoding="utf-8")
    table = text.split("| I want | change")[1].split("\n\n")[0]
    cells = [row.split(" | ")[1] for row in table.splitlines()[2:]]
    return sorted({name for cell in cells for name in re.findall(r"`(\w+(?:\.\w+)?)`", cell)})


@pytest.mark.parametrize("name", places())
def test_what_one_changes_is_where_the_docs_say(name):
    """`name.py` is a file, `Class.method` and the others are defined in the core or a sibling."""
    if name.endswith(".py"):
        assert (ROOT / "kernel_utils" / name).is_file()
        return
    files = sorted((ROOT / "kernel_utils").glob("*.py"))
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    for part in name.split("."):
        defined = rf"^ *(?:def|class) {part}\b|^[\w, ]*\b{part}\b.* = "
        assert re.search(defined, sources, flags=re.MULTILINE), f"{part} is not defined"


def test_the_page_of_settings_is_current():
    path = ROOT / "tools" / "dev" / "settings_page.py"
    spec = importlib.util.spec_from_file_location("settings_page", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = tool.PAGE.read_text(encoding="utf-8")
    assert page == tool.page(), "run python tools/dev/settings_page.py"


def test_the_made_table_of_the_docs_has_classes_labels_and_grades(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "notebooks" / "sample", tmp_path / "notebooks" / "sample")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "heads-losses-metrics.md").read_text(encoding="utf-8")
    (block,) = [code for language, code in BLOCK.findall(text) if language == "python" and "to_csv" in code]
    exec(block, {})
    made = pd.read_csv("made/train.csv")
    assert list(made) == ["id", "excerpt", "grade", "level", "long", "easy"]
    assert sorted(made["grade"].unique()) == [1, 2, 3, 4]
