"""Personal data: found where it is, not where it is not, and masked once and for all."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcourse.data.detection import Detection
from llmcourse.data.privacy import KINDS, MARKERS, Found, find_personal_data, mask, score_personal_data
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("Write to anna.miller@example.org.", "email", "anna.miller@example.org"),
        ("<anna_m+news@mail.example.co.uk>", "email", "anna_m+news@mail.example.co.uk"),
        ("mailto:a@example.com, please", "email", "a@example.com"),
        ("müller@bücher.example", "email", "müller@bücher.example"),
        ("an anna@example.com-like address", "email", "anna@example.com"),
        ("Call (212) 555-0123 today", "phone", "(212) 555-0123"),
        ("Call 212-555-0123.", "phone", "212-555-0123"),
        ("212.555.0123", "phone", "212.555.0123"),
        ("+1 212 555 0123!", "phone", "+1 212 555 0123"),
        ("1-800-555-0199", "phone", "1-800-555-0199"),
        ("+1 (212) 555-0123", "phone", "+1 (212) 555-0123"),
        ("Phone:+44 20 7946 0958", "phone", "+44 20 7946 0958"),
        ("+442079460958", "phone", "+442079460958"),
        ("+49 (0)30 901820", "phone", "+49 (0)30 901820"),
        ("Last login from 198.51.100.254.", "ipv4", "198.51.100.254"),
        ("http://192.0.2.1:8080/", "ipv4", "192.0.2.1"),
        ("10.0.0.0/8", "ipv4", "10.0.0.0"),
        ("0.0.0.0", "ipv4", "0.0.0.0"),
        ("1.2.3.4.", "ipv4", "1.2.3.4"),
        ("+44 20 7946 0958, 3+44", "phone", "+44 20 7946 0958"),
        ("f(212) 555-0123", "phone", "(212) 555-0123"),
    ],
)
def test_found(text: str, kind: str, value: str) -> None:
    start = text.index(value)
    assert find_personal_data(text) == [Found(start, start + len(value), kind, value)]
    assert mask(text)[0] == text.replace(value, MARKERS[kind])


@pytest.mark.parametrize(
    "text",
    [
        "200-555", "12 + 7 = 19", "83 - 26: 13-6=7, 7-2=5, 57", "100-200-3000", "212-155-0123", "555-0123",
        "2125550123", "212-555-01234", "1212-555-0123", "x212-555-0123", "212-555-0123-4", "+123 456",
        "3 +44 20", "3+4420794609", "2024-10-10 12:30", "ISBN 978-3-16-148410-0",
        "1.2.3", "10.0.0.1.2", "256.1.1.1", "1.2.3.256", "01.2.3.4", "v1.2.3.4", "1.2.3.4-rc1", "1.2.3.4a",
        "version 1.2.3.4", "Release: 10.4.0.1", "see section 1.2.3.4",
        "anna@localhost", "anna @ example.org", "@anna", "a@b.c", "anna@-example.org", "anna@example.123",
        *MARKERS.values(), "",
    ],
)  # fmt: skip
def test_not_found(text: str) -> None:
    assert mask(text) == (text, [])


def test_several_in_order_and_by_kind() -> None:
    text = "anna@example.org, 192.0.2.7; (212) 555-0100 and 192.0.2.7"
    masked, found = mask(text)
    assert masked == "<EMAIL>, <IPV4>; <PHONE> and <IPV4>"
    assert [piece.kind for piece in found] == ["email", "ipv4", "phone", "ipv4"]
    assert all(text[piece.start : piece.end] == piece.value for piece in found)
    assert mask(text, ["phone"])[0] == "anna@example.org, 192.0.2.7; <PHONE> and 192.0.2.7"
    assert mask(text, [])[0] == text


def test_an_overlap_is_one_piece() -> None:
    assert mask("212-555-0123@example.com")[0] == "<EMAIL>"
    assert mask("a@192.0.2.1")[0] == "a@<IPV4>"
    assert mask("(212) 555-0123(212) 555-0124")[0] == "<PHONE><PHONE>"
    assert mask("anna@example.org(212) 555-0123")[0] == "<EMAIL><PHONE>"


PIECES = st.sampled_from(
    ["anna@example.org", "192.0.2.1", "(212) 555-0123", "212-555-0123", "+44 20 7946 0958", "+1", "(", ")", " ", ".",
     "-", "+", "@", "version ", "1", "a", "<", ">", "\n", "\u00a0", "'", "é"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=8).map("".join))
def test_masking_is_idempotent_and_touches_nothing_else(text: str) -> None:
    masked, found = mask(text)
    assert mask(masked) == (masked, [])
    assert len(masked) == len(text) + sum(len(MARKERS[piece.kind]) - len(piece.value) for piece in found)
    rest = masked
    for piece in found:
        before, marker, rest = rest.partition(MARKERS[piece.kind])
        assert marker and before in text


def test_no_false_alarm_in_clean_text() -> None:
    for document in Town(0).documents(3000, seed=5):
        assert find_personal_data(document.text) == []


def test_everything_in_a_dump() -> None:
    pages = list(web_dump(Town(1), 2000, seed=3))
    found = [find_personal_data(page.labels["text"]) for page in pages]
    for kind, result in score_personal_data(found, [page.labels["personal_data"] for page in pages]).items():
        assert result.n_positive > 60, kind
        assert result.precision == 1.0 and result.recall == 1.0, kind
    for page, pieces in zip(pages, found, strict=True):
        masked = mask(page.labels["text"])[0]
        assert not any(value in masked for _, value in page.labels["personal_data"])
        assert mask(masked)[0] == masked and (pieces or masked == page.labels["text"])


def test_scores_by_hand() -> None:
    found = [
        [Found(0, 1, "email", "a@b.de"), Found(2, 3, "phone", "212-555-0123")],
        [Found(0, 1, "email", "a@b.de"), Found(0, 1, "email", "a@b.de")],
    ]
    truth = [[("email", "a@b.de"), ("phone", "+1 212-555-0123")], [("email", "a@b.de")]]
    assert score_personal_data(found, truth) == {
        "email": Detection(2, 1, 0), "phone": Detection(0, 1, 1), "ipv4": Detection(0, 0, 0),
    }  # fmt: skip


def test_time_is_linear() -> None:
    awkward = (
        "a",
        "a.",
        "1.",
        "+1 2 ",
        "a@",
        "a@b.",
        "1",
        "@",
        "(",
        "192.0.2.1 ",
        "(212) 555-0123",
        "x@y.org ",
    )
    start = time.process_time()
    for piece in awkward:
        find_personal_data(piece * (100_000 // len(piece)))
    assert time.process_time() - start < 5  # quadratic work would take minutes


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="'iban'"):
        find_personal_data("x", ["iban"])
    with pytest.raises(ValueError, match="'iban'"):
        mask("x", ["iban"])
    with pytest.raises(ValueError, match="shorter|longer"):
        score_personal_data([[]], [])
    assert tuple(MARKERS) == KINDS
