"""Marks of a person: the sheet goes out and comes back, the page stores each mark and lets nobody else in."""

from __future__ import annotations

import csv
import http.client
import io
import threading
import urllib.parse
from dataclasses import replace

import pytest
from bs4 import BeautifulSoup

from llmcourse.grading.manual import (
    AUTOMATIC,
    Mark,
    files_to_decide,
    load_marks,
    merge,
    open_marks,
    read_sheet,
    store,
    write_sheet,
)
from llmcourse.grading.marking_page import MarkingServer
from llmcourse.grading.verdicts import Verdict
from tests.grading.hand_ins import make_grade, write_hand_ins

QUESTION = "hardware-why"
HOSTILE = "</pre><script>alert(1)</script>"


@pytest.fixture(scope="module")
def key(tiny_release):
    return tiny_release.key


@pytest.fixture
def grades(key):
    review = make_grade(key, "s002", verdict=Verdict.REVIEW, note="it answered early")
    return [make_grade(key, "s001"), review]


@pytest.fixture
def marks(key, grades):
    return open_marks(key, grades, {"s001": {QUESTION: HOSTILE}, "s002": {QUESTION: "two"}})


# The sheet


def test_everything_that_waits_for_a_person_is_listed(marks):
    assert [(mark.student, mark.question, mark.max_points) for mark in marks] == [
        ("s001", QUESTION, 2.5),
        ("s002", AUTOMATIC, 4),
        ("s002", QUESTION, 2.5),
    ]
    assert "it answered early" in marks[1].title and all(mark.points is None for mark in marks)


def fill(path, points, comment="=good", header=None, delimiter=","):
    """Fill a sheet as a spreadsheet does, which may use its own delimiter and a byte order mark."""
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    for row, value in zip(rows, points, strict=True):
        row["points"], row["comment"] = value, comment
    out = io.StringIO()
    table = csv.DictWriter(out, header or rows[0].keys(), delimiter=delimiter, extrasaction="ignore")
    table.writeheader()
    table.writerows(rows)
    path.write_text("\ufeff" + out.getvalue(), encoding="utf-8")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_filled_sheet_is_taken_over(tmp_path, marks, delimiter):
    sheet = tmp_path / "sheet.csv"
    write_sheet(sheet, marks)
    fill(sheet, ["3", "2", ""], delimiter=delimiter)
    assert merge(tmp_path, marks, read_sheet(sheet)) == 2
    stored = {(mark.student, mark.question): mark for mark in load_marks(tmp_path, marks)}
    assert stored["s002", AUTOMATIC].points == 3 and stored["s001", QUESTION].points == 2
    assert stored["s002", QUESTION].points is None and stored["s001", QUESTION].comment == "=good"
    assert ",'=good," in (tmp_path / "marks.csv").read_text()
    write_sheet(sheet, load_marks(tmp_path, marks))
    fill(sheet, ["", "1,5", "0"])
    assert merge(tmp_path, load_marks(tmp_path, marks), read_sheet(sheet)) == 2
    assert [mark.points for mark in load_marks(tmp_path, marks)] == [1.5, 3, 0]


def test_a_mark_counts_for_the_answer_it_was_given_for(tmp_path, key, grades, marks):
    merge(tmp_path, marks, [replace(mark, points=1.0) for mark in marks])
    later = open_marks(key, grades, {"s001": {QUESTION: "another"}, "s002": {QUESTION: "two"}})
    assert [mark.points for mark in load_marks(tmp_path, later)] == [None, 1.0, 1.0]
    with pytest.raises(ValueError, match="s001 changed the answer"):
        merge(tmp_path, later, [replace(marks[0], points=2.0)])


def test_texts_with_quotation_marks_commas_and_lines_come_back(tmp_path, marks):
    comment = '"memory-bound" is right, but no number.\nSee "roofline", page 3' + 3900 * "x"
    title = 'What does "memory-bound" mean, in numbers?'
    given = [replace(mark, title=title, comment=comment, points=1.0) for mark in marks]
    write_sheet(tmp_path / "sheet.csv", given)
    by_place = {(mark.student, mark.question): mark for mark in read_sheet(tmp_path / "sheet.csv")}
    assert by_place == {(mark.student, mark.question): mark for mark in given}
    assert merge(tmp_path, marks, read_sheet(tmp_path / "sheet.csv")) == 3
    assert [mark.comment for mark in load_marks(tmp_path, marks)] == [comment] * 3


def test_no_digest_is_a_number_to_a_spreadsheet(marks):
    assert all(mark.answer.startswith("a-") for mark in marks)


def test_a_decision_is_about_the_file_that_was_read(tmp_path, key, grades):
    written = {"s001": {}, "s002": {}}
    first, second = (
        open_marks(key, grades, written, {"s002": digest}) for digest in ("one file", "another file")
    )
    merge(tmp_path, first, [replace(mark, points=1.0) for mark in first])
    assert [mark.points for mark in load_marks(tmp_path, first)] == [1.0, 1.0, 1.0]
    decision = next(mark for mark in load_marks(tmp_path, second) if mark.question == AUTOMATIC)
    assert decision.points is None
    folder = write_hand_ins(tmp_path / "in", key, {"s001": b"{", "s002": b"{"})
    assert list(files_to_decide(folder, key.name, grades)) == ["s002"]


def test_marks_that_others_store_meanwhile_are_kept(tmp_path, marks):
    by_question = {(mark.student, mark.question): mark for mark in marks}
    store(tmp_path, marks, replace(by_question["s001", QUESTION], points=2.0))
    merge(tmp_path, marks, [replace(by_question["s002", AUTOMATIC], points=3.0)])
    found = store(tmp_path, marks, replace(by_question["s002", QUESTION], points=1.0, comment="c"))
    assert found == load_marks(tmp_path, marks) and {mark.points for mark in found} == {1.0, 2.0, 3.0}
    found = store(tmp_path, found, by_question["s001", QUESTION])  # taken back
    assert [mark.points for mark in found if mark.student == "s001"] == [None]


@pytest.mark.parametrize("value", ["-1", "2.6", "x", "nan", "inf", "1e99"])
def test_bad_points_name_their_line_and_store_nothing(tmp_path, marks, value):
    sheet = tmp_path / "sheet.csv"
    write_sheet(sheet, marks)
    fill(sheet, ["1", "1", value])
    with pytest.raises(ValueError, match="line 4: points") as error:
        merge(tmp_path, marks, read_sheet(sheet))
    assert "\n" not in str(error.value) and not (tmp_path / "marks.csv").exists()


def test_bad_sheets_are_one_line(tmp_path, marks):
    sheet = tmp_path / "sheet.csv"
    with pytest.raises(ValueError, match="no file"):
        read_sheet(sheet)
    write_sheet(sheet, marks)
    fill(sheet, ["1", "1", "1"], header=["student", "points"])
    with pytest.raises(ValueError, match="lacks the columns answer, max_points, question"):
        read_sheet(sheet)
    sheet.write_bytes(b"\xff\xfe\x00student")
    with pytest.raises(ValueError, match="save the sheet as CSV"):
        read_sheet(sheet)
    for changes, message in (
        ({"student": "s009"}, "nobody has to mark"),
        ({"max_points": 50, "points": 40.0}, "more than 2.5"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(tmp_path, marks, [replace(marks[0], **{"points": 1.0, **changes})])
    assert not (tmp_path / "marks.csv").exists()


# The page


@pytest.fixture
def server(tmp_path, marks):
    written = {"s001": {QUESTION: HOSTILE}, "s002": {QUESTION: "two"}}
    outputs = {"cell": [{"output_type": "stream", "text": HOSTILE}]}
    with MarkingServer("Lab", tmp_path, marks, written, lambda mark: outputs) as found:
        thread = threading.Thread(target=found.serve, daemon=True)
        thread.start()
        yield found
        found.close()
        thread.join(5)


def test_a_long_answer_and_a_long_comment_are_whole(tmp_path, marks):
    answer, comment = "word " * 1000 + "end", "c " * 1500 + "end"
    given = [replace(mark, comment=comment) for mark in marks]
    with MarkingServer("Lab", tmp_path, given, {"s001": {QUESTION: answer}}, lambda mark: {}) as server:
        page = BeautifulSoup(server.question(QUESTION), "html.parser")
    assert page.find("textarea").get_text() == comment and page.find("pre").get_text() == answer


def ask(server, path, method="GET", form=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    body = urllib.parse.urlencode(form) if form is not None else None
    connection.request(
        method, path, body, {"Content-Type": "application/x-www-form-urlencoded"} | (headers or {})
    )
    response = connection.getresponse()
    return response, response.read().decode()


def form_of(marks, number=0, **changes):
    mark = marks[number]
    form = {
        "student": mark.student,
        "question": mark.question,
        "answer": mark.answer,
        "points": "2",
        "comment": "",
    }
    return form | changes


def test_the_page_shows_the_answers_as_text_and_stores_a_mark(server, marks, tmp_path):
    home = f"/{server.token}/"
    _, text = ask(server, home)
    addresses = [link["href"] for link in BeautifulSoup(text, "html.parser").find_all("a")]
    assert addresses == [f"question?name={QUESTION}", f"question?name={AUTOMATIC}"]
    response, text = ask(server, home + addresses[0])
    page = BeautifulSoup(text, "html.parser")
    assert not page.find("script") and HOSTILE in [pre.get_text() for pre in page.find_all("pre")]
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in response.headers["Content-Security-Policy"]
    (first, _) = page.find_all("form")
    form = {field["name"]: field.get("value", "") for field in first.find_all("input")}
    response, _ = ask(server, first["action"], "POST", form | {"points": "1,5", "comment": HOSTILE})
    assert response.status == 303
    _, text = ask(server, response.headers["Location"].partition("#")[0])
    assert 'value="1.5"' in text and "<script>" not in text
    stored = load_marks(tmp_path, marks)[0]
    assert (stored.points, stored.comment) == (1.5, HOSTILE)
    _, text = ask(server, home + "outputs?student=s001")
    assert "&lt;script&gt;" in text and "<script>" not in text


def test_a_mark_can_be_taken_back(server, marks, tmp_path):
    for points, expected in (("2", 2.0), ("", None)):
        response, _ = ask(server, f"/{server.token}/mark", "POST", form_of(marks, points=points))
        assert response.status == 303 and load_marks(tmp_path, marks)[0].points == expected


@pytest.mark.parametrize("points", ["9", "-1", "nan", "two"])
def test_bad_points_are_said_on_the_page(server, marks, tmp_path, points):
    response, text = ask(server, f"/{server.token}/mark", "POST", form_of(marks, points=points))
    assert response.status == 400 and "Not stored" in text and not (tmp_path / "marks.csv").exists()


def test_nobody_else_gets_in(server, marks, tmp_path):
    token, form = f"/{server.token}/", form_of(marks)
    assert ask(server, "/")[0].status == ask(server, "/wrong/")[0].status == 403
    assert ask(server, "/" + server.token[:-1] + "/mark", "POST", form)[0].status == 403
    evil = {"Host": f"evil.example:{server.port}"}
    assert ask(server, token, headers=evil)[0].status == 403, "a name that an attacker's DNS points here"
    assert ask(server, token + "mark", "POST", form, {"Origin": "http://evil.example"})[0].status == 403
    assert ask(server, token + "mark", "POST", form | {"comment": "x" * 70_000})[0].status == 400
    assert ask(server, token + "mark", "POST", form_of(marks, student="s009"))[0].status == 404
    assert ask(server, token + "mark", "POST", form_of(marks, answer="0" * 16))[0].status == 400
    for path in ("nowhere", "question?name=x", "outputs?student=x", "question", "../../etc/passwd"):
        assert ask(server, token + path)[0].status == 404
    assert not (tmp_path / "marks.csv").exists()
    other, _ = ask(server, token)
    assert other.status == 200 and len(server.token) >= 32


def test_the_page_is_for_this_machine_alone(server):
    assert server._server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.port}/{server.token}/"


def test_a_token_of_other_characters_is_refused(server):
    assert ask(server, "/%C3%BC%00/")[0].status == 403


def test_marks_are_plain():
    assert Mark("s", "q", "t", 1.0) == Mark("s", "q", "t", 1.0, None, "", "")
