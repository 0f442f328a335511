"""What this machine has, what stands in the way, and what the labs will cost on it."""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import shutil
import sysconfig
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmcourse.artifacts import artifact_root, list_artifacts
from llmcourse.labs.repository import Lab, find_repository, list_labs
from llmcourse.runtime import describe_machine, has_fast_bf16, matmul_flops, pick_device

LEAST_MEMORY = 4 * 2**30
"""bytes of memory that any one lab may use on the CPU"""
LEAST_DISK = 2 * 2**30
"""bytes that the artifacts of all labs fit into"""
EXTRAS = ("labs",)
"""optional parts of the package that a learner needs too"""
BASE_STAGE = "base"
"""name under which the pipeline stores the base model"""


@dataclass(frozen=True)
class Check:
    """One finding."""

    name: str
    """what was looked at"""
    found: str
    """what is there"""
    advice: str | None = None
    """what to do about it, if it is a problem"""


@dataclass(frozen=True)
class Estimate:
    """What a lab, or the base model, costs on this machine."""

    name: str
    """the lab's number and slug, or "base model" """
    minutes: float | None
    """expected wall-clock minutes; None if nothing measured says"""
    peak_bytes: int | None
    """peak memory in bytes where it was measured"""
    basis: str
    """what the estimate rests on"""


@dataclass(frozen=True)
class Report:
    """Everything that `diagnose` found."""

    checks: list[Check]
    """in the order in which they are shown"""
    estimates: list[Estimate]
    """the base model first, then the labs by number; empty without a checkout of the course"""
    gflops: dict[str, float]
    """measured rate of a large matrix product in GFLOP/s by type: "fp32" and, in hardware, "bf16" """

    @property
    def problems(self) -> list[Check]:
        """The findings that need something done."""
        return [check for check in self.checks if check.advice]


def diagnose(repository: Path | None = None, *, seconds: float = 0.5) -> Report:
    """Look at this machine; `seconds` is how long each matrix product is measured (a second in all by default)."""
    repository = repository or find_repository()
    machine, device = describe_machine(), pick_device()
    gflops = {"fp32": matmul_flops(device, torch.float32, seconds=seconds) / 1e9}
    if has_fast_bf16(device):
        gflops["bf16"] = matmul_flops(device, torch.bfloat16, seconds=seconds) / 1e9
    requires_python, requirements = read_requirements(repository)
    estimates = estimate_costs(list_labs(repository) if repository else [], device.type, gflops["fp32"])
    checks = [
        check_python(requires_python),
        check_packages(requirements),
        Check("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} torch threads"),
        check_memory(psutil.virtual_memory().total, psutil.virtual_memory().available, estimates),
        check_disk(artifact_root()),
        check_gpu(machine["gpu"], Path("/proc/driver/nvidia/version").exists()),
        check_bf16(device, gflops),
        check_compiler(),
        Check("matrix product", ", ".join(f"{rate:,.0f} GFLOP/s in {kind}" for kind, rate in gflops.items())),
        check_jail(),
    ]
    return Report(checks, estimates, gflops)


def read_requirements(repository: Path | None) -> tuple[str, list[str]]:
    """Versions of Python and requirements of the package: from the checkout, or else as it was installed."""
    path = repository / "pyproject.toml" if repository else None
    if path and path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        optional = project.get("optional-dependencies", {})
        extras = [requirement for extra in EXTRAS for requirement in optional.get(extra, [])]
        return project.get("requires-python", ""), [*project.get("dependencies", []), *extras]
    try:
        metadata = importlib.metadata.metadata("llmcourse")
    except importlib.metadata.PackageNotFoundError:
        return "", []
    lines = metadata.get_all("Requires-Dist") or []
    wanted = [
        line
        for line in lines
        if (marker := Requirement(line).marker) is None
        or any(marker.evaluate({"extra": extra}) for extra in ("", *EXTRAS))
    ]
    return metadata.get("Requires-Python") or "", wanted


def check_python(requires: str, version: str | None = None) -> Check:
    """This Python against the range `requires`, such as ">=3.11,<3.14"."""
    version = version or platform.python_version()
    fits = SpecifierSet(requires).contains(version, prereleases=True)
    return Check("Python", version, None if fits else f"use a Python {requires}")


def check_jail() -> Check:
    """Which walls a jail for students' notebooks has here; only who grades needs one, so that none is no problem."""
    from llmcourse.grading.jail.client import Jail

    try:
        with Jail(preload=()) as jail:
            walls = [name for name, stands in jail.layers.items() if stands]
    except (ValueError, OSError) as error:
        return Check("jail for grading", f"none: {error}")
    return Check("jail for grading", ", ".join(walls))


def check_packages(
    requirements: Iterable[str], version_of: Callable[[str], str] = importlib.metadata.version
) -> Check:
    """Installed versions against ranges such as "torch>=2.6"."""
    n, wrong = 0, []
    for requirement in map(Requirement, requirements):
        n += 1
        try:
            version = version_of(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Check(
            "packages", "; ".join(wrong), "run `make setup` in the clone, or `pip install -U llmcourse[labs]`"
        )
    return Check("packages", f"{n} as required" if n else "no list of requirements here")


def check_memory(total: int, available: int, estimates: Iterable[Estimate]) -> Check:
    """Memory in bytes against what the labs were measured to use."""
    found = f"{total / 2**30:.1f} GiB, {available / 2**30:.1f} GiB available"
    needed = max((estimate.peak_bytes or 0 for estimate in estimates), default=0) or LEAST_MEMORY
    if available >= needed:
        return Check("memory", found)
    return Check("memory", found, f"close other programs: a lab may use {needed / 2**30:.1f} GiB")


def check_disk(root: Path) -> Check:
    """Space where artifacts are kept."""
    place = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free for artifacts in {root}"
    if not os.access(place, os.W_OK):
        return Check("disk", found, "it cannot be written: set LLMCOURSE_HOME to a folder that you may write")
    enough = free >= LEAST_DISK
    return Check(
        "disk", found, None if enough else "free some space or set LLMCOURSE_HOME to a folder with more"
    )


def check_gpu(name: str | None, has_driver: bool) -> Check:
    """The GPUs that torch sees; `has_driver` says whether the system has an NVIDIA driver."""
    if name is not None:
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found = ", ".join(f"{each.name} ({each.total_memory / 2**30:.0f} GiB)" for each in names)
        return Check("GPU", found)
    if torch.backends.mps.is_available():
        return Check("GPU", "Apple MPS")
    if has_driver:
        advice = "install the CUDA build of torch, see https://pytorch.org/get-started/locally"
        return Check("GPU", "there is an NVIDIA driver, but torch sees no GPU", advice)
    return Check("GPU", "none, and none is needed: the preset `cpu` is made for this")


def check_bf16(device: torch.device, gflops: dict[str, float]) -> Check:
    """Whether bfloat16 products run in hardware, and what they gain."""
    if "bf16" in gflops:
        return Check("bfloat16", f"in hardware, {gflops['bf16'] / gflops['fp32']:.1f} x the rate of float32")
    return Check("bfloat16", f"not in hardware on this {device.type}: training runs in float32")


def check_compiler(which: Callable[[str], str | None] = shutil.which, include: Path | None = None) -> Check:
    """What torch.compile needs on a CPU: a C++ compiler and, to load what it compiles, Python's header files."""
    compiler = next((path for name in ("g++", "clang++", "cl") if (path := which(name))), None)
    header = (include or Path(sysconfig.get_paths()["include"])) / "Python.h"
    slower = "without it training takes longer, since torch.compile is left out"
    if compiler is None:
        return Check("C++ compiler", "none", f"install one (Debian, Ubuntu: `apt-get install g++`): {slower}")
    if not header.is_file():
        found = f"{compiler}, but no Python.h"
        return Check(
            "C++ compiler", found, f"install it (Debian, Ubuntu: `apt-get install python3-dev`): {slower}"
        )
    return Check("C++ compiler", compiler)


def _cost(lab: Lab) -> dict[str, Any] | None:
    """What the stored notebook says about its execution, if it was executed."""
    import nbformat

    if not lab.notebook.is_file():
        return None
    found = nbformat.read(lab.notebook, as_version=4).metadata.get("llmcourse")
    return dict(found) if found and found.get("matmul_gflops") else None


def estimate_costs(labs: Iterable[Lab], device: str, gflops: float) -> list[Estimate]:
    """Minutes of each lab here: those measured where it was stored, times the ratio of the two matrix product rates.

    An estimate is made only from a measurement on the same kind of device. `gflops` is this machine's float32
    rate.
    """
    labs = list(labs)
    if not labs:
        return []
    costs = [(lab, _cost(lab)) for lab in labs]
    return [_estimate_base([cost for _, cost in costs if cost], device, gflops)] + [
        _estimate_lab(lab.name, cost, device, gflops) for lab, cost in costs
    ]


def _minutes(seconds: float, cost: dict[str, Any], gflops: float) -> float:
    return seconds / 60 * cost["matmul_gflops"] / gflops


def _estimate_lab(name: str, cost: dict[str, Any] | None, device: str, gflops: float) -> Estimate:
    if cost is None:
        return Estimate(name, None, None, "not executed yet")
    if cost["device"] != device:
        return Estimate(
            name, None, cost["peak_bytes"], f"measured on another kind of device, {cost['device']}"
        )
    basis = f"{cost['seconds'] / 60:.1f} min at {cost['matmul_gflops']:,.0f} GFLOP/s"
    return Estimate(name, _minutes(cost["seconds"], cost, gflops), cost["peak_bytes"], basis)


def _estimate_base(costs: list[dict[str, Any]], device: str, gflops: float) -> Estimate:
    """The base model and what it is made from; a lab's upstream seconds are what it had to make before it could run."""
    name = "base model"
    built = [artifact for artifact in list_artifacts() if artifact.stage == BASE_STAGE]
    if built:
        return Estimate(name, 0.0, None, f"in the cache; it took {built[-1].seconds / 60:.1f} min")
    usable = [cost for cost in costs if cost["device"] == device and cost.get("upstream_seconds")]
    if not usable:
        return Estimate(name, None, None, "not measured on this kind of device yet")
    cost = max(usable, key=lambda cost: cost["upstream_seconds"] * cost["matmul_gflops"])
    basis = f"{cost['upstream_seconds'] / 60:.1f} min at {cost['matmul_gflops']:,.0f} GFLOP/s"
    return Estimate(name, _minutes(cost["upstream_seconds"], cost, gflops), None, basis)


def render(report: Report, width: int = 100) -> str:
    """The report as text: findings, what each lab will cost, and what to do about the problems."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    table = Table(title="This machine", show_header=False)
    for check in report.checks:
        table.add_row("!" if check.advice else "ok", check.name, escape(check.found))
    console.print(table)
    if report.estimates:
        console.print(_estimates_table(report.estimates))
    for check in report.problems:
        console.print(
            f"{check.name}: {escape(check.found)}\n  -> {escape(check.advice or '')}", soft_wrap=True
        )
    if not report.problems:
        console.print("Nothing stands in the way.")
    return console.file.getvalue()


def _estimates_table(estimates: Iterable[Estimate]) -> Table:
    table = Table(title="What the labs will cost here")
    for column, side in (
        ("Lab", "left"),
        ("Minutes", "right"),
        ("Peak GiB", "right"),
        ("Estimated from", "left"),
    ):
        table.add_column(column, justify=side)
    for estimate in estimates:
        minutes = "-" if estimate.minutes is None else f"{estimate.minutes:.1f}"
        peak = "-" if estimate.peak_bytes is None else f"{estimate.peak_bytes / 2**30:.2f}"
        table.add_row(estimate.name, minutes, peak, escape(estimate.basis))
    return table
