"""A bucket of Google Cloud Storage on this machine, in memory: as much of its JSON API as gcsfs and tensorstore speak.

Generations and their preconditions are kept: tensorstore builds atomic writes on them. No credentials are asked for.
"""

from __future__ import annotations

import email
import json
import re
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
_OBJECT = re.compile(
    rf"/(?:download/)?storage/v1/b/{BUCKET}/o/([^/]+)(?:/(moveTo|copyTo|rewriteTo)(?:/b/{BUCKET})?/o/([^/]+))?"
)


class Bucket:
    """Objects by name, each as `(generation, content)`."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.lock = threading.Lock()
        self._generation = 0
        self._held = ""
        self._reached, self._dropped = threading.Event(), threading.Event()

    @contextmanager
    def hold(self, text: str) -> Iterator[threading.Event]:
        """Writes of names that hold `text` wait to the end of the block, and are then dropped. The event: one came."""
        self._held, self._reached, self._dropped = text, threading.Event(), threading.Event()
        try:
            yield self._reached
        finally:
            self._held = ""
            self._dropped.set()

    def receive(self, request: str) -> None:
        """Raises ConnectionError for what is held."""
        dropped = self._dropped
        if self._held and self._held in request:
            self._reached.set()
            dropped.wait()
            raise ConnectionAbortedError

    def put(self, name: str, content: bytes) -> dict[str, Any]:
        self._generation += 1
        self.objects[name] = (self._generation, content)
        return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        generation, content = self.objects[name]
        at = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": BUCKET,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "timeCreated": at,
            "updated": at,
            "contentType": "application/octet-stream",
        }

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or name < query.get("startOffset", ""):
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def unmet(self, name: str, query: dict[str, str]) -> int | None:
        """The status that a precondition which does not hold asks for."""
        generation = self.objects.get(name, (0, b""))[0]
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return 412
        return 304 if query.get("ifGenerationNotMatch") == str(generation) and generation else None


@contextmanager
def gcs_server() -> Iterator[tuple[str, Bucket]]:
    """The address of a server of an empty bucket named "bucket", and the bucket."""
    bucket = Bucket()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", bucket
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients are killed
            super().handle_error(*args)


class _Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.command in ("POST", "PUT"):
            self.bucket.receive(unquote(self.path) + content[:1000].decode(errors="replace"))
        with self.bucket.lock:
            status, headers, body = self._answer(self.command, self.path, content)
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _answer(self, method: str, target: str, content: bytes) -> tuple[int, dict[str, str], bytes]:
        url = urlsplit(target)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        if url.path.startswith("/batch/"):
            return self._batch(content)
        if url.path.startswith("/upload/"):
            return self._upload(query, content)
        if url.path == f"/storage/v1/b/{BUCKET}":
            return _json(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET, "location": "US"})
        if url.path in (f"/storage/v1/b/{BUCKET}/o", f"/storage/v1/b/{BUCKET}/o/"):
            return _json(200, self.bucket.list(query))
        match = _OBJECT.fullmatch(url.path)
        if match is None:
            return _json(404, {"error": {"code": 404, "message": f"{url.path} not found"}})
        name, verb, target = unquote(match[1]), match[2], unquote(match[3] or "")
        if name not in self.bucket.objects:
            return _json(404, {"error": {"code": 404, "message": f"{name} not found"}})
        if (status := self.bucket.unmet(name, query)) is not None:
            return status, {}, b""
        if verb:
            resource = self.bucket.put(target, self.bucket.objects[name][1])
            if verb == "moveTo":
                del self.bucket.objects[name]
            return _json(200, {"done": True, "resource": resource} if verb == "rewriteTo" else resource)
        if method == "DELETE":
            del self.bucket.objects[name]
            return 204, {}, b""
        if query.get("alt") != "media":
            return _json(200, self.bucket.describe(name))
        generation, whole = self.bucket.objects[name]
        headers = {"x-goog-generation": str(generation), "Content-Type": "application/octet-stream"}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, headers, whole
        first, last = wanted.groups()
        start = int(first) if first else max(len(whole) - int(last), 0)
        stop = min(int(last) + 1, len(whole)) if first and last else len(whole)
        if start >= len(whole):
            return 416, headers, b""
        return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(whole)}"}, whole[start:stop]

    def _upload(self, query: dict[str, str], content: bytes) -> tuple[int, dict[str, str], bytes]:
        kind = query["uploadType"]
        if kind == "multipart":
            described, media = _parts(self.headers["Content-Type"], content)
            return _json(200, self.bucket.put(json.loads(described)["name"], media))
        if kind == "media":
            if (status := self.bucket.unmet(query["name"], query)) is not None:
                return status, {}, b""
            return _json(200, self.bucket.put(query["name"], content))
        upload = query.get("upload_id")
        if upload is None:
            name = query.get("name") or json.loads(content)["name"]
            upload = uuid.uuid4().hex
            self.bucket.uploads[upload] = (name, bytearray())
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/{BUCKET}/o"
            return 200, {"Location": f"{place}?uploadType=resumable&upload_id={upload}"}, b""
        name, so_far = self.bucket.uploads[upload]
        so_far += content
        if self.headers.get("Content-Range", "").endswith("/*"):
            return 308, {"Range": f"bytes=0-{len(so_far) - 1}"}, b""
        return _json(200, self.bucket.put(name, bytes(self.bucket.uploads.pop(upload)[1])))

    def _batch(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
        answers = []
        for part in _parts(self.headers["Content-Type"], content):
            method, target, _ = part.decode().split(None, 2)
            status, _, body = self._answer(method, target, b"")
            answers.append(
                b"--batch\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 %d .\r\n"
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s\r\n" % (status, len(body), body)
            )
        return 200, {"Content-Type": 'multipart/mixed; boundary="batch"'}, b"".join(answers) + b"--batch--\r\n"


def _parts(kind: str, content: bytes) -> list[bytes]:
    message = email.message_from_bytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + content)
    return [part.get_payload(decode=True) for part in message.get_payload()]  # type: ignore[union-attr]


def _json(status: int, content: Any) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()
