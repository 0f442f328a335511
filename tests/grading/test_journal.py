"""The journal: what was added is there after a kill, what the kill cut is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from llmcourse.grading.journal import Journal


def test_records_survive_and_the_last_one_counts(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add("a", {"points": 1, "text": "line\nend \ud800"})
        journal.add("b", {"points": 2})
        journal.add("a", {"points": 3})
    with Journal(path) as journal:
        assert journal.records == {"a": {"points": 3}, "b": {"points": 2}} and journal.dropped == 0


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_cut_line_is_dropped_and_the_next_one_is_whole(tmp_path, cut):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add("a", {"points": 1})
        journal.add("b", {"points": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal(path) as journal:
        assert journal.records == {"a": {"points": 1}} and journal.dropped == 1
        journal.add("c", {"points": 3})
    with Journal(path) as journal:
        assert journal.records == {"a": {"points": 1}, "c": {"points": 3}} and journal.dropped == 0


def test_a_changed_line_does_not_count(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.add("a", {"points": 1})
        journal.add("b", {"points": 2})
    path.write_text(path.read_text().replace('points\\":1', 'points\\":9'))
    with Journal(path) as journal:
        assert journal.records == {"b": {"points": 2}} and journal.dropped == 1


def test_what_was_added_before_a_kill_is_there(tmp_path):
    path = tmp_path / "journal.jsonl"
    code = (
        "import sys; from pathlib import Path; from llmcourse.grading.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for i in range(10**6):\n    journal.add(str(i), {'i': i}); print(i, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    seen = [int(process.stdout.readline()) for _ in range(20)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with Journal(path) as journal:
        assert all(journal.records[str(i)] == {"i": i} for i in seen)
