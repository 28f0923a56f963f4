"""Which files the web page consists of. Apart from `page.py`: who asks only which paths are public
does not need the web framework."""

from __future__ import annotations

__all__ = ["PAGE_FILES"]

MODULES = (
    "api",
    "app",
    "blocks",
    "card",
    "chart",
    "curves",
    "dashboard",
    "dom",
    "metrics",
    "pane",
    "playground",
    "settings",
    "tokens",
)
"""The page's program, by feature; `app` is where it begins."""

SHEETS = ("dashboard", "playground", "style", "views")

PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    **{f"/static/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8") for name in MODULES},
    **{f"/static/{name}.css": (f"{name}.css", "text/css; charset=utf-8") for name in SHEETS},
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path → file and media type. Nothing else of the folder can be asked for."""
