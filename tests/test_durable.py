"""Plain data, seals, damage, space."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llmcourse.durable import (
    canonical_json,
    discard,
    file_digest,
    find_damage,
    plain,
    publish,
    read_sealed,
    record_files,
    require_space,
    text_digest,
    write_sealed,
)


def test_plain_gives_what_json_gives_back() -> None:
    value = {"a": (1, 2.5, [True, None]), "b": {"c": "text"}, "d": np.float64(0.1)}
    result = plain(value, "x")
    assert result == {"a": [1, 2.5, [True, None]], "b": {"c": "text"}, "d": 0.1}
    assert json.loads(json.dumps(result)) == result and type(result["d"]) is float
    assert plain(True, "x") is True and math.isnan(plain(float("nan"), "x"))
    for bad, message in [
        ({"a": {3: 1}}, r"x\['a'\]: key 3 is not text"),
        ({"a": [0, {1}]}, r"x\['a'\]\[1\]: set is not"),
        (np.float32(1), "x: float32 is not"),
    ]:
        with pytest.raises(ValueError, match=message):
            plain(bad, "x")


def test_canonical_json_and_digests_against_known_values(tmp_path: Path) -> None:
    assert canonical_json({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"\\u00e9"]}'
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert text_digest("abc") == abc
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == abc
    assert record_files(tmp_path) == {"f": {"bytes": 3, "sha256": abc}}


def test_sealed_files(tmp_path: Path) -> None:
    path, data = tmp_path / "m.json", {"step": 3, "x": [0.1, "é"], "none": None}
    write_sealed(path, data)
    assert read_sealed(path) == data
    text = path.read_text()
    for damaged, message in [
        (text.replace("0.1", "0.2"), "its seal differs"),
        (text + " ", "its seal differs"),
        (text[:-4], "cannot be read as JSON"),
        ("[1]", "has no seal"),
    ]:
        path.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            read_sealed(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_sealed(path)
    path.unlink()
    with pytest.raises(ValueError, match="m.json is missing"):
        read_sealed(path)


def test_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("12345")
    records = record_files(tmp_path)
    (tmp_path / "unrecorded").write_text("x")
    assert find_damage(tmp_path, records) is None
    (tmp_path / "a" / "f").write_text("12346")
    assert "a/f does not hold the bytes" in find_damage(tmp_path, records)
    assert find_damage(tmp_path, records, digests=False) is None
    (tmp_path / "a" / "f").write_text("123")
    assert find_damage(tmp_path, records, digests=False) == "a/f has 3 bytes, 5 were written"
    (tmp_path / "a" / "f").unlink()
    assert find_damage(tmp_path, records) == "a/f is missing"


def test_space_publish_discard(tmp_path: Path) -> None:
    require_space(tmp_path, 10, "this")
    with pytest.raises(OSError, match=r"this needs 9\d+\.\d MiB but only .* MiB are free"):
        require_space(tmp_path, 10**18, "this")
    work = tmp_path / ".work"
    (work / "deep").mkdir(parents=True)
    (work / "deep" / "f").write_text("x")
    publish(work, tmp_path / "final")
    assert (tmp_path / "final" / "deep" / "f").read_text() == "x" and not work.exists()
    discard(tmp_path / "final")
    assert list(tmp_path.iterdir()) == []
