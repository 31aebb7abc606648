import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from advebm.training.loop import train
from tests.helpers import tiny


class Served(NamedTuple):
    url: str
    runs: list[str]
    log: Path
    pid: int


@contextlib.contextmanager
def serving(runs, folder):
    """``advebm app`` on runs in a process of its own, which works in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.txt"
    command = [sys.executable, "-m", "advebm", "app", *runs, "--port", str(port)]
    source = str(Path(__file__).parents[2] / "src")
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    with log.open("w") as file:
        options = {"cwd": folder, "env": {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path}}
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **options)
        try:
            begun = time.monotonic()
            while "ready" not in log.read_text():
                assert server.poll() is None, log.read_text()
                assert time.monotonic() - begun < 300, log.read_text()
                time.sleep(0.1)
            time.sleep(0.5)
            yield Served(f"http://127.0.0.1:{port}", runs, log, server.pid)
            assert server.poll() is None, "the server went down"
            assert "advebm/web" not in log.read_text(), log.read_text()  # Gradio's own complaints are its own
        finally:
            server.terminate()
            server.wait(30)


@pytest.fixture(scope="session")
def served(small_run, tmp_path_factory):
    """The page on a classifier and a critic."""
    pytest.importorskip("gradio")
    short = {"train__images": 1_000, "train__validate_with": 50, "objective__curriculum__steps": 2}
    critic = train(tiny("digits-binary-at", **short), tmp_path_factory.mktemp("page") / "critic", device="cpu")
    runs = [str(run.folder.resolve()) for run in (small_run, critic)]
    with serving(runs, tmp_path_factory.mktemp("log")) as page:
        yield page


@pytest.fixture(scope="session")
def driver():
    """Chromium without a screen."""
    pytest.importorskip("selenium")
    from selenium import webdriver

    browser, chromedriver = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
    if not browser or not chromedriver:
        pytest.skip("there is no Chromium with a driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1280,1400",
        "--hide-scrollbars",
        "--disable-dev-shm-usage",
    ):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield running
    running.quit()
