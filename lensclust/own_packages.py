"""Imports of `probes` and `studies`, also if a user's file has one of these names."""

from __future__ import annotations

import logging
import sys
from difflib import get_close_matches
from importlib import import_module, util
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType

_log = logging.getLogger("lensclust")

NAMES = ("probes", "studies")
_HOME = Path(__file__).resolve().parent.parent
# Our packages whose names other modules have taken.
_FOUND: dict[str, ModuleType] = {}


def in_the_way(name: str) -> Path | None:
    """The file that ``import name`` finds instead of our package; None if it finds ours."""
    if not _file(name).is_file():
        return None
    loaded = sys.modules.get(name)
    try:
        found = util.find_spec(name) if loaded is None else getattr(loaded, "__spec__", None)
    except (ImportError, ValueError):
        return None
    file = getattr(loaded, "__file__", None) or getattr(found, "origin", None)
    if not file or Path(file).resolve() == _file(name):
        return None
    return Path(file)


def report() -> None:
    """Log the files that are imported instead of our packages."""
    for name in NAMES:
        if (file := in_the_way(name)) is not None:
            _log.warning(
                "lensclust: 'import %s' finds %s, not the package of lensclust: rename that file, "
                "or write 'from lensclust import %s'",
                name,
                file,
                name,
            )


def own(name: str) -> ModuleType:
    """Our package of this name.

    If another module has the name, ours is loaded completely, and the name stays with the other.

    >>> own("probes").__name__
    'probes'
    """
    if all(in_the_way(each) is None for each in NAMES):
        return import_module(name)
    if name not in _FOUND:
        _load_ours()
    return _FOUND[name]


def missing(module: str, name: str) -> AttributeError:
    """The error for a missing name of one of our packages, with a suggestion.

    >>> str(missing("lensclust", "cluster"))
    "module 'lensclust' has no attribute 'cluster': it is probes.cluster"
    >>> str(missing("lensclust", "extact"))
    "module 'lensclust' has no attribute 'extact': did you mean extract?"
    """
    said = f"module {module!r} has no attribute {name!r}"
    if name.startswith("_"):
        return AttributeError(said)
    offered = {each: _offered(each) for each in ("lensclust", "probes")}
    for other, names in offered.items():
        if name in names:
            return AttributeError(f"{said}: it is {other}.{name}")
    close = get_close_matches(name, offered[module], n=1)
    return AttributeError(f"{said}: did you mean {close[0]}?" if close else said)


def _offered(package: str) -> list[str]:
    home = own(package) if package in NAMES else sys.modules[package]
    return [] if home is None else [*getattr(home, "__all__", ())]


def put_first() -> None:
    """In a process of lensclust, import our packages before all others."""
    if any(in_the_way(name) is not None for name in NAMES):
        sys.path.insert(0, str(_HOME))
        for key in [key for key in sys.modules if _top(key) in NAMES]:
            del sys.modules[key]


def _load_ours() -> None:
    theirs = {key: sys.modules.pop(key) for key in [*sys.modules] if _top(key) in NAMES}
    sys.path.insert(0, str(_HOME))
    try:
        for name in NAMES:
            _FOUND[name] = import_module(name)
            # All modules: later imports inside functions find them by their full names.
            for module in walk_packages(_FOUND[name].__path__, f"{name}."):
                import_module(module.name)
    finally:
        sys.path.remove(str(_HOME))
        for name in NAMES:
            sys.modules.pop(name, None)
            if in_the_way(name) is None:
                sys.modules[name] = _FOUND.get(name) or import_module(name)
        sys.modules.update(theirs)


def _top(key: str) -> str:
    return key.partition(".")[0]


def _file(name: str) -> Path:
    return _HOME / name / "__init__.py"
