"""Tables for learning platforms: the right columns, no formulas, and never a 0 in place of an open result."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import sys
from dataclasses import replace

import pytest

from llmcourse.grading.grades import Item
from llmcourse.grading.manual import AUTOMATIC
from llmcourse.grading.reports.exports import (
    FORMATS,
    canvas_csv,
    export,
    feedback_lines,
    grades_csv,
    gradescope_json,
    moodle_csv,
    read_answers,
    read_grades,
    write_answers,
    write_grades,
)
from llmcourse.grading.reports.text import cell, number
from llmcourse.grading.verdicts import Finding, Verdict
from tests.grading.hand_ins import make_grade, make_results

PEOPLE = {
    "s001": {"name": 'Number, "One"', "ids": {"canvas": "501", "moodle": "9001", "sis": "S1"}},
    "s002": {"name": '=HYPERLINK("http://evil","x")', "ids": {"canvas": "502", "moodle": "9002"}},
    "s003": {"name": "+1\n@three\t", "ids": {"canvas": "503", "moodle": "9003"}},
}


@pytest.fixture(scope="module")
def key(tiny_release):
    return tiny_release.key


@pytest.fixture
def results(key):
    """A full score, a partial one, a malformed file; the first two with their question marked."""
    grades = [
        make_grade(key, "s001", right=3),
        make_grade(key, "s002", right=1, findings=(Finding("DUPLICATE", "twice", "x"),)),
        make_grade(key, "s003", right=0, verdict=Verdict.MALFORMED, note="this is no JSON"),
    ]
    found = make_results(key, grades, PEOPLE)
    marked = [
        replace(result, marks=tuple(replace(m, points=2.0, comment="=1+1") for m in result.marks))
        for result in found[:2]
    ]
    return [*marked, found[2]]


def rows(text):
    return list(csv.reader(io.StringIO(text)))


def test_grades_csv_has_a_line_a_student_and_no_zero_for_what_is_open(key, results):
    table = list(csv.DictReader(io.StringIO(grades_csv(key, results))))
    full = sum(key.manifest.points.values())
    assert [row["student"] for row in table] == ["s001", "s002", "s003"]
    assert table[0]["points"] == number(full) and table[0]["total"] == number(full + 2)
    assert table[0]["total_max"] == number(key.manifest.max_points) and table[0]["name"] == 'Number, "One"'
    first, *others = key.manifest.points
    assert table[1][first] == number(key.manifest.points[first]) and {table[1][name] for name in others} == {
        "0"
    }
    assert table[1]["findings"] == "DUPLICATE"
    open_row = table[2]
    assert open_row["points"] == open_row["total"] == open_row[first] == ""
    assert open_row["verdict"] == "malformed" and "a person decides" in open_row["open"]
    assert open_row["note"] == "this is no JSON"


def test_X5_no_cell_is_a_formula(key, results):
    for text in (grades_csv(key, results), canvas_csv(key, results), moodle_csv(results)):
        cells = [value for row in rows(text) for value in row]
        assert not [value for value in cells if value.startswith(("=", "+", "-", "@", "\t", "\r"))]
        assert any(value.startswith("'=HYPERLINK") for value in cells)
        assert "'+1 @three" in cells and 'Number, "One"' in cells
        assert len({len(row) for row in rows(text)}) == 1
    assert cell("-5") == "'-5" and cell(-5) == -5 and cell("a\nb") == "a b" and cell("\t=1") == "'=1"


def test_a_decision_replaces_the_open_points(key, results):
    marks = tuple(
        replace(mark, points=1.0 if mark.question == AUTOMATIC else 2.5) for mark in results[2].marks
    )
    decided = replace(results[2], marks=marks)
    assert (decided.automatic, decided.manual, decided.total, decided.open) == (1.0, 2.5, 3.5, "")
    assert results[2].total is None
    (row,) = csv.DictReader(io.StringIO(grades_csv(key, [decided])))
    assert (row["points"], row["total"], row["verdict"]) == ("1", "3.5", "malformed")


def test_canvas_columns(key, results):
    header, possible, *students = rows(canvas_csv(key, results, "Lab (77)"))
    assert header == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Lab (77)"]
    assert possible == ["Points Possible", "", "", "", "", number(key.manifest.max_points)]
    assert students[0][1:] == ["501", "S1", "", "", results[0] and number(results[0].total)]
    assert students[2][5] == "", "an empty cell changes nothing in Canvas"
    (_, _, unknown) = rows(canvas_csv(key, make_results(key, [make_grade(key, "s009")])))
    assert unknown[:4] == ["s009", "", "", "s009"]


def test_moodle_columns_and_escaped_feedback(key, results):
    header, *students = rows(moodle_csv(results))
    assert header == ["Identifier", "Full name", "Grade", "Maximum Grade", "Feedback comments"]
    assert students[0][0] == "Participant 9001" and students[0][2] == number(results[0].total)
    assert students[2][2] == ""
    hostile = replace(results[0], marks=tuple(replace(m, comment="<script>") for m in results[0].marks))
    assert "&lt;script&gt;" in rows(moodle_csv([hostile]))[1][4] and "<script>" not in moodle_csv([hostile])
    with pytest.raises(ValueError, match="no submission has a Moodle participant number"):
        moodle_csv(make_results(key, [make_grade(key, "s001")]))


def test_gradescope_has_no_score_for_what_is_open(results):
    done, waiting = gradescope_json(results[1]), gradescope_json(results[2])
    assert done["score"] == sum(test["score"] for test in done["tests"]) == results[1].total
    assert {test.get("status") for test in done["tests"]} == {"passed", "failed", None}
    unmarked = replace(results[1], marks=tuple(replace(mark, points=None) for mark in results[1].marks))
    assert "score" not in gradescope_json(unmarked) and "not marked" in gradescope_json(unmarked)["output"]
    assert "score" not in waiting and waiting["tests"] == [] and "a person decides" in waiting["output"]
    assert "17" not in json.dumps(done), "the detail holds hidden inputs"


def test_feedback_names_what_is_open(results):
    assert feedback_lines(results[2]) == [f"Open: {results[2].open}."]
    assert feedback_lines(results[0])[-1].startswith("Why are bytes slower?: 2 of 2.5.")


def test_files_round_trip_and_are_the_same_each_time(tmp_path, key, results):
    write_grades(tmp_path, key, results)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_grades(tmp_path, key, list(reversed(results)))
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert read_grades(tmp_path) == (key.manifest.release, [result.grade for result in results])
    write_answers(tmp_path, {"s2": ({"e": "x \ud800"}, {}), "s1": ({}, {"q": "y"})})
    assert read_answers(tmp_path)["s2"]["answers"] == {"e": "x \ud800"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"release": 1, "grades": [{}]}', '{"grades": 3}'])
def test_damaged_grades_are_one_line(tmp_path, content):
    with pytest.raises(ValueError, match="run `llmcourse grade` first"):
        read_grades(tmp_path)
    (tmp_path / "grades.json").write_text(content)
    with pytest.raises(ValueError, match="is damaged") as error:
        read_grades(tmp_path)
    assert "\n" not in str(error.value)


def test_every_format_writes_what_it_says(tmp_path, key, results):
    for form in set(FORMATS) - {"nbgrader"}:
        assert export(tmp_path, key, results, form).exists()
    written = json.loads((tmp_path / "gradescope" / "s002" / "results.json").read_text())
    assert written == gradescope_json(results[1])
    with pytest.raises(ValueError, match="choose one of csv, canvas"):
        export(tmp_path, key, results, "excel")


def test_without_nbgrader_its_format_is_one_line(tmp_path, key, results, monkeypatch):
    monkeypatch.setitem(sys.modules, "nbgrader.api", None)
    with pytest.raises(ValueError, match="pip install nbgrader"):
        export(tmp_path, key, results, "nbgrader")
    assert not list(tmp_path.iterdir())


def test_gradebook_of_nbgrader(tmp_path, key, results):
    pytest.importorskip("nbgrader.api", reason="nbgrader is not installed")
    files = Item("files", "Submitted files", 3.0, 5.0, "partly", "")
    results[0] = replace(results[0], grade=results[0].grade.with_item(files, Verdict.GRADED, ()))
    path = export(tmp_path, key, results, "nbgrader")
    export(tmp_path, key, results, "nbgrader")
    with sqlite3.connect(path) as database:
        scores = dict(
            database.execute(
                "select student.id, sum(coalesce(grade.auto_score, 0) + coalesce(grade.manual_score, 0)) from grade "
                "join submitted_notebook n on grade.notebook_id = n.id "
                "join submitted_assignment a on n.assignment_id = a.id "
                "join student on a.student_id = student.id group by student.id"
            )
        )
    assert scores == {"s001": results[0].total, "s002": results[1].total}
