"""Which modules count, and what changes the hash."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from llmcourse import provenance
from llmcourse.provenance import code_hash, code_modules

FILES = {
    "__init__.py": "",
    "main.py": """
        import os
        import pkg.direct
        from pkg import member, VERSION
        from . import sibling
        from .sub.deep import thing as other
        from typing import TYPE_CHECKING
        import typing
        if TYPE_CHECKING:
            from pkg.types_only import T
        if typing.TYPE_CHECKING:
            from pkg.types_only import T
        else:
            import pkg.at_run_time

        def late():
            from pkg.late import x
            return x
        """,
    "direct.py": "from pkg import main  # a cycle\nimport numpy\n",
    "member.py": "",
    "sibling.py": "from .sub import name\n",
    "sub/__init__.py": "from .inner import name\n",
    "sub/inner.py": "from ..member import y\n",
    "sub/deep.py": "thing = 1\n",
    "types_only.py": "",
    "at_run_time.py": "",
    "late.py": "x = 1\n",
    "unrelated.py": "",
}
ORDER = itertools.count()
CACHES = (
    provenance._package_folder,
    provenance._source_file,
    provenance._tree,
    provenance._direct_imports,
    provenance._module_hash,
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the package with some files changed, on a path of its own, and forget what was read before."""

    def write(**changes: str | None) -> Path:
        folder = tmp_path / str(next(ORDER))
        given = {name.replace("__", "/") + ".py": text for name, text in changes.items()}
        for name, text in {**FILES, **given}.items():
            if text is None:
                continue
            path = folder / "pkg" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(folder))
        for cached in CACHES:
            cached.cache_clear()
        return folder

    yield write
    monkeypatch.undo()
    for cached in CACHES:
        cached.cache_clear()


def test_imports_are_followed_and_nothing_else(package) -> None:
    package()
    assert code_modules("pkg.main") == [
        "pkg",
        "pkg.at_run_time",
        "pkg.direct",
        "pkg.late",
        "pkg.main",
        "pkg.member",
        "pkg.sibling",
        "pkg.sub",
        "pkg.sub.deep",
        "pkg.sub.inner",
    ]
    assert code_modules("pkg.sub.inner") == [
        "pkg.member",
        "pkg.sub.inner",
    ]  # its package's __init__ is not asked for
    assert code_modules("pkg.sub.deep", "pkg.late") == ["pkg.late", "pkg.sub.deep"]
    assert code_modules("pkg.main", ignore={"pkg.sub", "pkg.direct"}) == [
        "pkg",
        "pkg.at_run_time",
        "pkg.late",
        "pkg.main",
        "pkg.member",
        "pkg.sibling",
    ]


def test_names_modules_functions_and_classes_mean_the_same() -> None:
    import llmcourse.models.config as module

    expected = code_hash("llmcourse.models.config")
    assert code_hash(module) == code_hash(module.ModelConfig) == expected
    assert code_hash(module.ModelConfig.__post_init__) == expected


@pytest.mark.parametrize(
    "text",
    [
        "x = 1  # a comment\n",
        '"""A docstring."""\n\n\nx = (\n    1\n)\n',
        'x = 1\n"""what x is"""\n',
    ],
)
def test_comments_docstrings_and_layout_do_not_count(package, text: str) -> None:
    package()
    before = code_hash("pkg.main")
    package(late=text)
    assert code_hash("pkg.main") == before


def test_docstrings_inside_functions_and_classes_do_not_count(package) -> None:
    bare = "class A:\n    x: int = 0\n    async def f(self):\n        return 'text'\n"
    documented = (
        'class A:\n    """Doc."""\n    x: int = 0\n    """unit"""\n'
        "    async def f(self):\n        '''Doc.'''\n        return u'text'\n"
    )
    package(late=bare)
    before = code_hash("pkg.late")
    package(late=documented)
    assert code_hash("pkg.late") == before


@pytest.mark.parametrize(
    "text",
    ["x = 2\n", "x = True\n", "x = 1.0\n", "x = '1'\n", "x = 1\ny = 1\n", "y = 1\n", "x: int = 1\n", ""],
)
def test_any_change_of_the_code_counts_wherever_it_is(package, text: str) -> None:
    package()
    before = code_hash("pkg.main")
    alone = code_hash("pkg.sub.inner")
    package(late=text)
    assert code_hash("pkg.main") != before
    assert code_hash("pkg.main", ignore=["pkg.late"]) not in (before, code_hash("pkg.main"))
    assert code_hash("pkg.sub.inner") == alone  # does not import it


def test_ignored_code_does_not_count(package) -> None:
    package()
    before = code_hash("pkg.main", ignore=["pkg.late"])
    package(late="x = 3\n")
    assert code_hash("pkg.main", ignore=["pkg.late"]) == before


def test_moving_code_to_another_module_counts(package) -> None:
    package(late="x = 1\n", unrelated="")
    before = code_hash("pkg.late", "pkg.unrelated")
    package(late="", unrelated="x = 1\n")
    assert code_hash("pkg.late", "pkg.unrelated") != before


def test_what_cannot_be_hashed_is_an_error(package) -> None:
    package(late="import pkg.missing\n")
    with pytest.raises(ValueError, match="'pkg.missing' has no Python source"):
        code_hash("pkg.late")
    with pytest.raises(ValueError, match="'no_such_package.x' has no Python source"):
        code_hash("no_such_package.x")
    package(late="x =\n")
    with pytest.raises(SyntaxError):
        code_hash("pkg.late")
    function = eval("lambda: 0", {"__name__": "__main__"})
    assert function.__module__ == "__main__"
    with pytest.raises(ValueError, match="belongs to no module: define it in a file"):
        as_in_a_notebook(function)


def as_in_a_notebook(function: object) -> str:
    """`code_hash` called in a notebook, whose `__main__` has no spec."""
    main = sys.modules["__main__"]
    saved = getattr(main, "__spec__", None)
    main.__spec__ = None
    try:
        return code_hash(function)
    finally:
        main.__spec__ = saved


def test_a_module_run_with_dash_m_is_hashed_as_itself(package, tmp_path: Path) -> None:
    run = """
        def f(): pass

        if __name__ == "__main__":
            from llmcourse.provenance import code_hash
            print(code_hash(f))
        """
    folder = package(late=run)
    root = Path(provenance.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "pkg.late"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": f"{folder}:{root}"},
    )
    assert done.stdout.strip() == code_hash("pkg.late")


def test_the_package_itself_can_be_hashed_without_running_it() -> None:
    names = code_modules("llmcourse.models.transformer")
    assert {"llmcourse.models.attention", "llmcourse.models.config", "llmcourse.models.transformer"} <= set(
        names
    )
    assert not any(name.startswith("llmcourse.training") for name in names)
