"""Checkpoints: exact resume, kills at any moment, damage refused, what is kept, and clear errors."""

from __future__ import annotations

import collections
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmcourse import durable
from llmcourse.training import checkpoint as module
from llmcourse.training.checkpoint import (
    CheckpointError,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    restore_rng_state,
    rng_state,
    save_checkpoint,
    unwrap,
    verify_checkpoint,
)
from llmcourse.training.state import separate_shared


class Tiny(nn.Module):
    """Embedding, dropout (which draws random numbers) and a head that may be tied to the embedding."""

    def __init__(self, vocab: int = 11, width: int = 6, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += tokens.numel()
        return self.head(F.dropout(self.norm(self.embedding(tokens)), 0.3))


class Momentum(torch.optim.Optimizer):
    """SGD with a momentum buffer and a Python counter: state as Muon keeps it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.95)})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
                buffer.mul_(group["betas"][0]).add_(parameter.grad)
                parameter.sub_(buffer, alpha=group["lr"] / state["count"])


def make_run(seed: int = 0, tied: bool = True) -> tuple[Tiny, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = Tiny(tied=tied)
    adamw = torch.optim.AdamW([model.embedding.weight], lr=1e-2, weight_decay=0.1, fused=True)
    return model, [adamw, Momentum(list(model.norm.parameters()))]


def train(model: Tiny, optimizers: list[torch.optim.Optimizer], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens = (torch.randint(11, (4, 5)) + random.randrange(11)) % 11
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()) * (1 + np.random.rand() * 0.1)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def save(folder: Path, step: int, run: tuple[Tiny, list[torch.optim.Optimizer]], **options: object) -> Path:
    return save_checkpoint(folder, step, model=run[0], optimizers=run[1], data_state={"at": step}, **options)


def test_resumed_run_equals_the_one_never_stopped_bit_for_bit(tmp_path: Path) -> None:
    model, optimizers = make_run()
    np.random.seed(3)
    random.seed(4)
    train(model, optimizers, 5)
    records = {"lr": 0.1, "losses": [0.1 + 0.2, 1e-300]}
    save_checkpoint(
        tmp_path,
        5,
        model=model,
        optimizers=optimizers,
        data_state={"epoch": 1, "order": [3, 1]},
        extra=records,
    )
    straight = train(model, optimizers, 7)
    other, other_optimizers = make_run(seed=99)
    train(other, other_optimizers, 2)  # wrong weights, moments and generators, all to be replaced
    found = find_checkpoint(tmp_path)
    assert found is not None and (found.step, found.metric) == (5, None)
    data, extra = load_checkpoint(found, model=other, optimizers=other_optimizers)
    assert data == {"epoch": 1, "order": [3, 1]} and extra == records
    assert train(other, other_optimizers, 7) == straight
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    for one, two in zip(optimizers, other_optimizers, strict=True):
        assert_same(one.state_dict(), two.state_dict())


def assert_same(one: object, two: object) -> None:
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two) and one.dtype == two.dtype
    elif isinstance(one, dict):
        assert list(one) == list(two)
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    else:
        assert one == two


def test_rng_state_is_json_and_restores_every_generator() -> None:
    random.gauss(0, 1)  # leaves a second Gaussian pending inside the generator
    np.random.randn()
    state = json.loads(json.dumps(rng_state()))

    def draw() -> tuple[object, ...]:
        return random.gauss(0, 1), random.random(), np.random.randn(), torch.randn(3).tolist()

    first = draw()
    assert draw() != first
    restore_rng_state(state)
    assert draw() == first


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    run = make_run()
    path = save(tmp_path, 1, run)
    tied_bytes = (path / "model.safetensors").stat().st_size
    untied = make_run(tied=False)
    untied_bytes = (save(tmp_path / "untied", 1, untied) / "model.safetensors").stat().st_size
    assert untied_bytes - tied_bytes >= run[0].embedding.weight.nbytes  # one matrix (and its name) less
    fresh = make_run(seed=1)
    load_checkpoint(verify_checkpoint(path), model=fresh[0], optimizers=fresh[1])
    assert fresh[0].head.weight is fresh[0].embedding.weight
    assert torch.equal(fresh[0].head.weight, run[0].head.weight)
    with pytest.raises(ValueError, match="head.weight is tied to embedding.weight in the checkpoint but not"):
        load_weights(verify_checkpoint(path), untied[0])
    with pytest.raises(ValueError, match="in this model but not the checkpoint"):
        load_weights(verify_checkpoint(tmp_path / "untied" / "step_00000001"), run[0])


def test_views_of_one_storage_are_separated() -> None:
    base = torch.arange(12.0).view(3, 4)
    tensors = {"a": base, "row": base[1], "column": base[:, 2], "same": base, "none": torch.empty(0)}
    distinct, ties = separate_shared(tensors)
    assert ties == {"same": "a"}
    for name, tensor in distinct.items():
        assert torch.equal(tensor, tensors[name]) and tensor.is_contiguous()
    pointers = [tensor.untyped_storage().data_ptr() for tensor in distinct.values() if tensor.numel()]
    assert len(set(pointers)) == len(pointers)


def test_wrapped_models_save_and_load_under_the_bare_names(tmp_path: Path) -> None:
    model, optimizers = make_run()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model))
        assert unwrap(wrapped) is model
        assert unwrap(nn.DataParallel(torch.compile(model))) is model
        path = save_checkpoint(tmp_path / "c", 1, model=wrapped, optimizers=optimizers, data_state={})
        fresh, fresh_optimizers = make_run(seed=5)
        load_checkpoint(verify_checkpoint(path), model=fresh, optimizers=fresh_optimizers)
        assert torch.equal(fresh.embedding.weight, model.embedding.weight)
        parts = nn.Sequential(torch.compile(nn.Linear(2, 3)), nn.ReLU())  # only a part is compiled
        path = save_checkpoint(tmp_path / "d", 1, model=parts, optimizers=[], data_state={})
        plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        load_weights(verify_checkpoint(path), plain)
        assert torch.equal(plain[0].weight, parts[0].weight)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_any_truncation_or_flipped_bit_is_refused_and_the_previous_taken(tmp_path: Path, name: str) -> None:
    run = make_run()
    train(*run, 1)
    save(tmp_path, 1, run)
    path = save(tmp_path, 2, run) / name
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, len(whole) // 3, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(path.parent)
    path.write_bytes(whole + b"\n")
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(path.parent)
    generator = random.Random(0)
    places = range(len(whole)) if name == "manifest.json" else generator.sample(range(len(whole)), 60)
    for byte in places:
        damaged = bytearray(whole)
        damaged[byte] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(path.parent)
    with pytest.warns(UserWarning, match=f"step_00000002.*{name}"):
        found = find_checkpoint(tmp_path)
    assert found is not None and found.step == 1
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        verify_checkpoint(path.parent)
    save(tmp_path, 2, run)  # the run comes to step 2 again: the damaged one is replaced
    assert find_checkpoint(tmp_path).step == 2


def test_what_is_kept(tmp_path: Path) -> None:
    run = make_run()
    for step, metric in enumerate([5.0, 2.0, None, 4.0, 2.0, 3.0, 3.5]):
        save(tmp_path, step, run, metric=metric, keep_last=2)
    assert [(found.step, found.metric) for found in list_checkpoints(tmp_path)] == [
        (1, 2.0),
        (5, 3.0),
        (6, 3.5),
    ]
    save(tmp_path, 7, run, metric=1.0, keep_last=1)
    assert [found.step for found in list_checkpoints(tmp_path)] == [7]
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_damaged_checkpoints_do_not_count_among_the_kept(tmp_path: Path) -> None:
    run = make_run()
    for step in (1, 2, 3):
        save(tmp_path, step, run, keep_last=3)
    (tmp_path / "step_00000003" / "state.json").write_text("")
    (tmp_path / "step_00000004").mkdir()  # foreign and empty
    save(tmp_path, 2, run, keep_last=2)
    assert [found.step for found in list_checkpoints(tmp_path)] == [1, 2]


def test_saving_never_overwrites_the_work_of_another_run(tmp_path: Path) -> None:
    run = make_run()
    save(tmp_path, 9, run)
    with pytest.raises(CheckpointError, match="later step 9: resume from it"):
        save(tmp_path, 3, run)
    (tmp_path / "step_00000010").mkdir()
    (tmp_path / "step_00000010" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="step_00000010 holds files that are no checkpoint's"):
        save(tmp_path, 10, run)
    assert (tmp_path / "step_00000010" / "thesis.txt").read_text() == "mine"


def test_folders_that_are_no_checkpoint_folders(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "missing") is None and list_checkpoints(tmp_path / "missing") == []
    (tmp_path / "empty").mkdir()
    assert find_checkpoint(tmp_path / "empty") is None
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        find_checkpoint(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds a.jpg, \.\.\. and no checkpoint"):
        find_checkpoint(tmp_path / "photos")
    with pytest.raises(CheckpointError, match=r"holds a.jpg"):
        save(tmp_path / "photos", 1, make_run())
    path = save(tmp_path / "good", 1, make_run())
    with pytest.raises(CheckpointError, match="is a single checkpoint"):
        find_checkpoint(path)
    moved = path.rename(tmp_path / "good" / "step_00000077")
    with pytest.raises(CheckpointError, match="manifest.json is of step 1"):
        verify_checkpoint(moved)


def test_a_manifest_of_another_program_or_version_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, make_run())
    manifest = durable.read_sealed(path / "manifest.json")
    for change, message in [
        ({"format": "other"}, "of format 'other'"),
        ({"version": 99}, "format version 99"),
        ({"files": {}}, "the manifest lists"),
    ]:
        durable.write_sealed(path / "manifest.json", {**manifest, **change})
        with pytest.raises(CheckpointError, match=message):
            verify_checkpoint(path)
    (path / "manifest.json").write_text('{"weights": 3}')
    with pytest.raises(CheckpointError, match="not one of this program's"):
        verify_checkpoint(path)


def test_a_different_model_or_optimizer_is_refused_before_anything_changes(tmp_path: Path) -> None:
    run = make_run()
    found = verify_checkpoint(save(tmp_path, 1, run))
    torch.manual_seed(1)
    wide = Tiny(width=8)
    before = {name: tensor.clone() for name, tensor in wide.state_dict().items()}
    with pytest.raises(ValueError, match=r"embedding.weight is \(11, 6\) .* and \(11, 8\)"):
        load_checkpoint(found, model=wide, optimizers=run[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in wide.state_dict().items())
    with pytest.raises(ValueError, match="float64"):
        load_weights(found, Tiny().double())
    more = Tiny()
    more.extra = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"this model has extra.bias \(3,\), the checkpoint has not"):
        load_weights(found, more)
    less = Tiny()
    del less.norm
    with pytest.raises(ValueError, match=r"the checkpoint has norm.bias \(6,\), this model has not"):
        load_weights(found, less)
    other, (adamw, momentum) = make_run(seed=2)
    with pytest.raises(
        ValueError, match=r"holds optimizers \['AdamW', 'Momentum'\], this run has \['AdamW'\]"
    ):
        load_checkpoint(found, model=other, optimizers=[adamw])
    swapped = Momentum(list(reversed(list(other.norm.parameters())))[:1])
    with pytest.raises(ValueError, match=r"optimizer 1 \(Momentum\) has groups of \[1\]"):
        load_checkpoint(found, model=other, optimizers=[adamw, swapped])
    assert not torch.equal(other.embedding.weight, run[0].embedding.weight)
    assert momentum.state_dict()["state"] == {}


def test_bad_arguments(tmp_path: Path) -> None:
    model, optimizers = run = make_run()
    for options, message in [
        ({"step": -1}, "step=-1"),
        ({"keep_last": 0}, "keep_last=0"),
        ({"metric": float("nan")}, "metric=nan at step 1"),
        ({"data_state": {1: 2}}, r"data_state: key 1 is not text"),
        ({"extra": {"a": [torch.ones(1)]}}, r"extra\['a'\]\[0\]: Tensor is not plain data"),
    ]:
        given = {"step": 1, "data_state": {}, **options}
        with pytest.raises(ValueError, match=message):
            save_checkpoint(tmp_path, given.pop("step"), model=model, optimizers=optimizers, **given)
    model.__class__ = type("Extra", (Tiny,), {"get_extra_state": lambda self: {"a": 1}})
    with pytest.raises(ValueError, match="_extra_state in the model's state is no tensor"):
        save(tmp_path, 1, run)
    assert list(tmp_path.iterdir()) == []


def test_no_space_is_one_clear_error_and_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    save(tmp_path, 1, run)
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
        with pytest.raises(
            OSError, match=r"step 2 needs 0.0 MiB but only 0.0 MiB are free .* delete what"
        ) as error:
            save(tmp_path, 2, run)
        assert "\n" not in str(error.value)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise module.SafetensorError("No space left on device")

    with monkeypatch.context() as patch:  # it fills up while the file is being written
        patch.setattr(module, "save_file", full)
        with pytest.raises(OSError, match="cannot be written .*No space left"):
            save(tmp_path, 2, run)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert find_checkpoint(tmp_path).step == 1


class Killed(BaseException):
    """Stands for SIGKILL: from the n-th file operation on, nothing happens any more."""


OPERATIONS = [(os, "rename"), (os, "fsync"), (os, "mkdir"), (shutil, "rmtree"), (module, "save_file")]


def kill_at(patch: pytest.MonkeyPatch, n: int) -> list[int]:
    """Make the n-th file operation and all after it fail; the list's one number counts them."""
    count = [0]
    for owner, name in OPERATIONS:

        def operation(
            *args: object, original: object = getattr(owner, name), name: str = name, **kw: object
        ) -> object:
            count[0] += 1
            if count[0] < n:
                return original(*args, **kw)
            if count[0] == n and name == "rmtree" and Path(args[0]).is_dir():
                next(iter(Path(args[0]).iterdir())).unlink()  # killed half-way through deleting
            raise Killed

        patch.setattr(owner, name, operation)
    return count


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step again"])
def test_killed_at_every_single_file_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    model, optimizers = make_run()
    first, second = 2, 2 if again else 3
    n, finished = 0, False
    while not finished:
        n += 1
        folder = tmp_path / str(n)
        model.seen.fill_(100)
        save(folder, first, (model, optimizers))
        model.seen.fill_(200)
        with monkeypatch.context() as patch:
            kill_at(patch, n)
            try:
                save(folder, second, (model, optimizers), keep_last=1)
                finished = True
            except Killed:
                pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = find_checkpoint(folder)
        fresh, fresh_optimizers = make_run(seed=1)
        data, _ = load_checkpoint(found, model=fresh, optimizers=fresh_optimizers)
        assert data == {"at": found.step}
        assert fresh.seen in ((100, 200) if again else (100,) if found.step == first else (200,))
        save(folder, 4, (model, optimizers), keep_last=1)
        assert [path.name for path in folder.iterdir()] == ["step_00000004"]
    assert n > 12  # there were as many moments to be killed at
    assert fresh.seen == 200


KILL_LOOP = """
import os, random, signal, sys, time, warnings
import torch
from llmcourse.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint

torch.set_num_threads(1)
warnings.simplefilter("error")
folder, kills = sys.argv[1], int(sys.argv[2])


def make():
    model = torch.nn.Linear(40, 30)
    return model, torch.optim.AdamW(model.parameters())


def write(pipe):
    model, optimizer = make()
    found = find_checkpoint(folder)
    step = found.step if found else 0
    while True:
        step += 1
        torch.nn.init.constant_(model.weight, step)
        save_checkpoint(folder, step, model=model, optimizers=[optimizer], data_state={"at": step})
        os.write(pipe, b"%d\\n" % step)


generator = random.Random(0)
steps = []
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        write(writer)
    os.close(writer)
    stream = os.fdopen(reader)
    stream.readline()  # one is saved
    time.sleep(generator.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    durable = [int(line) for line in stream]
    stream.close()
    found = find_checkpoint(folder)
    assert not durable or found.step >= durable[-1], (found, durable)
    model, optimizer = make()
    data, _ = load_checkpoint(found, model=model, optimizers=[optimizer])
    assert data == {"at": found.step} and bool((model.weight == found.step).all())
    steps.append(found.step)
print(len(steps), steps == sorted(set(steps)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_random_moments_always_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILL_LOOP, str(tmp_path / "run"), "25"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["25", "True"]
