"""Write the book as HTML pages, with nbconvert alone: `python docs/book.py [FOLDER] [--only
NOTEBOOK …] [--mathjax ADDRESS]`.

Saved outputs are taken as they are, nothing is run. Pages are whole in themselves (pictures,
styles) but for MathJax, which draws the equations and is loaded from
ADDRESS; a copy on the disk will do to read without a network.
"""

import argparse
import re
from html import escape
from pathlib import Path

import nbformat
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter

NOTEBOOKS = Path(__file__).parents[1] / "nbs"
MATHJAX = "https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-chtml.js"
WIDGET = "application/vnd.jupyter.widget-view+json"

STYLE = Path(__file__).with_name("book.css").read_text(encoding="utf-8")

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<script>window.MathJax = {{
  tex: {{
    inlineMath: [["$", "$"], ["\\\\(", "\\\\)"]],
    displayMath: [["$$", "$$"], ["\\\\[", "\\\\]"]]
  }},
  options: {{ignoreHtmlClass: "input|output_text"}}
}};</script>
<script async src="{mathjax}"></script>
</head>
<body>
<nav class="book" aria-label="chapters">{contents}</nav>
<main>
{body}
<div class="turn">{turn}</div>
</main>
</body>
</html>
"""


def chapters() -> list[Path]:
    """List the notebooks in the order of the book: index, then by number."""
    found = [path for path in NOTEBOOKS.rglob("*.ipynb") if not path.name.startswith("_")]
    return sorted(found, key=lambda path: (path.stem != "index", path.stem))


def label(path: Path) -> str:
    """Name a chapter as the book does: 05 coco."""
    return path.stem.replace("_", " ")


def link(path: Path, text: str, here: bool = False) -> str:
    """Point to the page of a chapter."""
    return f'<a href="{path.stem}.html"{" aria-current=page" if here else ""}>{escape(text)}</a>'


def readable(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leave out what only nbdev needs, and what only a running kernel can show."""
    kept = []
    for cell in notebook.cells:
        directives = (
            re.findall(r"(?m)^#\| *(.*?)\s*$", cell.source) if cell.cell_type == "code" else []
        )
        if cell.cell_type == "code":
            cell.source = re.sub(r"(?m)^#\|.*\n?", "", cell.source).strip("\n")
        if "hide" in directives or not cell.source:
            continue
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]
        kept.append(cell)
    notebook.cells = kept
    return notebook


def style() -> str:
    """Give the styles of pages and code, for light and dark screens."""
    light, dark = (
        HtmlFormatter(style=name, nobackground=True).get_style_defs(".highlight")
        for name in ("default", "github-dark")
    )
    return STYLE + light + "\n@media (prefers-color-scheme: dark) {\n" + dark + "\n}"


def page(path: Path, book: list[Path], mathjax: str = MATHJAX) -> str:
    """Turn one notebook into a page."""
    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True
    )
    body, _ = exporter.from_notebook_node(readable(nbformat.read(path, 4)))
    body = re.sub(r'href="(?![a-z]+:)(?:[^"#]*/)?([^"#/]*)\.ipynb(?=["#])', r'href="\1.html', body)
    at = book.index(path)
    before, after = (book[i] if 0 <= i < len(book) else None for i in (at - 1, at + 1))
    turn = "".join(
        link(other, text.format(label(other))) if other else "<span></span>"
        for other, text in ((before, "← {}"), (after, "{} →"))
    )
    contents = "".join(link(other, label(other), other == path) for other in book)
    return PAGE.format(
        title=escape(label(path)),
        style=style(),
        mathjax=escape(mathjax),
        contents=contents,
        body=body,
        turn=turn,
    )


def main(arguments: list[str] | None = None) -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(
        prog="python docs/book.py", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "folder", nargs="?", default="_book", help="where the pages go (default: %(default)s)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NOTEBOOK", help="write only these, for example 09_layout"
    )
    parser.add_argument(
        "--mathjax",
        default=MATHJAX,
        metavar="ADDRESS",
        help="where pages load MathJax from (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    folder, book = Path(options.folder), chapters()
    unknown = set(options.only or ()) - {path.stem for path in book}
    if unknown:
        parser.error(
            f"there is no notebook {', '.join(sorted(unknown))}: there are "
            f"{', '.join(path.stem for path in book)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for path in book:
        if options.only and path.stem not in options.only:
            continue
        (folder / f"{path.stem}.html").write_text(
            page(path, book, options.mathjax), encoding="utf-8"
        )
    print(f"{folder / 'index.html'}")


if __name__ == "__main__":
    main()
