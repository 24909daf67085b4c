"""Tests of parity take every tolerance from the vectors' ``meta``, so that vectors not seen yet bring their own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.rglob("test_*.py"))
TOLERANCES = ("rtol", "atol", "rel", "abs")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_tolerance_is_written_into_a_test(path: Path) -> None:
    found = [
        f"{path.name}:{keyword.value.lineno}: {keyword.arg} = {ast.unparse(keyword.value)}"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg in TOLERANCES and any(_sets(part) for part in ast.walk(keyword.value))
    ]
    assert found == []


def _sets(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, float) and node.value != 0
