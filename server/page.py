"""The web page: a few files of the package, read once, served from memory.

The page is static and holds no secrets, so it needs no key; what it asks the API does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

from .page_files import PAGE_FILES

__all__ = ["page_router"]

FOLDER = Path(__file__).parent / "static"


def page_router() -> APIRouter:
    """One route for each file."""
    router = APIRouter(include_in_schema=False)
    for path, (name, media_type) in PAGE_FILES.items():
        router.get(path)(_sender((FOLDER / name).read_bytes(), media_type))
    return router


def _sender(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def send_file() -> Response:
        """A file of the page."""
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return send_file
