"""Sources give text, source and license; splits are fixed and share no document; refusals say what to do."""

from __future__ import annotations

import importlib.metadata
import json
import socket
import time

import datasets
import huggingface_hub
import numpy as np
import pytest

from llmcourse.data import hub as hub_module
from llmcourse.data import python_docs as python_docs_module
from llmcourse.data.sources import files, hub, load_corpus, python_docs, tinytown
from llmcourse.data.tinytown import Town, entropy_per_token
from llmcourse.data.token_stream import tokenize

COLUMNS = {"text", "source", "license"}


@pytest.fixture(autouse=True)
def no_shared_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ---- the documentation at hand


@pytest.fixture(scope="module")
def all_docs() -> datasets.Dataset:
    return python_docs()


def test_documentation_is_megabytes_of_distinct_licensed_text(all_docs) -> None:
    assert set(all_docs.column_names) == COLUMNS
    texts, sources, licenses = (list(all_docs[name]) for name in ("text", "source", "license"))
    assert sum(len(text.encode()) for text in texts) > 2_000_000
    assert len(set(texts)) == len(texts) and all(text.strip() for text in texts)
    assert all(
        license == "PSF-2.0"
        for source, license in zip(sources, licenses, strict=True)
        if source.startswith("python ")
    )
    assert all(licenses)
    assert not any(
        part in source for source in sources for part in (".test.", ".tests.", "idlelib", "site-packages")
    )


def test_documentation_holds_what_is_known_of_it(all_docs) -> None:
    by_source = dict(zip(all_docs["source"], all_docs["text"], strict=True))
    name = next(source for source in by_source if source.endswith(":textwrap.dedent"))
    assert by_source[name].startswith(
        "textwrap.dedent(text)\n\nRemove any common leading whitespace from every line"
    )
    assert any(source.endswith(":help.lambda") for source in by_source)
    version = importlib.metadata.version("numpy")
    row = all_docs[list(all_docs["source"]).index(f"distribution:numpy {version}")]
    assert "NumPy" in row["text"] and "BSD" in row["license"]


def test_max_bytes_gives_a_prefix(all_docs) -> None:
    part = python_docs(max_bytes=20_000)
    texts = list(part["text"])
    assert texts == all_docs[: len(part)]["text"]
    size = sum(len(text.encode()) for text in texts)
    assert size <= 20_000 < size + len(all_docs[len(part)]["text"].encode())
    with pytest.raises(ValueError, match="max_bytes=1 leaves room for no document"):
        python_docs(max_bytes=1)


def test_docstrings_are_found_where_definitions_are() -> None:
    source = '''
"""Module."""
class A:
    """Class."""
    async def f(self, x: int = 1, *, y):
        """Method."""
        def inner():
            """Hidden."""
try:
    def g(): """Tried."""
except ImportError:
    def h(): """Caught."""
if True:
    pass
else:
    def k(): """Otherwise."""
def silent(): pass
'''
    tree = python_docs_module.ast.parse(source)
    assert list(python_docs_module._docstrings(tree, "m")) == [
        ("m", "m\n\nModule."),
        ("m.A", "m.A\n\nClass."),
        ("m.A.f", "m.A.f(self, x: int=1, *, y)\n\nMethod."),
        ("m.g", "m.g()\n\nTried."),
        ("m.h", "m.h()\n\nCaught."),
        ("m.k", "m.k()\n\nOtherwise."),
    ]


@pytest.mark.parametrize(
    "lines, license",
    [
        ("License-Expression: MIT\nLicense: other", "MIT"),
        ("License: BSD\nClassifier: License :: OSI Approved :: MIT License", "MIT License"),
        ("License: Apache 2.0", "Apache 2.0"),
        (f"License: {'Permission is granted ' * 9}", "unknown"),
        ("Summary: nothing said", "unknown"),
    ],
)
def test_license_is_taken_from_the_most_precise_field(tmp_path, lines: str, license: str) -> None:
    folder = tmp_path / "x-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: x\nVersion: 1\n{lines}\n\nText.")
    metadata = importlib.metadata.PathDistribution(folder).metadata
    assert python_docs_module._license(metadata) == license


# ---- files


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "b.md").write_text("# Größe\n", encoding="utf-8")
    (folder / "a.txt").write_text("first")
    (folder / "blank.txt").write_text(" \n")
    (folder / "deep" / "page.html").write_text("<p>raw</p>")
    lines = [
        json.dumps({"text": "one\u2028line"}, ensure_ascii=False),
        "",
        json.dumps({"text": "two", "n": 1}),
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG")
    return folder


def test_a_folder_is_read_in_order(notes) -> None:
    data = files(notes, license="CC-BY-4.0")
    assert list(zip(data["source"], data["text"], strict=True)) == [
        ("a.txt", "first"),
        ("b.md", "# Größe\n"),
        ("deep/page.html", "<p>raw</p>"),
        ("rows.jsonl:1", "one\u2028line"),
        ("rows.jsonl:3", "two"),
    ]
    assert set(data["license"]) == {"CC-BY-4.0"} and set(data.column_names) == COLUMNS
    assert set(files(notes)["license"]) == {"unknown"}


def test_globs_files_and_repetitions(notes, monkeypatch) -> None:
    assert list(files(f"{notes}/**/*.html")["source"]) == ["deep/page.html"]
    assert list(files([notes / "b.md", str(notes / "*.txt"), notes / "b.md"])["source"]) == ["b.md", "a.txt"]
    monkeypatch.chdir(notes)
    assert list(files("*.md")["source"]) == list(files("b.md")["source"]) == ["b.md"]


def test_files_refuses_what_it_cannot_read(notes) -> None:
    with pytest.raises(ValueError, match="matches no file: give a file, a folder"):
        files(notes / "*.rst")
    with pytest.raises(ValueError, match="matches no file"):
        files(notes / "missing")
    with pytest.raises(ValueError, match="'.png' are not read"):
        files(notes / "image.png")
    with pytest.raises(ValueError, match="every document is blank"):
        files(notes / "blank.txt")
    (notes / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt: byte 2 is not UTF-8"):
        files(notes / "latin.txt")


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"body": "x"}', '{"text": 3}', '{"text": "\\ud800"}', '"text"']
)
def test_bad_lines_are_named(tmp_path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(ValueError, match="x.jsonl:2: not a line like"):
        files(tmp_path / "x.jsonl")


# ---- the Hub, and folders laid out like its data sets


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"story": f"story {i}", "source": "theirs", "label": i} for i in range(50)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text(json.dumps(rows[0] | {"story": "for the test"}))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_local_data_set_in_three_columns(folder, streaming: bool) -> None:
    data = hub(str(folder), streaming=streaming, column="story")
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    assert isinstance(data, kind)
    rows = list(data)
    assert len(rows) == 50
    assert rows[7] == {"text": "story 7", "source": "folder:dataset", "license": "unknown"}
    (test,) = hub(str(folder), "test", streaming=streaming, column="story", license="MIT")
    assert test == {"text": "for the test", "source": "folder:dataset", "license": "MIT"}


@pytest.mark.parametrize("streaming", [False, True])
def test_column_named_text_keeps_its_name(tmp_path, streaming: bool) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("one\ntwo")
    assert [row["text"] for row in hub(str(tmp_path / "d"), streaming=streaming)] == ["one", "two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_wrong_column_split_and_folder_are_refused(folder, tmp_path, streaming: bool) -> None:
    with pytest.raises(ValueError, match="no column 'text': choose one of story, source, label"):
        hub(str(folder), streaming=streaming)
    with pytest.raises(ValueError, match="cannot open the data set .*dev"):
        hub(str(folder), "dev", streaming=streaming, column="story")
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="cannot open the data set") as error:
        hub(str(tmp_path / "void"), streaming=streaming)
    assert "\n" not in str(error.value)


def test_without_network_the_offline_choices_are_named(monkeypatch) -> None:
    monkeypatch.setattr(
        huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9"
    )  # discard: nothing listens
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for open_it in (lambda: hub("owner/name"), lambda: load_corpus("hub:owner/name", n_documents=10)):
        with pytest.raises(ValueError, match="cannot reach the Hub for 'owner/name'.*python-docs") as error:
            open_it()
        assert "\n" not in str(error.value)


def test_a_silent_server_does_not_hang_the_caller(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, answers nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_module, "PROBE_SECONDS", 0.2)
        start = time.monotonic()
        with pytest.raises(ValueError, match="cannot reach the Hub"):
            hub("owner/name")
        assert time.monotonic() - start < 5


def test_offline_mode_asks_nobody(monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_module, "_require_network", lambda name: pytest.fail("asked the network"))
    with pytest.raises(ValueError, match="cannot open the data set 'owner/name'.*tinytown"):
        hub("owner/name")


# ---- the town


def test_tinytown_rows_are_the_towns_documents() -> None:
    town = Town(seed=3)
    data = tinytown(40, seed=5, town=town)
    assert set(data.column_names) == COLUMNS | {"kind", "bits"}
    for row, document in zip(data, town.documents(40, 5), strict=True):
        assert (row["text"], row["kind"], row["bits"]) == (document.text, document.kind, document.bits)
    assert set(data["source"]) == {"tinytown:3"}
    assert list(tinytown(40, seed=5)["text"]) != list(data["text"])
    assert list(tinytown(40, seed=6, town=town)["text"]) != list(data["text"])
    with pytest.raises(ValueError, match="n_documents=0"):
        tinytown(0)


# ---- load_corpus


def test_town_corpus_knows_its_entropy() -> None:
    corpus = load_corpus("tinytown", seed=2, n_documents=300, validation_fraction=0.1)
    assert (len(corpus.train), len(corpus.validation)) == (270, 30)
    assert corpus.town is not None and corpus.town.seed == 2
    expected = [corpus.town.parse(text).bits for text in corpus.validation["text"]]
    np.testing.assert_allclose(corpus.entropy_bits, expected, rtol=1e-12)
    assert list(corpus.train["text"][:30]) != list(corpus.validation["text"])
    again = load_corpus("tinytown", seed=2, n_documents=300, validation_fraction=0.1)
    assert list(again.train["text"]) == list(corpus.train["text"])
    assert list(load_corpus("tinytown", n_documents=300).train["text"][:9]) != list(corpus.train["text"][:9])
    assert len(load_corpus("tinytown", n_documents=2).validation) == 1


def test_entropy_over_tokens_is_the_floor_that_the_town_states() -> None:
    class Bytes:
        vocab_size, eos_id = 257, 0

        def encode(self, text: str) -> list[int]:
            return [byte + 1 for byte in text.encode()]

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            return [self.encode(text) for text in texts]

    corpus = load_corpus("tinytown", n_documents=100, validation_fraction=0.5)
    stream = tokenize(corpus.validation, Bytes(), progress=False)
    documents = [corpus.town.parse(text) for text in corpus.validation["text"]]
    floor = corpus.entropy_bits.sum() / len(stream)
    assert floor == pytest.approx(entropy_per_token(documents, Bytes()), rel=1e-12)


@pytest.fixture
def repetitive(tmp_path) -> str:
    """200 documents, 100 texts: each text twice, once with white space at the end."""
    lines = [json.dumps({"text": f"text {i % 100}" + " " * (i // 100)}) for i in range(200)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    return f"files:{tmp_path}/r.jsonl"


def test_split_of_real_text_is_fixed_and_keeps_equal_texts_together(repetitive) -> None:
    corpus = load_corpus(repetitive, validation_fraction=0.1)
    train, validation = (
        [text.strip() for text in part["text"]] for part in (corpus.train, corpus.validation)
    )
    assert (len(train), len(validation)) == (180, 20)
    assert not set(train) & set(validation)
    assert len(set(train) | set(validation)) == 100
    assert corpus.entropy_bits is None and corpus.town is None and corpus.name == repetitive
    other_seed = load_corpus(repetitive, validation_fraction=0.1, seed=1)
    assert list(other_seed.validation["text"]) == list(corpus.validation["text"])
    larger = load_corpus(repetitive, validation_fraction=0.3)
    assert set(corpus.validation["text"]) < set(larger.validation["text"])
    assert len(load_corpus(repetitive, validation_fraction=1e-6).validation) == 2  # one text, twice
    assert len(set(map(str.strip, load_corpus(repetitive, validation_fraction=0.999).train["text"]))) == 1


def test_n_documents_takes_a_sample_of_real_text(repetitive) -> None:
    corpus = load_corpus(repetitive, n_documents=50)
    assert len(corpus.train) + len(corpus.validation) == 50
    numbers = [int(text.split()[1]) for text in corpus.train["text"]]
    assert max(numbers) > 50  # not the first 50 lines


def test_hub_corpus_from_a_folder(tmp_path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "train.jsonl").write_text(
        "\n".join(json.dumps({"text": f"row {i}"}) for i in range(30))
    )
    whole = load_corpus(f"hub:{tmp_path}/d")
    assert len(whole.train) + len(whole.validation) == 30
    part = load_corpus(f"hub:{tmp_path}/d", n_documents=5)
    assert sorted([*part.train["text"], *part.validation["text"]]) == [f"row {i}" for i in range(5)]
    with pytest.raises(ValueError, match="cannot open the data set.*'other'"):
        load_corpus(f"hub:{tmp_path}/d:other")


def test_python_docs_corpus(monkeypatch, all_docs) -> None:
    monkeypatch.setattr("llmcourse.data.sources.python_docs", lambda: all_docs)
    corpus = load_corpus("python-docs")
    assert len(corpus.train) + len(corpus.validation) == len(all_docs)
    assert not set(corpus.train["text"]) & set(corpus.validation["text"])


def test_load_corpus_refuses(tmp_path) -> None:
    for name in ("tinytwon", "files:", "hub:", "", "tinytown:3"):
        with pytest.raises(ValueError, match="unknown corpus .*choose one of tinytown, python-docs, files:"):
            load_corpus(name)
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(ValueError, match="1 distinct documents"):
        load_corpus(f"files:{tmp_path}/one.txt")
    with pytest.raises(ValueError, match="n_documents=1"):
        load_corpus("tinytown", n_documents=1)
    for fraction in (0, 1, -0.5):
        with pytest.raises(ValueError, match=f"validation_fraction={fraction}"):
            load_corpus("tinytown", validation_fraction=fraction)
