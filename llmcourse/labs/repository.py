"""Where the labs of a checkout are, and the one setting that says where its repository lives."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY_VARIABLE = "LLMCOURSE_REPOSITORY"


@dataclass(frozen=True)
class Lab:
    """A lab of a checkout: its number ("01"), slug ("attention"), and files."""

    repository: Path
    number: str
    slug: str

    @property
    def name(self) -> str:
        """Number and slug: "01_attention"."""
        return f"{self.number}_{self.slug}"

    @property
    def source(self) -> Path:
        """The edited py:percent file."""
        return self.repository / "labs" / "src" / f"{self.name}.py"

    @property
    def notebook(self) -> Path:
        """The executed notebook."""
        return self.repository / "labs" / f"{self.name}.ipynb"

    @property
    def results(self) -> Path:
        """What the lab stored for the book's pages."""
        return self.repository / "labs" / "results" / f"{self.name}.json"


def find_repository(start: Path | None = None) -> Path | None:
    """The checkout around `start`; without one, `$LLMCOURSE_REPOSITORY`, this folder's, or the package's own."""
    if start is None and os.environ.get(REPOSITORY_VARIABLE):
        return Path(os.environ[REPOSITORY_VARIABLE]).resolve()
    places = [(start or Path.cwd()).resolve()]
    if start is None:  # an editable installation lies in its checkout
        places.append(Path(__file__).resolve().parents[2])
    for place in places:
        for folder in (place, *place.parents):
            if (folder / "labs" / "src").is_dir() and (folder / "_config.yml").is_file():
                return folder
    return None


def require_repository(repository: Path | None = None) -> Path:
    """The given checkout, or the one found.

    Raises:
        ValueError: there is none.
    """
    repository = repository or find_repository()
    if repository is None:
        raise ValueError("no checkout of the course here: change into the cloned repository and try again")
    return repository


def list_labs(repository: Path | None = None) -> list[Lab]:
    """The labs with a source, by number.

    Raises:
        ValueError: there is no checkout, or a source is not called `NN_slug.py`.
    """
    repository = require_repository(repository)
    labs = []
    for path in sorted((repository / "labs" / "src").glob("*.py")):
        match = re.fullmatch(r"(\d\d)_([a-z][a-z0-9_]*)", path.stem)
        if match is None:
            raise ValueError(f"labs/src/{path.name}: call it NN_slug.py, such as 01_attention.py")
        labs.append(Lab(repository, *match.groups()))
    return labs


def select_labs(names: str | Iterable[str] | None = None, repository: Path | None = None) -> list[Lab]:
    """The labs of those numbers, slugs or names ("01 04", "attention", "01_attention"), in order; all when empty.

    Raises:
        ValueError: a name fits no lab.
    """
    labs = list_labs(repository)
    wanted = re.split(r"[\s,]+", names) if isinstance(names, str) else list(names or [])
    wanted = [name for name in wanted if name]
    for name in wanted:
        if not any(name in (lab.number, lab.slug, lab.name) for lab in labs):
            raise ValueError(f"no lab {name!r}: choose from {', '.join(lab.name for lab in labs) or 'none'}")
    return [lab for lab in labs if not wanted or {lab.number, lab.slug, lab.name} & set(wanted)]


def find_lab(name: str, repository: Path | None = None) -> Lab:
    """The lab of that number, slug or name.

    Raises:
        ValueError: there is none.
    """
    return select_labs([name], repository)[0]


def repository_address(repository: Path) -> tuple[str, str]:
    """URL and branch of the published repository, from `_config.yml`: the one place that holds them.

    Raises:
        ValueError: `_config.yml` lacks `repository.url`.
    """
    import yaml

    config = yaml.safe_load((repository / "_config.yml").read_text(encoding="utf-8")) or {}
    address = config.get("repository") or {}
    if not address.get("url"):
        raise ValueError("_config.yml: set repository.url, from which the labs' links are made")
    return str(address["url"]).rstrip("/"), str(address.get("branch", "main"))
