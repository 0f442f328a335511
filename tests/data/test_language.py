"""Language identification: right on the dump's languages, and sums are not dropped for having none."""

from __future__ import annotations

import pytest

from llmcourse.data.detection import score
from llmcourse.data.language import (
    LanguageSettings,
    accuracy_by_letters,
    count_letters,
    identify,
    keep_language,
    shorten,
)
from llmcourse.data.tinytown import Town
from llmcourse.data.web_dump import web_dump

SUMS = "12 + 7 = 19\n83 - 26: 13-6=7, 7-2=5, 57"


@pytest.fixture(scope="module")
def labelled() -> tuple[list[str], list[str]]:
    pages = list(web_dump(Town(0), 800, seed=1))
    return [page.labels["text"] for page in pages], [page.labels["language"] for page in pages]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The bridge by the old mill is closed until Friday.", "en"),
        ("Die Brücke bei der alten Mühle bleibt bis Freitag gesperrt.", "de"),
        ("La route du vieux moulin est fermée jusqu'à vendredi.", "fr"),
        ("El puente del viejo molino está cerrado hasta el viernes.", "es"),
        ("Мост у старой мельницы закрыт до пятницы.", "ru"),
    ],
)
def test_names_the_language(text: str, language: str) -> None:
    found, probability = identify(text)
    assert found == language and 0.5 < probability <= 1.0


def test_text_without_language() -> None:
    assert identify(SUMS) == identify("") == ("zxx", 1.0)
    assert identify("Anna: 555") == ("und", 0.0)
    assert identify("Anna: 555", LanguageSettings(min_letters=4))[0] not in ("und", "zxx")


def test_digits_do_not_outvote_a_sentence() -> None:
    sentence = "Call Jack Page about the old bicycle after six."
    assert identify(f"{SUMS}\n{sentence}") == identify(sentence)
    assert identify(sentence)[0] == "en"


def test_a_restricted_set_names_nothing_else() -> None:
    dutch = "De brug bij de oude molen is tot vrijdag gesloten voor het verkeer."
    assert identify(dutch)[0] == "nl"
    language, probability = identify(dutch, LanguageSettings(languages=("en", "de")))
    assert language in ("en", "de") and probability >= 0.5  # of two that sum to 1, the larger
    assert identify(dutch)[0] == "nl"  # the full model is untouched


def test_dump(labelled: tuple[list[str], list[str]]) -> None:
    texts, languages = labelled
    report = keep_language(texts, "en")
    found = score([not kept for kept in report.kept], [language != "en" for language in languages])
    assert found.n_positive > 40
    assert found.recall == 1.0 and found.precision >= 0.95
    borrowed = keep_language(texts, "en", 0.65).kept  # the threshold of another model
    assert (
        score([not kept for kept in borrowed], [language != "en" for language in languages]).precision < 0.92
    )
    assert sum(report.counts.values()) == len(texts) == len(report.probabilities)
    assert report.counts["zxx"] == sum(count_letters(text) == 0 for text in texts) > 10


def test_sums_survive_unless_told_otherwise(labelled: tuple[list[str], list[str]]) -> None:
    texts, _ = labelled
    kept = keep_language(texts, "en").kept
    strict = keep_language(texts, "en", keep_without_language=False).kept
    lost = {i for i in range(len(texts)) if kept[i] and not strict[i]}
    assert lost == {i for i, text in enumerate(texts) if count_letters(text) < 30}


def test_threshold_is_inclusive_and_monotone(labelled: tuple[list[str], list[str]]) -> None:
    texts = [text for text in labelled[0][:150] if count_letters(text) >= 30]
    kept = [sum(keep_language(texts, "en", threshold).kept) for threshold in (0.0, 0.5, 0.95, 1.0)]
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[-1]
    sure = identify(texts[0])[1]
    assert keep_language(texts[:1], identify(texts[0])[0], sure).kept == [True]


def test_accuracy_grows_with_length(labelled: tuple[list[str], list[str]]) -> None:
    table = accuracy_by_letters(*labelled, lengths=(5, 20, 40, 160, 10**6))
    shares = [right / tried for right, tried in table.values() if tried]
    assert len(shares) == 4 and shares == sorted(shares)
    assert shares[0] < 0.3 and shares[-1] > 0.99  # what the default of min_letters rests on
    assert table[10**6] == (0, 0)
    few = accuracy_by_letters(*labelled, lengths=(5,), candidates=("en", "de", "fr", "es"))
    assert few[5][0] > table[5][0]


def test_prefixes() -> None:
    assert count_letters("a1 é-ж") == 3
    assert shorten("1 a b c", 2) == "1 a b"
    assert shorten("1 a", 2) is None


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="min_letters=0"):
        LanguageSettings(min_letters=0)
    for languages in ((), ("en", "en")):
        with pytest.raises(ValueError, match="languages="):
            LanguageSettings(languages=languages)
    with pytest.raises(ValueError, match="'qq'"):
        identify("A text of more than thirty letters, surely.", LanguageSettings(languages=("en", "qq")))
    with pytest.raises(ValueError, match="threshold=1.5"):
        keep_language([], "en", 1.5)
    with pytest.raises(ValueError, match="language='english'"):
        keep_language([], "english")
    with pytest.raises(ValueError, match="language='fr'"):
        keep_language([], "fr", settings=LanguageSettings(languages=("en", "de")))
    with pytest.raises(ValueError, match="1 texts with 0 languages"):
        accuracy_by_letters(["a"], [])
