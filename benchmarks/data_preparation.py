"""The whole funnel: pages a second and where the time goes, one process against two, and memory against corpus size.

Part of `make bench` with corpora of 10 and 100 MB. The larger measurement, up to 1 GB, takes a quarter of an hour::

    python -m benchmarks.data_preparation --megabytes 100 1000

Generated documents have some 2 kB of words drawn by frequency from Tinytown's vocabulary, a twentieth of them an exact
and another twentieth a near copy of an earlier one. Each size runs in a process of its own. Memory is what the process
itself occupies (resident, without pages of files, which the system may take back), sampled during the run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.harness import alternate, result, write
from llmcourse.data.preparation import (
    DOCUMENT_STEPS,
    PreparationSettings,
    map_documents,
    prepare,
    prepare_shards,
)
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump

PAGES = 2000
ROUNDS = 3
MEGABYTES = (10, 100)
MAX_GROWTH = 1.2
"""peak memory of the largest corpus over that of the smallest"""


def run() -> list[dict[str, Any]]:
    """The funnel's speed on a web dump, in one process and two, and its memory on generated text."""
    return [_funnel(), _processes(), memory(MEGABYTES)]


def _funnel() -> dict[str, Any]:
    pages = list(web_dump(Town(0), PAGES, seed=1))
    bare = [
        {"html": page.html, "url": page.url} for page in pages
    ]  # labels cost time that a real corpus does not
    prepare(bare[:100])
    runs = [prepare(bare) for _ in range(ROUNDS)]
    seconds = {
        report.name: statistics.median(run.report(report.name).seconds for run in runs)
        for report in runs[0].reports
    }
    without = [PAGES / (run.seconds - run.report("extract").seconds) for run in runs]
    return result(
        "data_preparation",
        what=f"web pages through the funnel without extraction, one process, {PAGES} pages of a web dump",
        unit="pages/s",
        ours=without,
        least=1000.0,
        pages_per_second_with_extraction=statistics.median(PAGES / run.seconds for run in runs),
        step_seconds=seconds,
        slowest=max(seconds, key=seconds.__getitem__),
        documents=[(report.name, report.documents_in, report.documents_out) for report in runs[0].reports],
    )


def _processes() -> dict[str, Any]:
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    settings = PreparationSettings(steps=tuple(step for step in DOCUMENT_STEPS if step != "quality"))
    # each call gets pages of its own, since `datasets` would answer a repeated one from its cache
    numbers = itertools.count()

    def rate(num_proc: int | None) -> float:
        pages = web_dump(Town(0), PAGES, seed=100 + next(numbers))
        data = Dataset.from_list([{"html": page.html, "url": page.url} for page in pages])
        began = time.perf_counter()
        map_documents(data, settings, num_proc=num_proc)
        return PAGES / (time.perf_counter() - began)

    figures = alternate({"one": lambda: rate(1), "two": lambda: rate(2)}, ROUNDS, "processes")
    return result(
        "data_preparation_processes",
        what=f"per-document steps by datasets.map, extraction included, two processes against one, {PAGES} pages",
        unit="pages/s",
        ours=figures["two"],
        peers={"one process": figures["one"]},
    )


def memory(megabytes: tuple[int, ...]) -> dict[str, Any]:
    """Peak memory of `prepare_shards` for corpora of several sizes, each in a process of its own."""
    runs = []
    for size in megabytes:
        command = [sys.executable, "-m", "benchmarks.data_preparation", "--one", str(size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout))
    return result(
        "data_preparation_memory",
        what=f"peak memory of the funnel on {megabytes[-1]} MB of generated text over that on {megabytes[0]} MB",
        unit="ratio",
        ours=[runs[-1]["peak_bytes"] / runs[0]["peak_bytes"]],
        higher_is_better=False,
        limit=MAX_GROWTH,
        runs=runs,
    )


def generated(n_bytes: int, seed: int = 0) -> Iterator[str]:
    """Documents until they hold that many bytes; memory does not grow with them."""
    rng = np.random.default_rng(seed)
    counts = Counter(word for d in Town(0).documents(2_000) for word in d.text.split() if word.isalpha())
    words = np.array(list(counts))
    shares = np.fromiter(counts.values(), np.float64) / counts.total()
    recent: list[list[str]] = []
    total = 0
    while total < n_bytes:
        lines = _lines(rng, words, shares)
        kind = rng.random()
        if recent and kind < 0.1:
            lines = list(recent[rng.integers(len(recent))])
            if kind < 0.05:
                lines[rng.integers(len(lines))] = _lines(rng, words, shares)[0]
        elif len(recent) < 1000:
            recent.append(lines)
        else:
            recent[rng.integers(1000)] = lines
        text = "\n".join(lines)
        total += len(text) + 1
        yield text


def _lines(rng: np.random.Generator, words: np.ndarray, shares: np.ndarray) -> list[str]:
    drawn = rng.choice(words, size=int(rng.integers(300, 500)), p=shares).tolist()
    return [" ".join(drawn[i : i + 20]).capitalize() + "." for i in range(0, len(drawn), 20)]


class _OwnMemory(threading.Thread):
    """Samples this process's resident memory without pages of files, and with them, every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.own = self.resident = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        while not self.stopped.wait(0.02):
            info = process.memory_info()
            self.own, self.resident = max(self.own, info.rss - info.shared), max(self.resident, info.rss)


def _one(megabytes: int) -> dict[str, Any]:
    """Prepare one generated corpus into shards, and say what it took."""
    prepare(list(itertools.islice(generated(10**6), 300)))  # loads every library and model
    sampler = _OwnMemory()
    sampler.start()
    with tempfile.TemporaryDirectory() as folder:
        texts = generated(megabytes * 10**6)
        index, prepared = prepare_shards(texts, Path(folder) / "clean")
    sampler.stopped.set()
    sampler.join()
    documents = prepared.reports[0].documents_in
    return {
        "megabytes": megabytes,
        "documents": documents,
        "documents_left": index.n_documents,
        "peak_bytes": sampler.own,
        "peak_resident_bytes": sampler.resident,
        "seconds": prepared.seconds,
        "documents_per_second": documents / prepared.seconds,
        "step_documents_per_second": {
            r.name: r.documents_in / max(r.seconds, 1e-9) for r in prepared.reports
        },
        "dropped": {report.name: dict(report.dropped) for report in prepared.reports if report.dropped},
    }


def main() -> None:
    """Measure one size (for the process of its own), or several into the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_preparation", description=__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=MEGABYTES, help="sizes, smallest first")
    parser.add_argument("--one", type=int, help="measure this size here and print JSON")
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(_one(arguments.one)))
        return
    outcome = memory(tuple(arguments.megabytes))
    print(json.dumps(outcome, indent=1))
    write(outcome)


if __name__ == "__main__":
    main()
