"""llmcourse: one small language model, from raw text to a served chat model.

The package is the course's answer key. Chapters walk through its code, and a lab compares the learner's answers
with it, then goes on with the package's version. Modules import only from their own layer or those above it here:

    runtime, accounting, artifacts, plotting        the machine, arithmetic, the cache, figures
    tokenization, models                            text to tokens, tokens to logits
    data, inference                                 corpora and batches; generation
    training, evaluation                            the one training loop; measurements with intervals
    pipeline, checks, labs, book, cli               the stage graph, exercises, the course's own machinery

Importing `llmcourse` itself is cheap: it imports none of these.
"""

from __future__ import annotations

__version__ = "0.1.0"
