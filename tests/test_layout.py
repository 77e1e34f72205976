"""Packages are entered through their faces, and no two files need each other.

What lint-imports cannot see: a name that is imported from a face comes from the file that the
face's stub says.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import lensclust as lc
import probes

ROOT = Path(lc.__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("lensclust", "probes", "studies")
    for path in (ROOT / package).rglob("*.py")
}
# Package -> name -> the module that has it.
FACES = {
    name: {
        alias.name: f"{name}.{node.module}"
        for node in ast.parse(stub.read_text("utf-8")).body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    for name, path in MODULES.items()
    if (stub := path.with_suffix(".pyi")).exists()
}


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Module and name of every import of ours that runs, inside functions too."""
    tree = ast.parse(MODULES[module].read_text("utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in hidden and node.module in MODULES:
            for alias in node.names:
                yield node.module, alias.name


def home(module: str, name: str) -> str:
    """The file that a name comes from."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    while name in FACES.get(module, {}):
        module = FACES[module][name]
    return module


def package(module: str) -> str:
    return module if module in FACES else module.rpartition(".")[0]


def test_other_packages_are_imported_through_their_faces():
    around = [
        f"{module}: from {source} import {name}"
        for module in MODULES
        for source, name in imports(module)
        if name in FACES.get(source.rpartition(".")[0], {})
        and source.count(".") > 1
        and source not in FACES
        and not f"{package(module)}.".startswith(f"{package(source)}.")
    ]
    assert not around


def test_no_two_files_import_each_other():
    graph = {module: {home(*each) for each in imports(module)} - {module} for module in MODULES}
    assert list(TopologicalSorter(graph).static_order())


def test_stubs_name_what_is_there_and_modules_hide_no_function():
    for face, names in FACES.items():
        for name, module in names.items():
            assert module in MODULES or f"{module}.{name}" in MODULES, (face, name)
            assert f"{face}.{name}" not in MODULES, f"{face}.{name} is a module, too"


def test_every_public_name_can_be_had():
    for face in (lc, probes, lc.tasks, lc.figures, lc.report):
        for name in face.__all__:
            assert getattr(face, name) is not None
