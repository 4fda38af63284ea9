"""An executed notebook as one page."""

import re
import subprocess
import sys

import nbformat

from conftest import ROOT


def report(*arguments):
    command = [sys.executable, ROOT / "tools" / "report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_page_has_the_outputs_and_loads_nothing_from_elsewhere(tmp_path):
    image = nbformat.v4.new_output("display_data", {"image/png": "iVBORw0KGgo="})
    text = nbformat.v4.new_output("stream", text="rmse 0.5")
    cells = [nbformat.v4.new_code_cell("1 + 1", outputs=[text, image]), nbformat.v4.new_markdown_cell("$a^2$")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "out.ipynb")
    done = report(tmp_path / "out.ipynb", "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "rmse 0.5" in page and "data:image/png;base64,iVBORw0KGgo=" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(["']?http""", page)


def test_what_is_not_a_notebook_is_refused_and_no_page_is_written(tmp_path):
    (tmp_path / "out.ipynb").write_text("no notebook")
    for name in ("out.ipynb", "missing.ipynb"):
        done = report(tmp_path / name, "-o", tmp_path / "page.html")
        assert done.returncode == 1 and f"{name}: expected an executed notebook" in done.stderr
        assert "Traceback" not in done.stderr and not (tmp_path / "page.html").exists()
