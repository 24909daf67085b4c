"""The site as files: links, commands, escaping, and how it is put in place."""

from __future__ import annotations

import csv
import filecmp
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from methodbench.errors import MethodbenchError
from methodbench.pictures import checked
from methodbench_leaderboard import build, downloads

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Reads a page, checking that tags are balanced; collects elements with their attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.path = path
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.cells: list[tuple[dict[str, str], str, list[str]]] = []
        """Of each td: attributes, text, links."""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, f"{path}: left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        assert len(values) == len(attrs), f"{self.path}: <{tag}> repeats an attribute"
        self.elements.append((tag, values))
        if tag == "td":
            self.cells.append((values, "", []))
        if tag == "a" and self.cells and any(name == "td" for name, _ in self.open):
            self.cells[-1][2].append(values.get("href", ""))
        if tag not in VOID:
            self.open.append((tag, values))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open, f"{self.path}: </{tag}> closes nothing"
        assert self.open[-1][0] == tag, (
            f"{self.path}: </{tag}> closes <{self.open[-1][0]}> at {self.getpos()}"
        )
        self.open.pop()

    def handle_data(self, data):
        self.texts.append((tuple(tag for tag, _ in self.open), data))
        if any(tag == "td" for tag, _ in self.open):
            attributes, text, links = self.cells[-1]
            self.cells[-1] = (attributes, text + data, links)


@pytest.fixture(scope="module")
def read(site) -> dict[str, Page]:
    return {str(path.relative_to(site)): Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_balanced_and_has_one_heading_and_a_title(read):
    assert len(read) > 60
    for path, page in read.items():
        tags = [tag for tag, _ in page.elements]
        assert tags.count("h1") == 1, path
        assert tags.count("main") == 1, path
        assert "title" in tags, path


def test_ids_are_unique_and_every_link_leads_somewhere(site, read):
    ids = {path: [a["id"] for _, a in page.elements if "id" in a] for path, page in read.items()}
    for path, page in read.items():
        assert len(set(ids[path])) == len(ids[path]), path
        for _, attributes in page.elements:
            for name in ("href", "src"):
                target = attributes.get(name, "")
                if not target or target.startswith("https://"):
                    continue
                file, _, anchor = target.partition("#")
                resolved = ((site / path).parent / file).resolve() if file else site / path
                assert resolved.is_file(), f"{path} links to {target}"
                # An anchor with "=" is state that a script reads.
                if anchor and "=" not in anchor:
                    assert anchor in ids[str(resolved.relative_to(site.resolve()))], f"{path}: #{anchor}"


def test_no_page_asks_another_host_for_anything(site, read):
    for path, page in read.items():
        for tag, attributes in page.elements:
            assert not any(name.startswith("on") for name in attributes), path
            for name, value in attributes.items():
                if "//" in value and name in ("href", "src", "srcset", "action", "data", "poster", "style"):
                    assert tag == "a", f"{path}: <{tag} {name}={value}>"
                    assert value.startswith(("https://arxiv.org/abs/", "https://github.com/")), path
    for name in ("site.css", "site.js"):
        text = (site / "static" / name).read_text()
        assert not re.search(r"https?://|@import|url\(", text)


def test_every_number_of_a_board_links_to_a_run_that_says_it(site, read):
    checked = 0
    for path, page in read.items():
        if not path.startswith("boards/"):
            continue
        for attributes, text, links in page.cells:
            classes = attributes.get("class", "").split()
            if "num" in classes and "rank" not in classes and re.search(r"\d", text):
                assert any("runs/" in link for link in links), f"{path}: {text!r}"
                checked += 1
    assert checked > 60


def test_every_run_has_a_page_with_its_command(site, store, read):
    runs = store.runs()
    assert len(runs) == 50
    for run in runs:
        page = read[f"runs/{run.id}.html"]
        code = [text for tags, text in page.texts if tags[-2:] == ("pre", "code")]
        assert run.command.split()[0] in code[0].split(), run.id
        assert f"--task {run.task}" in code[0] or run.method.startswith("evil")


def test_a_failed_cell_says_why_and_leads_to_its_run(read):
    board = read["boards/shrink/causal-lm.html"]
    statuses = [(text, links) for _, text, links in board.cells if "out of memory" in text]
    assert statuses
    assert all(any("runs/" in link for link in links) for _, links in statuses)
    words = " ".join(text for _, text in board.texts)
    assert "needed 9 GB, 6 GB were free" in words
    assert "never tried" in words


def test_values_that_are_not_finite_are_words(read):
    texts = [text for _, text, _ in read["boards/shrink/causal-lm.html"].cells]
    assert any("diverged (inf)" in text for text in texts)
    assert any("not a number" in text for text in texts)
    words = [text for page in read.values() for _, text, _ in page.cells]
    assert not any(re.fullmatch(r"\s*(nan|inf|None)\s*", text) for text in words)


def test_simulated_storage_is_never_hidden(read):
    page = read["boards/mask/causal-lm.html"]
    marked = [text for attributes, text, _ in page.cells if text.strip() == "simulated"]
    assert len(marked) == 3
    assert any("accounted 16.00" in text for _, text, _ in page.cells)


def test_hostile_strings_stay_text(read, made_up):
    for path, page in read.items():
        scripts = [attributes for tag, attributes in page.elements if tag == "script"]
        assert scripts, path
        for attributes in scripts:
            assert set(attributes) == {"src", "defer"}, path
            assert re.fullmatch(r"(\.\./)*static/[a-z]+\.js", attributes["src"]), path
        assert not [tag for tag, _ in page.elements if tag in ("iframe", "object", "embed")], path
        for attributes in (attributes for tag, attributes in page.elements if tag == "img"):
            assert set(attributes) == {"class", "src", "width", "height", "alt"}, path
            assert re.fullmatch(r"\.\./pictures/[0-9a-f]{24}\.png", attributes["src"]), path
        raw = page.path.read_text(encoding="utf-8")
        assert not set(raw) & {"\u202e", "\u2066", "\x07"}, path
    words = "".join(text for page in read.values() for _, text in page.texts)
    assert made_up.SCRIPT in words
    assert "\\u202e" in words


def test_methods_show_the_same_pictures_side_by_side(site, read):
    for method, other in (("glow", "noise"), ("noise", "glow")):
        page = read[f"methods/{method}.html"]
        found = [attributes for tag, attributes in page.elements if tag == "img"]
        # Two pictures, and the maps of two methods on each.
        assert len(found) == 6
        assert len({attributes["src"] for attributes in found}) == 6
        assert sum(f"map by {other}" in attributes["alt"] for attributes in found) == 2
        # Pictures of 32 x 24 at three times their size.
        assert all((attributes["width"], attributes["height"]) == ("96", "72") for attributes in found)
    assert not any(tag == "img" for tag, _ in read["methods/round.html"].elements)


def test_runs_show_their_pictures_and_keep_them_out_of_their_facts(site, store, read):
    (run,) = (run for run in store.runs() if run.method == "glow" and run.status == "ok")
    page = read[f"runs/{run.id}.html"]
    assert sum(tag == "img" for tag, _ in page.elements) == 4
    text = (site / f"runs/{run.id}.html").read_text()
    assert run.facts["pictures"][0]["overlay"][:60] not in text
    assert "steps" in text
    assert "overlay" not in (site / "results.json").read_text()


def test_files_of_pictures_are_pictures_and_nothing_else(site):
    found = sorted((site / "pictures").iterdir())
    assert len(found) == 6
    for path in found:
        assert path.suffix == ".png"
        assert checked(path.read_bytes()) == (32, 24)


def test_long_strings_are_cut_except_on_the_page_of_their_run(site, made_up):
    whole = [path for path in site.rglob("*.html") if made_up.LONG in path.read_text(encoding="utf-8")]
    assert len(whole) == 1
    assert whole[0].parent.name == "runs"


def test_file_names_are_plain(site):
    for path in site.rglob("*"):
        assert re.fullmatch(r"[a-z0-9._-]+", path.name), path


def test_tables_say_what_they_are_and_how_they_are_sorted(read):
    for path, page in read.items():
        tags = [tag for tag, _ in page.elements]
        assert tags.count("caption") == tags.count("table"), path
        for tag, attributes in page.elements:
            if tag == "th":
                assert attributes.get("scope"), path
    headers = [
        a for tag, a in read["boards/shrink/causal-lm.html"].elements if tag == "th" and "aria-sort" in a
    ]
    assert [header["aria-sort"] for header in headers] == ["descending"]


def test_drawings_are_described(read):
    for path, page in read.items():
        text = page.path.read_text(encoding="utf-8")
        for drawing in re.findall(r"<svg[^>]*role=\"(?:img|group)\".*?</svg>", text, re.DOTALL):
            assert "<title" in drawing, path
            if 'class="chart' in drawing:
                assert "<desc" in drawing, path


def test_downloads_hold_every_run_and_no_formula(site, store):
    with (site / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["id"] for row in rows} == {run.id for run in store.runs()}
    assert not [cell for row in rows for cell in row.values() if cell and cell[0] in "=+@"]
    document = json.loads((site / "results.json").read_text())
    assert len(document["runs"]) == 50
    values = [metric["value"] for run in document["runs"] for metric in run["metrics"]]
    assert "inf" in values
    assert None in values


def test_same_records_give_the_same_bytes(site, store, made_up, tmp_path):
    again = build(store, made_up.make_catalog(), tmp_path / "again").parent
    paths = sorted(str(path.relative_to(site)) for path in site.rglob("*") if path.is_file())
    assert paths == sorted(str(path.relative_to(again)) for path in again.rglob("*") if path.is_file())
    _, different, errors = filecmp.cmpfiles(site, again, paths, shallow=False)
    assert not different
    assert not errors


def test_an_empty_database_has_a_site(made_up, tmp_path):
    from methodbench.store import open_store

    with open_store(str(tmp_path / "empty.db")) as empty:
        page = build(empty, made_up.make_catalog(), tmp_path / "site")
    assert "holds no runs" in page.read_text()
    assert "unused" in Page(page.parent / "methods.html").path.read_text()


def test_a_build_replaces_the_site_and_leaves_nothing_beside_it(made_up, store, tmp_path):
    out = tmp_path / "site"
    build(store, made_up.make_catalog(), out)
    (out / "runs" / "stale.html").write_text("old")
    build(store, made_up.make_catalog(), out)
    assert not (out / "runs" / "stale.html").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_failed_build_leaves_the_old_site(made_up, store, tmp_path, monkeypatch):
    out = tmp_path / "site"
    build(store, made_up.make_catalog(), out)
    before = (out / "index.html").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device", "runs.html")

    monkeypatch.setattr(downloads, "write", full)
    with pytest.raises(MethodbenchError, match="No space left on device"):
        build(store, made_up.make_catalog(), out)
    assert (out / "index.html").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_folder_of_something_else_is_never_replaced(made_up, store, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(MethodbenchError, match="was not built by methodbench"):
        build(store, made_up.make_catalog(), tmp_path)
    with pytest.raises(MethodbenchError, match="is a file"):
        build(store, made_up.make_catalog(), tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_importing_the_package_stays_light():
    code = (
        "import sys, methodbench_leaderboard;"
        "print([name for name in ('jinja2', 'numpy', 'sqlmodel') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
