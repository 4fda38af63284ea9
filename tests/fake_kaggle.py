"""A stand-in for the Kaggle API on 127.0.0.1, to try uploads with the real client. Standard library only.

    with FakeKaggle() as kaggle:
        kaggle.fail("PUT", "reset", name="weights")
        subprocess.run(["kaggle", "datasets", "create", "-p", folder], env=kaggle.client_env(home))
        assert kaggle.datasets["me/my-bundle"] == [{"weights.bin": b"..."}]  # one dictionary for each version

An operation is a method of the API (the methods of FakeKaggle that are spelt like one), PUT (bytes of a file) or QUERY
(how many have arrived?). `fail` makes some calls of one go wrong. The kinds:

    an HTTP status   429 has a Retry-After; 503 for a PUT keeps half of the bytes
    reset            the connection is reset and nothing done; a PUT keeps half of the bytes
    lost             done, then the connection is reset instead of an answer
    refused          status 200 with an error text
    ignored          answered as if done, and not done: no new version, or a file that is in no version
    cut              PUT: the last byte gets lost on the way

Nothing is passed on: whatever is not meant for loopback gets 403 and is recorded as operation FOREIGN.
"""

import http.server
import json
import math
import os
import re
import socket
import socketserver
import struct
import threading
import urllib.parse
from dataclasses import dataclass, field

LOOPBACK = (None, "localhost", "127.0.0.1")  # no host: sent to us directly, not as to a proxy


@dataclass
class Fault:
    operation: str
    kind: int | str
    times: float
    skip: int
    name: str


@dataclass
class Upload:
    name: str
    size: int
    data: bytearray = field(default_factory=bytearray)
    fault: int | str | None = None


class ApiError(Exception):
    """Answered with this HTTP status."""


class FakeKaggle(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lock = threading.Lock()
        self.calls, self.faults, self.uploads = [], [], []
        self.datasets, self.kernels = {}, {}  # owner/slug -> versions: file name -> bytes, and what SaveKernel got
        self.dataset_status, self.kernel_status = ["READY"], ["QUEUED"]  # one for each question; the last one stays
        self.competitions = {"commonlitreadabilityprize"}
        self.page_size = 200
        self.absent = 403  # what Kaggle answers about a dataset that does not exist; 404 is seen too

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def client_env(self, home):
        """The whole environment of an unmodified client that can reach nothing but this server."""
        proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"), self.url)
        folders = dict.fromkeys(("HOME", "TMPDIR", "KAGGLE_CONFIG_DIR"), str(home))
        user = {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "dummy", "KAGGLE_API_ENVIRONMENT": "LOCALHOST"}
        return {"PATH": os.environ["PATH"], **folders, **user, **proxies}

    def fail(self, operation, kind, times=1, skip=0, name=""):
        """Let `skip` calls of the operation for names that contain `name` pass, then fail `times` (0: all) of them."""
        self.faults.append(Fault(operation, kind, times or math.inf, skip, name))

    def count(self, *operations):
        return sum(call["operation"] in operations for call in self.calls)

    def record(self, operation, name):
        """Note a call down; the kind of fault that it meets, or None."""
        kind = None
        for fault in self.faults:
            if fault.operation == operation and fault.name in name and fault.times > 0:
                fault.skip, due = fault.skip - 1, fault.skip <= 0
                fault.times -= due
                kind = fault.kind if due else kind
        self.calls.append({"operation": operation, "name": name, "fault": kind})
        return kind

    def versions(self, request):
        ref = f"{request['ownerSlug']}/{request['datasetSlug']}"
        if ref not in self.datasets:
            raise ApiError(self.absent)
        return self.datasets[ref]

    def add_version(self, versions, tokens):
        uploads = [self.uploads[int(token["token"])] for token in tokens]
        if not uploads or any(len(upload.data) != upload.size for upload in uploads):
            raise ApiError(400)
        kept = [upload for upload in uploads if upload.fault != "ignored"]
        versions.append({upload.name: bytes(upload.data[: -1 if upload.fault == "cut" else None]) for upload in kept})
        return {"status": "ok", "url": "https://www.kaggle.com/datasets/somewhere"}

    # The API: one method for each operation, from the JSON of the request to the JSON of the answer.

    def GetDatasetStatus(self, request):
        self.versions(request)
        return {"status": self.dataset_status.pop(0) if self.dataset_status[1:] else self.dataset_status[0]}

    def GetDataset(self, request):
        return {"currentVersionNumber": len(self.versions(request))}

    def ListDatasetFiles(self, request):
        files = list(self.versions(request)[request.get("datasetVersionNumber", 0) - 1].items())  # 0: the newest
        start = int(request.get("pageToken") or 0)
        end = start + min(self.page_size, request["pageSize"])
        page = [{"name": name, "totalBytes": len(data)} for name, data in files[start:end]]
        return {"datasetFiles": page, "nextPageToken": str(end) if end < len(files) else ""}

    def StartBlobUpload(self, request):
        self.uploads.append(Upload(request["name"], int(request.get("contentLength", 0))))
        number = str(len(self.uploads) - 1)
        return {"token": number, "createUrl": f"{self.url}/upload/{number}"}

    def CreateDataset(self, request):
        ref = f"{request['ownerSlug']}/{request['slug']}"
        if ref in self.datasets:
            return {"status": "error", "error": "The requested slug is already in use by a dataset."}
        answer = self.add_version(versions := [], request["files"])
        self.datasets[ref] = versions
        return answer

    def CreateDatasetVersion(self, request):
        return self.add_version(self.versions(request), request["body"]["files"])

    def SaveKernel(self, request):
        versions = self.kernels.setdefault(request["slug"], [])
        versions.append(request)
        dropped = {  # as Kaggle: a source that does not exist is left out, and only the answer says so
            "invalidDatasetSources": set(request.get("datasetDataSources", [])) - self.datasets.keys(),
            "invalidKernelSources": set(request.get("kernelDataSources", [])) - self.kernels.keys(),
            "invalidCompetitionSources": set(request.get("competitionDataSources", [])) - self.competitions,
        }
        answer = {"versionNumber": len(versions), "url": "https://www.kaggle.com/code/somewhere"}
        return answer | {key: sorted(sources) for key, sources in dropped.items()}

    def GetKernelSessionStatus(self, request):
        if f"{request['userName']}/{request['kernelSlug']}" not in self.kernels:
            raise ApiError(403)
        status = self.kernel_status.pop(0) if self.kernel_status[1:] else self.kernel_status[0]
        return {"status": status, **({"failureMessage": "a cell failed"} if status == "ERROR" else {})}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 60

    def log_message(self, *args):
        pass

    def serve(self):
        target = urllib.parse.urlsplit(self.path)
        if self.command == "CONNECT" or target.hostname not in LOOPBACK:
            self.server.record("FOREIGN", self.path)
            self.close_connection = True
            return self.answer(403, {"error": {"message": "only loopback is served"}})
        if self.command == "PUT":
            return self.serve_upload(self.server.uploads[int(target.path.rpartition("/")[2])])
        return self.serve_api(target.path.rpartition("/")[2], json.loads(b"".join(self.pieces()) or b"{}"))

    do_GET = do_POST = do_PUT = do_CONNECT = serve

    def serve_api(self, operation, request):
        name = next((request[key] for key in ("name", "slug", "datasetSlug", "kernelSlug") if key in request), "")
        with self.server.lock:
            kind = self.server.record(operation, name)
            if kind in ("reset", "refused") or isinstance(kind, int):
                return self.fail(kind)
            before = {ref: list(versions) for ref, versions in self.server.datasets.items()}
            try:
                status, answer = 200, getattr(self.server, operation)(request)
            except ApiError as error:
                return self.fail(error.args[0])
            if kind == "ignored":
                self.server.datasets = before
        self.hang_up() if kind == "lost" else self.answer(status, answer)

    def serve_upload(self, upload):
        span = self.headers.get("Content-Range", "")
        question = span.startswith("bytes */")
        kind = self.server.record("QUERY" if question else "PUT", upload.name)
        if not question:
            self.receive(upload, int(re.search(r"\d+", span)[0]) if span else 0, kind)
        if kind in ("reset", "lost") or isinstance(kind, int):
            return self.hang_up() if kind == "lost" else self.fail(kind)
        complete = len(upload.data) == upload.size
        so_far = {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data and not complete else {}
        return self.answer(200 if complete else 308, {}, so_far)

    def receive(self, upload, start, kind):
        """The bytes from `start` on; half of them where the connection is to break, none where it is refused."""
        del upload.data[start:]
        half = (start + upload.size) // 2
        for piece in self.pieces():
            upload.data += piece
            if kind == "reset" and len(upload.data) >= half:
                break
        if kind in ("reset", 503):
            del upload.data[half:]
        elif isinstance(kind, int):
            del upload.data[start:]
        upload.fault = kind

    def pieces(self):
        """The body of the request, which may come in chunks."""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left > 0 and (piece := self.rfile.read(min(left, 65536))):
            left -= len(piece)
            yield piece

    def fail(self, kind):
        if kind == "reset":
            return self.hang_up()
        if kind == "refused":
            return self.answer(200, {"status": "error", "error": "not allowed by the stand-in"})
        error = {"code": kind, "message": "made to fail", "status": "FAULT"}
        return self.answer(kind, {"error": error}, {"Retry-After": "0"} if kind == 429 else {})

    def answer(self, status, content, headers=()):
        data = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": len(data), **dict(headers)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        self.wfile.write(data)

    def hang_up(self):
        """Reset the connection: closed at once, with bytes still on the way."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.close(self.connection.detach())
