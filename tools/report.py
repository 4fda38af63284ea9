"""An executed notebook as one HTML page that opens without internet: images inside, no script from elsewhere.

python tools/report.py compare.out.ipynb -o compare.html
"""

import argparse
import sys
from pathlib import Path

import nbformat


def report(path):
    """The page as text."""
    from nbconvert import HTMLExporter

    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("widgets", None)  # their scripts would be loaded
    nothing = "require_js_url mathjax_url jquery_url mermaid_js_url mermaid_layout_elk_js_url widget_renderer_url"
    page, _ = HTMLExporter(
        embed_images=True, **dict.fromkeys(nothing.split(), "")
    ).from_notebook_node(notebook)
    return page


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebook", type=Path, help="executed notebook")
    parser.add_argument("-o", "--output", type=Path, required=True, help="file of the page")
    asked = parser.parse_args()
    try:
        page = report(asked.notebook)
    except (OSError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        sys.exit(
            f"{asked.notebook}: expected an executed notebook ({type(error).__name__}: {str(error)[:200]})"
        )
    asked.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
