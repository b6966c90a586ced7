"""What keeps the package readable: short modules, and functions of few arguments."""

from __future__ import annotations

import ast

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
