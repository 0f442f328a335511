"""Which code a result depends on: the modules behind a function, and a hash of what they do.

The hash is taken over the parsed source, so that a comment, a docstring or the layout may change without a
result counting as made by other code. It is the same on every supported version of Python.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType

Code = str | ModuleType | type | Callable[..., object]


def module_name(code: Code) -> str:
    """The full name of a module given by name, as itself, or by a function or class that it defines.

    Raises:
        ValueError: the object was defined in a notebook or at a prompt, where there is no module to read.
    """
    if isinstance(code, str):
        return code
    name = code.__name__ if isinstance(code, ModuleType) else getattr(code, "__module__", None)
    if name == "__main__":  # started as `python -m package.module`
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        name = spec.name if spec else None
    if name is None:
        raise ValueError(
            f"{code!r} belongs to no module: define it in a file and import it, so it can be hashed"
        )
    return name


@functools.cache
def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)  # editable installations have finders of their own
    if spec is None:
        return None
    return Path(spec.origin) if spec.origin else Path(next(iter(spec.submodule_search_locations)))


@functools.cache
def _source_file(name: str) -> Path | None:
    """The file of a module, found without importing it, or None; a package without `__init__` is its folder."""
    package, *rest = name.split(".")
    base = _package_folder(package)
    if base is None or not rest:
        return base
    if base.name != "__init__.py" and base.is_file():
        return None  # a module of a single file has no submodules
    base = (base.parent if base.is_file() else base).joinpath(*rest)
    for path in (base.with_name(f"{base.name}.py"), base / "__init__.py", base):
        if path.is_file() or (path == base and path.is_dir()):
            return path
    return None


@functools.cache
def _tree(path: Path) -> ast.Module:
    if path.is_dir():  # a package without `__init__` has no code
        return ast.Module(body=[], type_ignores=[])
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements anywhere below `node`, but for those that only a type checker runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for other in child.orelse:
                yield from _imports(ast.Module(body=[other], type_ignores=[]))
        else:
            yield from _imports(child)


def _imported(name: str, path: Path, node: ast.Import | ast.ImportFrom) -> set[str]:
    """Names of the modules that an import statement of the module `name` asks for."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    base = node.module or ""
    if node.level:
        parts = name.split(".") + ([""] if path.name == "__init__.py" else [])  # a package's "." is itself
        base = ".".join([*parts[: -node.level], *([base] if base else [])])
    submodules = {f"{base}.{alias.name}" for alias in node.names}
    found = {submodule for submodule in submodules if _source_file(submodule)}
    return found if len(found) == len(submodules) else found | {base}


@functools.cache
def _direct_imports(name: str) -> frozenset[str]:
    path = _source_file(name)
    if path is None or (path.is_file() and path.suffix != ".py"):
        raise ValueError(f"module {name!r} has no Python source here: its name or an import of it is wrong")
    return frozenset().union(*(_imported(name, path, node) for node in _imports(_tree(path))))


def code_modules(*code: Code, ignore: Collection[str] = ()) -> list[str]:
    """The given modules and, transitively, those of the same package that they import, sorted.

    Imports are read from the source, wherever they stand (in functions too), and nothing is run; modules
    named only at run time are not seen. `ignore` names modules, or packages with all below, that are left out
    and not followed. The `__init__` of a package counts when something is imported from it, not when one of
    its modules is.

    Raises:
        ValueError: a module cannot be found or is not Python source.
    """
    waiting, found = [module_name(item) for item in code], set()
    packages = {name.split(".")[0] for name in waiting}
    while waiting:
        name = waiting.pop()
        if name in found or any(name == other or name.startswith(f"{other}.") for other in ignore):
            continue
        found.add(name)
        waiting += [other for other in _direct_imports(name) if other.split(".")[0] in packages]
    return sorted(found)


def _essence(value: object) -> object:
    """A syntax tree as nested tuples without positions, absent fields and statements that are only a string.

    `ast.dump` would do, but lists absent fields on some versions of Python and leaves them out on others.
    """
    if isinstance(value, ast.AST):
        fields = ((name, _essence(field)) for name, field in ast.iter_fields(value) if name != "kind")
        return (type(value).__name__, *((name, field) for name, field in fields if field not in (None, ())))
    if isinstance(value, list):
        return tuple(_essence(item) for item in value if not _is_string_statement(item))
    return value if value is None else f"{type(value).__name__} {value!r}"


def _is_string_statement(node: object) -> bool:
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant and isinstance(node.value.value, str)


@functools.cache
def _module_hash(path: Path) -> str:
    return hashlib.sha256(repr(_essence(_tree(path))).encode()).hexdigest()


def code_hash(*code: Code, ignore: Collection[str] = ()) -> str:
    """SHA-256 (hexadecimal) of what `code_modules` finds; comments and docstrings do not count.

    Files are read once per process, as Python itself reads them.

    Raises:
        ValueError: as `code_modules`.
    """
    names = code_modules(*code, ignore=ignore)
    lines = [f"{name} {_module_hash(_source_file(name))}\n" for name in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
