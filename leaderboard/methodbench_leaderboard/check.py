"""Looks a built site over: valid HTML, titles, links that lead somewhere, and no request to another host."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from justhtml import JustHTML

from methodbench.errors import MethodbenchError

#: Attributes that make a browser fetch something as soon as the page is open.
_LOADING = {
    "audio": ("src",),
    "embed": ("src",),
    "iframe": ("src",),
    "image": ("href", "xlink:href"),
    "img": ("src", "srcset"),
    "input": ("src",),
    "link": ("href",),
    "object": ("data",),
    "script": ("src",),
    "source": ("src", "srcset"),
    "track": ("src",),
    "use": ("href", "xlink:href"),
    "video": ("src", "poster"),
}
#: Attributes that a reader follows.
_FOLLOWED = {"a": ("href", "xlink:href"), "area": ("href",), "form": ("action",)}
#: What a style sheet or a script module loads.
_CSS_LOADS = re.compile(r"""(?:@import\s+(?:url\()?|url\()\s*["']?([^"')\s;]+)""")
_JS_LOADS = re.compile(
    r"""(?:\bimport\s*\(?|\bfrom|\bfetch\s*\(|\bimportScripts\s*\()\s*["'](\w+:|//)[^"']*["']"""
)
#: A link to another host is followed by the reader's own choice.
_MAY_FOLLOW = ("https", "http", "mailto")


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """Something that a visitor would stumble over."""

    path: str
    """File, relative to the site."""
    line: int
    """0 where the whole file is meant."""
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}" if self.line else f"{self.path}: {self.message}"


@dataclass(slots=True)
class _Page:
    ids: set[str] = field(default_factory=set)
    links: list[tuple[int, str]] = field(default_factory=list)
    """Line and address of everything that is loaded or followed on this site."""
    reads_fragment: bool = False
    """Whether a script of the page takes the fragment for what to show, so that it names no place."""


def check_site(folder: Path) -> list[Problem]:
    """Return what is wrong with the site in ``folder``, by file and line; empty when nothing is.

    Raises:
        MethodbenchError: there is no site.
    """
    if not (folder / "index.html").is_file():
        raise MethodbenchError(f"no site in {folder}", "Build it first: `methodbench site build`.")
    root = folder.resolve()
    problems: list[Problem] = []
    pages: dict[Path, _Page] = {}
    for path in sorted(root.rglob("*.html")):
        pages[path] = _read_page(path, path.relative_to(root).as_posix(), problems)
    for path, page in pages.items():
        where = path.relative_to(root).as_posix()
        problems += [
            Problem(where, line, message)
            for line, address in page.links
            if (message := _dead(address, path, root, pages))
        ]
    for pattern, loads in (("*.css", _CSS_LOADS), ("*.js", _JS_LOADS)):
        for path in sorted(root.rglob(pattern)):
            where = path.relative_to(root).as_posix()
            problems += list(_loads(path, where, loads))
    return sorted(problems)


def _read_page(path: Path, where: str, problems: list[Problem]) -> _Page:
    page = _Page()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(where, 0, f"cannot be read: {error}"))
        return page
    document = JustHTML(text, sanitize=False, collect_errors=True, track_node_locations=True)
    problems += [
        Problem(where, error.line or 0, f"not valid HTML: {str(error.code).replace('-', ' ')}")
        for error in document.errors
    ]
    titles = [node.to_text().strip() for node in document.query("head title")]
    if len(titles) != 1 or not titles[0]:
        problems.append(Problem(where, 0, "has no title" if not any(titles) else "has several titles"))
    if not any((node.attrs or {}).get("lang") for node in document.query("html")):
        problems.append(Problem(where, 0, "does not say its language"))
    for node in document.query("*"):
        name, line = node.name.lower(), node.origin_line or 0
        attributes: Mapping[str, str | None] = node.attrs or {}
        page.reads_fragment |= "data-reads-fragment" in attributes
        identifier = attributes.get("id")
        if identifier:
            if identifier in page.ids:
                problems.append(Problem(where, line, f"the id {identifier!r} is given twice"))
            page.ids.add(identifier)
        for attribute in _LOADING.get(name, ()):
            for address in _addresses(attribute, attributes.get(attribute)):
                if urlsplit(address).scheme in ("", "data") and not address.startswith("//"):
                    page.links.append((line, address))
                else:
                    problems.append(Problem(where, line, f"loads {address[:200]} from another host"))
        for attribute in _FOLLOWED.get(name, ()):
            for address in _addresses(attribute, attributes.get(attribute)):
                scheme = urlsplit(address).scheme
                if not scheme and not address.startswith("//"):
                    page.links.append((line, address))
                elif scheme not in _MAY_FOLLOW:
                    problems.append(Problem(where, line, f"links to {address[:200]}"))
    return page


def _addresses(attribute: str, value: str | None) -> list[str]:
    if value is None:
        return []
    if attribute == "srcset":
        return [part.split()[0] for part in value.split(",") if part.strip()]
    return [value]


def _dead(address: str, page: Path, root: Path, pages: Mapping[Path, _Page]) -> str:
    """Return why a link of this site leads nowhere; empty when it leads somewhere."""
    parts = urlsplit(address)
    if parts.scheme == "data":
        return ""
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if not target.is_relative_to(root):
        return f"the link {address[:200]!r} leaves the site"
    if target.is_dir():
        return f"the link {address[:200]!r} names a folder, which opens from no file"
    if not target.is_file():
        return f"the link {address[:200]!r} leads nowhere"
    fragment = unquote(parts.fragment)
    # A fragment with "=" is state that a script reads.
    if not fragment or "=" in fragment or target not in pages or pages[target].reads_fragment:
        return ""
    if fragment not in pages[target].ids:
        return f"the link {address[:200]!r} names a place that is not on its page"
    return ""


def _loads(path: Path, where: str, pattern: re.Pattern[str]) -> Iterator[Problem]:
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        for found in pattern.finditer(line):
            address = found[1]
            if address.startswith("//") or urlsplit(address).scheme not in ("", "data"):
                yield Problem(where, number, f"loads {found[0][:200]} from another host")
