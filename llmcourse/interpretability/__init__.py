"""Looking inside a model: hooks, lenses, attribution, patching, probes, steering, sparse autoencoders."""

from llmcourse.interpretability.hooks import hook_points, hooked, record

__all__ = ["hook_points", "hooked", "record"]
