"""Which files the web page consists of. Apart from `page.py`: who asks only which paths are public
does not need the web framework."""

from __future__ import annotations

__all__ = ["PAGE_FILES"]

PAGE_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/static/api.js": ("api.js", "text/javascript; charset=utf-8"),
    "/static/style.css": ("style.css", "text/css; charset=utf-8"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}
"""Path → file and media type. Nothing else of the folder can be asked for."""
