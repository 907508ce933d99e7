"""The HTML edition: links lead to pages, pictures have their alternative texts, and what only
nbdev needs is left out."""

import importlib.util
import json
import re
from html import unescape
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def book():
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("book", ROOT / "docs" / "book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_two_chapters_become_pages_whose_links_lead_to_pages(book, tmp_path):
    book.main([str(tmp_path), "--only", "01_boxes", "53_equivalence"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "01_boxes.html",
        "53_equivalence.html",
    ]
    pages = {f"{path.stem}.html" for path in (ROOT / "nbs").rglob("*.ipynb")}
    for path in tmp_path.iterdir():
        text = path.read_text(encoding="utf-8")
        links = set(re.findall(r'<a[^>]* href="([^"#:]+)["#]', text))
        assert pages <= links  # the contents name every chapter
        assert [link for link in links if ".ipynb" in link] == []
        assert "#| " not in text
        assert "nbdev_export()" not in text
        assert "prefers-color-scheme: dark" in text
        assert len(re.findall(r"<img[^>]*alt=", text)) == len(pictures_of(path.stem)) > 0


def pictures_of(name):
    """Pictures that a notebook shows."""
    (path,) = (ROOT / "nbs").rglob(f"{name}.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_a_chapter_that_is_not_there_is_named(book, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        book.main([str(tmp_path / "new"), "--only", "99_nothing"])
    assert "there is no notebook 99_nothing" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_page_keeps_what_is_read_and_leaves_out_what_is_not(book, tmp_path, monkeypatch):
    picture = new_output(
        "display_data",
        {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"},
        metadata={"image/png": {"alt": "Boxes < 3 & masks"}},
    )
    widget = new_output(
        "display_data",
        {book.WIDGET: {"model_id": "1", "version_major": 2}, "text/plain": "interactive(…)"},
    )
    cells = [
        new_markdown_cell(
            "# Title\n\n> quote\n\nSee [02 batch](02_data.ipynb#masks) and $x_i < y$, "
            "[papers](https://a.org/b.ipynb)."
        ),
        new_code_cell("#| default_exp one"),
        new_code_cell("#| export\ndef kept(): pass", outputs=[picture, widget]),
        new_code_cell("#| hide\nimport nbdev; nbdev.nbdev_export()"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "01_one.ipynb")
    nbformat.write(new_notebook(cells=cells[:1]), tmp_path / "02_data.ipynb")
    monkeypatch.setattr(book, "NOTEBOOKS", tmp_path)
    text = book.page(tmp_path / "01_one.ipynb", book.chapters(), "mathjax.js")
    assert 'href="02_data.html#masks"' in text
    assert 'href="https://a.org/b.ipynb"' in text
    assert 'src="mathjax.js"' in text
    assert [unescape(alt) for alt in re.findall(r'alt="([^"]*)"', text)] == ["Boxes < 3 & masks"]
    assert "kept" in text
    for word in ("default_exp", "nbdev_export", "#| export", "interactive(", "In&nbsp;["):
        assert word not in text
    assert "$x_i &lt; y$" in text
    assert "02 data →" in text
    assert "← " not in text
