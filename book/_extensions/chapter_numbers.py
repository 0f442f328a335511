"""Sphinx extension: number the chapters as the curriculum does.

Sphinx numbers chapters by counting them, so chapter 04 would be 2 as long as it is the second page of the book.
Here a chapter's number is the number of the lab that `_toc.yml` lists under it (`labs/04_pretraining` makes the page
chapter 4). Its sections become 4.1, 4.2, ..., and figures, tables and equations follow: Fig. 4.1, (4.3).
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.environment.collectors.toctree import TocTreeCollector

LAB = re.compile(r"labs/(\d{2})_\w+")
Number = tuple[int, ...]


def chapter_numbers(toctree_includes: dict[str, list[str]]) -> dict[str, int]:
    """Number of each page that has a lab below it in the table of contents."""
    numbers = {}
    for page, below in toctree_includes.items():
        labs = [int(match[1]) for name in below if (match := LAB.fullmatch(name))]
        if labs:
            numbers[page] = labs[0]
    return numbers


def number_sections(entries: nodes.Element, prefix: Number, found: dict[str, Number]) -> None:
    """Write section numbers into a page's table of contents; `found` receives number by anchor."""
    for position, item in enumerate(child for child in entries if isinstance(child, nodes.list_item)):
        # The one entry of the outermost list is the page itself, which takes the chapter's number as it is.
        number = prefix if not found else (*prefix, position + 1)
        reference = next(iter(item[0].findall(nodes.reference)))
        reference["secnumber"] = found[reference["anchorname"]] = number
        for below in item[1:]:
            if isinstance(below, nodes.bullet_list):
                number_sections(below, number, found)


def assign_section_numbers(collector: TocTreeCollector, env: BuildEnvironment) -> list[str]:
    """Replacement for Sphinx's method of this name; returns the pages whose numbers changed."""
    before, env.toc_secnumbers = env.toc_secnumbers, {}
    for page, number in chapter_numbers(env.toctree_includes).items():
        found: dict[str, Number] = {}
        number_sections(env.tocs[page], (number,), found)
        env.toc_secnumbers[page] = found
        env.titles[page]["secnumber"] = (number,)
    return [page for page, numbers in env.toc_secnumbers.items() if before.get(page) != numbers]


def install(app: Sphinx) -> None:
    """Put our numbering in place after every extension had its turn."""
    TocTreeCollector.assign_section_numbers = assign_section_numbers


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx entry point."""
    app.connect("builder-inited", install, priority=900)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
