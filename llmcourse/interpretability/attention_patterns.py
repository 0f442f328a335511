"""Attention patterns as a self-contained interactive picture: no script from elsewhere, nothing to install.

Shapes: L layers, H heads, T tokens.
"""

from __future__ import annotations

import html
import json
import zlib
from collections.abc import Sequence

from torch import Tensor

_TEMPLATE = """<div id="@@ID@@" class="llmcourse-attention" style="font-family:monospace;font-size:90%">
<p style="font-family:sans-serif;margin:.2em 0"><b>@@TITLE@@</b>
<label>head <select aria-label="head">@@OPTIONS@@</select></label>
<span>Point at a token: what it attends to is colored.</span></p>
<p class="tokens" style="line-height:2;white-space:pre-wrap;margin:.2em 0">@@TOKENS@@</p>
<script>
(function () {
  const root = document.getElementById("@@ID@@"), weights = @@WEIGHTS@@;
  const spans = Array.from(root.querySelectorAll(".tokens span")), select = root.querySelector("select");
  let query = spans.length - 1;
  function draw() {
    const row = weights[select.selectedIndex][query];
    spans.forEach(function (span, i) {
      const weight = i < row.length ? row[i] / 100 : 0;
      span.style.background = "rgba(0,114,178," + weight + ")";
      span.style.color = weight > 0.55 ? "#fff" : "inherit";
      span.style.outline = i === query ? "2px solid #d55e00" : "none";
      span.title = i < row.length ? row[i] + " %" : "later: not seen";
    });
  }
  spans.forEach(function (span, i) {
    span.addEventListener("mouseenter", function () { query = i; draw(); });
    span.addEventListener("focus", function () { query = i; draw(); });
  });
  select.addEventListener("change", draw);
  draw();
})();
</script></div>"""


def attention_html(
    tokens: Sequence[str], patterns: Tensor, *, title: str, heads: Sequence[tuple[int, int]] | None = None
) -> str:
    """An interactive picture of patterns (L, H, T, T) of one text; `heads` chooses (layer, head), by default all.

    Weights are rounded to whole percents. Show a static picture beside it, for readers without scripts.

    Raises:
        ValueError: patterns that do not fit the tokens.
    """
    n_layers, n_heads, n_queries, n_keys = patterns.shape
    if not n_queries == n_keys == len(tokens):
        raise ValueError(
            f"{len(tokens)} tokens and patterns of {n_queries} x {n_keys}: give the text's own patterns"
        )
    chosen = heads if heads is not None else [(i, h) for i in range(n_layers) for h in range(n_heads)]
    percents = (patterns.detach().float().cpu() * 100).round().int()
    weights = [[percents[i, h, t, : t + 1].tolist() for t in range(n_queries)] for i, h in chosen]
    spans = "".join(f'<span tabindex="0">{html.escape(token)}</span>' for token in tokens)
    options = "".join(f"<option>layer {i}, head {h}</option>" for i, h in chosen)
    # the same picture has the same name whenever it is made: Python's own hash of text would not
    name = f"attention-{zlib.crc32(repr((title, list(tokens), list(chosen))).encode()):08x}"
    found = _TEMPLATE
    for key, value in {
        "@@ID@@": name,
        "@@TITLE@@": html.escape(title),
        "@@OPTIONS@@": options,
        "@@TOKENS@@": spans,
        "@@WEIGHTS@@": json.dumps(weights, separators=(",", ":")),
    }.items():
        found = found.replace(key, value)
    return found
