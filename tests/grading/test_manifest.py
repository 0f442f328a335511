"""Manifests and keys: signed, complete, and the seeds that follow from the secret."""

from __future__ import annotations

import dataclasses
import json
import stat

import pytest

from llmcourse.grading.limits import Limits
from llmcourse.grading.manifest import (
    CellRecord,
    Key,
    Manifest,
    ManualQuestion,
    derive,
    normalized,
    signed_text,
    source_digest,
    verified,
)

MANIFEST = Manifest(
    release="ab",
    assignment="07_hardware",
    slug="hardware",
    title="Lab",
    points={"hardware/intensity": 1, "hardware/roofline": 2.5},
    titles={"hardware/intensity": "Intensity", "hardware/roofline": "Roofline"},
    manual=(ManualQuestion(grade_id="hardware-why", title="Why?", points=3),),
    limits=Limits(wall_seconds=2.5, memory_mb=100),
    cells=(CellRecord(grade_id=None, cell_id="a", type="code", role="other", sha256="0", run=True),),
    files={"data.csv": "f" * 64},
)


def test_a_manifest_survives_json():
    data = json.loads(json.dumps(MANIFEST.to_json()))
    assert Manifest.from_json(data) == MANIFEST and MANIFEST.max_points == 6.5


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"cells": None}, {"manual": [{}]}, {"extra": 1}, {"limits": 3}]
)
def test_other_manifests_are_refused_in_one_line(change):
    with pytest.raises(ValueError, match="release again") as caught:
        Manifest.from_json(MANIFEST.to_json() | change)
    assert "\n" not in str(caught.value)


def test_signatures_notice_every_change_and_other_uses(tmp_path):
    path = tmp_path / "file.json"
    path.write_text(signed_text({"a": [1, 2.5, "x"]}, b"s" * 32, "manifest"))
    assert verified(path, b"s" * 32, "manifest") == {"a": [1, 2.5, "x"]}
    for secret, purpose in ((b"t" * 32, "manifest"), (b"s" * 32, "key")):
        with pytest.raises(ValueError, match="another key"):
            verified(path, secret, purpose)
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(ValueError, match="was changed"):
        verified(path, b"s" * 32, "manifest")
    for text in ("", "[]", "{}", '{"signature": 3}', "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot be read|was changed"):
            verified(path, b"s" * 32, "manifest")


def test_a_key_folder_keeps_its_secret_and_its_assignments(tmp_path, tiny_release):
    key = Key.create(tmp_path / "key")
    assert len(key.secret) == 32 and Key.create(tmp_path / "key").secret == key.secret
    assert Key.create(tmp_path / "other").secret != key.secret
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "key", tmp_path / "key/secret")]
    assert modes == [0o700, 0o600]
    assignment = dataclasses.replace(tiny_release.key, secret=key.secret)
    key.save(assignment)
    assert stat.S_IMODE((tmp_path / "key/07_hardware.json").stat().st_mode) == 0o600
    again = Key.load(tmp_path / "key")
    assert again.assignments == ("07_hardware",) and again.assignment("07_hardware") == assignment
    assert again.seed("07_hardware", "s001", "hardware/roofline") == assignment.seed(
        "s001", "hardware/roofline"
    )
    assert key.secret.hex() not in repr(assignment)


def test_a_damaged_key_is_refused(tmp_path, tiny_release):
    with pytest.raises(ValueError, match="no key folder"):
        Key.load(tmp_path)
    key = Key.create(tmp_path / "key", tiny_release.key.secret)
    key.save(tiny_release.key)
    with pytest.raises(ValueError, match="no assignment 'x'"):
        key.assignment("x")
    path = tmp_path / "key/07_hardware.json"
    path.write_text(path.read_text().replace('"hardware/intensity": 1', '"hardware/intensity": 100'))
    with pytest.raises(ValueError, match="was changed"):
        key.assignment("07_hardware")
    for text in ("", "zz", "00" * 8):
        (tmp_path / "key/secret").write_text(text)
        with pytest.raises(ValueError, match="damaged"):
            Key.load(tmp_path / "key")


def test_a_published_manifest_can_be_checked(tmp_path, tiny_release):
    key = Key.create(tmp_path / "key", tiny_release.key.secret)
    path = tmp_path / "07_hardware.json"
    path.write_text(key.manifest_text(tiny_release.key.manifest))
    assert key.read_manifest(path) == tiny_release.key.manifest
    other = Key.create(tmp_path / "other")
    with pytest.raises(ValueError, match="another key"):
        other.read_manifest(path)


def test_seeds_follow_from_secret_student_and_exercise(tiny_release):
    key = tiny_release.key
    seeds = {(s, e): key.seed(f"s{s:03}", e) for s in range(40) for e in key.answers}
    assert all(seed in key.variants[exercise] for (_, exercise), seed in seeds.items())
    assert {seeds[s, "hardware/roofline"] for s in range(40)} == set(key.variants["hardware/roofline"])
    assert seeds == {(s, e): key.seed(f"s{s:03}", e) for s in range(40) for e in key.answers}
    other = dataclasses.replace(key, secret=b"o" * 32)
    assert any(other.seed(f"s{s:03}", e) != seed for (s, e), seed in seeds.items())
    with pytest.raises(ValueError, match="no exercise 'hardware/mfu'"):
        key.seed("s001", "hardware/mfu")


def test_derived_numbers_depend_on_each_part_and_their_borders():
    numbers = [derive(b"k", *parts) for parts in (("a", "b"), ("ab",), ("a,b",), ("b", "a"), ("a", "b", ""))]
    assert len(set(numbers)) == 5 and all(0 <= number < 2**31 for number in numbers)
    assert derive(b"k", "a") != derive(b"l", "a")


def test_line_ends_and_trailing_space_do_not_change_a_source():
    texts = ["a\n  b\n", "a  \r\n  b\r\n\r\n", "\na\r  b"]
    assert len({source_digest(text) for text in texts}) == 1 and normalized(texts[1]) == "a\n  b"
    assert source_digest("a\n b") != source_digest("a\n  b")
    source_digest("\ud800")


def test_the_two_controls_differ_in_the_solutions_alone(tiny_release):
    solved, untouched = tiny_release.solved(), tiny_release.untouched()
    changed = [
        one["metadata"]["nbgrader"]["grade_id"]
        for one, other in zip(solved["cells"], untouched["cells"], strict=True)
        if one != other
    ]
    assert changed == ["hardware-intensity", "hardware-roofline", "hardware-cache_rows"]
