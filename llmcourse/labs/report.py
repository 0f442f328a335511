"""The table of labs: what each costs, and whether its claims hold."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from llmcourse.labs.repository import Lab
from llmcourse.labs.staleness import read_notebook, stale


def labs_table(labs: Sequence[Lab], failures: dict[str, str] | None = None) -> Table:
    """One row a lab: state, minutes, minutes of upstream artifacts, peak memory, claims held.

    Args:
        failures: messages of labs that just failed, by name.
    """
    table = Table(title="Labs")
    for column in ("Lab", "State", "Minutes", "Upstream minutes", "Peak GiB", "Claims held", "Device"):
        table.add_column(
            column,
            justify="left" if column in ("Lab", "State", "Device") else "right",
            no_wrap=column == "Lab",
        )
    for lab in labs:
        state = "failed" if lab.name in (failures or {}) else stale(lab) or "current"
        table.add_row(lab.name, state, *_cost(lab))
    return table


def _cost(lab: Lab) -> list[str]:
    try:
        found = read_notebook(lab).metadata["llmcourse"]
    except (OSError, ValueError, KeyError):  # `stale` says which
        return ["-"] * 5
    claims = found["claims"]
    return [
        f"{found['seconds'] / 60:.1f}",
        f"{found['upstream_seconds'] / 60:.1f}" if found["upstream_seconds"] else "-",
        f"{found['peak_bytes'] / 2**30:.2f}",
        f"{sum(claim['held'] for claim in claims)}/{len(claims)}",
        str(found["device"]),
    ]
