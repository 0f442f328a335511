"""Release: what students get, what the key holds, and what is refused before anything is written."""

from __future__ import annotations

import json

import pytest

from llmcourse.checks import Exercise, Mutant
from llmcourse.checks.exercise import find_exercise
from llmcourse.grading.handout import make_questions, read_questions
from llmcourse.grading.limits import Limits
from llmcourse.grading.manifest import Key, Manifest, derive
from llmcourse.grading.references import choose_seeds, run_solutions, watched_functions
from llmcourse.grading.release import release
from llmcourse.grading.skeleton import rebuild
from llmcourse.labs.nbgrader import metadata_problems
from tests.grading.conftest import QUESTIONS, SOURCE, make_repository, prepare_lab

NAME = "07_hardware"


@pytest.fixture(scope="module")
def released(tiny_release, tmp_path_factory):
    """A release as the command writes it, proved in the jail."""
    out = tmp_path_factory.mktemp("released") / "out"
    manifests = release(
        "07",
        out,
        points={"hardware/roofline": 4},
        questions=QUESTIONS,
        limits=Limits(wall_seconds=30, memory_mb=512),
        repository=tiny_release.repository,
        variants=2,
        seed=5,
    )
    return out, manifests


def notebook_of(out):
    return json.loads((out / "student" / f"{NAME}.ipynb").read_text(encoding="utf-8"))


def refused(tiny_release, tmp_path, message, source=None, **options):
    """A release that is refused in one line and writes nothing."""
    repository = tiny_release.repository
    if source is not None:
        repository = make_repository(tmp_path / "repository", source)
    with pytest.raises(ValueError, match=message) as caught:
        release("07", tmp_path / "out", repository=repository, **{"variants": 1, "seed": 1, **options})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_files_of_a_release(released):
    out, (manifest,) = released
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {f"student/{NAME}.ipynb", f"manifests/{NAME}.json", f"key/{NAME}.json", "key/secret"}
    assert manifest.points == {"hardware/intensity": 1, "hardware/roofline": 4, "hardware/cache_rows": 2}
    assert manifest.max_points == 9.5 and manifest.title == "07 A small lab"
    assert manifest.limits == Limits(wall_seconds=30, memory_mb=512)
    assert [(one.grade_id, one.title, one.points) for one in manifest.manual] == [
        ("hardware-why", "Why are bytes slower?", 2.5)
    ]
    assert Key.load(out / "key").assignment(NAME).manifest == manifest


def test_the_students_notebook_is_clean_and_complete(released):
    import nbformat

    out, (manifest,) = released
    notebook = nbformat.from_dict(notebook_of(out))
    nbformat.validate(notebook)
    assert notebook.metadata.llmcourse == {"assignment": NAME, "release": manifest.release}
    assert metadata_problems(notebook.cells) == []
    text = json.dumps(notebook)
    assert "Solution" not in text and "math.prod" not in text and "<summary>Hint" in text
    assert sum("raise NotImplementedError" in cell.source for cell in notebook.cells) == 3
    assert all(cell.outputs == [] for cell in notebook.cells if cell.cell_type == "code")
    by_id = {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if "nbgrader" in cell.metadata}
    assert by_id["hardware-roofline-check"].metadata.nbgrader.points == 4
    assert by_id["hardware-roofline-check"].metadata.editable is False
    assert by_id["hardware-roofline"].metadata.editable is True
    ids = [cell.metadata.get("nbgrader", {}).get("grade_id") for cell in notebook.cells]
    assert ids[-3:] == [None, "hardware-why-text", "hardware-why"]
    assert (
        notebook.cells[-3].source.startswith("## Takeaways") and "Two sentences" in notebook.cells[-2].source
    )


def test_no_secret_leaves_the_key(released):
    out, _ = released
    key = Key.load(out / "key")
    public = (out / "manifests" / f"{NAME}.json").read_text() + json.dumps(notebook_of(out))
    assignment = key.assignment(NAME)
    seeds = [str(seed) for seeds in assignment.variants.values() for seed in seeds]
    for secret in [key.secret.hex(), *seeds, "math.prod", "max(0, memory"]:
        assert secret not in public
    assert key.secret.hex() not in (out / "key" / f"{NAME}.json").read_text()


def test_the_manifest_is_signed_and_names_each_cell(released):
    out, (manifest,) = released
    data = json.loads((out / "manifests" / f"{NAME}.json").read_text())
    assert len(data.pop("signature")) == 64 and Manifest.from_json(data) == manifest
    roles = [cell.role for cell in manifest.cells if cell.role != "other"]
    pair = ["solution", "check"]
    assert roles == ["setup", "setup", *pair, *pair, *pair, "manual"]
    assert [cell.cell_id for cell in manifest.cells] == [cell["id"] for cell in notebook_of(out)["cells"]]
    assert sum(cell.points for cell in manifest.cells) == manifest.max_points


def test_the_key_knows_what_the_answers_are_and_need(released):
    key = Key.load(released[0] / "key").assignment(NAME)
    assert key.answers == {
        "hardware/intensity": "my_intensity",
        "hardware/roofline": "my_roofline",
        "hardware/cache_rows": "my_rows",
    }
    assert key.solutions["hardware/roofline"].startswith("def my_roofline(")
    assert {name: len(set(seeds)) for name, seeds in key.variants.items()} == dict.fromkeys(key.answers, 2)
    assert key.preload == ("torch", "numpy", "llmcourse.checks.hardware", "math")
    run = [cell.cell_id for cell in key.manifest.cells if cell.run]
    assert len(run) == 5 and set(run) == set(key.proven)
    assert key.watched["hardware/cache_rows"] == ("llmcourse.checks.hardware:largest_batch",)
    assert "llmcourse.checks.hardware:product_intensity" in key.watched["hardware/intensity"]


def test_the_same_seed_gives_the_same_release(released, tiny_release):
    again = prepare_lab(tiny_release.lab)
    assert again == tiny_release.key
    assert prepare_lab(tiny_release.lab, seed=2).manifest.release != again.manifest.release
    random = [prepare_lab(tiny_release.lab, seed=None, variants=1).manifest.release for _ in range(2)]
    assert random[0] != random[1]


def test_a_second_release_must_be_meant(released, tiny_release):
    out, (manifest,) = released
    options = {"repository": tiny_release.repository, "variants": 1}
    with pytest.raises(ValueError, match="already released"):
        release("07", out, **options)
    assert notebook_of(out)["metadata"]["llmcourse"]["release"] == manifest.release
    secret = Key.load(out / "key").secret
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    try:
        (anew,) = release("07", out, replace=True, **options)
        assert anew.release != manifest.release and Key.load(out / "key").secret == secret
        assert notebook_of(out)["metadata"]["llmcourse"]["release"] == anew.release
    finally:
        for path, data in before.items():
            path.write_bytes(data)


def test_solutions_may_be_left_in(tiny_release):
    key = prepare_lab(tiny_release.lab, solutions=True, variants=1)
    assert "math.prod" in json.dumps(key.skeleton)
    rebuilt = rebuild(key.untouched(), key)
    assert rebuilt.exercises == dict.fromkeys(key.answers, "") and rebuilt.findings == ()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param("<summary>Solution", "<summary>Answer", "intensity has no model solution", id="none"),
        pytest.param("math.prod((m, k, n))", "m * k", "does not score the maximum", id="wrong"),
        pytest.param("math.prod((m, k, n))", "absent(m)", "does not score the maximum", id="name"),
        pytest.param(
            "# def my_roofline(", "# def another(", "does not define 'my_roofline'", id="other_name"
        ),
        pytest.param("    raise NotImplementedError", "    return 1", "give its answer away", id="no_stub"),
        pytest.param(
            "    raise NotImplementedError",
            "    if m is None:\n        raise NotImplementedError\n    "
            "return 2 * m * k * n / (bytes_per_value * (m * k + k * n + m * n))",
            "the untouched notebook of 07_hardware scores 1",
            id="untouched_scores",
        ),
        pytest.param(
            'check("hardware/roofline", my_roofline)',
            'check("hardware/roofline", my_roofline, seed=1)\nprint()',
            "no more",
            id="check",
        ),
        pytest.param(
            'check("hardware/roofline", my_roofline)',
            'check("hardware/mfu", my_roofline)',
            "no more",
            id="other_check",
        ),
        pytest.param(
            "# def my_rows(", "# model.x\n# def my_rows(", r"need `model = train\(6\)`", id="experiment"
        ),
    ],
)
def test_labs_that_cannot_be_graded(tiny_release, tmp_path, old, new, message):
    assert old in SOURCE
    refused(tiny_release, tmp_path, message, SOURCE.replace(old, new, 1), limits=Limits(wall_seconds=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": {"hardware/none": 2}}, "points for 'hardware/none'"),
        ({"points": {"hardware/roofline": 0}}, "must be a number above 0"),
        ({"points": {"hardware/roofline": True}}, "must be a number above 0"),
        ({"variants": 0}, "variants=0"),
        ({"questions": {"01": QUESTIONS["07"]}}, "no such lab"),
        ({"questions": {"07": [{"id": "a"}]}}, "id, after, text and points"),
        (
            {"questions": {"07": [QUESTIONS["07"][0] | {"after": "Nowhere"}]}},
            "no heading and no grade_id 'Nowhere'",
        ),
        ({"questions": {"07": QUESTIONS["07"] * 2}}, "used twice"),
        ({"questions": {"07": [QUESTIONS["07"][0] | {"points": -1}]}}, "number above 0"),
        ({"questions": {"07": [QUESTIONS["07"][0] | {"id": "a b"}]}}, "letters, digits"),
        ({"questions": {"07": [QUESTIONS["07"][0] | {"text": " "}]}}, "no text"),
        ({"questions": {"07": [QUESTIONS["07"][0] | {"id": "roofline"}]}}, "used twice"),
        ({"questions": ["x"]}, "for each lab a list"),
    ],
)
def test_arguments_that_are_refused(tiny_release, tmp_path, options, message):
    refused(tiny_release, tmp_path, message, **options)


def test_unknown_labs_and_no_labs(tiny_release, tmp_path):
    with pytest.raises(ValueError, match="no lab '99'"):
        release("99", tmp_path / "out", repository=tiny_release.repository)
    empty = make_repository(tmp_path / "empty")
    (empty / "labs/src/07_hardware.py").unlink()
    with pytest.raises(ValueError, match="no lab to release"):
        release(None, tmp_path / "out", repository=empty)


def test_questions_from_a_file_and_their_places(tiny_release, tmp_path):
    path = tmp_path / "questions.yml"
    path.write_text(
        "'07':\n- {id: a, after: hardware-intensity, text: 'First?', points: 1}\n"
        "- {id: b, after: hardware-intensity, text: 'Second?', points: 0.5}\n"
        "- {id: c, after: '## 1. Products', text: '**Third** `x`?', points: 2}\n"
    )
    key = prepare_lab(tiny_release.lab, questions=read_questions(path)["07"], variants=1)
    ids = [cell.grade_id for cell in key.manifest.cells if cell.grade_id]
    start = ["hardware-c-text", "hardware-c", "hardware-intensity", "hardware-intensity-check"]
    assert ids[:8] == [*start, "hardware-a-text", "hardware-a", "hardware-b-text", "hardware-b"]
    titles = {one.title: one.points for one in key.manifest.manual}
    assert list(titles.items()) == [("Third x?", 2), ("First?", 1), ("Second?", 0.5)]
    path.write_text("a: [")
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        read_questions(path)
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        read_questions(tmp_path / "none.yml")
    assert make_questions({}, "x") == {}


ADD = Exercise(
    id="add",
    title="Add",
    points=1,
    reference=lambda a, b: a + b,
    cases=lambda seed: [(seed % 10, 3)],
    mutants=[Mutant("off by one", lambda a, b: a + b + (a != 7), "too much")],
)


def test_seeds_are_those_on_which_wrong_answers_fail():
    drawn = [derive(b"s" * 32, "seed", "x/add", str(number)) for number in range(20)]
    assert any(seed % 10 == 7 for seed in drawn)  # there the wrong answer is right
    seeds = choose_seeds(ADD, "x/add", ADD.reference, b"s" * 32, 20)
    assert len(set(seeds)) == 20 and not any(seed % 10 == 7 for seed in seeds)
    assert set(drawn) - set(seeds) == {seed for seed in drawn if seed % 10 == 7}


def test_seeds_on_which_rounding_could_decide_are_not_used():
    near = Exercise(
        id="add",
        title="Add",
        points=1,
        reference=lambda a: float(a),
        cases=lambda seed: [(seed % 10,)],
        mutants=[Mutant("more", lambda a: a + 1.0, "too much")],
        rtol=0,
        atol=1e-3,
    )
    # Right within the tolerance everywhere; at 7 only just.
    solution = lambda a: a + (9e-4 if a == 7 else 2e-4)  # noqa: E731
    drawn = {derive(b"s" * 32, "seed", "x/add", str(number)) for number in range(20)}
    seeds = set(choose_seeds(near, "x/add", solution, b"s" * 32, 20))
    assert drawn - seeds == {seed for seed in drawn if seed % 10 == 7} != set()
    with pytest.raises(ValueError, match="model solution does not score the maximum"):
        choose_seeds(near, "x/add", lambda a: a + 9e-4, b"s" * 32, 20)


def test_a_wrong_answer_that_passes_is_refused():
    always = Exercise(
        id="add",
        title="Add",
        points=1,
        reference=ADD.reference,
        cases=lambda seed: [(1 if seed == 0 else 7, 3)],
        mutants=ADD.mutants,
    )
    with pytest.raises(ValueError, match="on 2 of 2 seeds the wrong answer 'off by one' passes"):
        choose_seeds(always, "x/add", always.reference, b"s" * 32, 4)


def test_a_check_that_accepts_a_wrong_answer_is_refused():
    blind = Exercise(
        id="add",
        title="Add",
        points=1,
        reference=ADD.reference,
        cases=lambda seed: [(7, 3)],
        mutants=ADD.mutants,
    )
    with pytest.raises(ValueError, match="not worth trusting"):
        choose_seeds(blind, "x/add", blind.reference, b"s" * 32, 4)


def test_watched_functions_are_those_that_only_the_reference_calls():
    mask = find_exercise("attention/mask")
    own = run_solutions(
        [
            (
                "a",
                "import torch\ndef f(q, k):\n    return torch.arange(k)[None] <= torch.arange(k - q, k)[:, None]",
            )
        ],
        {"attention/mask": "f"},
    )["attention/mask"]
    assert watched_functions(mask, own) == ("llmcourse.models.attention:causal_mask",)
    assert watched_functions(mask, mask.reference) == ()


def test_solutions_that_do_not_run():
    with pytest.raises(ValueError, match="cell 'a': ZeroDivisionError"):
        run_solutions([("a", "1 / 0")], {"x/y": "f"})
