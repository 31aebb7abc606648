"""The pictures of docs/page.md: ``ADVEBM_PICTURES=docs/pictures make test-page`` makes them again.

They show the CIFAR-10 model that comes with the package.
"""

import os
from pathlib import Path

import pytest

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By

from tests.page.conftest import serving
from tests.page.steps import idle, open_page, photograph, press, tab, text, until

MODEL = "cifar10-at-2h"
PICTURES = os.environ.get("ADVEBM_PICTURES")


@pytest.fixture(scope="module")
def page(driver, tmp_path_factory):
    if not PICTURES:
        pytest.skip("ADVEBM_PICTURES names no folder to keep the pictures in")
    with serving([MODEL], tmp_path_factory.mktemp("pictures")) as served:
        open_page(driver, served.url)
        until(lambda: idle(driver, "draw"))
        yield driver
        driver.get("about:blank")


def keep(picture, name):
    folder = Path(PICTURES)
    folder.mkdir(parents=True, exist_ok=True)
    picture.quantize(250).save(folder / f"page-{name}.png", optimize=True)


@pytest.mark.parametrize(
    ("name", "button"),
    [
        ("Draw", None),
        ("Edit", "edit"),
        ("Explain", None),
        ("Robustness", "attack"),
        ("Landscape", "measure"),
        ("Runs", None),
        ("Toy", "train"),
    ],
)
def test_a_tab(page, name, button):
    tab(page, name)
    if button:
        press(page, button)
        until(lambda: not idle(page, button))
        until(lambda: idle(page, button))
    if name == "Explain":
        until(lambda: "The model takes" in text(page, "explained"))
    keep(photograph(page), name.lower())


def test_a_phone(page):
    tab(page, "Draw")
    picture = photograph(page, 390, 844)
    keep(picture.crop((0, 0, 390, 1100)), "phone")
    assert page.find_elements(By.ID, "draw")
