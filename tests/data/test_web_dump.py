"""The web dump: its labels are the truth about its pages, at the rates asked for."""

from __future__ import annotations

import math
import re
from collections import Counter
from html.parser import HTMLParser

import pytest

from llmcourse.data import web_text
from llmcourse.data.tinytown import KINDS, Town
from llmcourse.data.town_choices import stream
from llmcourse.data.web_dump import WebPage, WebSettings, web_dump

N = 1200


@pytest.fixture(scope="module")
def town() -> Town:
    return Town(0)


@pytest.fixture(scope="module")
def pages(town: Town) -> list[WebPage]:
    return list(web_dump(town, N, seed=1))


def shown(page: WebPage) -> str:
    return (
        web_text.mojibake(page.labels["text"])
        if page.labels["encoding"] == "mojibake"
        else page.labels["text"]
    )


class MainText(HTMLParser):
    """Collects what stands in <p>, which only the main text uses."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "p":
            self.inside = True
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.paragraphs[-1] += data


def test_deterministic(town: Town, pages: list[WebPage]) -> None:
    assert list(web_dump(town, N, seed=1)) == pages
    assert list(web_dump(town, 5, seed=2)) != list(web_dump(town, 5, seed=1))
    assert list(web_dump(town, 0)) == []


def test_addresses_are_unique_reserved_and_link_to_pages(pages: list[WebPage]) -> None:
    urls = {page.url for page in pages}
    assert len(urls) == N
    assert all(re.fullmatch(r"https://\w+\.example/\w+/\d+\.html", url) for url in urls)
    for page in pages:
        assert set(re.findall(r'href="(https://[^"]+)"', page.html)) <= urls


def test_text_stands_in_the_page(pages: list[WebPage]) -> None:
    for page in pages:
        parser = MainText()
        parser.feed(page.html)
        assert "\n\n".join(parser.paragraphs) == shown(page)
        assert page.html.count("<nav>") == 1 and "<script>" in page.html


def test_rates(pages: list[WebPage]) -> None:
    settings = WebSettings()
    fresh = [p for p in pages if p.labels["kind"] in KINDS and p.labels["duplicate"] is None]
    non_ascii = [p for p in pages if not p.labels["text"].isascii() and p.labels["duplicate"] is None]
    for share, found, n in (
        (settings.spam, sum(p.labels["kind"] == "spam" for p in pages), N),
        (settings.foreign, sum(p.labels["kind"] == "foreign" for p in pages), N),
        (settings.exact_duplicates, sum(p.labels["duplicate"] == "exact" for p in pages), N),
        (settings.near_duplicates, sum(p.labels["duplicate"] == "near" for p in pages), N),
        (settings.personal_data, sum(bool(p.labels["personal_data"]) for p in fresh), len(fresh)),
        (settings.broken, sum(p.labels["encoding"] == "mojibake" for p in non_ascii), len(non_ascii)),
    ):
        assert abs(found / n - share) < 4 * math.sqrt(share * (1 - share) / n)


def test_duplicates(pages: list[WebPage]) -> None:
    by_url = {page.url: page.labels for page in pages}
    seen: set[str] = set()
    for page in pages:
        labels = page.labels
        if labels["duplicate"] is None:
            assert labels["duplicate_of"] is None and labels["jaccard"] is None
            if labels["kind"] in KINDS:
                seen.add(page.url)
            continue
        assert labels["duplicate_of"] in seen  # an earlier page
        original = by_url[labels["duplicate_of"]]["text"]
        assert (labels["text"] == original) is (labels["duplicate"] == "exact")
        assert bool(labels["edits"]) is (labels["duplicate"] == "near")
        assert labels["jaccard"] == web_text.shingle_jaccard(labels["text"], original)
    near = [page.labels["jaccard"] for page in pages if page.labels["duplicate"] == "near"]
    assert sum(jaccard > 0.6 for jaccard in near) > 0.5 * len(near)


def test_fresh_english_pages_do_not_repeat_long_texts(pages: list[WebPage]) -> None:
    texts = Counter(
        page.labels["text"]
        for page in pages
        if page.labels["duplicate"] is None and page.labels["kind"] in KINDS
    )
    assert all(count == 1 for text, count in texts.items() if len(text.split()) > 12)


def test_personal_data_is_complete(pages: list[WebPage]) -> None:
    patterns = {
        "email": r"[\w.]+@example\.(?:org|com|net)",
        "phone": r"(?:\(\d{3}\) |\+1 \d{3} |\d{3}-)555[- ]01\d\d",
        "ipv4": r"(?:192\.0\.2|198\.51\.100|203\.0\.113)\.\d{1,3}",
    }
    kinds = Counter()
    for page in pages:
        found = [
            (kind, value) for kind, pattern in patterns.items() for value in re.findall(pattern, shown(page))
        ]
        assert sorted(set(found)) == sorted(set(page.labels["personal_data"]))
        kinds.update(kind for kind, _ in found)
    assert set(kinds) == set(patterns)


def test_held_out_residents_stay_out(town: Town, pages: list[WebPage]) -> None:
    held_out = [resident.name for resident in town.residents if resident.held_out]
    assert held_out and not [page.url for page in pages if any(name in page.html for name in held_out)]


def test_languages_and_encodings(pages: list[WebPage]) -> None:
    assert {page.labels["language"] for page in pages} == {"en", *web_text.FOREIGN_LANGUAGES}
    broken = [page.labels["text"] for page in pages if page.labels["encoding"] == "mojibake"]
    assert broken
    for text in broken:
        garbled = web_text.mojibake(text)
        assert garbled != text
        # Undo it by hand: cp1252 where it is defined, the byte itself elsewhere.
        data = b"".join(c.encode("latin-1") if ord(c) < 256 else c.encode("cp1252") for c in garbled)
        assert data.decode("utf-8") == text


def test_mojibake_by_hand() -> None:
    assert web_text.mojibake("café’s") == "cafÃ©â€™s"
    assert web_text.mojibake("”") == "â€\x9d"  # the byte 9D is undefined in Windows-1252


def test_shingle_jaccard_by_hand() -> None:
    # Three and two 2-grams, of which one is common to both: 1 / 4.
    assert web_text.shingle_jaccard("a b c d", "x b c", size=2) == pytest.approx(1 / 4)
    assert web_text.shingle_jaccard("a b", "a b") == 1.0
    assert web_text.shingle_jaccard("a b", "a c") == 0.0


@pytest.mark.parametrize(
    "text", ["1 + 1 = 2", "A. B. C. D.", "The ball was in the park. It was so. Ben had it."]
)
def test_near_copies_always_differ(text: str) -> None:
    rng = stream(0)
    for _ in range(200):
        edited, edits = web_text.near_copy(rng, text)
        assert edited != text and edits


@pytest.mark.parametrize("name", list(vars(WebSettings())))
def test_every_setting_changes_the_dump(town: Town, name: str) -> None:
    base = list(web_dump(town, 60, seed=3))
    assert list(web_dump(town, 60, seed=3, settings=WebSettings(**{name: 0.5}))) != base


def test_bad_input_is_refused(town: Town) -> None:
    with pytest.raises(ValueError, match="spam=1.5"):
        WebSettings(spam=1.5)
    with pytest.raises(ValueError, match="use 1 at most"):
        WebSettings(spam=0.5, foreign=0.6)
    with pytest.raises(ValueError, match="n_pages=-1"):
        web_dump(town, -1)
    with pytest.raises(ValueError, match="seed -2"):
        web_dump(town, 1, seed=-2)
