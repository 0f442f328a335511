"""AdamW and Muon against torch's own, Newton-Schulz against the SVD, and which parameters get which."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer
from llmcourse.training import optimizers
from llmcourse.training.optimizers import (
    NEWTON_SCHULZ_COEFFICIENTS,
    Muon,
    adamw_step,
    build_optimizers,
    newton_schulz,
    split_parameters,
)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# AdamW


def test_adamw_by_hand():
    # first step: both moments are (1 - beta) g and g^2, corrected to g and g^2, so the step is lr x sign(g) if eps = 0;
    # before it the parameter is scaled by 1 - 0.1 x 0.5 = 0.95
    parameter, first, second = torch.tensor([2.0, 2.0]), torch.zeros(2), torch.zeros(2)
    adamw_step(parameter, torch.tensor([5.0, -0.01]), first, second, 1, lr=0.1, eps=0.0, weight_decay=0.5)
    torch.testing.assert_close(parameter, torch.tensor([1.9 - 0.1, 1.9 + 0.1]))
    torch.testing.assert_close(first, torch.tensor([0.5, -0.001]))
    torch.testing.assert_close(second, torch.tensor([1.25, 0.000005]))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_torchs_over_many_steps(fused, weight_decay):
    kept = {"lr": 0.02, "betas": (0.8, 0.93), "eps": 1e-7, "weight_decay": weight_decay}
    ours = randn(4, 3, dtype=torch.float64)
    theirs = nn.Parameter(ours.clone())
    optimizer = torch.optim.AdamW([theirs], fused=fused, **kept)
    first, second = torch.zeros_like(ours), torch.zeros_like(ours)
    for step in range(1, 13):
        gradient = randn(4, 3, seed=step, dtype=torch.float64) * step
        adamw_step(ours, gradient, first, second, step, **kept)
        theirs.grad = gradient
        optimizer.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.01}, {"betas": (0.5, 0.95)}, {"betas": (0.9, 0.5)}, {"eps": 0.1}, {"weight_decay": 0.0}],
    ids=str,
)
def test_every_option_of_adamw_changes_the_result(change):
    results = []
    for options in ({"lr": 0.02}, {"lr": 0.02} | change):
        parameter, first, second = randn(3), torch.zeros(3), torch.zeros(3)
        for step in (1, 2, 3):
            adamw_step(parameter, randn(3, seed=step), first, second, step, **options)
        results.append(parameter)
    assert not torch.allclose(*results, atol=1e-5)


# Newton-Schulz


def test_one_iteration_maps_singular_values_by_the_polynomial():
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    u, v = (
        torch.linalg.qr(randn(4, 4, dtype=torch.float64))[0],
        torch.linalg.qr(randn(7, 4, dtype=torch.float64))[0],
    )
    singular = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    matrix = u @ torch.diag(singular) @ v.T
    s = singular / singular.norm()
    expected = u @ torch.diag(a * s + b * s**3 + c * s**5) @ v.T
    torch.testing.assert_close(newton_schulz(matrix, iterations=1), expected)
    torch.testing.assert_close(newton_schulz(matrix.T, iterations=1), expected.T)


@pytest.mark.parametrize("shape", [(16, 16), (64, 24), (24, 64), (128, 128), (1, 9), (8, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_five_iterations_bring_all_singular_values_near_one(shape, dtype):
    # A square random matrix has a smallest singular value of about 1 / n of the largest, which five steps, each at most
    # 3.44 times, lift by a factor of 484 at most; so the well conditioned ones must land within the band.
    matrix = randn(*shape, dtype=torch.float32)
    if shape[0] == shape[1]:
        matrix = matrix + 3 * torch.eye(shape[0]) * math.sqrt(shape[0])
    found = newton_schulz(matrix.to(dtype))
    assert found.dtype == dtype and found.shape == matrix.shape
    singular = torch.linalg.svdvals(found.float())
    assert 0.65 < float(singular.min()) and float(singular.max()) < 1.25


def test_it_points_along_the_orthogonal_factor():
    matrix = randn(20, 48, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix)
    # same singular vectors: u^T found v is diagonal, with entries within the band
    core = u.T @ found @ vh.T
    torch.testing.assert_close(core, torch.diag(core.diag()), rtol=0, atol=1e-9)
    assert float((found * (u @ vh)).sum() / found.norm() / math.sqrt(20)) > 0.97  # cosine with U V^T


def test_orthogonal_changes_of_basis_and_scale_pass_through():
    matrix = randn(6, 10, dtype=torch.float64)
    left, right = (torch.linalg.qr(randn(n, n, seed=n, dtype=torch.float64))[0] for n in (6, 10))
    expected = left @ newton_schulz(matrix) @ right
    torch.testing.assert_close(newton_schulz(left @ matrix @ right), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(newton_schulz(1e5 * matrix), newton_schulz(matrix), rtol=1e-9, atol=1e-10)


def test_a_stack_is_each_of_its_matrices():
    stack = randn(3, 5, 8, dtype=torch.float64)
    found = newton_schulz(stack)
    for one, matrix in zip(found, stack, strict=True):
        torch.testing.assert_close(one, newton_schulz(matrix), rtol=1e-10, atol=1e-12)


def test_a_zero_matrix_stays_zero():
    assert torch.equal(newton_schulz(torch.zeros(4, 6)), torch.zeros(4, 6))


# Muon

SHAPES = ((6, 10), (10, 6), (6, 10), (8, 8))  # two of one shape: they are orthogonalized in one batch


def run_muon(optimizer_of, dtype: torch.dtype, n_steps: int = 6) -> list[Tensor]:
    parameters = [nn.Parameter(randn(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(SHAPES)]
    optimizer = optimizer_of(parameters)
    for step in range(n_steps):
        for i, parameter in enumerate(parameters):
            parameter.grad = randn(*SHAPES[i], seed=100 * step + i, dtype=dtype)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def both_muons(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    kept = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.2}
    ours = run_muon(lambda parameters: Muon(parameters, **kept), dtype)
    theirs = run_muon(
        lambda parameters: torch.optim.Muon(
            parameters,
            nesterov=True,
            ns_coefficients=NEWTON_SCHULZ_COEFFICIENTS,
            ns_steps=5,
            adjust_lr_fn="match_rms_adamw",
            **kept,
        ),
        dtype,
    )
    return ours, theirs


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rounding to bfloat16, neither in ours, which does so where the hardware is fast at it, nor in torch's."""
    monkeypatch.setattr(optimizers, "has_fast_bf16", lambda device: False)
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_muon_is_torchs_when_both_compute_in_the_same_precision(dtype, exact):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for one, other in zip(*both_muons(dtype), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("fast", [True, False], ids=["both round", "torch rounds"])
def test_muon_is_torchs_within_the_rounding_of_bfloat16(fast, monkeypatch):
    # torch rounds the update to 8 bits. Per step it has entries of up to lr x 0.2 sqrt(10) x 1.2 = 0.038, so six steps
    # differ by at most about 6 x 0.038 x (a few times 2^-8); they move the weights by some 0.1.
    monkeypatch.setattr(optimizers, "has_fast_bf16", lambda device: fast)
    ours, theirs = both_muons(torch.float32)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert (one - other).abs().max() < 6e-3
        assert (one - randn(*SHAPES[i], seed=i)).abs().mean() > 0.05


def test_muon_by_hand(exact):
    # a 1 x 1 matrix: the orthogonal factor is the sign, s = 1 maps to p = 3.4445 - 4.7750 + 2.0315 = 0.7010, and four
    # more times; momentum buffer 0.1 g, Nesterov 0.1 g x 0.9 + 0.1 g > 0; scale 0.2 sqrt(1); decay 1 - 0.5 x 0.2
    p = 1.0
    for _ in range(5):
        p = 3.4445 * p - 4.7750 * p**3 + 2.0315 * p**5
    parameter = nn.Parameter(torch.tensor([[2.0]]))
    parameter.grad = torch.tensor([[7.0]])
    Muon([parameter], lr=0.5, momentum=0.9, weight_decay=0.2).step()
    assert parameter.item() == pytest.approx(2.0 * 0.9 - 0.5 * 0.2 * p, rel=1e-5)


def test_the_size_of_muons_update_is_that_of_adamw():
    for shape in ((64, 64), (32, 128)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = randn(*shape)
        Muon([parameter], lr=1.0, weight_decay=0.0).step()
        assert 0.15 < float(parameter.detach().pow(2).mean().sqrt()) < 0.25  # root mean square 0.2 at lr 1


@pytest.mark.parametrize(
    "change", [{"lr": 0.02}, {"momentum": 0.5}, {"weight_decay": 0.0}, {"iterations": 3}], ids=str
)
def test_every_option_of_muon_changes_the_result(change):
    kept = {"lr": 0.05}
    one, other = (run_muon(lambda p, o=o: Muon(p, **o), torch.float32) for o in (kept, kept | change))
    assert not torch.allclose(one[0], other[0], atol=1e-5)


def test_muon_runs_a_closure_and_skips_what_has_no_gradient():
    used, unused = nn.Parameter(randn(3, 4)), nn.Parameter(randn(3, 4, seed=1))
    optimizer, before = Muon([used, unused], lr=0.1), unused.detach().clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = used.pow(2).sum()
        loss.backward()
        return float(loss.detach())

    losses = [optimizer.step(closure) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert torch.equal(unused, before)
    assert Muon([used]).step() is None


def test_muon_refuses_what_is_no_matrix():
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(
            ValueError, match=r"Muon got a parameter of shape .*give vectors and embeddings to AdamW"
        ):
            Muon([nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(shape))])


# Which parameters get which


def transformer(tied: bool) -> Transformer:
    return Transformer(
        ModelConfig(
            vocab_size=11, d_model=8, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=12, tie_embeddings=tied
        )
    )


def names_of(model: nn.Module, parameters: list[Tensor]) -> set[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in parameters}


@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_one_part(tied):
    model = transformer(tied)
    hidden, embeddings, vectors = (names_of(model, part) for part in split_parameters(model))
    assert hidden | embeddings | vectors == {name for name, _ in model.named_parameters()}
    assert len(hidden) == 2 * 7 and all(name.startswith("blocks.") for name in hidden)
    assert embeddings == ({"embedding.weight"} if tied else {"embedding.weight", "head.weight"})
    assert len(vectors) == 2 * 2 + 1 and all("norm" in name for name in vectors)


def test_frozen_parameters_and_a_head_of_another_name():
    model = nn.ModuleDict({"wte": nn.Embedding(5, 4), "lm_head": nn.Linear(4, 5), "hidden": nn.Linear(4, 4)})
    hidden, embeddings, vectors = (names_of(model, part) for part in split_parameters(model))
    assert (hidden, embeddings) == ({"hidden.weight"}, {"wte.weight", "lm_head.weight"})
    assert vectors == {"lm_head.bias", "hidden.bias"}
    model["hidden"].requires_grad_(False)
    assert names_of(model, split_parameters(model)[0]) == set()


def settings_by_name(model: nn.Module, built: list[torch.optim.Optimizer]) -> dict[str, tuple[str, float]]:
    found = {}
    for optimizer in built:
        for group in optimizer.param_groups:
            for name in names_of(model, group["params"]):
                assert name not in found
                found[name] = (type(optimizer).__name__, group["weight_decay"])
    return found


@pytest.mark.parametrize("tied", [True, False])
def test_adamw_gets_everything_and_decays_no_vector(tied):
    model = transformer(tied)
    built = build_optimizers(model, "adamw", lr=0.1, betas=(0.7, 0.8), eps=1e-3, weight_decay=0.4)
    found = settings_by_name(model, built)
    assert found == {
        name: ("AdamW", 0.4 if parameter.ndim == 2 else 0.0) for name, parameter in model.named_parameters()
    }
    for group in built[0].param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.1, (0.7, 0.8), 1e-3)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_gets_the_hidden_matrices_alone(tied):
    model = transformer(tied)
    built = build_optimizers(model, "muon", lr=0.1, weight_decay=0.4, momentum=0.6)
    found = settings_by_name(model, built)
    for name, parameter in model.named_parameters():
        is_hidden = parameter.ndim == 2 and name.startswith("blocks.")
        expected = ("Muon", 0.4) if is_hidden else ("AdamW", 0.4 if parameter.ndim == 2 else 0.0)
        assert found[name] == expected, name
    (muon,) = (o for o in built if isinstance(o, Muon))
    assert (muon.param_groups[0]["lr"], muon.param_groups[0]["momentum"]) == (0.1, 0.6)


def test_bad_requests_are_refused():
    model = transformer(True)
    with pytest.raises(ValueError, match=r"optimizer='sgd': choose adamw or muon"):
        build_optimizers(model, "sgd", lr=0.1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter"):
        build_optimizers(model, "adamw", lr=0.1)
