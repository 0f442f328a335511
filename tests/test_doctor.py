"""The doctor: findings with advice, estimates scaled by measured rates, a readable report."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import nbformat
import pytest
import torch

from llmcourse import doctor
from llmcourse.artifacts import build
from llmcourse.doctor import Check, Estimate, Report, estimate_costs, render
from llmcourse.labs.repository import list_labs

GIB = 2**30


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_lab(repository: Path, name: str, **cost: object) -> None:
    (repository / "labs" / "src").mkdir(parents=True, exist_ok=True)
    (repository / "_config.yml").touch()
    (repository / "labs" / "src" / f"{name}.py").write_text("# %%\n")
    if cost:
        notebook = nbformat.v4.new_notebook(metadata={"llmcourse": cost})
        nbformat.write(notebook, repository / "labs" / f"{name}.ipynb")


def test_minutes_scale_with_the_ratio_of_the_rates(tmp_path: Path, empty_cache: Path) -> None:
    write_lab(
        tmp_path,
        "01_attention",
        seconds=90.0,
        upstream_seconds=0.0,
        peak_bytes=GIB,
        device="cpu",
        matmul_gflops=200.0,
    )
    write_lab(
        tmp_path,
        "04_pretraining",
        seconds=120.0,
        upstream_seconds=210.0,
        peak_bytes=2 * GIB,
        device="cpu",
        matmul_gflops=100.0,
    )
    write_lab(
        tmp_path,
        "06_distributed",
        seconds=60.0,
        upstream_seconds=9e9,
        peak_bytes=GIB,
        device="cuda",
        matmul_gflops=9e4,
    )
    write_lab(tmp_path, "07_data")
    labs = list_labs(tmp_path)
    base, attention, pretraining, distributed, data = estimate_costs(labs, "cpu", 50.0)
    assert attention.name == "01_attention"
    assert attention.minutes == pytest.approx(
        6.0
    )  # 1.5 min at 200 GFLOP/s is 300 units of work, here 50 a minute
    assert pretraining.minutes == pytest.approx(4.0)
    assert pretraining.peak_bytes == 2 * GIB
    assert base.name == "base model" and base.minutes == pytest.approx(7.0)
    assert distributed.minutes is None and "another kind of device, cuda" in distributed.basis
    assert data.minutes is None and data.basis == "not executed yet"
    assert estimate_costs(labs, "cuda", 9e4)[3].minutes == pytest.approx(1.0)
    build("base", settings={}, make=lambda path: {}, code=["llmcourse.durable"], root=empty_cache)
    assert estimate_costs(labs, "cpu", 50.0)[0].minutes == 0.0
    assert estimate_costs([], "cpu", 50.0) == []


def test_packages_against_ranges() -> None:
    versions = {"torch": "2.13.0+cpu", "rich": "13.0"}

    def version_of(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    assert doctor.check_packages(["torch>=2.6", "rich"], version_of) == Check("packages", "2 as required")
    bad = doctor.check_packages(["torch<2.13", "rich>=13.7", "datasets>=3"], version_of)
    assert bad.found == "torch 2.13.0+cpu is not <2.13; rich 13.0 is not >=13.7; datasets is missing"
    assert "make setup" in bad.advice
    assert doctor.check_packages([]).advice is None


def test_requirements_come_from_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "llmcourse"\nrequires-python = ">=3.11,<3.14"\ndependencies = ["torch>=2.6"]\n'
        '[project.optional-dependencies]\nlabs = ["papermill>=2.6"]\nbook = ["jupyter-book"]\n'
    )
    assert doctor.read_requirements(tmp_path) == (">=3.11,<3.14", ["torch>=2.6", "papermill>=2.6"])


def test_requirements_of_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    message = importlib.metadata._adapters.email.message_from_string(
        "Metadata-Version: 2.1\nName: llmcourse\nRequires-Python: >=3.11\nRequires-Dist: torch>=2.6\n"
        "Requires-Dist: papermill>=2.6; extra == 'labs'\nRequires-Dist: sphinx; extra == 'book'\n"
    )
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: message)
    python, lines = doctor.read_requirements(None)
    assert python == ">=3.11" and [line.split(">")[0] for line in lines] == ["torch", "papermill"]


def test_python_versions() -> None:
    assert doctor.check_python(">=3.11,<3.14", "3.12.1").advice is None
    assert doctor.check_python(">=3.11,<3.14", "3.10.9").advice == "use a Python >=3.11,<3.14"
    assert doctor.check_python("").found.startswith("3.")


def test_memory_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labs = [Estimate("01", 1.0, GIB, ""), Estimate("04", 1.0, 3 * GIB, "")]
    assert doctor.check_memory(8 * GIB, 3 * GIB, labs).advice is None
    assert "a lab may use 3.0 GiB" in doctor.check_memory(8 * GIB, 2 * GIB, labs).advice
    assert "a lab may use 4.0 GiB" in doctor.check_memory(8 * GIB, 2 * GIB, []).advice
    assert doctor.check_disk(tmp_path / "not" / "yet" / "there").found.endswith("there")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": GIB}))
    assert "LLMCOURSE_HOME" in doctor.check_disk(tmp_path).advice
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "cannot be written" in doctor.check_disk(tmp_path).advice


def test_compiler_gpu_and_bf16(tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()

    def clang(name: str) -> str | None:
        return "/bin/clang++" if name == "clang++" else None

    assert doctor.check_compiler(clang, tmp_path) == Check("C++ compiler", "/bin/clang++")
    assert "python3-dev" in doctor.check_compiler(clang, tmp_path / "nothing").advice
    assert "apt-get install g++" in doctor.check_compiler(lambda name: None, tmp_path).advice
    cpu = torch.device("cpu")
    assert (
        doctor.check_bf16(cpu, {"fp32": 100.0, "bf16": 250.0}).found
        == "in hardware, 2.5 x the rate of float32"
    )
    assert "training runs in float32" in doctor.check_bf16(cpu, {"fp32": 100.0}).found
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert doctor.check_gpu(None, False).advice is None
        assert "CUDA build of torch" in doctor.check_gpu(None, True).advice


def test_diagnose_looks_at_this_machine(tmp_path: Path) -> None:
    write_lab(tmp_path, "01_attention")
    report = doctor.diagnose(tmp_path, seconds=0.01)
    assert [check.name for check in report.checks] == [
        "Python",
        "packages",
        "processor",
        "memory",
        "disk",
        "GPU",
        "bfloat16",
        "C++ compiler",
        "matrix product",
        "jail for grading",
    ]
    jail = report.checks[-1]
    assert jail.advice is None and (jail.found.startswith("none: ") or "seccomp" in jail.found)
    assert report.gflops["fp32"] > 0.1
    assert [estimate.name for estimate in report.estimates] == ["base model", "01_attention"]


def test_report_reads_well() -> None:
    checks = [Check("disk", "1.0 GiB free in [home]", "free some space"), Check("Python", "3.12.1")]
    estimates = [
        Estimate("01_attention", 1.25, GIB, "1.0 min"),
        Estimate("07_data", None, None, "not executed yet"),
    ]
    text = render(Report(checks, estimates, {"fp32": 100.0}))
    lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
    assert "! disk 1.0 GiB free in [home]" in lines and "ok Python 3.12.1" in lines
    assert "01_attention 1.2 1.00 1.0 min" in lines and "07_data - - not executed yet" in lines
    assert lines[-2:] == ["disk: 1.0 GiB free in [home]", "-> free some space"]
    assert "\x1b" not in text and "Nothing stands in the way." not in text
    assert render(Report(checks[1:], [], {})).splitlines()[-1] == "Nothing stands in the way."
