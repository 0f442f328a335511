"""One loop on N processes: the identity alone, and under torchrun the losses and weights of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmcourse import cli
from llmcourse.training import distributed

CPU = torch.device("cpu")


def test_alone_everything_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.start(CPU) == distributed.World() == distributed.world()
    assert distributed.world().is_main and not distributed.World(rank=1, size=2).is_main
    model, values = nn.Linear(2, 2), torch.tensor([1.0, 2.0])
    assert distributed.wrap(model) is model
    assert distributed.sum_over_processes(values).tolist() == [1.0, 2.0]
    with distributed.without_gradient_sync(model, skip=True):
        model(values).sum().backward()
    assert model.weight.grad is not None
    distributed.barrier()
    distributed.stop()


@pytest.fixture
def group_of_one(monkeypatch):
    """A process group with this process alone, as `torchrun --nproc-per-node 1` announces it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in names.items():
        monkeypatch.setenv(name, str(value))
    yield distributed.start(CPU)
    distributed.stop()
    assert not torch.distributed.is_initialized()


def test_a_group_is_joined_once_and_left(group_of_one):
    assert group_of_one == distributed.World(rank=0, size=1, local_rank=0)
    assert torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo"
    assert distributed.start(CPU) == group_of_one


def test_gradients_are_not_exchanged_before_the_last_micro_step(group_of_one):
    replica = DistributedDataParallel(nn.Linear(2, 1))
    assert replica.require_backward_grad_sync
    with distributed.without_gradient_sync(replica, skip=True):
        assert not replica.require_backward_grad_sync
    with distributed.without_gradient_sync(replica, skip=False):
        assert replica.require_backward_grad_sync


FLAGS = {
    "corpus": "tinytown",
    "n_documents": 300,
    "vocab_size": 300,
    "context_length": 32,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "d_ff": 24,
    "micro_steps": 2,
    "schedule": "constant",
    "precision": "fp32",
    "compile": "off",
    "eval_every": 3,
}


def losses(folder: Path) -> dict[str, list[float]]:
    stored = json.loads((folder / "records.json").read_text())
    return {
        "loss": [record["loss"] for record in stored["records"]],
        "grad_norm": [record["grad_norm"] for record in stored["records"]],
        "units": [record["units"] for record in stored["records"]],
        "validation": [evaluation["validation_loss"] for evaluation in stored["evaluations"]],
    }


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_rows(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMCOURSE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in FLAGS.items()]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = ["-m", "llmcourse.training.pretraining", *flags, "--steps=6", "--batch-size=4"]
    done = subprocess.run(
        [sys.executable, *launch, *program, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("validation_loss") == 1  # one process speaks

    cli.run_pretraining(tmp_path / "one", "cpu", None, FLAGS | {"steps": 8, "batch_size": 8})
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert two["units"] == one["units"][:6] == [2 * 8 * 32] * 6
    assert two["loss"] == pytest.approx(one["loss"][:6], abs=1e-4)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"][:6], rel=1e-3)
    assert two["validation"] == pytest.approx(one["validation"][:2], abs=1e-4)

    # and one process may go on where two stopped, since the global batch is the same
    cli.run_pretraining(tmp_path / "two", "cpu", None, FLAGS | {"steps": 8, "batch_size": 8})
    resumed = losses(tmp_path / "two")
    assert resumed["loss"] == pytest.approx(one["loss"], abs=1e-4) and len(resumed["loss"]) == 8
    weights, expected = (load_file(tmp_path / run / "model.safetensors") for run in ("two", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-3)
