"""Serve the page: which requests are answered, and from which files."""

import contextlib
import logging
import os
import socket
import tempfile
import threading
import time
from asyncio import CancelledError
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advebm.core.errors import UserError
from advebm.evaluation.compare import by_title
from advebm.runs.run import Run
from advebm.web import sampling
from advebm.web.inputs import MAX_FILE_BYTES
from advebm.web.jobs import Job, Stopped
from advebm.web.studio import Studio

if TYPE_CHECKING:
    from fastapi import FastAPI

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAMES = ("127.0.0.1", "localhost", "[::1]", "[")  # as in URLs; "[": older versions of Starlette cut at the first colon
BODY = 2 * MAX_FILE_BYTES  # limit of a request
WAITING = 32  # limit of jobs in the queue
PATIENCE = 30  # seconds that the first pictures may take before the page is served
AT_ONCE = 4  # limit of running jobs of one kind; searches on one model still take turns

# Browsers let the page load from, submit to and be framed by this server only.
HEADERS = {
    "content-security-policy": (
        "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
        "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'; form-action 'self'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with "no-referrer" some browsers hide the origin of a request
}


def open_studios(runs: Sequence[Run], *, checkpoint: str = "latest", device: str = "cpu") -> dict[str, Studio]:
    """Load runs by title, and draw the pictures that the page opens with, unless that takes too long."""
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("a run is named twice; name each once")
    studios = {}
    for title, run in by_title(runs).items():
        if not run.checkpoints.latest():
            raise UserError(f"{run.folder} has no checkpoint yet; train it first: advebm train --resume {run.folder}")
        studios[title] = Studio(title, run, checkpoint=checkpoint, device=device)
    job = Job()
    timer = threading.Timer(PATIENCE, job.stop)
    timer.start()
    try:
        sampling.sample_first(next(iter(studios.values())), job)
    except Stopped:  # they are drawn when the page is opened
        pass
    finally:
        timer.cancel()
    return studios


def application(studios: Mapping[str, Studio], folder: Path, *, hosts: Sequence[str] = NAMES) -> "FastAPI":
    """Return the page as an ASGI application.

    Args:
        studios: loaded runs by title.
        folder: folder of the page's own files, uploads and pictures; no other files are served.
        hosts: accepted ``Host`` names, against DNS rebinding by other sites; ``*`` accepts all.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
        from fastapi import FastAPI
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise UserError("the page needs Gradio: pip install 'advebm[app]'") from None
    from advebm.web.page import CSS, THEME, Page

    blocks = Page(studios, folder).build()
    blocks.queue(default_concurrency_limit=AT_ONCE, max_size=WAITING, api_open=False)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard)
    if "*" not in hosts:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    options: dict[str, Any] = {"theme": THEME, "css": CSS, "footer_links": []}
    options["app_kwargs"] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    options["blocked_paths"] = [str(studio.run.folder.resolve()) for studio in studios.values()]
    options |= {"allowed_paths": [], "max_file_size": MAX_FILE_BYTES, "show_error": False, "ssr_mode": False}
    mounted = gradio.mount_gradio_app(app, blocks, path="/", **options)
    blocks.has_launched = True  # otherwise Gradio does not check that files given by name were uploaded
    return mounted


class Guard:
    """ASGI middleware that adds :data:`HEADERS` to every response and refuses some requests.

    Refused are requests of other origins, except GET and HEAD, with status 403, and requests that are larger than
    :data:`BODY` or do not state their size, with status 413.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(event: Any) -> None:
            if event["type"] == "http.response.start":
                names = {name.lower() for name, _ in event["headers"]}
                missing = [(k.encode(), v.encode()) for k, v in HEADERS.items() if k.encode() not in names]
                event = {**event, "headers": [*event["headers"], *missing]}
            await send(event)

        headers = {name.lower(): value for name, value in scope.get("headers", ())}
        origin = headers.get(b"origin")
        same_origin = origin is None or origin.rpartition(b"//")[2].lower() == headers.get(b"host", b"").lower()
        size = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not size.isdigit() or int(size) > BODY:
            await refuse(send_with_headers, 413, f"a request of at most {BODY / 1e6:.0f} MB is taken")
        elif not same_origin and scope.get("method") not in ("GET", "HEAD"):
            await refuse(send_with_headers, 403, "asked for by another page")
        else:
            await self.app(scope, receive, send_with_headers)


async def refuse(send: Any, status: int, text: str) -> None:
    """Respond with a status and a line of text."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": text.encode()})


def address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_free(host: str, port: int) -> None:
    """Raise UserError if an address is in use, not permitted, or not of this machine."""
    if not 0 < port < 65536:
        raise UserError(f"a port is a number from 1 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except PermissionError:
        raise UserError(f"port {port} is not for everyone; choose one above 1023 with --port") from None
    except socket.gaierror:
        what = f"there is no host {host!r}"
        raise UserError(f"{what}; --host takes an address of this machine, such as 127.0.0.1") from None
    except OSError as error:
        what = f"port {port} on {host} cannot be had ({error.strerror})"
        raise UserError(f"{what}; another server may have it: choose another with --port") from None


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """Provide a folder for uploads and pictures that is removed with the server."""
    with tempfile.TemporaryDirectory(prefix="advebm-page-", ignore_cleanup_errors=True) as name:
        yield Path(name).resolve()


def serve(runs: Sequence[Run], *, host: str, port: int, checkpoint: str, device: str, say: Any) -> None:
    """Serve the page until Ctrl-C."""
    check_free(host, port)
    start = time.perf_counter()
    try:
        import uvicorn
    except ImportError:
        raise UserError("the page needs Gradio: pip install 'advebm[app]'") from None
    studios = open_studios(runs, checkpoint=checkpoint, device=device)
    with own_folder() as folder:
        app = application(studios, folder, hosts=NAMES if host in LOOPBACK else ("*",))
        if host not in LOOPBACK:
            say(f"everyone who reaches {host} can use the page")
        logging.getLogger("uvicorn.error").addFilter(lambda r: not (r.exc_info and r.exc_info[0] is CancelledError))
        say(f"{address(host, port)}  ready after {time.perf_counter() - start:.1f} s; Ctrl-C ends it")
        uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=2)
