"""Text from a model: key/value cache, sampling, generation."""

from llmcourse.inference.generation import complete, generate
from llmcourse.inference.kv_cache import KVCache
from llmcourse.inference.sampling import SamplingParams

__all__ = ["KVCache", "SamplingParams", "complete", "generate"]
