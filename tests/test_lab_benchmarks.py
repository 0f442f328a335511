"""The lines that a chapter prints of its benchmarks."""

from __future__ import annotations

import json

import pytest

from llmcourse.labs.benchmarks import benchmark_lines


def test_lines_name_figures_ratio_and_verdict(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (tmp_path / "labs" / "src").mkdir(parents=True)
    stored = {
        "name": "sft_speed",
        "what": "a run",
        "unit": "steps/s",
        "ours": [3.0, 6.0, 5.0],
        "peers": {"a": [2.5], "b": [5.0]},
        "ratios": {"a": 2.0, "b": 1.0},
        "bars": {"a": 1.5},
    }
    (folder / "sft_speed.json").write_text(json.dumps(stored))
    assert benchmark_lines("sft", tmp_path) == [
        "a run: 5 steps/s",
        "    a: 2.5, ratio 2.00 (bar 1.5: holds)",
        "    b: 5, ratio 1.00",
    ]
    (folder / "sft_speed.json").write_text(json.dumps(stored | {"bars": {"b": 1.5}}))
    assert benchmark_lines("sft", tmp_path)[-1] == "    b: 5, ratio 1.00 (bar 1.5: missed)"
    many = {"ours": [2751.4], "peers": {"a": [0.01234]}, "ratios": {"a": 3.0}, "bars": {}}
    (folder / "sft_speed.json").write_text(json.dumps(stored | many))
    assert benchmark_lines("sft", tmp_path) == ["a run: 2,751 steps/s", "    a: 0.0123, ratio 3.00"]
    with pytest.raises(ValueError, match="no benchmark begins with 'dpo'"):
        benchmark_lines("dpo", tmp_path)
