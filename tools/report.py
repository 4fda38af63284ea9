"""An executed notebook as one HTML page that opens without internet: no image or script elsewhere.

python tools/report.py compare.out.ipynb -o compare.html
"""

import argparse
import sys
from pathlib import Path

import nbformat

SCRIPTS = ["require_js_url", "mathjax_url", "jquery_url", "mermaid_js_url"]
SCRIPTS += ["mermaid_layout_elk_js_url", "widget_renderer_url"]


def report(path):
    """The page as text; ValueError where a file is no notebook."""
    from nbconvert import HTMLExporter

    try:
        notebook = nbformat.read(path, 4)
        notebook.metadata.pop("widgets", None)  # their scripts would be loaded
        exporter = HTMLExporter(embed_images=True, **dict.fromkeys(SCRIPTS, ""))
        return exporter.from_notebook_node(notebook)[0]
    except Exception as error:  # nbformat raises what its parts meet
        problem = f"{type(error).__name__}: {str(error)[:200]}"
        raise ValueError(f"{path}: expected an executed notebook ({problem})") from error


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("notebook", type=Path, help="executed notebook")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of the page")
    args = parser.parse_args()
    try:
        page = report(args.notebook)
    except ValueError as error:
        sys.exit(str(error))
    args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
