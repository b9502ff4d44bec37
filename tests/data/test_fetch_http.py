"""http(s) images, only when allowed and within limits of time and size, from a server on this machine."""

import http.server
import io
import threading
import time

import pytest
from PIL import Image

from lmmr1_jax.data.faults import ImageFault
from lmmr1_jax.data.fetch import FetchPolicy
from lmmr1_jax.data.images import ImageFormat, load_image


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/none.png":
            return self.send_error(404)
        if self.path == "/away.png":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            return self.end_headers()
        self.send_response(200)
        self.end_headers()
        if self.path == "/a.png":
            made = io.BytesIO()
            Image.new("RGB", (56, 56), "red").save(made, "PNG")
            return self.wfile.write(made.getvalue())
        try:
            for _ in range(200):  # "/slow.png" drips, "/large.png" pours
                self.wfile.write(b"x" * (1 if self.path == "/slow.png" else 10_000))
                time.sleep(0.02 if self.path == "/slow.png" else 0)
        except OSError:
            pass

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.daemon_threads = True
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()
    served.server_close()


def test_an_image_is_fetched_when_allowed(server, tmp_path):
    policy = FetchPolicy(allow_http=True)
    image = load_image(f"{server}/a.png", tmp_path, policy, ImageFormat())
    assert (image.pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("name", ["none.png", "away.png", "slow.png", "large.png"])
def test_what_cannot_be_fetched_within_the_limits_is_missing(server, tmp_path, name):
    policy = FetchPolicy(allow_http=True, http_seconds=0.5, http_bytes=100_000)
    start = time.monotonic()
    with pytest.raises(ImageFault) as caught:
        load_image(f"{server}/{name}", tmp_path, policy, ImageFormat())
    assert caught.value.reason == "missing_image" and time.monotonic() - start < 3
