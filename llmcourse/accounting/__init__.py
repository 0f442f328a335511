"""Parameters, FLOPs, bytes and costs of a decoder, by arithmetic alone (no torch).

Every function takes a `ModelShape` or whatever `shape_of` turns into one: this course's `ModelConfig`, a `transformers`
configuration, its dictionary, a config.json.

Symbols: N parameters, B batch, T context, D d_model, H query heads, K key/value heads, C d_head, F d_ff, V vocab_size.
A multiplication and an addition count as two FLOPs.
"""

from llmcourse.accounting.activations import (
    evaluation_bytes,
    loss_work_bytes,
    published_activation_bytes,
    saved_activations,
)
from llmcourse.accounting.costs import run_energy_kwh, run_hours, run_price
from llmcourse.accounting.flops import (
    decode_flops,
    forward_flops,
    forward_flops_per_token,
    matmul_weights,
    model_flops_utilization,
    six_nd,
    six_nd_error,
    training_flops,
    training_flops_per_token,
)
from llmcourse.accounting.layers import (
    LayerCost,
    Product,
    element_wise_bytes,
    layer_costs,
    matrix_products,
    newton_schulz_bytes,
    newton_schulz_products,
)
from llmcourse.accounting.memory import (
    MemoryEstimate,
    kv_cache_bytes,
    peak_memory,
    state_bytes,
    update_bytes,
)
from llmcourse.accounting.parameters import active_parameters, count_parameters, parameters_by_part
from llmcourse.accounting.shapes import ModelShape, shape_of

__all__ = [
    "LayerCost",
    "MemoryEstimate",
    "ModelShape",
    "Product",
    "active_parameters",
    "count_parameters",
    "decode_flops",
    "element_wise_bytes",
    "evaluation_bytes",
    "forward_flops",
    "forward_flops_per_token",
    "kv_cache_bytes",
    "layer_costs",
    "loss_work_bytes",
    "matmul_weights",
    "matrix_products",
    "model_flops_utilization",
    "newton_schulz_bytes",
    "newton_schulz_products",
    "parameters_by_part",
    "peak_memory",
    "published_activation_bytes",
    "run_energy_kwh",
    "run_hours",
    "run_price",
    "saved_activations",
    "shape_of",
    "six_nd",
    "six_nd_error",
    "state_bytes",
    "training_flops",
    "training_flops_per_token",
    "update_bytes",
]
