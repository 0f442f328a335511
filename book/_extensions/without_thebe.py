"""Sphinx extension: take sphinx-thebe out of the pages.

Jupyter Book always loads it, although this book has no in-page execution. It would name a script on another host in
every page, and it declares the same constant twice, which is an error in the browser's console.
"""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx


def disconnect(app: Sphinx) -> None:
    """Drop every event handler that sphinx-thebe has registered."""
    for listeners in app.events.listeners.values():
        for listener in list(listeners):
            if getattr(listener.handler, "__module__", "").startswith("sphinx_thebe"):
                app.disconnect(listener.id)


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx entry point."""
    app.connect("builder-inited", disconnect, priority=0)
    return {"version": "1.0", "parallel_read_safe": True, "parallel_write_safe": True}
