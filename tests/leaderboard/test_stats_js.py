"""The statistics in the browser against those of the package: the same data, seeds and numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import methodbench_leaderboard
from methodbench import stats

SCRIPT = Path(methodbench_leaderboard.__file__).parent / "static" / "stats.js"

#: Reads calls of functions with their arguments as JSON, and writes what they return. Numbers travel as text where
#: JSON has none for them.
HARNESS = """
const read = (value) => Array.isArray(value)
  ? (value.every((item) => typeof item === "number" || typeof item === "string")
    ? Float64Array.from(value, Number) : value.map(read))
  : value;
const write = (value) => typeof value === "number" ? String(value)
  : value === null || typeof value !== "object" ? value
  : ArrayBuffer.isView(value) || Array.isArray(value) ? Array.from(value, write)
  : Object.fromEntries(Object.entries(value).map(([key, item]) => [key, write(item)]));
const answer = (stats, calls) => calls.map(([name, args]) => write(stats[name](
  ...args.map((arg) => Array.isArray(arg) ? read(arg) : arg))));
"""
NODE = (
    HARNESS
    + """
const stats = require(process.argv[1]);
const text = require("fs").readFileSync(0, "utf8");
process.stdout.write(JSON.stringify(answer(stats, JSON.parse(text))));
"""
)

Ask = Callable[[list[tuple[str, list[Any]]]], list[Any]]


def _sent(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _sent(value.tolist())
    if isinstance(value, list):
        return [_sent(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    return value


def _received(value: Any) -> Any:
    if isinstance(value, str):
        return float(value)
    if isinstance(value, list):
        return [_received(item) for item in value]
    if isinstance(value, dict):
        return {key: _received(item) for key, item in value.items()}
    return value


@pytest.fixture(scope="module", params=["node", pytest.param("browser", marks=pytest.mark.browser)])
def ask(request) -> Ask:
    """Return a function that answers calls by the script, in Node or in a browser."""
    if request.param == "node":
        node = shutil.which("node")
        if node is None:
            pytest.skip("no Node on this machine; the browser runs the same script")

        def in_node(text: str) -> str:
            command = [node, "-e", NODE, str(SCRIPT)]
            done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            return done.stdout

        run = in_node
    else:
        page = request.getfixturevalue("stats_page")

        def in_browser(text: str) -> str:
            code = f"(text) => {{ {HARNESS} return JSON.stringify(answer(methodbenchStats, JSON.parse(text))); }}"
            found: str = page.evaluate(code, text)
            return found

        run = in_browser
    return lambda calls: _received(json.loads(run(json.dumps(_sent([list(call) for call in calls])))))


@pytest.fixture(scope="module")
def stats_page(tmp_path_factory):
    """An empty page of a browser with the script loaded from a file."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        found = None
    if found is None:
        if os.environ.get("METHODBENCH_REQUIRE_BROWSER") == "1":
            pytest.fail("no Chromium, or playwright is not installed")
        pytest.skip("no Chromium, or playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--headless", "--no-sandbox"])
        page = browser.new_page()
        page.add_script_tag(path=str(SCRIPT))
        yield page
        browser.close()


def _close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(
        np.asarray(ours, np.float64), np.asarray(theirs, np.float64), rtol=1e-9, atol=1e-12
    )


def _rows(rng: np.random.Generator, how: str, methods: int, units: int) -> np.ndarray:
    common = rng.normal(2.0, 1.0, units)
    rows = common + 0.1 * rng.normal(size=(methods, 1)) + rng.normal(0, 0.2, (methods, units))
    # Means of three seeds of right and wrong answers: sums of thirds tie but for their rounding.
    return np.mean(rng.random((3, methods, units)) < 0.6, axis=0) if how == "thirds" else rows


def test_random_words_are_the_same(ask):
    cases = [(7, 0, 0, 10), (7, 1, 999, 7), (2**32 - 1, 1, 5, 3), (123456789, 0, 77, 1)]
    for case, found in zip(cases, ask([("randomWords", list(case)) for case in cases]), strict=True):
        seed, stream, draw, count = case
        expected = stats.random_words(seed, stream, range(draw, draw + 1), count)[0]
        assert [int(word) for word in found] == expected.tolist()


@pytest.mark.parametrize("how", ["mean", "exp-mean", "median", "single"])
def test_values_and_intervals_are_the_same(ask, how):
    rng = np.random.default_rng(1)
    rows = _rows(rng, how, 6, 41)
    rows[1, 3] = np.nan
    rows[2, 5] = np.inf
    rows[3, 5] = -np.inf
    rows[4] = 720.0
    rows[5] = rows[0]
    others = [rng.normal(size=1), np.full(5, np.nan), rng.normal(size=2), rng.normal(size=300)]
    values = ask([("aggregate", [row, how]) for row in [*rows, *others]])
    _close(values, [stats.aggregate(row, how) for row in [*rows, *others]])
    together = ask([("bootstrapIntervals", [rows, how])])[0]
    expected = stats.bootstrap_intervals(rows, how)
    assert [item is None for item in together] == [item is None for item in expected]
    _close([item for item in together if item], [item for item in expected if item])
    options = {"seed": 3, "draws": 200, "level": 0.9}
    for row, found in zip(
        others, ask([("bootstrapInterval", [row, how, options]) for row in others]), strict=True
    ):
        wanted = stats.bootstrap_interval(row, how, seed=3, draws=200, level=0.9)
        assert (found is None) == (wanted is None)
        if wanted:
            _close(found, wanted)


@pytest.mark.parametrize("how", ["mean", "exp-mean", "median", "single"])
@pytest.mark.parametrize("units", [1, 2, 12, 13, 90])
def test_paired_differences_and_p_values_are_the_same(ask, how, units):
    rng = np.random.default_rng(units)
    a, b = rng.normal(2, 1, units), rng.normal(2.1, 1, units)
    pairs = [(a, b), (a, a.copy())]
    if units > 2:
        gap, endless = a.copy(), a.copy()
        gap[1], endless[0] = np.nan, np.inf
        pairs += [(gap, b), (endless, b), (endless, endless)]
    for (left, right), found in zip(
        pairs, ask([("pairedDifference", [x, y, how]) for x, y in pairs]), strict=True
    ):
        expected = stats.paired_difference(left, right, how)
        with np.errstate(invalid="ignore"):
            _close(
                [found[name] for name in ("valueA", "valueB", "low", "high", "pValue", "units")],
                [
                    expected.value_a,
                    expected.value_b,
                    expected.low,
                    expected.high,
                    expected.p_value,
                    expected.units,
                ],
            )
            _close(found["difference"], expected.difference)


def test_scaled_differences_are_the_same(ask):
    rng = np.random.default_rng(5)
    a, b = rng.normal(2, 1, 30), rng.normal(2, 1, 30)
    found = ask([("differenceInterval", [a, b, "mean", {"factors": [100, 50], "shift": 3}])])[0]
    _close(found, stats.difference_interval(a, b, "mean", factors=(100, 50), shift=3))


def test_what_cannot_be_paired_is_refused(ask):
    with pytest.raises(Exception, match="differ in length"):
        ask([("pairedDifference", [np.zeros(2), np.zeros(3), "mean"])])
    with pytest.raises(Exception, match="scored by both"):
        ask([("pairedDifference", [np.array([np.nan, 1.0]), np.array([1.0, np.nan]), "mean"])])


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(("how", "kind"), [
    ("mean", ""), ("mean", "thirds"), ("exp-mean", ""), ("median", ""), ("median", "thirds"), ("single", ""),
])  # fmt: skip
def test_rank_intervals_are_the_same_numbers(ask, how, kind, lower):
    rng = np.random.default_rng(9)
    for methods, units in ((1, 20), (14, 1), (14, 40), (30, 65)):
        rows = _rows(rng, kind or how, methods, units)
        if methods > 10:
            rows[3] = rows[4]
            rows[5, 0] = np.nan
            rows[6, units // 2] = np.inf
            rows[7, 0] = -np.inf
            rows[8] = 800.0
        found = ask([("rankIntervals", [rows, how, lower])])[0]
        expected = stats.rank_intervals(rows, how, lower_is_better=lower)
        assert [[int(place) for place in row] for row in found] == expected.tolist()


def test_a_front_is_the_same(ask):
    points = np.random.default_rng(2).integers(0, 6, (25, 2)).astype(np.float64)
    assert ask([("paretoFront", [points])])[0] == stats.pareto_front(points).tolist()


def test_mean_ranks_and_their_test_are_the_same(ask):
    rng = np.random.default_rng(11)
    for methods, tasks in ((2, 2), (3, 5), (12, 6), (40, 3)):
        values = rng.normal(size=(methods, tasks))
        # Ties, and methods that diverged.
        values[:, 0] = np.round(values[:, 0])
        values[: methods // 3, 1] = np.inf
        found = ask([("friedman", [values])])[0]
        expected = stats.friedman(values, lower_is_better=True)
        _close(found["meanRanks"], expected.mean_ranks)
        _close(found["statistic"], expected.statistic)
        np.testing.assert_allclose(found["pValue"], expected.p_value, rtol=1e-8)
        _close(found["criticalDifference"], expected.critical_difference)
    equal = ask([("friedman", [np.ones((4, 3))])])[0]
    assert (equal["statistic"], equal["pValue"]) == (0, 1)


def test_distributions_behind_the_tests_are_the_same(ask):
    points = [-3.0, -0.5, 0.0, 0.1, 1.0, 2.499, 2.5, 4.0, 12.0]
    np.testing.assert_allclose(
        ask([("erfc", [x]) for x in points]), [math.erfc(x) for x in points], rtol=1e-11
    )
    tails = [(x, degrees) for x in (0.0, 0.3, 7.0, 80.0) for degrees in (1, 2, 5, 40)]
    found = ask([("chiSquareTail", list(case)) for case in tails])
    np.testing.assert_allclose(found, [stats.chi_square_tail(*case) for case in tails], rtol=1e-10)
    cases = [(0.95, 2), (0.95, 10), (0.99, 5), (0.9, 100)]
    quantiles = ask([("studentizedRangeQuantile", list(case)) for case in cases])
    _close(quantiles, [stats.studentized_range_quantile(*case) for case in cases])
