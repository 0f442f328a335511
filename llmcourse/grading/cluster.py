"""A batch on a Dask cluster: each worker has jails of its own, this process keeps the journal.

The cluster's machines are trusted: they get the assignment's key. Use TLS between machines (Dask's own settings,
`distributed.comm`), since Dask's messages can make a worker run anything.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from llmcourse.grading.station import Graded, Station, Submission

if TYPE_CHECKING:
    from distributed import Client, Future

    from llmcourse.grading.manifest import AssignmentKey

AHEAD = 2
"""submissions sent to a worker's thread before the first is back"""
CONNECT_SECONDS = 20


def grade_on_cluster(
    scheduler: str,
    key: AssignmentKey,
    pending: Sequence[Submission],
    done: Callable[[Submission, Graded], None],
    *,
    trust: bool = False,
) -> tuple[str, ...]:
    """Grade on the workers of a Dask scheduler; `done` is called here for each, as they come back.

    Args:
        scheduler: address, "tls://10.0.0.5:8786".
        key: the assignment, which is sent to the workers.
        pending: what to grade.
        done: takes each result.
        trust: as in `batch.grade_batch`, for the workers.

    Returns:
        The walls of the jail that stand on every worker.

    Raises:
        ValueError: Dask is not installed, nobody answers, there are no workers, they have another version of the
            package, or their jails or controls fail.
    """
    from llmcourse.grading.batch import Failures, grader_version

    with _connected(scheduler) as client:
        threads = sum(client.nthreads().values())
        if not threads:
            raise ValueError(
                f"the scheduler at {scheduler} has no workers: start some with `dask worker {scheduler}`"
            )
        there = client.scatter(key, broadcast=True, hash=False)
        layers: set[str] | None = None
        failures = Failures()
        for submission, future in _results(
            client, there, pending, AHEAD * threads, (grader_version(), trust)
        ):
            graded, stands = _received(key, submission, future)
            if stands is not None:
                layers = set(stands) if layers is None else layers & set(stands)
            done(submission, graded)
            failures.count(graded)
        return tuple(sorted(layers or ()))


@contextlib.contextmanager
def _connected(scheduler: str) -> Iterator[Client]:
    try:
        from distributed import Client
    except ImportError:
        raise ValueError(
            "grading on a cluster needs Dask: `pip install 'llmcourse[grading]'` here and on the workers"
        ) from None
    try:
        client = Client(scheduler, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"no Dask scheduler answers at {scheduler!r} ({reason}): give its address") from None
    with client:
        yield client


def _results(
    client: Client, key: Future, pending: Sequence[Submission], ahead: int, settings: tuple[str, bool]
) -> Iterator[tuple[Submission, Future]]:
    """Send submissions, a limited number ahead of what is back; yield them as they come."""
    from distributed import as_completed

    queue, sent = iter(pending), {}

    def send(submission: Submission) -> Future:
        future = client.submit(grade_remotely, key, submission.loaded(), *settings, pure=False)
        sent[future.key] = submission
        return future

    first = [send(submission) for submission in itertools.islice(queue, ahead)]
    running = as_completed(first, loop=client.loop)
    for future in running:
        yield sent.pop(future.key), future
        if (submission := next(queue, None)) is not None:
            running.add(send(submission))


def _received(
    key: AssignmentKey, submission: Submission, future: Future
) -> tuple[Graded, tuple[str, ...] | None]:
    from distributed import KilledWorker

    from llmcourse.grading.scoring import Scorer
    from llmcourse.grading.verdicts import Verdict

    try:
        data = future.result()
    except (KilledWorker, OSError) as error:
        note = f"the workers that had it died ({type(error).__name__})"
        grade = Scorer(key).ungraded(submission.student, Verdict.INFRASTRUCTURE, note)
        return Graded(grade), None
    return Graded.from_json(data["graded"]), tuple(data["layers"])


class _Stations:
    """The jails of a worker process, for as many threads as it has; each is proved before it grades."""

    def __init__(self, key: AssignmentKey, trust: bool) -> None:
        self.key, self.trust, self.layers, self.walls = key, trust, (), None
        self.lock, self.free = threading.Lock(), []

    @contextlib.contextmanager
    def one(self) -> Iterator[Station]:
        with self.lock:
            station = self.free.pop() if self.free else None
            if station is None:
                station = Station(self.key, trust=self.trust, layers=self.walls)
                self.layers = station.prove()
                self.walls = station.layers
        try:
            yield station
        finally:
            with self.lock:
                self.free.append(station)


_stations: dict[str, _Stations] = {}
_stations_lock = threading.Lock()


def grade_remotely(key: AssignmentKey, submission: Submission, version: str, trust: bool) -> dict[str, Any]:
    """Grade one submission in a worker of the cluster.

    Args:
        key: the assignment.
        submission: with its bytes.
        version: `batch.grader_version()` where the batch was started.
        trust: as in `batch.grade_batch`.

    Returns:
        Plain data: {"graded": ..., "layers": [...]}.

    Raises:
        ValueError: this worker has another version, or its jail or controls fail.
    """
    from llmcourse.grading.batch import grader_version

    if grader_version() != version:
        raise ValueError(
            "a worker of the cluster has another version of llmcourse: install the same on all machines"
        )
    with _stations_lock:
        name = f"{key.name} {key.manifest.release} {trust}"
        stations = _stations.setdefault(name, _Stations(key, trust))
    with stations.one() as station:
        return {"graded": station.grade(submission).to_json(), "layers": list(stations.layers)}
