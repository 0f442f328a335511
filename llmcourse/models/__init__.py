"""The Llama-family decoder: configuration, attention, transformer, and exchange with Hugging Face checkpoints."""

from llmcourse.models.attention import Attention, RMSNorm, SwiGLU
from llmcourse.models.config import ModelConfig
from llmcourse.models.transformer import Block, Transformer

__all__ = ["Attention", "Block", "ModelConfig", "RMSNorm", "SwiGLU", "Transformer"]
