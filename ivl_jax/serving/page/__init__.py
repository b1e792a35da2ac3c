"""The page at `/`: a chat with the base alone and with value networks, side by side.

In: the files beside this one. Out: routes. The page asks nobody but this server, and its headers
let it run no other script.
"""

from collections.abc import Mapping, Sequence
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FILES = {
    "/": ("index.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
PATHS = tuple(_FILES)
"""Its paths; they need no key, which the page itself asks for."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors "
)
_HEADERS = {
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page_routes(*, framed_by: Sequence[str] = ()) -> list[Route]:
    """One route per file, which is read once.

    Args:
        framed_by: origins whose pages, such as a notebook, may show this one in a frame.
    """
    ancestors = " ".join(("'self'", *framed_by)) if framed_by else "'none'"
    headers = _HEADERS | {"content-security-policy": _POLICY + ancestors}
    return [_route(path, *file, headers) for path, file in _FILES.items()]


def _route(path: str, name: str, kind: str, headers: Mapping[str, str]) -> Route:
    content = resources.files("ivl_jax.serving.page").joinpath(name).read_bytes()

    async def show(request: Request) -> Response:
        del request
        return Response(content, media_type=kind, headers=headers)

    return Route(path, show, methods=["GET"])
