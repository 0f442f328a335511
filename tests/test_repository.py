"""The files around the package agree with each other: address, versions, pins, README, workflows, wheel."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import llmcourse
from llmcourse.book import toc_pages

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def repository_files() -> list[Path]:
    """Everything that is tracked or would be: what Git does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def pins() -> dict[str, Requirement]:
    """Requirements of requirements.txt by lower-case name."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    parsed = [
        Requirement(text) for line in lines if (text := line.split(" #")[0].strip()) and text[0] not in "#-"
    ]
    return {normal(requirement.name): requirement for requirement in parsed}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def exact(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    return specifier.version


def test_the_repository_address_is_in_one_place():
    # The generated notebooks carry links made from the setting; nothing else may name where the repository lives.
    addresses = [
        CONFIG["repository"]["url"].removeprefix("https://"),
        CONFIG["html"]["baseurl"].removeprefix("https://"),
    ]
    assert all("/" in address for address in addresses)
    holders = set()
    for path in repository_files():
        text = path.read_bytes()
        if any(address.strip("/").encode() in text for address in addresses):
            holders.add(path.relative_to(ROOT).as_posix())
    assert {name for name in holders if not re.fullmatch(r"labs/\d\d_\w+\.ipynb", name)} == {"_config.yml"}


def test_addresses_in_the_configuration_belong_together():
    owner, name = CONFIG["repository"]["url"].split("/")[-2:]
    assert CONFIG["html"]["baseurl"] == f"https://{owner}.github.io/{name}/"
    assert CONFIG["parse"]["myst_substitutions"]["repository"] == CONFIG["repository"]["url"]


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PYPROJECT["project"]["version"] == llmcourse.__version__ == citation["version"]
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_every_requirement_is_pinned_exactly():
    loose = [
        str(pin)
        for pin in pins().values()
        if [s.operator for s in pin.specifier] != ["=="] or "*" in str(pin)
    ]
    assert loose == []
    assert exact(pins()["torch"]) == "2.13.0"
    assert exact(pins()["jupyter-book"]).startswith("1."), "2.x reads neither _config.yml nor _toc.yml"


def test_declared_ranges_contain_the_pins():
    # The package is built without isolation, so what builds it is pinned as well.
    declared = [*PYPROJECT["build-system"]["requires"], *PYPROJECT["project"]["dependencies"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        declared += extra
    for requirement in map(Requirement, declared):
        pin = pins().get(normal(requirement.name))
        assert pin is not None, (
            f"{requirement.name} is declared in pyproject.toml and not pinned in requirements.txt"
        )
        assert requirement.specifier.contains(exact(pin)), f"{pin} is outside {requirement}"


def test_installed_versions_are_the_pinned_ones():
    wrong = {}
    for name, pin in pins().items():
        if pin.marker and not pin.marker.evaluate():
            continue
        installed = importlib.metadata.version(name)
        if not pin.specifier.contains(installed):
            wrong[name] = installed
    assert wrong == {}, "run make setup"


def test_python_versions_agree():
    allowed = SpecifierSet(PYPROJECT["project"]["requires-python"])
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    tried = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert [
        version for version in ("3.10", "3.11", "3.12", "3.13", "3.14") if allowed.contains(version)
    ] == tried
    for version in tried:
        assert f"Programming Language :: Python :: {version}" in PYPROJECT["project"]["classifiers"]


def fake_python(folder: Path, name: str, version: tuple[int, int]) -> None:
    """An executable that answers as the interpreter of that version would."""
    script = folder / name
    code = f"import sys; sys.version_info = {(*version, 0)}; exec(sys.argv[1])"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{code}" "$2"\n', encoding="utf-8")
    script.chmod(0o755)


def find_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    for tool in ("bash", "env"):
        (folder / tool).exists() or (folder / tool).symlink_to(shutil.which(tool))
    return subprocess.run(
        [ROOT / ".ci/find-python", *arguments],
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_find_python_takes_a_supported_one(tmp_path):
    fake_python(tmp_path, "python3", (3, 14))
    fake_python(tmp_path, "python3.12", (3, 12))
    assert find_python(tmp_path).stdout.strip() == str(tmp_path / "python3.12")


@pytest.mark.parametrize("version", [(3, 10), (3, 14)])
def test_find_python_refuses_others_in_one_line(tmp_path, version):
    fake_python(tmp_path, "python3", version)
    found = find_python(tmp_path)
    assert found.returncode == 1 and found.stdout == ""
    assert "no Python 3.11, 3.12 or 3.13 found" in found.stderr and found.stderr.count("\n") == 1


def make(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_make_help_is_the_default_and_lists_every_target():
    text = make()
    assert text == make("help")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    assert [line.split()[0] for line in text.splitlines()[1:-1]] == targets


def test_make_test_runs_everything_in_order():
    commands = make("--dry-run", "test")
    expected = [
        "ruff check .",
        "ruff format --check .",
        "codespell",
        "-m pytest",
        "llmcourse.labs check",
        "llmcourse.book build --force",
        "pytest -m book tests/test_book.py tests/test_browser.py",
    ]
    positions = [commands.index(command) for command in expected]
    assert positions == sorted(positions)


def test_ci_runs_make_test():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
    assert "set -euo pipefail" in lines and lines[-1] == "exec make test"
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert {"run": ".ci/run"} in workflow["jobs"]["test"]["steps"]


def test_licenses_are_there():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "CC BY 4.0" in (ROOT / "LICENSE-prose.md").read_text(encoding="utf-8")
    vendored = ROOT / "book/_static/vendor"
    listed = (vendored / "README.txt").read_text(encoding="utf-8")
    for path in vendored.rglob("*.js"):
        assert path.relative_to(vendored).as_posix() in listed
        assert list(path.parent.glob("LICENSE*")), f"{path.name} lies there without its license"


def readme_rows() -> dict[str, list[str]]:
    """Cells of the README's table of labs, by lab."""
    rows = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if match := re.search(r"\(labs/(\d\d_\w+)\.ipynb\)", line):
            rows[match[1]] = [cell.strip() for cell in line.strip("|").split("|")]
    return rows


def test_readme_lists_each_lab_with_the_minutes_it_took():
    labs = [page.removeprefix("labs/") for page in toc_pages(ROOT) if page.startswith("labs/")]
    rows = readme_rows()
    assert list(rows) == labs
    for lab in labs:
        notebook = json.loads((ROOT / f"labs/{lab}.ipynb").read_text(encoding="utf-8"))
        run = notebook["metadata"]["llmcourse"]
        claimed = float(re.search(r"[\d.]+", rows[lab][3])[0])
        # Rounded up to whole minutes, and another run of the same lab may be a little slower or faster.
        assert abs(claimed - math.ceil(run["seconds"] / 60)) <= 1, f"{lab} took {run['seconds']:.0f} s"


def test_readme_tree_names_what_is_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\n(.*?)```", readme, re.DOTALL)[1]
    named = re.findall(r"^(\S+)", tree, re.MULTILINE)
    assert [name for name in named if not (ROOT / name).exists()] == []
    top = {path.relative_to(ROOT).parts[0] for path in repository_files()}
    unnamed = {name for name in top if name.rstrip("/") not in {item.rstrip("/") for item in named}}
    assert unnamed - {".gitignore", ".gitattributes"} == set()


def test_readme_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text(encoding="utf-8")):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{name}: {target}"


@pytest.mark.slow
def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "llmcourse", source / "llmcourse", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-prose.md"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
    ]
    subprocess.run([*command, source], check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        path
        for path in (source / "llmcourse").rglob("*")
        if path.suffix in (".py", ".json", ".typed", ".jinja")
    }
    assert names == {path.relative_to(source).as_posix() for path in files}
