"""A batch on a Dask cluster comes to the same tables as on one machine; what the cluster lacks is one line."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from llmcourse.grading import batch, cluster
from llmcourse.grading.batch import grade_batch
from llmcourse.grading.jail import selftest
from llmcourse.grading.station import Station
from tests.grading.hand_ins import write_hand_ins, write_key

distributed = pytest.importorskip("distributed", reason="Dask's distributed is not installed")
pytestmark = pytest.mark.slow


@pytest.fixture
def course(tiny_release, tmp_path):
    """Folders of hand-ins and key, with right, untouched, wrong and broken notebooks."""
    wrong = tiny_release.solved()
    tiny_release.cell(wrong, "roofline")["source"] = "def my_roofline(**inputs):\n    return 0.0"
    kinds = [tiny_release.solved(), tiny_release.untouched(), wrong, b"{"]
    folder = write_hand_ins(tmp_path / "in", tiny_release.key, {f"s{i:03}": kinds[i % 4] for i in range(10)})
    return folder, write_key(tmp_path / "key", tiny_release.key)


@pytest.fixture
def threads(monkeypatch):
    """A cluster of one worker with two threads in this process; its stations end with it."""
    monkeypatch.setattr(cluster, "_stations", {})
    monkeypatch.setattr(selftest, "self_test", lambda jail: [])
    options = {"n_workers": 1, "threads_per_worker": 2, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as found:
        yield found
    for stations in cluster._stations.values():
        for station in stations.free:
            station.close()


def test_workers_of_a_cluster_give_the_same_tables(course, tmp_path):
    folder, key = course
    here = grade_batch(folder, key, tmp_path / "here", workers=1, progress=False)
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with distributed.LocalCluster(**options) as found:
        address = found.scheduler_address
        there = grade_batch(folder, key, tmp_path / "there", scheduler=address, progress=False)
    assert there.counts == here.counts == {"graded": 8, "malformed": 2}
    assert set(there.layers) == set(here.layers) and there.graded == 10
    for name in ("grades.csv", "grades.json", "answers.json"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    again = grade_batch(folder, key, tmp_path / "there", workers=1, progress=False)
    assert (again.graded, again.resumed) == (0, 10)


def test_stations_are_kept_between_submissions(course, threads, tmp_path):
    grade_batch(*course, tmp_path / "report", scheduler=threads.scheduler_address, progress=False)
    (stations,) = cluster._stations.values()
    assert 1 <= len(stations.free) <= 2 and stations.layers


def test_controls_that_fail_on_a_worker_stop_the_batch(course, threads, tiny_release, tmp_path):
    folder, _ = course
    wrong = {**tiny_release.key.solutions, "hardware/roofline": "def my_roofline(**inputs): return 0"}
    key = write_key(tmp_path / "wrong", dataclasses.replace(tiny_release.key, solutions=wrong))
    with pytest.raises(ValueError, match="the model solutions of 07_hardware score 3 of 4"):
        grade_batch(folder, key, tmp_path / "report", scheduler=threads.scheduler_address, progress=False)
    assert not (tmp_path / "report" / "grades.csv").exists()


def test_a_worker_with_another_version_stops_the_batch(course, threads, tmp_path, monkeypatch):
    versions = iter(["a"] * 11 + ["b"] * 100)
    monkeypatch.setattr(batch, "grader_version", lambda: next(versions))
    with pytest.raises(ValueError, match="another version of llmcourse"):
        grade_batch(*course, tmp_path / "report", scheduler=threads.scheduler_address, progress=False)


def test_a_worker_that_dies_costs_no_points(tiny_release, course, threads, tmp_path, monkeypatch):
    real = Station.grade

    def dying(self, submission):
        if submission.student == "s004":
            raise OSError("the worker is gone")
        return real(self, submission)

    monkeypatch.setattr(Station, "grade", dying)
    summary = grade_batch(*course, tmp_path / "report", scheduler=threads.scheduler_address, progress=False)
    assert summary.counts == {"graded": 7, "malformed": 2, "infrastructure": 1}
    monkeypatch.setattr(Station, "grade", real)
    summary = grade_batch(*course, tmp_path / "report", scheduler=threads.scheduler_address, progress=False)
    assert summary.counts == {"graded": 8, "malformed": 2} and summary.graded == 1


def test_what_a_cluster_lacks_is_one_line(course, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1)
    with pytest.raises(ValueError, match="no Dask scheduler answers at 'tcp://127.0.0.1:1'") as error:
        grade_batch(*course, tmp_path / "report", scheduler="tcp://127.0.0.1:1", progress=False)
    assert "\n" not in str(error.value)
    options = {"n_workers": 0, "processes": False, "dashboard_address": None}
    with distributed.LocalCluster(**options) as found:
        with pytest.raises(ValueError, match="has no workers: start some"):
            grade_batch(*course, tmp_path / "report", scheduler=found.scheduler_address, progress=False)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match="pip install 'llmcourse\\[grading\\]'"):
        grade_batch(*course, tmp_path / "report", scheduler="tcp://127.0.0.1:1", progress=False)
