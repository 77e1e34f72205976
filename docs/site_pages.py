"""Pages of the site that are made from the code: the reference, and the notebooks' source.

The public names stand once in the packages' stub files (``__init__.pyi``). Here each becomes a
page, in the groups of the stubs.
"""

from __future__ import annotations

import ast
import json
import shutil
from importlib.metadata import entry_points, metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Packages whose stubs list what is public, in groups with a comment line each.
FACES = ("lensclust", "lensclust.tasks", "probes")
# What is public in packages that are not faces.
OTHERS: dict[str, tuple[str, ...]] = {
    "Deciding claims": ("lensclust.results.decide", "lensclust.results.shown_by"),
    "Figures": tuple(
        f"lensclust.figures.{name}"
        for name in ("bars", "curves", "head_map", "save", "scatter", "stack")
    ),
    "The page": ("lensclust.report.views.ClusterView", "lensclust.report.write_page"),
}


def names(package: str) -> dict[str, list[str]]:
    """The public names of a package's stub by the title of their group.

    >>> sorted(names("probes")["Linear probes"])
    ['PairedDecoding', 'ProbeSweep', 'decodability', 'decode', 'probe']
    """
    stub = ROOT.joinpath(*package.split("."), "__init__.pyi").read_text(encoding="utf-8")
    lines, found = stub.splitlines(), dict[str, list[str]]()
    for node in ast.parse(stub).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            above = lines[: node.lineno - 1]
            title = next(line[2:] for line in reversed(above) if line.startswith("# "))
            found.setdefault(title, []).extend(alias.asname or alias.name for alias in node.names)
    return found


def studies() -> tuple[str, ...]:
    """The studies' classes, and what a study is made of."""
    classes = [point.value.replace(":", ".") for point in entry_points(group="lensclust.studies")]
    base = [f"studies.study.{name}" for name in ("Study", "Context", "Findings")]
    return (*base, *sorted(name for name in classes if name.startswith("studies.")))


def sections() -> dict[str, dict[str, tuple[str, ...]]]:
    """Section -> group -> full names."""
    faces = {
        package: {
            title: tuple(f"{package}.{name}" for name in sorted(group, key=str.lower))
            for title, group in names(package).items()
        }
        for package in FACES
    }
    return {**faces, "Claims, figures, pages": OTHERS, "studies": {"Studies": studies()}}


def write_reference(folder: Path) -> None:
    """One page a name, and an index of all."""
    lines = [*_heading("Reference", "="), "One page a name: shapes, units, errors, an example.", ""]
    for section, groups in sections().items():
        lines += _heading(section, "-")
        for title, full_names in groups.items():
            # Named in the list, so that a class and a function that differ in case stay apart.
            pages = [f"   {name} <{_file(name)}>" for name in full_names]
            lines += [f".. rubric:: {title}", "", ".. toctree::", "   :maxdepth: 1", "", *pages, ""]
            for name in full_names:
                _write(folder / f"{_file(name)}.rst", _page(name))
    _write(folder / "index.rst", lines)


def copy_notebooks(folder: Path) -> None:
    """The notebooks lie beside the studies; the site shows its own copies, with outputs if run.

    Where the package's metadata name a repository on GitHub, each opens in Colab.
    """
    for notebook in sorted((ROOT / "studies" / "notebooks").glob("*.ipynb")):
        copy = folder / notebook.name
        if not copy.exists() or copy.stat().st_mtime < notebook.stat().st_mtime:
            shutil.copyfile(notebook, copy)
        for line in metadata("lensclust").get_all("Project-URL", []):
            label, _, url = line.partition(", ")
            if label == "Repository":
                _add_badge(copy, url)


def _add_badge(notebook: Path, repository: str) -> None:
    if not repository.startswith(github := "https://github.com/"):
        return
    colab = "https://colab.research.google.com"
    place = f"{repository.removeprefix(github)}/blob/main/studies/notebooks/{notebook.name}"
    badge = f"[![Open in Colab]({colab}/assets/colab-badge.svg)]({colab}/github/{place})"
    content = json.loads(notebook.read_text(encoding="utf-8"))
    text = content["cells"][0]["source"]
    if badge not in text:
        text += ["\n", "\n", badge]
        notebook.write_text(json.dumps(content), encoding="utf-8")


def _page(name: str) -> list[str]:
    short = name.rpartition(".")[2]
    directive = "autoclass" if short[0].isupper() else "autofunction"
    members = ["   :members:", "   :show-inheritance:"] if directive == "autoclass" else []
    if short.endswith("Error"):
        directive, members = "autoexception", []
    return [*_heading(name, "="), f".. {directive}:: {name}", *members]


def _file(name: str) -> str:
    """A file name that differs from others in more than the case of its letters."""
    package, _, short = name.rpartition(".")
    return f"{package}.{'class.' if short[0].isupper() else ''}{short}"


def _heading(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def _write(path: Path, lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    # Sphinx reads again what is newer than what it made of it.
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
