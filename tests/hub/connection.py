"""The hub's ports and connections: reads requests, lets faults happen, sends answers."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import sys
import termios
import time
import traceback
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from tests.hub.faults import Fault
from tests.hub.wire import Answer, Request, UploadCut, refuse

if TYPE_CHECKING:
    from tests.hub.server import Entry, FakeHub


class Server(ThreadingHTTPServer):
    """One port; it knows its connections, to end them with itself or by a reset."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], hub: FakeHub) -> None:
        self.hub = hub
        self.to_reset: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        super().__init__(address, Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        if request in self.to_reset:
            self.to_reset.discard(request)
            request.close()
        else:
            super().shutdown_request(request)

    def end_connections(self) -> None:
        for connection in self._open.copy():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *_: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.errors.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, lets faults happen, sends answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        fault = self.server.hub.consult(self.command, unquote(urlsplit(self.path).path))
        time.sleep(fault.wait)
        body = self._read_body(fault)
        request = Request(self.command, self.path, self.headers, body)  # type: ignore[arg-type]
        try:
            self._serve(request, fault)
        except UploadCut:
            self.server.hub.record(request, 0)
            self._end(reset=fault.reset)
        except ConnectionError:
            self.close_connection = True
        except Exception:
            self._end(reset=True)
            raise

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def _serve(self, request: Request, fault: Fault) -> None:
        hub = self.server.hub
        answer = None
        if fault.code is not None:
            answer = refuse(fault.code, fault.message)
            answer.headers.update(fault.headers)
        elif fault.effect or not fault.silent:
            answer = hub.answer(request)
        for _ in request.chunks:  # what nobody read stands between this request and the next
            pass
        if answer is None or fault.silent:
            hub.record(request, 0)
            self._end(reset=fault.reset)
        else:
            self._send(request, answer, fault)

    def _send(self, request: Request, answer: Answer, fault: Fault) -> None:
        with_body = request.method != "HEAD"
        length = max(0, answer.length - fault.shorten_by) if with_body else answer.length
        entry = self.server.hub.record(request, answer.code)
        self.send_response(answer.code)
        for name, value in {**answer.headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            limit = length if fault.send_at_most is None else min(length, fault.send_at_most)
            flip_at = None if fault.flip_at is None else fault.flip_at % max(1, length)
            self._send_body(entry, answer, limit, flip_at)
        if fault.send_at_most is not None:
            self._end(reset=fault.reset)

    def _send_body(self, entry: Entry, answer: Answer, length: int, flip_at: int | None) -> None:
        """Sends `length` bytes in pieces, from memory or from the file by the kernel, and counts them."""
        source = answer.body.source
        with source.open("rb") if isinstance(source, Path) else contextlib.nullcontext(source) as data:
            done = 0
            while done < length:
                count = min(self.server.hub.throttle.piece, length - done)
                self.server.hub.throttle.take(count)
                self.server.hub.count(entry, answer.file, count)
                start = answer.start + done
                if flip_at is not None and done <= flip_at < done + count:
                    self.wfile.write(_flipped(data, start, count, flip_at - done))
                elif isinstance(data, bytes):
                    self.wfile.write(memoryview(data)[start : start + count])
                else:
                    self._send_file(data.fileno(), start, count)
                done += count

    def _send_file(self, file: int, start: int, count: int) -> None:
        while count:
            sent = os.sendfile(self.connection.fileno(), file, start, count)
            if not sent:
                raise ConnectionError("the file became shorter")
            start, count = start + sent, count - sent

    def _read_body(self, fault: Fault) -> Iterator[bytes]:
        """The request's body in pieces, whichever way it is framed, as far as the fault lets it come."""
        left = fault.read_at_most
        for piece in self._read_chunks() if "Transfer-Encoding" in self.headers else self._read_counted():
            self.server.hub.throttle.take(len(piece))
            if left is not None and len(piece) >= left:
                raise UploadCut
            left = left if left is None else left - len(piece)
            yield piece
        if left is not None:
            raise UploadCut

    def _read_counted(self) -> Iterator[bytes]:
        yield from self._read_exactly(int(self.headers.get("Content-Length", 0)))

    def _read_chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            yield from self._read_exactly(size)
            self.rfile.readline()
        self.rfile.readline()

    def _read_exactly(self, left: int) -> Iterator[bytes]:
        while left:
            piece = self.rfile.read(min(left, self.server.hub.throttle.piece, 1 << 20))
            if not piece:
                raise ConnectionError("the client left")
            left -= len(piece)
            yield piece

    def _end(self, *, reset: bool) -> None:
        """Ends the connection, by a reset only once the client has what was sent to it."""
        self.close_connection = True
        if not reset:
            return
        give_up = time.monotonic() + 5
        while _unsent(self.connection) and time.monotonic() < give_up:
            time.sleep(0.001)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.to_reset.add(self.connection)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing: `FakeHub.requests` has it all."""


def _unsent(connection: socket.socket) -> int:
    """Bytes that the other side has not acknowledged."""
    found = fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4)
    return int(struct.unpack("i", found)[0])


def _flipped(data: Any, start: int, count: int, at: int) -> bytes:
    """A piece of a file or of bytes with one byte changed."""
    in_memory = isinstance(data, bytes)
    piece = bytearray(data[start : start + count] if in_memory else os.pread(data.fileno(), count, start))
    piece[at] ^= 0xFF
    return bytes(piece)
