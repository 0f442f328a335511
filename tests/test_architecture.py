"""The package keeps to its layers, its style and its sizes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llmcourse"
# Each layer imports only from itself and from those above it in this list.
LAYERS = [
    {"runtime", "accounting", "roofline", "profiling", "artifacts", "durable", "provenance", "plotting"},
    {"tokenization", "models"},
    {"data", "inference", "interpretability"},
    {"training", "evaluation"},
    {"alignment"},
    {"pipeline", "checks", "grading", "labs", "book", "course", "doctor", "cli"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 70
# An exercise's file holds a record for each wrong answer that it knows: data, and long.
MAX_EXERCISES_LINES = 900

FILES = sorted(PACKAGE.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    """Dotted name below `llmcourse`: "training.fit"; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def identify(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(node: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Absolute names of everything imported below `node`, at any depth, except for type checkers only."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from imports(child, package)
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, node.lineno) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*above, *([node.module] if node.module else [])])
        yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, package)


def imports_of(path: Path) -> list[tuple[str, int]]:
    package = ".".join(("llmcourse", *path.relative_to(PACKAGE).parent.parts))
    return list(imports(parse(path), package))


def own_imports(path: Path) -> list[tuple[str, int]]:
    """Top-level parts of this package that a file imports, with line numbers."""
    found = [(name.split("."), line) for name, line in imports_of(path)]
    return [
        (parts[1], line)
        for parts, line in found
        if parts[0] == "llmcourse" and len(parts) > 1 and parts[1] in LAYER
    ]


def public_definitions(path: Path) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions, classes, and public methods of public classes, with their names."""
    for node in parse(path).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, Function) and (
                        not member.name.startswith("_") or member.name == "__init__"
                    ):
                        yield f"{node.name}.{member.name}", member


def code_lines(node: Function) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - docstring


def test_the_layers_cover_the_package():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES} - {"__init__"}
    assert parts <= set(LAYER), f"give these a layer: {sorted(parts - set(LAYER))}"
    assert {"runtime", "models", "data", "training", "checks"} <= parts


def test_import_scan_sees_every_kind_of_import():
    source = (
        "import llmcourse.models\nfrom llmcourse.data import packing\nfrom . import fit\n"
        "def f():\n    from ..inference.sampling import sample\n"
        "if TYPE_CHECKING:\n    from llmcourse.cli import app\n"
    )
    found = [name for name, _ in imports(ast.parse(source), "llmcourse.training")]
    assert found == [
        "llmcourse.models",
        "llmcourse.data.packing",
        "llmcourse.training.fit",
        "llmcourse.inference.sampling.sample",
    ]


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_imports_go_downwards_only(path):
    here = (name_of(path) or "llmcourse").split(".")[0]
    if here == "llmcourse":
        assert own_imports(path) == [], (
            "importing the package must stay cheap: import nothing in llmcourse/__init__.py"
        )
        return
    wrong = [f"line {line}: imports {part}" for part, line in own_imports(path) if LAYER[part] > LAYER[here]]
    assert wrong == [], f"{here} is in layer {LAYER[here]}"


def test_parts_of_one_layer_do_not_import_in_circles():
    edges = {part: set() for part in LAYER}
    for path in FILES:
        here = name_of(path).split(".")[0]
        if here in LAYER:
            edges[here] |= {part for part, _ in own_imports(path)} - {here}
    done: set[str] = set()

    def visit(part: str, trail: tuple[str, ...]) -> None:
        assert part not in trail, f"import circle: {' -> '.join((*trail, part))}"
        if part not in done:
            for below in edges[part]:
                visit(below, (*trail, part))
            done.add(part)

    for part in sorted(LAYER):
        visit(part, ())


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_only_plotting_imports_matplotlib(path):
    uses = any(name.split(".")[0] == "matplotlib" for name, _ in imports_of(path))
    assert not uses or name_of(path).split(".")[0] == "plotting"


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_public_names_have_docstrings(path):
    assert ast.get_docstring(parse(path)), "the file needs a docstring that says what it is for"
    missing = [
        f"line {node.lineno}: {name}"
        for name, node in public_definitions(path)
        if not name.endswith("__init__") and not ast.get_docstring(node)
    ]
    assert missing == []


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_public_functions_are_typed(path):
    missing = []
    for name, node in public_definitions(path):
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if "." in name and not any(ast.unparse(item) == "staticmethod" for item in node.decorator_list):
            arguments = arguments[1:]
        arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
        missing += [
            f"line {node.lineno}: {name}({item.arg})" for item in arguments if item.annotation is None
        ]
        if node.returns is None and not name.endswith("__init__"):
            missing.append(f"line {node.lineno}: {name} -> ?")
    assert missing == []


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_files_and_functions_stay_readable(path):
    exercises = name_of(path).startswith("checks.")
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (MAX_EXERCISES_LINES if exercises else MAX_FILE_LINES), "split the file: one idea each"
    functions = [node for node in ast.walk(parse(path)) if isinstance(node, Function)]
    lengths = {node.name: code_lines(node) for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


def test_modules_are_named_for_what_they_hold():
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert [
        identify(path) for path in FILES if set(path.relative_to(PACKAGE).with_suffix("").parts) & vague
    ] == []


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_annotations_are_lazy(path):
    tree = parse(path)
    if any(isinstance(node, Function | ast.ClassDef) for node in tree.body):
        assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
