"""Handed-in notebooks on the released one: careless and dishonest changes neither cost nor gain, and are reported."""

from __future__ import annotations

import copy
import json
import time

import pytest

from llmcourse.grading.notebook_file import MAX_BYTES
from llmcourse.grading.skeleton import Malformed
from tests.grading.rebuilding import ALL, BAD, GOOD, hand_in, kinds, points


def test_the_solved_notebook_scores_everything_and_the_untouched_one_nothing(tiny_release):
    solved = hand_in(tiny_release, tiny_release.solved())
    assert points(tiny_release, solved) == ALL and solved.findings == ()
    untouched = hand_in(tiny_release, tiny_release.untouched())
    assert points(tiny_release, untouched) == dict.fromkeys(ALL, 0) and untouched.findings == ()
    assert untouched.exercises == dict.fromkeys(ALL, "")


def test_only_what_answers_need_is_run(tiny_release):
    rebuilt = hand_in(tiny_release, tiny_release.solved())
    text = "\n".join(cell.source for cell in rebuilt.cells)
    assert "import math" in text and "def bytes_of" in text and "WIDTH = 2" in text
    for absent in ("train", "time", "model", "check(", "PRESET", "results"):
        assert absent not in text, absent


def test_saving_in_other_editors_is_not_reported(tiny_release):
    notebook = tiny_release.solved()
    notebook["nbformat_minor"] = 4
    notebook["metadata"]["colab"] = {"provenance": []}
    for cell in notebook["cells"]:
        cell["source"] = (cell["source"].replace("\n", "\r\n") + "\n").splitlines(keepends=True)
        cell["metadata"] |= {"collapsed": False, "trusted": True, "executionInfo": {"status": "ok"}}
        if "nbgrader" in cell["metadata"]:
            cell["metadata"]["nbgrader"] |= {"cell_type": cell["cell_type"], "checksum": "0" * 32}
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and rebuilt.findings == ()


# Honest and careless: full points, and a finding.


@pytest.mark.filterwarnings("ignore:hm")
@pytest.mark.parametrize(
    "code",
    ["import sys; sys.stderr.write('50%|#####')", "import warnings; warnings.warn('hm', stacklevel=1)"],
)
def test_h1_h2_noise_on_stderr(tiny_release, code):
    notebook = tiny_release.solved()
    cell = tiny_release.cell(notebook, "intensity")
    cell["source"] = cell["source"].replace("):\n", f"):\n    {code}\n", 1)
    rebuilt = hand_in(tiny_release, notebook)
    assert code in "".join(cell.source for cell in rebuilt.cells)
    assert points(tiny_release, rebuilt) == ALL and rebuilt.findings == ()


def test_h3_split_cell(tiny_release):
    notebook = tiny_release.solved()
    at = tiny_release.position(notebook, "intensity")
    first, second = copy.deepcopy(notebook["cells"][at]), notebook["cells"][at]
    first["source"] = "def product(*numbers):\n    return math.prod(numbers)"
    second["source"] = GOOD.replace("m * k * n /", "product(m, k, n) /")
    notebook["cells"].insert(at, first)
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["DUPLICATE"]
    assert rebuilt.exercises["hardware/intensity"] == first["source"] + "\n\n" + second["source"]


@pytest.mark.parametrize("stub_last", [False, True])
def test_h4_copied_cell_whose_copy_was_not_written_in(tiny_release, stub_last):
    notebook, stub = tiny_release.solved(), tiny_release.cell(tiny_release.untouched(), "intensity")
    notebook["cells"].insert(tiny_release.position(notebook, "intensity") + stub_last, stub)
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["DUPLICATE"]
    assert "NotImplementedError" not in "".join(cell.source for cell in rebuilt.cells)


def test_h5_deleted_check(tiny_release):
    notebook = tiny_release.solved()
    del notebook["cells"][tiny_release.position(notebook, "intensity", check=True)]
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["CELL_MISSING"]


@pytest.mark.parametrize("kind", ["markdown", "raw"])
def test_h6_h7_cells_of_another_type(tiny_release, kind):
    notebook = tiny_release.solved()
    for check in (False, True):
        cell = tiny_release.cell(notebook, "intensity", check)
        cell["cell_type"] = kind
        del cell["outputs"], cell["execution_count"]
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["TYPE_CHANGED"]
    assert len(rebuilt.findings) == 2


@pytest.mark.parametrize("ids", [True, False])
def test_h8_h9_metadata_stripped(tiny_release, ids):
    notebook = tiny_release.solved()
    notebook["metadata"] = {}
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if not ids:
            del cell["id"]
    notebook["cells"][-1]["source"] = "Write your answer here: memory is slower, in place of this line."
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL
    expected = ["IDENTITY_MISSING", *([] if ids else ["MATCHED_BY_SIMILARITY"]), "META_CHANGED"]
    assert kinds(rebuilt) == expected
    assert rebuilt.written == {"hardware-why": notebook["cells"][-1]["source"]}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "utf-32"])
def test_h10_other_encodings(tiny_release, encoding):
    rebuilt = hand_in(tiny_release, json.dumps(tiny_release.solved()).encode(encoding))
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["ENCODING"]


@pytest.mark.parametrize("version", [None, 1, 99])
def test_h12_other_version_of_the_metadata(tiny_release, version):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["metadata"]["nbgrader"]["schema_version"] = version
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["META_CHANGED"]


# Tampering: the answers count, whatever the notebook says about them.


def test_t1_edited_check(tiny_release):
    notebook = tiny_release.untouched()
    tiny_release.cell(notebook, "intensity", check=True)["source"] = f"{GOOD}\nprint(1)"
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == dict.fromkeys(ALL, 0) and kinds(rebuilt) == ["LOCKED_EDITED"]


@pytest.mark.parametrize(
    ("check", "change"),
    [
        pytest.param(True, {"points": 200}, id="t2-points"),
        pytest.param(True, {"grade": False}, id="t3-grade_false"),
        pytest.param(True, {"solution": True}, id="t4-solution_true"),
        pytest.param(True, {"locked": False}, id="t5-unlock"),
        pytest.param(False, {"locked": True}, id="t5-lock"),
        pytest.param(False, {"grade_id": "mine"}, id="t6-rename"),
        pytest.param(True, {"points": "abc"}, id="t7-points_string"),
        pytest.param(True, {"points": True}, id="t7-points_bool"),
        pytest.param(True, {"points": float("nan")}, id="t7-points_nan"),
        pytest.param(False, {"grade_id": "x'; drop table grade; --"}, id="t9-sql"),
        pytest.param(False, {"grade_id": ["a"]}, id="t9-list"),
    ],
)
def test_t2_to_t9_edited_metadata(tiny_release, check, change):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity", check)["metadata"]["nbgrader"] |= change
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["META_CHANGED"]


@pytest.mark.parametrize("value", [[1], "text", 7, {}])
def test_t8_metadata_of_another_type(tiny_release, value):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["metadata"]["nbgrader"] = value
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["META_CHANGED"]


def test_t10_reordered_with_a_good_copy_to_be_tested(tiny_release, code_cell):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["source"] = BAD
    answer = notebook["cells"].pop(tiny_release.position(notebook, "intensity"))
    notebook["cells"].insert(tiny_release.position(notebook, "intensity", check=True), code_cell(GOOD))
    notebook["cells"].append(answer)
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL | {"hardware/intensity": 0}
    assert kinds(rebuilt) == ["ORDER_CHANGED"] and rebuilt.exercises["hardware/intensity"] == BAD


def test_t11_other_kernel(tiny_release):
    notebook = tiny_release.solved()
    notebook["metadata"]["kernelspec"] = {"name": "../../bin/sh", "language": "bash"}
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and rebuilt.findings == ()


@pytest.mark.parametrize("change", [{"assignment": "01_attention"}, {"release": "feed"}])
def test_t12_another_assignment_or_release(tiny_release, change):
    notebook = tiny_release.solved()
    notebook["metadata"]["llmcourse"] |= change
    with pytest.raises(Malformed, match="01_attention" if "assignment" in change else "another release"):
        hand_in(tiny_release, notebook)


def test_t12_a_notebook_of_something_else(tiny_release, code_cell):
    with pytest.raises(Malformed, match="none of its exercises"):
        hand_in(tiny_release, {"nbformat": 4, "cells": [code_cell("print(1)")], "metadata": {"llmcourse": 3}})


def test_an_extra_cell_that_claims_to_be_a_test(tiny_release, code_cell):
    notebook = tiny_release.solved()
    metadata = {
        "nbgrader": {"grade": True, "grade_id": "bonus", "points": 100, "locked": True, "solution": False}
    }
    notebook["cells"].append(code_cell("100", metadata=metadata))
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["EXTRA_TEST_LIKE"]


# Malformed: a line that says what is wrong, at once.


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b'{"cells": [', "not JSON", id="m1-cut_off"),
        pytest.param(b"", "empty", id="m2-empty"),
        pytest.param(b" \n", "empty", id="m2-white"),
        pytest.param(b"[]", "is a list", id="m3-list"),
        pytest.param(b"3", "is a number", id="m3-number"),
        pytest.param(b'"notebook"', "is a text", id="m3-text"),
        pytest.param(bytes(range(256)) * 40, "not JSON", id="m4-binary"),
        pytest.param(b"PK\x03\x04" + bytes(100), "not JSON", id="m4-zip"),
        pytest.param(b'{"cells": 3, "nbformat": 4}', "no list of cells", id="m4-no_list"),
        pytest.param(b'{"cells": [], "nbformat": 5}', "format 4", id="m5-newer"),
        pytest.param(b'{"nbformat": "4", "cells": []}', "format 4", id="m5-text"),
        pytest.param(b"[" * 200_000 + b"]" * 200_000, "nested too deeply", id="m6-deep"),
        pytest.param(b'{"a":' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply", id="m6-deep_objects"),
        pytest.param(b'{"cells": [' + b"1" * 5000 + b"]}", "not JSON", id="m6-digits"),
        pytest.param(b" " * (MAX_BYTES + 1), "clear the outputs", id="m7-large"),
        pytest.param(b'{"cells": [' + b"{}," * 6000 + b"{}]}", "6001 cells", id="m8-many"),
    ],
)
def test_m_malformed_files(tiny_release, data, message):
    start = time.perf_counter()
    with pytest.raises(Malformed, match=message) as caught:
        hand_in(tiny_release, data)
    assert time.perf_counter() - start < 1 and "\n" not in str(caught.value)


def test_m5_format_3_is_understood(tiny_release):
    notebook = tiny_release.solved()
    for cell in notebook["cells"]:
        cell["input"] = cell.pop("source") if cell["cell_type"] == "code" else None
        del cell["id"]
    old = {"nbformat": 3, "nbformat_minor": 0, "metadata": notebook["metadata"]}
    rebuilt = hand_in(tiny_release, {**old, "worksheets": [{"cells": notebook["cells"]}]})
    assert points(tiny_release, rebuilt) == ALL and "FORMAT_CONVERTED" in kinds(rebuilt)


def test_m8_what_is_no_cell_is_left_out(tiny_release):
    notebook = tiny_release.solved()
    notebook["cells"][1:1] = [3, None, "text", [], {}, {"cell_type": "code", "source": 7}, {"source": [1]}]
    notebook["cells"][1:1] = [{"cell_type": ["code"], "source": "x", "metadata": [], "outputs": 3, "id": {}}]
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["CELL_IGNORED"]


def test_m9_half_characters_and_null_bytes(tiny_release):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["source"] = f"{GOOD}\n# \ud800 \udfff"
    tiny_release.cell(notebook, "roofline")["source"] += "\n# \x00"
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL | {"hardware/roofline": 0} and kinds(rebuilt) == ["ENCODING"]
    json.dumps([cell.source for cell in rebuilt.cells], ensure_ascii=False).encode()


def test_bytes_that_are_not_utf8_are_replaced(tiny_release):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["source"] = (
        f"{GOOD}  # M\N{LATIN SMALL LETTER U WITH DIAERESIS}nchen"
    )
    data = json.dumps(notebook, ensure_ascii=False).encode("latin-1", errors="replace")
    rebuilt = hand_in(tiny_release, data)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["ENCODING"]
