"""The same funnel as a `datatrove` pipeline: how the steps of this chapter run on a cluster.

datatrove (Penedo et al. 2024) made FineWeb. A pipeline is a list of blocks through which documents flow; an executor
runs the list once for each task, and each task reads its share of the input files. Here the list runs on this machine,
with `LocalPipelineExecutor`; on a cluster the same lists go to `SlurmPipelineExecutor`, which submits each stage as
a job array and makes each stage wait for the one before::

    from datatrove.executor import SlurmPipelineExecutor
    from llmcourse.data.datatrove_pipeline import DatatroveSettings, stages

    previous = None
    for stage in stages("s3://bucket/pages", "s3://bucket/clean", DatatroveSettings(tasks=2000)):
        previous = SlurmPipelineExecutor(
            pipeline=stage.blocks, tasks=stage.tasks, job_name=stage.name, depends=previous,
            time="12:00:00", partition="cpu", mem_per_cpu_gb=4, logging_dir=f"s3://bucket/logs/{stage.name}",
        )
    previous.run()  # submits all, in order

Four things differ from `preparation`: the text is what datatrove's own Trafilatura block gives, its masks are addresses
that look real (and telephone numbers stay), its near-duplicates are drawn with other permutations, and decontamination
(`NGramsDecontFilter`) needs a download, so it is left out. Two blocks would need one as well and are replaced:
fastText's language weights by `language.identify`, and spaCy's word tokenizer by one that splits at white space.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcourse.data.filtering import FilterSettings, RuleFilter
from llmcourse.data.language import LanguageSettings, keep_language
from llmcourse.data.minhash import MinHashSettings

_SENTENCE = re.compile(r"\S.*?(?:[.!?]+[\"'”’)]*(?=\s|$)|$)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class DatatroveSettings:
    """What the pipeline does.

    Raises:
        ValueError: fewer than 1 task or worker.
    """

    text_key: str = "html"
    """column of the input that holds the page, or the text if `extract` is off"""
    extract: bool = True
    """take the main text out of HTML first"""
    min_chars: int = 25
    """characters below which trafilatura distrusts its result"""
    language: str = "en"
    """what to keep"""
    language_threshold: float = 0.5
    """least probability of it"""
    rules: FilterSettings | None = None
    """our rules with these bounds; None: datatrove's filters with the published bounds of Gopher, C4 and FineWeb"""
    near: MinHashSettings = field(default_factory=MinHashSettings)
    """shingles, bands and rows; the seed is datatrove's"""
    tasks: int = 2
    """shares of the work; at most the number of input files is useful"""
    workers: int = 1
    """tasks that run at the same time on this machine; 1 runs them in this process"""

    def __post_init__(self) -> None:
        for name in ("tasks", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Stage:
    """One job: a list of blocks and the number of tasks that run it."""

    name: str
    blocks: list[Any]
    tasks: int


def require_datatrove() -> None:
    """Check that the optional library is there.

    Raises:
        ValueError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec("datatrove") is None:
        raise ValueError("datatrove is not installed: run `pip install datatrove`")


def stages(source: str | Path, folder: str | Path, settings: DatatroveSettings | None = None) -> list[Stage]:
    """The jobs of the funnel, in order: document steps, and the four stages of MinHash.

    Args:
        source: folder of Parquet files with the column `settings.text_key`, such as `write_shards` writes.
        folder: where everything goes; the result lies in its folder "clean", as Parquet files with a column "text".
        settings: what to do.

    Raises:
        ValueError: datatrove is not installed.
    """
    require_datatrove()
    settings = settings or DatatroveSettings()
    source, folder = str(source), str(folder)
    tokenizer = _tokenizer()
    return [
        Stage("documents", _document_blocks(source, folder, settings, tokenizer), settings.tasks),
        *_minhash_stages(folder, settings, tokenizer),
    ]


def run_locally(
    source: str | Path, folder: str | Path, settings: DatatroveSettings | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Run all stages on this machine, one after another.

    Stages that are complete according to their logs in `folder` are not run again, so that an interrupted run goes on
    where it stopped.

    Args:
        source: as for `stages`.
        folder: as for `stages`.
        settings: what to do.

    Returns:
        For each stage that ran, a row of datatrove's counts for each block: "name", and numbers such as "total",
        "forwarded" and "dropped", of all its tasks together.

    Raises:
        ValueError: datatrove is not installed, or the source folder holds no Parquet file.
    """
    settings = settings or DatatroveSettings()
    jobs = stages(source, folder, settings)
    if not list(Path(source).rglob("*.parquet")):
        raise ValueError(f"{source} holds no Parquet file: write the pages with write_shards first")
    from datatrove.executor import LocalPipelineExecutor

    counts = {}
    for job in jobs:
        executor = LocalPipelineExecutor(
            job.blocks,
            tasks=job.tasks,
            workers=settings.workers,
            logging_dir=str(Path(folder) / "logs" / job.name),
        )
        done = executor.run()
        counts[job.name] = [] if done is None else [_row(block) for block in done.stats]
    return counts


def _row(block: Any) -> dict[str, Any]:
    return {"name": block.name} | {name: metric.total for name, metric in block.stats.items()}


def _tokenizer() -> Any:
    """Words between white space, sentences by their ends; passed to blocks where others name a language."""
    return _tokenizer_class()()


@functools.cache
def _tokenizer_class() -> type:
    """Made here because its base is datatrove's, and that import is optional."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class WhiteSpaceTokenizer(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return [text[start:end] for start, end in self.span_tokenize(text)]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [match.span() for match in _SENTENCE.finditer(text)]

        def __reduce__(self) -> tuple[Any, tuple[()]]:  # executors pickle their blocks
            return _tokenizer, ()

    return WhiteSpaceTokenizer


def _document_blocks(source: str, folder: str, settings: DatatroveSettings, tokenizer: Any) -> list[Any]:
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter

    wanted = functools.partial(
        _is_wanted_language, language=settings.language, threshold=settings.language_threshold
    )
    return [
        ParquetReader(source, text_key=settings.text_key, glob_pattern="**/*.parquet"),
        *([_extractor(settings)] if settings.extract else []),
        FTFYFormatter(uncurl_quotes=False, normalization=None, fix_line_breaks=False),
        LambdaFilter(wanted),
        *_filters(settings, tokenizer),
        PIIFormatter(only_remove_public_ips=False),
        ParquetWriter(f"{folder}/documents"),
    ]


def _extractor(settings: DatatroveSettings) -> Any:
    from datatrove.pipeline.extractors import Trafilatura
    from trafilatura.settings import use_config

    config = use_config()
    config.set("DEFAULT", "MIN_EXTRACTED_SIZE", str(settings.min_chars))
    return Trafilatura(favour_precision=False, deduplicate=False, timeout=10, config=config)


def _filters(settings: DatatroveSettings, tokenizer: Any) -> list[Any]:
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LambdaFilter,
    )

    if settings.rules is not None:
        return [LambdaFilter(functools.partial(_passes_rules, settings=settings.rules))]
    return [
        GopherRepetitionFilter(language=tokenizer),
        GopherQualityFilter(language=tokenizer),
        C4QualityFilter(filter_no_terminal_punct=False, language=tokenizer),  # as FineWeb has it
        FineWebQualityFilter(language=tokenizer),
    ]


def _is_wanted_language(document: Any, language: str, threshold: float) -> bool:
    return keep_language([document.text], language, threshold, settings=LanguageSettings()).kept[0]


def _passes_rules(document: Any, settings: FilterSettings) -> bool:
    return not _rule_filter(settings)(document.text).violations


@functools.cache
def _rule_filter(settings: FilterSettings) -> RuleFilter:
    """Made in the process that uses it: settings can be pickled, prepared rules cannot."""
    return RuleFilter(settings)


def _minhash_stages(folder: str, settings: DatatroveSettings, tokenizer: Any) -> list[Stage]:
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.hashing import HashConfig

    near = settings.near
    config = MinhashConfig(
        n_grams=near.shingle_words,
        num_buckets=near.bands,
        hashes_per_bucket=near.rows,
        hash_config=HashConfig(
            hash_fc="sha1", precision=64
        ),  # its xxHash passes text where xxhash 4 asks for bytes
    )

    # read twice, by the first stage and the last, which must see the same files in the same order
    def reader() -> Any:
        return ParquetReader(f"{folder}/documents")

    signatures, buckets, remove = (f"{folder}/minhash/{name}" for name in ("signatures", "buckets", "remove"))
    return [
        Stage(
            "signatures",
            [reader(), MinhashDedupSignature(signatures, config, language=tokenizer)],
            settings.tasks,
        ),
        Stage("buckets", [MinhashDedupBuckets(signatures, buckets, config=config)], near.bands),
        Stage("clusters", [MinhashDedupCluster(buckets, remove, config=config)], 1),
        Stage(
            "filter", [reader(), MinhashDedupFilter(remove), ParquetWriter(f"{folder}/clean")], settings.tasks
        ),
    ]
