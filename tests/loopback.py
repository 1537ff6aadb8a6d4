"""A server on this machine that sends files as well or badly as a test wants."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def whole(content: bytes, over: threading.Event):
    yield content


def slowly(content: bytes, over: threading.Event):
    size = len(content) // 12
    for start in range(0, len(content), size):
        yield content[start : start + size]
        over.wait(0.3)


def half_then_silence(content: bytes, over: threading.Event):
    yield content[: len(content) // 2]
    over.wait(60)


class Server(ThreadingHTTPServer):
    """how(content, over) sends files[name] in pieces."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {}
        self.how = whole
        self.asked = []
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        self.server.asked.append(name)
        if name not in self.server.files:
            return self.send_error(404)
        content = self.server.files[name]
        try:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for piece in self.server.how(content, self.server.over):
                self.wfile.write(piece)
        except OSError:  # whoever asked has gone
            pass

    def log_message(self, *_):
        pass
