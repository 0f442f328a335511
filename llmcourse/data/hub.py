"""Data sets of the Hugging Face Hub, or a folder laid out like one, in the course's three columns."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets import Dataset, IterableDataset

PROBE_SECONDS = 5.0
OFFLINE = "without network use tinytown, python-docs or files:PATH"


def hub(
    name: str,
    split: str = "train",
    config: str | None = None,
    streaming: bool = False,
    column: str = "text",
    license: str | None = None,
) -> Dataset | IterableDataset:
    """Open a data set through `datasets.load_dataset`.

    The Hub is asked for a sign of life first, so that without network this fails within seconds. What was
    downloaded before can be used offline by setting the environment variable HF_HUB_OFFLINE=1.

    Args:
        name: "owner/name" on the Hub, or a local folder with data files (Parquet, JSON lines, CSV, text).
        split: which part, or a slice of it such as "train[:1%]".
        config: which configuration, for data sets that have several.
        streaming: read rows as they are asked for instead of downloading everything first.
        column: the column that holds the text.
        license: what to write into the license column; None takes what the data set declares, else "unknown".

    Returns:
        Columns text, source ("hub:owner/name", "folder:name") and license: a `Dataset`, memory-mapped, or an
        `IterableDataset` when streaming.

    Raises:
        ValueError: the Hub cannot be reached, or there is no such data set, configuration, split or column.
    """
    local = Path(name).is_dir()
    if not local and not huggingface_hub.constants.HF_HUB_OFFLINE:
        _require_network(name)
    try:
        data = datasets.load_dataset(name, config, split=split, streaming=streaming)
        columns = list(data.column_names or next(iter(data)))
    # the library raises its own, the network client's, and built-in errors, with no common base
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        advice = "" if local else f"; check the name, the configuration and the split; {OFFLINE}"
        raise ValueError(f"cannot open the data set {name!r}: {reason.rstrip('.')}{advice}") from error
    if column not in columns:
        raise ValueError(f"{name!r} has no column {column!r}: choose one of {', '.join(columns)}")
    source = f"folder:{Path(name).name}" if local else f"hub:{name}"
    return _three_columns(data, column, source, license or data.info.license or "unknown")


def _three_columns(data: Any, column: str, source: str, license: str) -> Dataset | IterableDataset:
    texts = data.select_columns([column])
    if column != "text":
        texts = texts.rename_column(column, "text")
    if isinstance(texts, IterableDataset):
        return texts.map(lambda row: row | {"source": source, "license": license})
    # labels go beside the memory-mapped texts, which are not copied
    labels = Dataset.from_dict({"source": [source] * len(texts), "license": [license] * len(texts)})
    return datasets.concatenate_datasets([texts, labels], axis=1)


def _require_network(name: str) -> None:
    """Fail within seconds when the Hub does not answer.

    The question goes through the Hub's own client, proxies and certificates included. It runs in a thread
    because looking up a host name can block for longer than any time-out given to the client.
    """
    problems: list[str] = ["no answer"]

    def ask() -> None:
        try:
            session = huggingface_hub.utils.get_session()
            session.head(huggingface_hub.constants.ENDPOINT, timeout=PROBE_SECONDS)
            problems.clear()
        except Exception as error:  # whatever the client raises means the same here
            problems[:] = [type(error).__name__]

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * PROBE_SECONDS)
    if problems:
        raise ValueError(f"cannot reach the Hub for {name!r} ({problems[0]}): {OFFLINE}")
