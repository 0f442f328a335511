"""A cell's top-level statements: which names each binds and needs, and whether it is cheap to run.

Nothing is executed. The compiler itself tells names of the notebook from local ones, in functions, classes and
comprehensions alike.
"""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import re
import types
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_ANALYZED = 50_000
"""characters of a cell that are looked at; a longer one is not split"""
ALWAYS_THERE = frozenset(dir(builtins)) | {
    "get_ipython",
    "display",
    "exit",
    "quit",
    "In",
    "Out",
    "_",
    "__name__",
}
BODY_MAGICS = {"time", "timeit", "capture", "prun"}
_UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError, SystemError)
_DEFINITION = re.compile(r"^(?:async\s+)?(?:def|class)\s+(\w+)|^(\w+)\s*(?::[^=\n]*)?=(?!=)", re.M)


@dataclass(frozen=True)
class Statement:
    """Top-level statements of a cell that stand on common lines.

    Attributes:
        first, last: its lines, from 0.
        text: its source.
        binds: names of the notebook that it assigns, imports or defines.
        changes: names of objects that it writes into: `results["a"] = 1`, `names.append("b")`.
        needs: names of the notebook that it, or a function in it, reads.
        cheap: whether it only imports, defines, or assigns without a call.
        imports: whether it only imports.
        star: whether it imports all names of a module.
    """

    first: int
    last: int
    text: str
    binds: frozenset[str] = frozenset()
    changes: frozenset[str] = frozenset()
    needs: frozenset[str] = frozenset()
    cheap: bool = False
    imports: bool = False
    star: bool = False


def split(source: str) -> tuple[Statement, ...]:
    """The statements of a cell; one that cannot be parsed, is too long, or has a cell magic is one statement.

    Lines that begin with `%` or `!` belong to no statement.
    """
    return _split(source) if len(source) <= MAX_ANALYZED else unsplit(source)


def unsplit(source: str) -> tuple[Statement, ...]:
    """A cell as one statement, with the names that its unindented lines seem to define."""
    names = frozenset(one or two for one, two in _DEFINITION.findall(source[:MAX_ANALYZED]))
    return (Statement(0, len(lines_of(source)) - 1, source, binds=names),)


@functools.lru_cache(maxsize=1024)  # the cells of the lab are the same in every submission
def _split(source: str) -> tuple[Statement, ...]:
    lines = lines_of(source)
    code = ["" if re.match(r"\s*[%!]", line) else line for line in lines]
    first = next((line.strip() for line in lines if line.strip()), "")
    whole = first.startswith("%%")
    if whole and (first[2:].split() or [""])[0] not in BODY_MAGICS:
        return (Statement(0, len(lines) - 1, source),)  # a script for something else
    try:
        found = tuple(_statements(code))
    except _UNREADABLE:
        return unsplit(source)
    if not whole:
        return found
    joined = {
        name: frozenset().union(*(getattr(one, name) for one in found))
        for name in ("binds", "changes", "needs")
    }
    return (Statement(0, len(lines) - 1, source, **joined),)


def keep(source: str, kept: Sequence[Statement]) -> str:
    """A cell with only these statements, each on the line where it stood, so that messages name the right lines."""
    lines = lines_of(source)
    wanted = {number for one in kept for number in range(one.first, one.last + 1)}
    return "\n".join(line if number in wanted else "" for number, line in enumerate(lines)).rstrip()


def drop(source: str, dropped: Sequence[Statement]) -> str:
    """A cell without these statements; all other lines, magics too, stay where they are."""
    lines = lines_of(source)
    unwanted = {number for one in dropped for number in range(one.first, one.last + 1)}
    return "\n".join("" if number in unwanted else line for number, line in enumerate(lines)).rstrip()


def lines_of(source: str) -> list[str]:
    """Lines as the compiler counts them."""
    return re.split(r"\r\n|\r|\n", source)


def _statements(code: list[str]) -> Iterator[Statement]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a student's source, such as an invalid escape
        tree = ast.parse("\n".join(code))
        group: list[ast.stmt] = []
        for node in tree.body:
            if group and _first_line(node) <= _last_line(group):
                group.append(node)
                continue
            if group:
                yield _statement(group, code)
            group = [node]
        if group:
            yield _statement(group, code)


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(item.lineno for item in getattr(node, "decorator_list", []))]) - 1


def _last_line(group: list[ast.stmt]) -> int:
    return max(node.end_lineno or node.lineno for node in group) - 1


def _statement(group: list[ast.stmt], code: list[str]) -> Statement:
    first, last = _first_line(group[0]), _last_line(group)
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    module = ast.Module(body=group, type_ignores=[])
    compiled = compile(module, "cell", "exec", flags=flags, dont_inherit=True)
    binds, needs = _names(compiled)
    only_imports = all(isinstance(node, ast.Import | ast.ImportFrom) for node in group)
    return Statement(
        first,
        last,
        "\n".join(code[first : last + 1]),
        frozenset(binds),
        frozenset(name for node in group for name in _changed(node)),
        frozenset(needs - ALWAYS_THERE),
        cheap=all(_is_cheap(node) for node in group),
        imports=only_imports,
        star=any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in group),
    )


def _names(code: types.CodeType, outermost: bool = True) -> tuple[set[str], set[str]]:
    """Names of the notebook that a code object binds, and that it reads."""
    binds, needs = set(), set()
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation == "STORE_GLOBAL" or (outermost and operation == "STORE_NAME"):
            binds.add(name)
        elif operation in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS", "DELETE_GLOBAL"):
            needs.add(name)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a function, class body or comprehension
            inner_binds, inner_needs = _names(constant, outermost=False)
            binds |= inner_binds
            needs |= inner_needs
    return binds, needs


def _changed(node: ast.stmt) -> Iterator[str]:
    """Names of objects that a statement writes into, outside of functions that it defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    pending: list[ast.AST] = [node]
    while pending:
        one = pending.pop()
        if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        pending.extend(ast.iter_child_nodes(one))
        written = isinstance(one, ast.Subscript | ast.Attribute) and isinstance(one.ctx, ast.Store | ast.Del)
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Call):
            written, one = isinstance(one.value.func, ast.Attribute), one.value.func
        if written and (root := _root(one)):
            yield root


def _root(node: ast.AST) -> str | None:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_cheap(node: ast.stmt) -> bool:
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Pass)
    if isinstance(node, definitions):
        return True
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    return not any(isinstance(inner, ast.Call | ast.Await) for inner in ast.walk(node))
