"""Where answers and what they need are found: helpers, edited cells of the lab, experiments, written replies."""

from __future__ import annotations

import json
import random
import time

import pytest

from llmcourse.grading.skeleton import Malformed
from tests.grading.rebuilding import ALL, BAD, GOOD, hand_in, kinds, points


def source_of(rebuilt, identifier):
    return next(cell.source for cell in rebuilt.cells if cell.id == identifier)


def imports(release, notebook):
    """The lab's cell of imports."""
    return next(cell for cell in notebook["cells"] if "import math" in "".join(cell["source"]))


def test_a_helper_in_an_extra_cell(tiny_release, code_cell):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["source"] = GOOD.replace("2 * m * k * n", "operations(m, k, n)")
    helper = (
        "print(operations(1))\ndef operations(*sides):\n    return 2 * math.prod(sides)\nwhile True: pass"
    )
    notebook["cells"].append(code_cell(helper))
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and rebuilt.findings == ()
    extra = rebuilt.cells[-1]
    assert (
        extra.id == f"extra-{len(notebook['cells'])}"
        and "while" not in extra.source
        and "print" not in extra.source
    )
    assert rebuilt.after["hardware/intensity"] == extra.id


def test_an_import_added_to_a_cell_of_the_lab(tiny_release):
    notebook = tiny_release.solved()
    imports(tiny_release, notebook)["source"] += "\nfrom functools import reduce\nreduce.twice = 2"
    tiny_release.cell(notebook, "roofline")["source"] = (
        "def my_roofline(flops, n_bytes, peak_flops, bandwidth):\n"
        "    return reduce(max, (flops / peak_flops, n_bytes / bandwidth))"
    )
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["CELL_EDITED"]


def test_a_deleted_import_of_the_lab_is_still_there(tiny_release):
    notebook = tiny_release.solved()
    imports(tiny_release, notebook)["source"] = "WIDTH = 2"
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["CELL_EDITED"]
    notebook["cells"].remove(
        imports_removed := next(c for c in notebook["cells"] if c["source"] == "WIDTH = 2")
    )
    assert imports_removed["cell_type"] == "code"
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == []


def test_a_helper_written_into_an_experiment_runs_without_it(tiny_release):
    notebook = tiny_release.solved()
    cell = next(cell for cell in notebook["cells"] if "model = train(6)" in cell["source"])
    cell["source"] += "\ndef rate(amount, speed):\n    return amount / speed\nanother = train(7)"
    tiny_release.cell(notebook, "roofline")["source"] = (
        "def my_roofline(flops, n_bytes, peak_flops, bandwidth):\n"
        "    return max(rate(flops, peak_flops), rate(n_bytes, bandwidth))"
    )
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["CELL_EDITED"]
    assert "train" not in "".join(cell.source for cell in rebuilt.cells)


def test_an_answer_that_reads_what_an_experiment_makes(tiny_release):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["source"] = GOOD.replace("return 2 *", "return model / 3 *")
    rebuilt = hand_in(tiny_release, notebook)
    (finding,) = rebuilt.findings
    assert (
        finding.kind == "NEEDS_EXPERIMENT"
        and "model" in finding.text
        and finding.cell == "hardware/intensity"
    )
    assert points(tiny_release, rebuilt) == ALL | {"hardware/intensity": 0}


def test_printing_an_experiment_above_the_answer_costs_nothing(tiny_release):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["source"] = (
        f"print(model + 1)\n{GOOD}\nprint(my_intensity(model, 2, 3, 4))"
    )
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["STATEMENT_SKIPPED"]
    assert source_of(rebuilt, "hardware-intensity").splitlines()[0] == ""  # lines keep their numbers


def test_what_stands_in_an_answers_cell_runs(tiny_release):
    notebook = tiny_release.solved()
    payload = "while True:\n    pass"
    tiny_release.cell(notebook, "intensity")["source"] = f"{GOOD}\nimport os\nos.getpid()\n{payload}"
    rebuilt = hand_in(tiny_release, notebook)
    assert payload in source_of(rebuilt, "hardware-intensity")
    assert "os.getpid()" in source_of(rebuilt, "hardware-intensity")


def test_a_helper_of_the_same_name_in_two_exercises(tiny_release):
    notebook = tiny_release.solved()
    one, other = (tiny_release.cell(notebook, name) for name in ("intensity", "roofline"))
    one["source"] = "def helper(m, k, n):\n    return 2 * m * k * n\n" + GOOD.replace(
        "2 * m * k * n", "helper(m, k, n)"
    )
    other["source"] = (
        "def helper(a, b):\n    return a / b\ndef my_roofline(flops, n_bytes, peak_flops, bandwidth):\n"
        "    return max(helper(flops, peak_flops), helper(n_bytes, bandwidth))"
    )
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and rebuilt.findings == ()


def test_an_answer_in_a_new_cell_below_the_untouched_stub(tiny_release, code_cell):
    notebook = tiny_release.solved()
    at = tiny_release.position(notebook, "intensity")
    notebook["cells"][at] = tiny_release.cell(tiny_release.untouched(), "intensity")
    notebook["cells"].insert(at + 2, code_cell(GOOD))
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL and kinds(rebuilt) == ["ANSWER_ELSEWHERE"]
    assert rebuilt.exercises["hardware/intensity"] == GOOD
    notebook["cells"][at]["source"] = BAD  # a cell that was written in is the answer
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL | {"hardware/intensity": 0}


def test_a_deleted_solution_cell(tiny_release, code_cell):
    notebook = tiny_release.solved()
    del notebook["cells"][tiny_release.position(notebook, "intensity")]
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL | {"hardware/intensity": 0} and kinds(rebuilt) == [
        "CELL_MISSING"
    ]
    notebook["cells"].append(code_cell(GOOD))
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL
    assert kinds(rebuilt) == ["MATCHED_BY_SIMILARITY", "META_CHANGED", "ORDER_CHANGED"]


def test_an_answer_with_magics_runs_as_it_is(tiny_release):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["source"] = f"%load_ext autoreload\n!pwd\n{GOOD}"
    text = source_of(hand_in(tiny_release, notebook), "hardware-intensity")
    assert text.startswith("%load_ext autoreload\n!pwd\ndef my_intensity")


def test_a_syntax_error_costs_its_own_exercise_alone(tiny_release):
    notebook = tiny_release.solved()
    tiny_release.cell(notebook, "intensity")["source"] = GOOD + "\n)("
    rebuilt = hand_in(tiny_release, notebook)
    assert points(tiny_release, rebuilt) == ALL | {"hardware/intensity": 0} and rebuilt.findings == ()


def test_written_replies_and_stored_outputs(tiny_release):
    notebook = tiny_release.solved()
    assert hand_in(tiny_release, notebook).written == {"hardware-why": ""}
    reply = notebook["cells"][-1]
    reply["source"] = ["Memory is far.\n", "Twice."]
    reply["attachments"] = {"a.png": {"image/png": "AAAA"}}
    output = {"output_type": "stream", "name": "stdout", "text": "right"}
    tiny_release.cell(notebook, "intensity", check=True)["outputs"] = [output, "no output"]
    rebuilt = hand_in(tiny_release, notebook)
    assert rebuilt.written == {"hardware-why": "Memory is far.\nTwice."}
    assert rebuilt.outputs["hardware-intensity-check"] == (output,)
    assert rebuilt.outputs["hardware-why"][0]["data"] == {"image/png": "AAAA"}
    notebook["cells"].append(json.loads(json.dumps(reply)))
    rebuilt = hand_in(tiny_release, notebook)
    assert rebuilt.written["hardware-why"].count("Memory") == 2 and kinds(rebuilt) == ["DUPLICATE"]


@pytest.mark.parametrize("kind", ["many", "large", "names", "copies", "statements"])
def test_notebooks_made_to_be_slow_are_read_in_seconds(tiny_release, code_cell, kind):
    notebook = tiny_release.solved()
    if kind == "names":
        notebook["cells"] = [cell for cell in notebook["cells"] if "nbgrader" not in cell["metadata"]]
    stub = tiny_release.cell(tiny_release.untouched(), "intensity")
    more = {
        "many": [code_cell(f"x{i} = x{i + 1}\n" * 90, id=str(i)) for i in range(4900)],
        "large": [code_cell(f"x{i} = [{'1, ' * 300_000}]", id=str(i)) for i in range(18)],
        "names": [code_cell(f"my_intensity = {i}\n" * 150, id=str(i)) for i in range(4900)],
        "copies": [json.loads(json.dumps(stub)) for _ in range(4900)],
        "statements": [json.loads(json.dumps(stub | {"source": "a\n" * 25_000})) for _ in range(40)],
    }[kind]
    notebook["cells"] += more
    data = json.dumps(notebook).encode()
    start = time.process_time()
    rebuilt = hand_in(tiny_release, data)
    assert time.process_time() - start < 4
    if kind not in ("names", "statements"):
        assert points(tiny_release, rebuilt) == ALL


def test_random_damage_never_raises_anything_but_malformed(tiny_release):
    data = tiny_release.solved_bytes()
    generator = random.Random(0)
    values = [None, True, -1, 1e400, "", "x", [], {}, [[]], {"a": {}}, "\ud800", "0" * 300]
    damaged = 0
    for _ in range(300):
        notebook = json.loads(data)
        for _ in range(generator.randint(1, 4)):
            place = notebook
            while isinstance(place, dict | list) and place:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                key = generator.choice(keys)
                if generator.random() < 0.3 or not isinstance(place[key], dict | list):
                    place[key] = generator.choice(values)
                    break
                place = place[key]
        try:
            rebuilt = hand_in(tiny_release, json.dumps(notebook).encode())
        except Malformed as error:
            damaged += 1
            assert "\n" not in str(error)
        else:
            assert set(rebuilt.exercises) == set(ALL) and all(
                isinstance(cell.source, str) for cell in rebuilt.cells
            )
    assert 5 < damaged < 250


def test_random_bytes_never_raise_anything_but_malformed(tiny_release):
    data = tiny_release.solved_bytes()
    generator = random.Random(1)
    read = 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 5)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        try:
            hand_in(tiny_release, bytes(changed))
            read += 1
        except Malformed as error:
            assert "\n" not in str(error)
    assert 20 < read < 300
