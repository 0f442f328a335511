"""What was handed out, signed, and the instructor's key: seeds, skeletons, model solutions.

The manifest names every cell of a released notebook with the hash of its text. It holds no secret and may be
published; its signature shows that it belongs to the key. The key's folder is for the instructor alone. The reference
answers are public (they are this package), so what the secret protects is the inputs: each student is graded on one of
a few dozen variants of the random inputs, and which one follows from the secret.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcourse.durable import canonical_json
from llmcourse.grading.limits import Limits
from llmcourse.labs.results import write_atomically

MANIFEST_VERSION = 1
VARIANTS = 64
SECRET_FILE = "secret"
ROLES = ("setup", "solution", "check", "manual", "other")
SEED_BITS = 31


@dataclass(frozen=True, kw_only=True)
class CellRecord:
    """One cell of a released notebook.

    Attributes:
        grade_id: nbgrader's id, `None` for a cell that nbgrader does not manage.
        cell_id: the notebook's own id of the cell.
        type: "code", "markdown" or "raw".
        role: "setup", "solution", "check", "manual" or "other".
        sha256: of the released source, see `source_digest`.
        points: what it is worth: a check cell's exercise, a manual question.
        run: whether grading runs any of it for the model solutions.
    """

    grade_id: str | None
    cell_id: str
    type: str
    role: str
    sha256: str
    points: float = 0
    run: bool = False


@dataclass(frozen=True, kw_only=True)
class ManualQuestion:
    """A question that a person grades: its grade_id, title and points."""

    grade_id: str
    title: str
    points: float


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is public about a released assignment.

    Attributes:
        release: random hexadecimal name of this release.
        assignment: "11_peft"; `slug`: "peft".
        points, titles: of each exercise, by its name "peft/lora_forward", in the order of the lab.
        manual: the questions that a person grades.
        limits: what a submission may use.
        files: SHA-256 of data files handed out beside the notebook, by name.
    """

    release: str
    assignment: str
    slug: str
    title: str
    points: Mapping[str, float]
    titles: Mapping[str, str]
    manual: tuple[ManualQuestion, ...]
    limits: Limits
    cells: tuple[CellRecord, ...]
    files: Mapping[str, str]
    version: int = MANIFEST_VERSION

    @property
    def max_points(self) -> float:
        """Points of all exercises and manual questions."""
        return sum(self.points.values()) + sum(question.points for question in self.manual)

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain data."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """The manifest of such data.

        Raises:
            ValueError: it is of another version, or incomplete.
        """
        if data.get("version") != MANIFEST_VERSION:
            raise ValueError(
                f"the manifest has version {data.get('version')!r}, not {MANIFEST_VERSION}: release again"
            )
        try:
            fields = dict(data)
            fields["manual"] = tuple(ManualQuestion(**question) for question in data["manual"])
            fields["cells"] = tuple(CellRecord(**cell) for cell in data["cells"])
            fields["limits"] = Limits(**data["limits"])
            return cls(**fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the manifest is incomplete ({error}): release again") from None


@dataclass(frozen=True, kw_only=True)
class AssignmentKey:
    """What grading one assignment needs, and no student may see before the hand-in.

    Attributes:
        skeleton: the released student notebook as JSON data: the only source of locked cells.
        solutions: source of the model solution of each exercise.
        answers: the expression that names an exercise's answer in the notebook: "my_lora_forward".
        watched: package functions ("module:qualname") whose call by an answer is reported, for each exercise.
        variants: the seeds of each exercise's input variants; each was tried at release.
        proven: numbers of the top-level statements of each skeleton cell that the model solutions need.
        preload: modules that the jail imports once for all submissions.
        secret: the key's secret bytes.
    """

    manifest: Manifest
    skeleton: Mapping[str, Any]
    solutions: Mapping[str, str]
    answers: Mapping[str, str]
    watched: Mapping[str, tuple[str, ...]]
    variants: Mapping[str, tuple[int, ...]]
    proven: Mapping[str, tuple[int, ...]]
    preload: tuple[str, ...]
    secret: bytes = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """The assignment: "11_peft"."""
        return self.manifest.assignment

    @property
    def slug(self) -> str:
        """The chapter: "peft"."""
        return self.manifest.slug

    def seed(self, student: str, exercise: str) -> int:
        """The seed of a student's inputs for an exercise: one of its variants, by the secret.

        Raises:
            ValueError: the assignment has no such exercise.
        """
        if exercise not in self.variants:
            raise ValueError(f"{self.name} has no exercise {exercise!r}: choose {', '.join(self.variants)}")
        seeds = self.variants[exercise]
        return seeds[derive(self.secret, "variant", self.name, student, exercise) % len(seeds)]

    def untouched(self) -> bytes:
        """The released notebook as a student would hand it in without writing anything."""
        return json.dumps(self.skeleton).encode()

    def solved(self) -> bytes:
        """The released notebook with the model solutions in their cells."""
        notebook = json.loads(json.dumps(self.skeleton))
        by_cell = {f"{name.replace('/', '-')}": source for name, source in self.solutions.items()}
        for cell in notebook["cells"]:
            grade_id = cell["metadata"].get("nbgrader", {}).get("grade_id")
            if grade_id in by_cell:
                cell["source"] = by_cell[grade_id]
        return json.dumps(notebook).encode()

    def to_json(self) -> dict[str, Any]:
        """All but the secret, as plain data."""
        names = ("skeleton", "solutions", "answers", "watched", "variants", "proven", "preload")
        data = {name: getattr(self, name) for name in names}
        return json.loads(json.dumps({**data, "manifest": self.manifest.to_json()}))

    @classmethod
    def from_json(cls, data: Mapping[str, Any], secret: bytes) -> AssignmentKey:
        """The key of such data.

        Raises:
            ValueError: it is incomplete, or of another version.
        """
        try:
            lists = {
                name: {key: tuple(values) for key, values in data[name].items()}
                for name in ("watched", "variants", "proven")
            }
            return cls(
                manifest=Manifest.from_json(data["manifest"]),
                **{name: data[name] for name in ("skeleton", "solutions", "answers")},
                **lists,
                preload=tuple(data["preload"]),
                secret=secret,
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the key is incomplete ({error}): release again") from None


class Key:
    """A key folder: one secret, and one signed file for each released assignment."""

    def __init__(self, folder: Path, secret: bytes) -> None:
        self.folder, self.secret = Path(folder), secret

    @classmethod
    def create(cls, folder: Path, secret: bytes | None = None) -> Key:
        """The key of a folder, with a new secret where it has none; the folder is the owner's alone (mode 700).

        Args:
            secret: for tests; by default 32 random bytes.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o700)
        path = folder / SECRET_FILE
        if not path.exists():
            write_atomically(path, (secret or secrets.token_bytes(32)).hex() + "\n")
            os.chmod(path, 0o600)
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Key:
        """The key of an existing folder.

        Raises:
            ValueError: there is no key, or its secret is damaged.
        """
        path = Path(folder) / SECRET_FILE
        try:
            secret = bytes.fromhex(path.read_text(encoding="ascii").strip())
        except FileNotFoundError:
            raise ValueError(f"{folder} is no key folder: give the folder key/ that release wrote") from None
        except ValueError:
            raise ValueError(f"{path} is damaged: restore it from your copy, or release again") from None
        if len(secret) < 16:
            raise ValueError(f"{path} is damaged: restore it from your copy, or release again")
        return cls(folder, secret)

    @property
    def assignments(self) -> tuple[str, ...]:
        """The assignments released with this key, by name."""
        return tuple(sorted(path.stem for path in self.folder.glob("*.json")))

    def assignment(self, name: str) -> AssignmentKey:
        """The key of one assignment.

        Raises:
            ValueError: there is none of that name, or its file was changed after the release.
        """
        if name not in self.assignments:
            raise ValueError(
                f"no assignment {name!r} in {self.folder}: {', '.join(self.assignments) or 'none'}"
            )
        return AssignmentKey.from_json(self._verified(self.folder / f"{name}.json"), self.secret)

    def save(self, assignment: AssignmentKey) -> None:
        """Write an assignment's key, signed."""
        path = self.folder / f"{assignment.name}.json"
        write_atomically(path, signed_text(assignment.to_json(), self.secret, "key"))
        os.chmod(path, 0o600)

    def seed(self, assignment: str, student: str, exercise: str) -> int:
        """The seed of a student's inputs for an exercise, see `AssignmentKey.seed`."""
        return self.assignment(assignment).seed(student, exercise)

    def manifest_text(self, manifest: Manifest) -> str:
        """The manifest's file: signed JSON."""
        return signed_text(manifest.to_json(), self.secret, "manifest")

    def read_manifest(self, path: Path) -> Manifest:
        """A manifest's file.

        Raises:
            ValueError: it is damaged, or this key did not sign it.
        """
        return Manifest.from_json(verified(path, self.secret, "manifest"))

    def _verified(self, path: Path) -> dict[str, Any]:
        return verified(path, self.secret, "key")


def source_digest(source: str) -> str:
    """SHA-256 of a cell's text as far as it matters: line ends and white space at the ends of lines do not."""
    return hashlib.sha256(normalized(source).encode("utf-8", "surrogatepass")).hexdigest()


def normalized(source: str) -> str:
    """A cell's text without what editors and upload forms change by themselves."""
    lines = [line.rstrip() for line in re.split(r"\r\n|\r|\n", source)]
    return "\n".join(lines).strip("\n")


def derive(secret: bytes, *parts: str) -> int:
    """A number below 2**31 that follows from the secret and the parts."""
    digest = hmac.new(secret, canonical_json(list(parts)).encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - SEED_BITS)


def signed_text(data: Mapping[str, Any], secret: bytes, purpose: str) -> str:
    """Plain data as JSON with its signature."""
    return json.dumps({**data, "signature": _signature(data, secret, purpose)}, indent=1) + "\n"


def verified(path: Path, secret: bytes, purpose: str) -> dict[str, Any]:
    """The data of a signed file.

    Raises:
        ValueError: it is no JSON, or another secret signed it, or it was changed.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        signature = data.pop("signature")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}): release again") from None
    if not hmac.compare_digest(str(signature), _signature(data, secret, purpose)):
        raise ValueError(f"{path} was changed, or belongs to another key: release again")
    return data


def _signature(data: Mapping[str, Any], secret: bytes, purpose: str) -> str:
    message = f"{purpose}\n{canonical_json(data)}".encode()
    return hmac.new(secret, message, hashlib.sha256).hexdigest()
