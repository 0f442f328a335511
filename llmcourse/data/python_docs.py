"""A real corpus that every Python installation carries: its own documentation and that of what is installed.

Three kinds of documents, some 4 MB for this course's requirements: docstrings of the standard library, each
under the name and signature that it explains; the topics of Python's interactive help; and the long
descriptions (the project pages) of installed distributions. The text depends on the installation, so a loss
on it compares models of one machine, not of two.
"""

from __future__ import annotations

import ast
import importlib.metadata
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

# tests and bundled copies of other projects, and what later versions of Python no longer have
EXCLUDED = frozenset(
    "test tests idlelib lib2to3 distutils turtledemo _bundled site-packages dist-packages __pycache__".split()
)


class Page(NamedTuple):
    """One document: a row of the data set."""

    text: str
    source: str
    license: str


def python_docs(max_bytes: int | None = None) -> Dataset:
    """The documentation on this machine, in a fixed order: standard library, help topics, distributions by
    name.

    Args:
        max_bytes: stop before the documents exceed this many bytes of UTF-8; None takes all.

    Returns:
        Columns text, source ("python 3.11:json.dumps", "distribution:numpy 2.4.6") and license ("PSF-2.0", or
        what the distribution's metadata says, or "unknown").

    Raises:
        ValueError: `max_bytes` leaves room for no document.
    """
    pages, total = [], 0
    for page in _pages():
        total += len(page.text.encode())
        if max_bytes is not None and total > max_bytes:
            break
        pages.append(page)
    if not pages:
        raise ValueError(f"max_bytes={max_bytes} leaves room for no document: use 100000 or more")
    return Dataset.from_dict({name: [getattr(page, name) for page in pages] for name in Page._fields})


def _pages() -> Iterator[Page]:
    """All documents, the blank and the repeated ones left out."""
    seen: set[str] = set()
    for pages in (_standard_library(), _distributions()):
        for page in pages:
            text = page.text.strip()
            if text and text not in seen and _is_unicode(text):
                seen.add(text)
                yield page._replace(text=text)


def _standard_library() -> Iterator[Page]:
    version = ".".join(platform.python_version_tuple()[:2])
    root = Path(sysconfig.get_path("stdlib"))
    for path in _python_files(root):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
        found = _topics(tree) if module == "pydoc_data.topics" else _docstrings(tree, module)
        for name, text in found:
            yield Page(text, f"python {version}:{name}", "PSF-2.0")


def _python_files(folder: Path) -> Iterator[Path]:
    """Modules of a folder, then of its packages, in alphabetical order; excluded folders are not opened."""
    entries = sorted(folder.iterdir())
    yield from (path for path in entries if path.suffix == ".py" and path.is_file())
    for path in entries:
        if path.name not in EXCLUDED and path.is_dir():
            yield from _python_files(path)


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """(name, signature and docstring) of a module, class or function and of what it contains.

    Definitions under `if` and `try` count, functions inside functions do not.
    """
    is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    if isinstance(node, ast.Module | ast.ClassDef) or is_function:
        text = ast.get_docstring(node)
        if text:
            signature = f"{name}({ast.unparse(node.args)})" if is_function else name
            yield name, f"{signature}\n\n{text}"
    if is_function:
        return
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.If | ast.Try | ast.ExceptHandler):
            yield from _docstrings(child, name)


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The texts of `help("NAME")`, a dictionary in the module pydoc_data.topics."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield f"help.{name}", text


def _distributions() -> Iterator[Page]:
    """The long descriptions of installed distributions; not of this course, which would change with every
    edit."""
    named = {d.metadata["Name"].lower().replace("_", "-"): d for d in importlib.metadata.distributions()}
    for name in sorted(named.keys() - {"llmcourse"}):
        metadata = named[name].metadata
        text = metadata.get("Description") or metadata.get_payload()
        if isinstance(text, str) and text.strip() != "UNKNOWN":
            yield Page(text, f"distribution:{name} {named[name].version}", _license(metadata))


def _license(metadata: importlib.metadata.PackageMetadata) -> str:
    """The license's name: of three places where distributions put it, the most precise one that is filled
    in."""
    if metadata.get("License-Expression"):
        return metadata["License-Expression"]
    classifiers = [
        c.split(" :: ")[-1] for c in metadata.get_all("Classifier") or [] if c.startswith("License ::")
    ]
    if classifiers:
        return " / ".join(classifiers)
    field = (metadata.get("License") or "").strip()  # some put the whole text here
    return field if field and len(field) <= 80 and "\n" not in field else "unknown"


def _is_unicode(text: str) -> bool:
    """Whether text can be stored as UTF-8; a lone surrogate, which an escape in a docstring can make,
    cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
