"""From a lab's source to an executed notebook with provenance; the results that labs store and book pages read.

`labs/src/NN_slug.py` (py:percent) is what is edited; `labs/NN_slug.ipynb` is built from it, executed on a fresh
kernel in an empty folder, and stored with its outputs. `python -m llmcourse.labs --help` lists the commands.
"""

from __future__ import annotations

from llmcourse.labs.execution import LabError, execute
from llmcourse.labs.repository import Lab, find_lab, find_repository, list_labs, select_labs
from llmcourse.labs.results import load_benchmarks, load_results, store_results
from llmcourse.labs.source import SETUP, build
from llmcourse.labs.staleness import refresh, stale

__all__ = [
    "SETUP",
    "Lab",
    "LabError",
    "build",
    "execute",
    "find_lab",
    "find_repository",
    "list_labs",
    "load_benchmarks",
    "load_results",
    "refresh",
    "select_labs",
    "stale",
    "store_results",
]
