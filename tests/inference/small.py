"""Small models with clear likeliest tokens, for the tests of inference."""

from __future__ import annotations

import random

import torch

from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Transformer

V, CONTEXT = 61, 96


def lively_model(seed: int = 1, **changes: object) -> Transformer:
    """A model whose weights make the likeliest token clear and its sequences lively."""
    sizes = {
        "vocab_size": V,
        "context_length": CONTEXT,
        "d_model": 24,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 32,
        "tie_embeddings": False,
    }
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.4)
    return model


def some_prompts(n: int, seed: int = 0, shortest: int = 1, longest: int = 40) -> list[list[int]]:
    """Prompts of random lengths; every third begins as the one before it."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for i in range(n):
        prompt = [rng.randrange(V) for _ in range(rng.randint(shortest, longest))]
        if i % 3 == 2:
            prompt = (prompts[-1] + prompt)[:longest]
        prompts.append(prompt)
    return prompts
