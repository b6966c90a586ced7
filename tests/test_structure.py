"""What keeps the package readable: short modules, and functions of few arguments."""

from __future__ import annotations

import ast
import graphlib

import pytest

from tests.helpers import ROOT

pytestmark = pytest.mark.fast

PACKAGE = ROOT / "deco_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400
TABLES = {"deco_jax/config/sections.py"}  # the settings, one after the other
MAX_PARAMETERS = 8


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_no_module_is_long():
    assert len(MODULES) > 100
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in MODULES}
    assert {path: lines for path, lines in lengths.items() if lines > MAX_LINES and path not in TABLES} == {}


def test_no_program_takes_many_arguments():
    programs = sorted((PACKAGE / "programs").glob("*.py"))
    assert len(programs) > 10
    found = {
        f"{path.name}: {function.name}": parameters(function)
        for path in programs
        for function in functions(ast.parse(path.read_text()))
    }
    assert {name: names for name, names in found.items() if len(names) > MAX_PARAMETERS} == {}


def imports() -> dict[str, set[str]]:
    """Each module's imports of the package, those within functions too, those for type checkers alone not."""
    paths = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
    found = {}
    for name, path in paths.items():
        tree = ast.parse(path.read_text())
        for node in list(ast.walk(tree)):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = []
        wanted = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inside = f"{node.module}.{alias.name}"
                    wanted.add(inside if inside in paths else node.module)
        found[name] = (wanted & paths.keys()) - {name}
    return found


def test_imports_run_in_no_circles():
    graph = imports()
    assert sum(map(len, graph.values())) > 500
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
