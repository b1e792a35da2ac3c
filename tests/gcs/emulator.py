"""An object store on this machine: gcp-storage-emulator, with what our libraries need and it lacks.

In: a port. Out: a server that answers as Google Cloud Storage does to gcsfs, TensorStore and Orbax.
Added are the generation of an object that is read, writes and deletions on the condition of a
generation (TensorStore's OCDBT driver relies on both), and the renaming of an object (gcsfs).

    python -m tests.gcs.emulator PORT
"""

import sys
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

BUCKET = "bucket"


def _generation(storage: Any, bucket: str, name: str) -> str:
    """The generation of an object; "0" where there is none, as in a condition."""
    try:
        return str(storage.get_file_obj(bucket, name)["generation"])
    except NotFound:
        return "0"


def _download(request: Any, response: Any, storage: Any, *arguments: Any) -> None:
    objects.download(request, response, storage, *arguments)
    where = request.params
    response["x-goog-generation"] = _generation(storage, where["bucket_name"], where["object_id"])


def _get(request: Any, response: Any, storage: Any, *arguments: Any) -> None:
    media = request.query.get("alt") == ["media"]
    (_download if media else objects.get)(request, response, storage, *arguments)


def _if_generation_matches(handler: Any) -> Any:
    """A handler that does nothing where the object is not of the generation that is asked for."""

    def handle(request: Any, response: Any, storage: Any, *arguments: Any) -> None:
        (wanted,) = request.query.get("ifGenerationMatch", [None])
        where = request.params
        name = where.get("object_id") or request.query.get("name", [None])[0]
        if name is None:
            name = request.data["meta"]["name"]
        if wanted not in (None, _generation(storage, where["bucket_name"], name)):
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": "conditionNotMet"}})
            return
        handler(request, response, storage, *arguments)

    return handle


def _move(request: Any, response: Any, storage: Any, *_: Any) -> None:
    where = request.params
    bucket, name, new = where["bucket_name"], where["object_id"], where["new_id"]
    try:
        moved = objects._copy(request.base_url, storage, bucket, name, bucket, new)
    except NotFound:
        response.status = HTTPStatus.NOT_FOUND
        return
    storage.delete_file(bucket, name)
    response.json(moved)


_REPLACED = {
    objects.download: _download,
    objects.get: _get,
    objects.insert: _if_generation_matches(objects.insert),
    objects.delete: _if_generation_matches(objects.delete),
}
_MOVE = (
    r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>[^/]+)/moveTo/o/(?P<new_id>[^/]+)$"
)


def make_server(port: int) -> server.Server:
    """A server with one empty bucket, in memory."""
    server.HANDLERS = (
        (_MOVE, {server.POST: _move}),
        *(
            (pattern, {verb: _REPLACED.get(handler, handler) for verb, handler in verbs.items()})
            for pattern, verbs in server.HANDLERS
        ),
    )
    return server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)


if __name__ == "__main__":
    make_server(int(sys.argv[1])).run()
