"""``site check``: what it finds, and that our own site has none of it."""

from __future__ import annotations

import shutil

import pytest

from methodbench.cli import main
from methodbench.errors import MethodbenchError
from methodbench_leaderboard.check import check_site

HEAD = '<meta charset="utf-8"><title>t</title>'
PAGE = f'<!doctype html>\n<html lang="en"><head>{HEAD}{{}}</head>\n<body>{{}}</body></html>\n'


@pytest.fixture
def page(tmp_path):
    """Return a function that writes a page with a head and a body, and says what is wrong with it."""

    def make(head: str = "", body: str = "<p>x</p>") -> list[str]:
        (tmp_path / "index.html").write_text(PAGE.format(head, body))
        (tmp_path / "other.html").write_text(PAGE.format("", '<p id="here">x</p>'))
        return [str(problem) for problem in check_site(tmp_path)]

    return make


def test_the_site_of_the_made_up_records_has_no_problem(site):
    assert check_site(site) == []


def test_a_sound_page_with_links_to_papers_has_no_problem(page):
    assert (
        page(
            body='<a href="other.html#here">a</a> <a href="https://example.org/paper">b</a> <a href="#s=1">c</a>'
        )
        == []
    )


@pytest.mark.parametrize(
    ("head", "body", "line", "words"),
    [
        ("", '<a href="gone.html">a</a>', 3, "leads nowhere"),
        ("", '<a href="other.html#gone">a</a>', 3, "names a place that is not on its page"),
        ("", '<a href="../../etc/passwd">a</a>', 3, "leaves the site"),
        ("", '<a href="javascript:alert(1)">a</a>', 3, "links to javascript:"),
        ("", '<img alt="" src="https://example.org/pixel.png">', 3, "from another host"),
        ("", '<img alt="" src="//example.org/pixel.png">', 3, "from another host"),
        ("", '<img alt="" srcset="https://example.org/a.png 2x">', 3, "from another host"),
        ('<script src="https://cdn.example.org/x.js"></script>', "", 2, "from another host"),
        ('<link rel="stylesheet" href="https://example.org/x.css">', "", 2, "from another host"),
        ("", '<p id="a"></p><p id="a"></p>', 3, "given twice"),
        ("", "<div><p></div></p></section>", 3, "not valid HTML"),
    ],
)  # fmt: skip
def test_each_kind_of_problem_is_named_with_its_file_and_line(page, head, body, line, words):
    found = page(head, body)
    assert any(problem.startswith(f"index.html:{line}:") and words in problem for problem in found), found


def test_missing_titles_and_languages_are_named(tmp_path):
    (tmp_path / "index.html").write_text(
        "<!doctype html>\n<html><head><title> </title></head><body></body></html>"
    )
    messages = [problem.message for problem in check_site(tmp_path)]
    assert messages == ["does not say its language", "has no title"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.css", "p { color: red }\n@import url(https://example.org/x.css);"),
        ("a.css", "\np { background: url('//example.org/x.png') }"),
        ("a.js", "\nimport x from 'https://example.org/x.js';"),
        ("a.js", '\nfetch("https://example.org/data.json")'),
    ],
)
def test_styles_and_scripts_that_load_from_other_hosts_are_named(page, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    (found,) = page()
    assert found.startswith(f"{name}:2: loads ")


def test_names_of_xml_spaces_and_user_strings_are_no_requests(page, tmp_path):
    (tmp_path / "data.js").write_text(
        'const ns = "http://www.w3.org/2000/svg"; const note = "see https://example.org";'
    )
    (tmp_path / "a.css").write_text('p { background: url("data:image/png;base64,AAAA") url(x.png) }')
    assert page() == []


def test_the_command_lists_problems_and_exits_with_1(site, tmp_path, capsys):
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    with pytest.raises(SystemExit) as left:
        main(["site", "check", "--out", str(copy)])
    assert left.value.code == 0
    (copy / "about.html").unlink()
    with pytest.raises(SystemExit) as left:
        main(["site", "check", "--out", str(copy)])
    assert left.value.code == 1
    assert "leads nowhere" in capsys.readouterr().out


def test_a_folder_without_a_site_is_a_mistake(tmp_path):
    with pytest.raises(MethodbenchError, match="no site in"):
        check_site(tmp_path)


def test_a_site_of_sharded_runs_is_whole(made_up, store, tmp_path, monkeypatch):
    from methodbench_leaderboard import pages

    monkeypatch.setattr(pages, "MOST_RUN_PAGES", 3)
    site = pages.write_site(store, made_up.make_catalog(), tmp_path / "site").parent
    assert (site / "run.html").is_file()
    assert check_site(site) == []
