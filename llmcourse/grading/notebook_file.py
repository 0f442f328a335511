"""A handed-in file as a list of cells. Every byte of it is somebody else's: nothing is taken for granted.

nbformat is not used: its validation follows the file's own structure wherever that leads. What can be understood is
understood (other encodings, older formats, cells without ids); the rest is one line that says what is wrong.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcourse.grading.verdicts import Finding

MAX_BYTES = 20_000_000
MAX_CELLS = 5000
MAX_ID = 200
CELL_TYPES = ("code", "markdown", "raw")
MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Malformed(ValueError):
    """The file cannot be read as a notebook of the assignment; the message is one line for the student."""


@dataclass(frozen=True)
class StudentCell:
    """A cell as it was handed in.

    Attributes:
        type: "code", "markdown" or "raw".
        source: its text; half characters (lone surrogates) are replaced.
        cell_id, grade_id: "" where there is none.
        nbgrader: nbgrader's metadata as they are, `None` where there are none.
        outputs: stored outputs, and attachments: for people, never for points.
    """

    type: str
    source: str
    cell_id: str = ""
    grade_id: str = ""
    nbgrader: Any = None
    outputs: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Submitted:
    """A handed-in notebook: its cells, the course's entry in its metadata, and what was odd about the file."""

    cells: tuple[StudentCell, ...]
    course: Any
    findings: tuple[Finding, ...] = field(default=())


def read_notebook(data: bytes) -> Submitted:
    """The notebook of a file's bytes.

    Raises:
        Malformed: it is too large, no JSON, nested too deeply, or no notebook.
    """
    if len(data) > MAX_BYTES:
        size = f"{len(data) / 1e6:.0f} MB"
        raise Malformed(
            f"the file has {size}, more than {MAX_BYTES / 1e6:.0f}: clear the outputs and hand it in again"
        )
    if not data.strip():
        raise Malformed("the file is empty")
    text, findings = _decoded(data)
    try:
        content = json.loads(text)
    except RecursionError:
        raise Malformed("the file is no notebook: its JSON is nested too deeply") from None
    except ValueError as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise Malformed(f"the file is no notebook: it is not JSON{where}") from None
    if not isinstance(content, dict):
        raise Malformed(f"the file is no notebook: its JSON is a {_kind(content)}")
    raw_cells, older = _raw_cells(content)
    if older:
        findings.append(
            Finding("FORMAT_CONVERTED", f"the notebook has format {content.get('nbformat')}, an old one")
        )
    if len(raw_cells) > MAX_CELLS:
        raise Malformed(f"the notebook has {len(raw_cells)} cells, more than {MAX_CELLS}")
    cells = tuple(_cells(raw_cells, older, findings))
    metadata = content.get("metadata")
    return Submitted(
        cells, metadata.get("llmcourse") if isinstance(metadata, dict) else None, tuple(findings)
    )


def _decoded(data: bytes) -> tuple[str, list[Finding]]:
    findings = []
    encoding = "utf-8-sig"
    if data.startswith(MARKS) or (len(data) > 3 and 0 in data[:4]):
        encoding = json.detect_encoding(data)
    if encoding.replace("-", "")[:5] != "utf8s" or data.startswith(codecs.BOM_UTF8):
        findings.append(Finding("ENCODING", f"the file is encoded as {encoding.upper()}, not as UTF-8"))
    try:
        return data.decode(encoding), findings
    except UnicodeDecodeError:
        findings.append(Finding("ENCODING", "bytes that are not UTF-8 were replaced"))
        return data.decode(encoding, errors="replace"), findings


def _raw_cells(content: Mapping[str, Any]) -> tuple[list[Any], bool]:
    """The list of cells, and whether it is in the old layout."""
    version = content.get("nbformat", 4)
    if isinstance(version, bool) or not isinstance(version, int) or not 2 <= version <= 4:
        raise Malformed(f"the file is no notebook of format 4: it says {_short(version)}")
    if version == 4 or "cells" in content:
        if not isinstance(content.get("cells"), list):
            raise Malformed("the file is no notebook: it has no list of cells")
        return content["cells"], False
    sheets = content.get("worksheets")
    if not isinstance(sheets, list):
        raise Malformed("the file is no notebook: it has no list of cells")
    lists = [
        sheet["cells"] for sheet in sheets if isinstance(sheet, dict) and isinstance(sheet.get("cells"), list)
    ]
    return [cell for cells in lists for cell in cells], True


def _cells(raw_cells: list[Any], older: bool, findings: list[Finding]) -> Iterator[StudentCell]:
    replaced = 0
    for number, raw in enumerate(raw_cells, 1):
        cell = _cell(raw, older)
        if cell is None:
            findings.append(Finding("CELL_IGNORED", f"cell {number} is no cell and was left out"))
            continue
        clean = _whole_characters(cell.source)
        replaced += clean != cell.source
        yield cell if clean == cell.source else StudentCell(**{**vars(cell), "source": clean})
    if replaced:
        findings.append(
            Finding("ENCODING", f"half characters (lone surrogates) were replaced in {replaced} cells")
        )


def _cell(raw: Any, older: bool) -> StudentCell | None:
    if not isinstance(raw, dict):
        return None
    source = raw.get("input", raw.get("source", "")) if older else raw.get("source", "")
    if isinstance(source, list) and all(isinstance(line, str) for line in source):
        source = "".join(source)
    if not isinstance(source, str):
        return None
    kind = raw.get("cell_type")
    if kind not in CELL_TYPES:
        kind = "markdown" if older and kind == "heading" else "raw"
    metadata = raw.get("metadata")
    nbgrader = metadata.get("nbgrader") if isinstance(metadata, dict) else None
    grade_id = nbgrader.get("grade_id") if isinstance(nbgrader, dict) else None
    outputs = raw.get("outputs")
    kept = [item for item in outputs if isinstance(item, dict)] if isinstance(outputs, list) else []
    attachments = raw.get("attachments")
    if isinstance(attachments, dict):
        kept += [
            {"output_type": "display_data", "data": one}
            for one in attachments.values()
            if isinstance(one, dict)
        ]
    return StudentCell(kind, source, _id(raw.get("id")), _id(grade_id), nbgrader, tuple(kept))


def _whole_characters(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _id(value: Any) -> str:
    return _whole_characters(value) if isinstance(value, str) and len(value) <= MAX_ID else ""


def _kind(value: Any) -> str:
    return {list: "list", str: "text", bool: "truth value", type(None): "null"}.get(type(value), "number")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value) if isinstance(value, int | float) else _kind(value)
    return repr(_whole_characters(text)[:20])
