"""The cache of results: each is a folder addressed by its settings, its inputs and the code that makes it.

`<root>/<stage>-<key>/` holds a stage's files and manifest.json (settings, lineage, metrics, seconds, machine,
versions, size and SHA-256 of each file). It appears at once and whole, or not at all. Whoever asks for a
result that is there gets it; whoever asks for one that another process is making waits for it.
`LLMCOURSE_HOME` moves the root.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from llmcourse.durable import (
    OUT_OF_SPACE,
    canonical_json,
    discard,
    find_damage,
    plain,
    publish,
    read_sealed,
    record_files,
    text_digest,
    write_sealed,
)
from llmcourse.provenance import Code, code_hash, code_modules
from llmcourse.runtime import describe_machine

__all__ = [
    "Artifact",
    "artifact_key",
    "artifact_root",
    "build",
    "code_hash",
    "code_modules",
    "find_artifact",
    "lineage",
    "list_artifacts",
    "remove_stale",
]

KEY_DIGITS = 16
"""hexadecimal digits of the key in a folder's name (64 bits); the manifest holds the whole key"""
QUIET_WAIT = 2.0
"""seconds that a caller waits for another before it says so"""
_checked: set[tuple[str, str]] = (
    set()
)  # (path, seal of the files) whose bytes this process has read and found right


@dataclass(frozen=True)
class Artifact:
    """A finished result on disk."""

    path: Path
    """its folder"""
    manifest: Mapping[str, Any]
    """what manifest.json says"""

    @property
    def key(self) -> str:
        """SHA-256 over stage, settings, input keys and code hash, in hexadecimal."""
        return self.manifest["key"]

    @property
    def stage(self) -> str:
        """Name of the stage that made it."""
        return self.manifest["stage"]

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage's function returned: plain data."""
        return self.manifest["metrics"]

    @property
    def seconds(self) -> float:
        """Wall-clock seconds that it took to make."""
        return self.manifest["seconds"]

    @property
    def inputs(self) -> dict[str, str]:
        """Keys of the artifacts that it was made from, by the names the stage gave them."""
        return self.manifest["inputs"]


def artifact_root() -> Path:
    """Where artifacts are kept: `$LLMCOURSE_HOME`, or `~/.cache/llmcourse/artifacts`."""
    home = os.environ.get("LLMCOURSE_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "llmcourse" / "artifacts"


def artifact_key(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, Artifact], code: str) -> str:
    """The address of a result: SHA-256 over stage name, settings, keys of the inputs and `code_hash`.

    Raises:
        ValueError: a stage name that cannot be part of a folder's name, or settings that are not plain data.
    """
    if not stage or not all(c.isalnum() or c in "_-" for c in stage):
        raise ValueError(f"stage={stage!r}: use letters, digits, '_' and '-'")
    content = {
        "stage": stage,
        "settings": plain(dict(settings), "settings"),
        "inputs": {name: artifact.key for name, artifact in inputs.items()},
        "code": code,
    }
    return text_digest(canonical_json(content))


def build(
    stage: str,
    *,
    settings: Mapping[str, Any],
    make: Callable[..., Mapping[str, Any]],
    inputs: Mapping[str, Artifact] | None = None,
    code: Sequence[Code] = (),
    ignore: Collection[str] = (),
    resumable: bool = False,
    root: str | Path | None = None,
) -> Artifact:
    """The result of a stage, from the cache, or made now.

    `make(path)` writes its files into the empty folder `path` and returns its metrics, plain data. If it
    raises, nothing is left. With `resumable=True` it is called as `make(path, work)`: `work` is a second
    folder, which stays where it is when the process is killed or `make` raises, is found again by the next
    attempt at the same result (put checkpoints there), and is deleted on success. `code` names the modules,
    functions or classes that decide the result (default: where `make` is defined); `ignore` those that do not
    matter to it, such as plotting. A damaged result is made anew, with a warning. Several processes may call
    this at once: one makes it.

    Raises:
        ValueError: settings or metrics are not plain data, or the code cannot be found.
        OSError: the root cannot be written or is full; one line that says what to do.
    """
    inputs, code = dict(inputs or {}), tuple(code) or (make,)
    hashed = code_hash(*code, ignore=ignore)
    key = artifact_key(stage, settings, inputs, hashed)
    root = Path(root) if root is not None else artifact_root()
    folder = root / f"{stage}-{key[:KEY_DIGITS]}"
    if (found := _open(folder, key, warn=False)) is not None:
        return found
    with _locked(folder):
        if (found := _open(folder, key, warn=True)) is not None:  # another process has made it meanwhile
            return found
        head = {
            "key": key,
            "stage": stage,
            "settings": plain(dict(settings), "settings"),
            "inputs": {name: artifact.key for name, artifact in inputs.items()},
            "lineage": _ancestors(inputs.values()),
            "code": hashed,
        }
        return _make(folder, head, make, resumable)


def _make(
    folder: Path, head: dict[str, Any], make: Callable[..., Mapping[str, Any]], resumable: bool
) -> Artifact:
    for remnant in folder.parent.glob(
        f".{folder.name}.*.*"
    ):  # of killed makers: we hold the lock, so none lives
        shutil.rmtree(remnant) if remnant.is_dir() else remnant.unlink()
    if folder.exists():
        discard(folder)
    output = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    work = folder.with_name(f"{folder.name}.partial")
    output.mkdir()
    try:
        if resumable:
            work.mkdir(exist_ok=True)
        start = time.perf_counter()
        metrics = make(output, work) if resumable else make(output)
        seconds = time.perf_counter() - start
        manifest = {
            **head,
            "metrics": plain(dict(metrics), f"metrics of stage {head['stage']!r}"),
            "seconds": round(seconds, 3),
            "created": datetime.now(UTC).isoformat(timespec="microseconds"),
            **_environment(),
            "files": record_files(output),
        }
        write_sealed(output / "manifest.json", manifest)
        publish(output, folder)
    except BaseException:
        shutil.rmtree(output, ignore_errors=True)
        raise
    if resumable:
        shutil.rmtree(work)
    return Artifact(folder, manifest)


def _environment() -> dict[str, Any]:
    machine = describe_machine()
    try:
        own = version("llmcourse")
    except PackageNotFoundError:
        own = None  # used from the clone without being installed
    versions = {"python": machine["python"], "torch": machine["torch"], "llmcourse": own}
    return {"device": machine["gpu"] or machine["cpu"], "machine": machine, "versions": versions}


ADVICE = "set LLMCOURSE_HOME to a folder with space that you may write"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of one result, having said for whom it waits. The system frees a killed holder's."""
    root = folder.parent
    lock = FileLock(root / f".{folder.name}.lock")
    owner = root / f".{folder.name}.owner"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _acquire(lock, owner, folder.name)
        owner.write_text(f"process {os.getpid()} (since {datetime.now():%H:%M:%S})", encoding="utf-8")
    except OSError as error:
        lock.release()
        raise OSError(
            error.errno, f"cannot write artifacts to {root} ({error.strerror}): {ADVICE}"
        ) from error
    try:
        yield
    except OSError as error:
        if error.errno in OUT_OF_SPACE:
            raise OSError(error.errno, f"no space left in {root} to make {folder.name}: {ADVICE}") from error
        raise
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _acquire(lock: FileLock, owner: Path, name: str) -> None:
    try:
        lock.acquire(timeout=QUIET_WAIT)
    except Timeout:
        holder = owner.read_text(encoding="utf-8") if owner.exists() else "another process"
        print(f"waiting for {holder}, which is making {name}", file=sys.stderr, flush=True)
        lock.acquire()


def _open(folder: Path, key: str, *, warn: bool) -> Artifact | None:
    """The result in `folder` if it is there and whole: sizes always, bytes once per process."""
    if not folder.exists():
        return None
    try:
        manifest = read_sealed(folder / "manifest.json")
        damage = None if manifest.get("key") == key else "manifest.json is of another result"
    except ValueError as error:
        damage = str(error)
    if damage is None:
        mark = (str(folder.absolute()), text_digest(canonical_json(manifest["files"])))
        damage = find_damage(folder, manifest["files"], digests=mark not in _checked)
    if damage is None:
        _checked.add(mark)
        return Artifact(folder, manifest)
    if warn:
        warnings.warn(f"artifact {folder} is damaged and is made anew: {damage}", stacklevel=3)
    return None


def find_artifact(key: str, root: str | Path | None = None) -> Artifact | None:
    """The finished artifact of which `key` is the whole key, or None if it is not there or damaged."""
    root = Path(root) if root is not None else artifact_root()
    for folder in root.glob(f"*-{key[:KEY_DIGITS]}"):
        if (found := _open(folder, key, warn=False)) is not None:
            return found
    return None


def _record(artifact: Artifact) -> dict[str, Any]:
    names = (
        "key",
        "stage",
        "settings",
        "inputs",
        "code",
        "metrics",
        "seconds",
        "device",
        "versions",
        "created",
    )
    return {name: artifact.manifest[name] for name in names}


def _ancestors(artifacts: Iterable[Artifact]) -> list[dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    for artifact in artifacts:
        for record in (*artifact.manifest["lineage"], _record(artifact)):
            records.setdefault(record["key"], record)
    return list(records.values())


def lineage(artifact: Artifact) -> list[dict[str, Any]]:
    """The whole ancestry, each after its own inputs, the artifact itself last; one record per result.

    A record has key, stage, settings, inputs, code, metrics, seconds, device, versions and created. It is
    complete even if an ancestor was deleted: each manifest carries the records of all before it.
    """
    return _ancestors([artifact])


def list_artifacts(root: str | Path | None = None) -> list[Artifact]:
    """All finished artifacts, oldest first; a folder without a whole manifest is not one."""
    root = Path(root) if root is not None else artifact_root()
    found = []
    for path in root.glob("*/manifest.json"):
        try:
            manifest = read_sealed(path)
        except ValueError:
            continue
        if path.parent.name == f"{manifest.get('stage')}-{str(manifest.get('key'))[:KEY_DIGITS]}":
            found.append(Artifact(path.parent, manifest))
    return sorted(found, key=lambda artifact: (artifact.manifest["created"], artifact.path.name))


def remove_stale(current: Iterable[Artifact], root: str | Path | None = None) -> list[Path]:
    """Delete every artifact that is neither in `current` nor an ancestor of one; returns what was deleted.

    Nothing in this package calls it on its own. Results that are being made at the moment are left alone; the
    unfinished work of killed runs goes.
    """
    root = Path(root) if root is not None else artifact_root()
    keep = {record["key"] for record in _ancestors(current)}
    folders = [artifact.path for artifact in list_artifacts(root) if artifact.key not in keep]
    folders += [path for path in root.glob("*.partial") if path.is_dir()]
    removed = []
    for folder in folders:
        lock = FileLock(root / f".{folder.name.removesuffix('.partial')}.lock")
        try:
            with lock.acquire(timeout=0):
                discard(folder)
                removed.append(folder)
        except Timeout:
            continue
    return removed
