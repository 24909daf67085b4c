"""What came of a method's checks is kept in its package and shown, and says when it is of another version."""

from __future__ import annotations

import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from click.testing import CliRunner

from methodbench import hookspecs
from methodbench.catalog import Catalog, load_catalog
from methodbench.cli import cli
from methodbench.contract import Outcome, check_record_of, digest_of, write_check_record
from methodbench.errors import MethodbenchError
from methodbench.scaffold import write_package
from methodbench.store import Store

GOOD = Outcome(name="planted-teacher", status="passed", detail="right in 98%")
BAD = Outcome(name="deterministic", status="failed", detail="two <runs> differ")


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    """A catalogue with one method, whose package lies in a folder of its own."""
    made = write_package("my-method", "probe", load_catalog(points=()), parent=tmp_path)
    monkeypatch.syspath_prepend(str(made.folder))
    for name in [name for name in sys.modules if name.startswith("methodbench_my_method")]:
        monkeypatch.delitem(sys.modules, name)
    return load_catalog(points=[EntryPoint("mine", "methodbench_my_method.plugin", hookspecs.GROUP)])


def page_of(catalog: Catalog, store: Store, folder: Path) -> str:
    from methodbench_leaderboard import build

    return (build(store, catalog, folder).parent / "methods" / "my-method.html").read_text()


def test_a_record_is_shown_on_the_methods_page_until_the_method_changes(
    mine: Catalog, store: Store, tmp_path: Path
) -> None:
    method = mine.method("my-method")
    assert check_record_of(method, mine) is None
    assert "no record of its checks" in page_of(mine, store, tmp_path / "site")
    path = write_check_record(method, mine, [GOOD, BAD])
    assert path.parent.parent.name == "methodbench_my_method"
    record = check_record_of(method, mine)
    assert record is not None
    assert (record.summary(), record.good, record.is_of(method)) == ("1 passed, 1 failed", False, True)
    page = page_of(mine, store, tmp_path / "site")
    assert "To mend: 1 passed, 1 failed" in page
    assert "deterministic failed: two &lt;runs&gt; differ" in page
    assert "planted-teacher: right in 98%" in page
    assert "the method has changed since" not in page
    write_check_record(method, mine, [GOOD])
    assert "To mend" not in page_of(mine, store, tmp_path / "site")
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": "0" * 64}))
    assert "the method has changed since" in page_of(mine, store, tmp_path / "site")


def test_a_change_of_the_source_or_of_the_promises_makes_a_record_one_of_another_version(
    mine: Catalog, tmp_path: Path
) -> None:
    import dataclasses

    from methodbench.provenance import _source, source_digest

    method = mine.method("my-method")
    before = digest_of(method)
    for change in ({"properties": ("deterministic",)}, {"expected_failures": {"runs": "why"}}):
        assert digest_of(dataclasses.replace(method, **change)) != before
    assert digest_of(dataclasses.replace(method, summary="Another sentence of it.")) == before
    source = tmp_path / "methodbench-my-method" / "methodbench_my_method" / "my_method.py"
    source.write_text(source.read_text() + "\nMORE = 1\n")
    for cached in (_source, source_digest):
        cached.cache_clear()
    assert digest_of(method) != before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"outcomes": 1}', '{"outcomes": [{"status": "great"}]}'])
def test_a_record_that_is_damaged_counts_as_none(mine: Catalog, text: str) -> None:
    method = mine.method("my-method")
    write_check_record(method, mine, [GOOD]).write_text(text)
    assert check_record_of(method, mine) is None


def test_a_folder_that_cannot_be_written_is_told(mine: Catalog, tmp_path: Path) -> None:
    (tmp_path / "methodbench-my-method" / "methodbench_my_method" / "checks").write_text("a file")
    with pytest.raises(MethodbenchError, match=r"cannot write .*my-method\.json"):
        write_check_record(mine.method("my-method"), mine, [GOOD])


def test_the_command_records_all_checks_or_none(
    mine: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    monkeypatch.setattr("methodbench.cli.authoring.get_catalog", lambda: mine)
    partly = CliRunner().invoke(cli, ["check", "my-method", "--record", "--only", "presets"])
    assert isinstance(partly.exception, MethodbenchError)
    assert check_record_of(mine.method("my-method"), mine) is None
    done = CliRunner().invoke(cli, ["check", "my-method", "--record"])
    assert "recorded in" in done.output, done.output
    record = check_record_of(mine.method("my-method"), mine)
    assert record is not None
    listed = CliRunner().invoke(cli, ["check", "my-method", "--list"])
    assert [f"my-method::{one.name}" for one in record.outcomes] == listed.output.split()
