"""The page as a person meets it: each tab is opened, used and looked at."""

import json
import os
import time
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest

pytest.importorskip("selenium")
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By

from tests.page.steps import came, idle, open_page, photograph, press, resize, seen, sources, tab, text, type_in, until


@pytest.fixture(scope="module")
def page(driver, served):
    open_page(driver, served.url)
    return driver


def look(page):
    """Something is on the page, and nothing sticks out of it, on a wide and on a narrow one."""
    for width in (1280, 390):
        assert len(photograph(page, width).getcolors(1 << 24)) > 50, "the page is empty"
    resize(page, 390, 844)
    assert page.execute_script("return document.documentElement.scrollWidth") == 390
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def errors(page):
    severe = [line for line in page.get_log("browser") if line["level"] == "SEVERE"]
    return [line for line in severe if "No draw texture found" not in line["message"]]  # Gradio's, of a brushed picture


def test_the_page_opens_and_takes_everything_from_here(page, served):
    assert page.title == "advebm"
    names = [b.text.strip() for b in page.find_elements(By.CSS_SELECTOR, "button[role=tab]")]
    assert [n for n in names if n] == ["Draw", "Edit", "Explain", "Robustness", "Landscape", "Runs", "Toy"]
    asked = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    hosts = {urlparse(url).netloc for url in urls if urlparse(url).scheme.startswith(("http", "ws"))}
    assert hosts == {urlparse(served.url).netloc}


@pytest.mark.parametrize("width", [1280, 390])
def test_pictures_are_there_before_anything_is_pressed(page, width):
    resize(page, width, 844)
    tiles = page.find_elements(By.CSS_SELECTOR, "#samples img")
    assert [tile.get_attribute("alt") for tile in tiles] == [*map(str, range(10))] * 2
    assert min(tile.rect["width"] for tile in tiles) >= 96
    assert min(tile.rect["height"] for tile in tiles) >= 96
    right = max(tile.rect["x"] + tile.rect["width"] for tile in tiles)
    assert width - right == pytest.approx(min(tile.rect["x"] for tile in tiles), abs=30)  # over the full width
    assert page.find_element(By.ID, "draw").rect["y"] < tiles[0].rect["y"]
    assert not seen(page, "draw-stop")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_empty_is_shown(page):
    for name in ("Draw", "Edit", "Robustness", "Landscape", "Runs", "Toy"):
        tab(page, name)
        shown = [e for e in page.find_elements(By.CSS_SELECTOR, ".sight") if e.is_displayed()]
        assert all(e.find_elements(By.TAG_NAME, "img") for e in shown), name
        assert not [e for e in page.find_elements(By.CSS_SELECTOR, "[id$=-stop]") if e.is_displayed()]


def test_draw(page):
    tab(page, "Draw")
    before = sources(page, "samples")
    type_in(page, "how many", 3)
    press(page, "draw")
    until(lambda: "images in" in text(page, "sampled") and idle(page, "draw"))
    assert came(page, "samples", before).std() > 20
    look(page)


def test_stop(page):
    tab(page, "Draw")
    next(b for b in page.find_elements(By.CSS_SELECTOR, "button.label-wrap") if b.is_displayed()).click()
    time.sleep(0.5)
    type_in(page, "number input for steps K", 1000)
    press(page, "draw")
    until(lambda: "step" in text(page, "sampled"))
    assert not page.find_element(By.ID, "draw").is_enabled()
    press(page, "draw-stop")
    until(lambda: "stopped" in text(page, "sampled"), 5)
    until(lambda: idle(page, "draw"), 5)


def brush(page):
    """A stroke over the middle of the picture."""
    canvas = until(lambda: page.find_element(By.CSS_SELECTOR, "#canvas canvas"))
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", canvas)
    time.sleep(1)
    chain = ActionChains(page).move_to_element_with_offset(canvas, -30, -10).click_and_hold()
    for _ in range(6):
        chain = chain.move_by_offset(10, 4)
    chain.release().perform()
    time.sleep(1)


def test_edit(page):
    tab(page, "Edit")
    press(page, "edit")  # the picture is brushed over already
    first = came(page, "edited", [])
    assert first.std() > 20
    until(lambda: "nats" in text(page, "change") and idle(page, "edit"))
    look(page)


def test_an_edit_by_a_stroke_and_one_without(page):
    tab(page, "Edit")
    next(b for b in page.find_elements(By.CSS_SELECTOR, "button") if b.text.strip() == "Empty picture").click()
    time.sleep(1)
    press(page, "edit")
    until(lambda: "nothing is brushed over" in text(page, "change"))  # stays after the message has gone
    until(lambda: idle(page, "edit"))
    assert not page.find_elements(By.CSS_SELECTOR, "#edited .error")
    until(lambda: not page.find_elements(By.CSS_SELECTOR, ".toast-messages > *"))
    brush(page)
    before = sources(page, "edited")
    press(page, "edit")
    assert came(page, "edited", before).std() > 5
    until(lambda: "nats" in text(page, "change"))


def test_another_picture_takes_the_result_of_the_last_one_away(page):
    tab(page, "Edit")
    assert seen(page, "edited")
    type_in(page, "test image", 5)
    until(lambda: not seen(page, "edited"))
    assert not text(page, "change")


def test_explain(page):
    tab(page, "Explain")  # without pressing anything
    until(lambda: "The model takes the image for" in text(page, "explained"))
    until(lambda: seen(page, "way") and idle(page, "explain"))
    before = sources(page, "counterfactual")
    type_in(page, "number input for from the image", 0)
    came(page, "counterfactual", before)
    look(page)


def test_robustness(page):
    tab(page, "Robustness")
    before = sources(page, "attacked")
    press(page, "attack")
    assert came(page, "attacked", before).std() > 20
    until(lambda: "aken for" in text(page, "verdict"))
    assert "before any attack" not in text(page, "verdict")
    look(page)


def test_landscape(page):
    tab(page, "Landscape")
    before = sources(page, "slice")
    press(page, "measure")
    assert len(np.unique(came(page, "slice", before).reshape(-1, 3), axis=0)) > 50
    look(page)


def test_toy(page):
    tab(page, "Toy")
    before = sources(page, "plane")
    press(page, "train")
    assert len(np.unique(came(page, "plane", before).reshape(-1, 3), axis=0)) > 50
    until(lambda: "updates of" in text(page, "played"))
    look(page)


def test_runs(page):
    tab(page, "Runs")
    press(page, "report")
    frame = until(lambda: page.find_element(By.CSS_SELECTOR, "#shown iframe"))
    page.switch_to.frame(frame)
    until(lambda: page.find_element(By.TAG_NAME, "h1").text)
    page.switch_to.default_content()
    look(page)


def test_a_file_that_is_no_picture(page, tmp_path):
    tab(page, "Robustness")
    path = tmp_path / "picture.png"
    path.write_text("no picture")
    fields = page.find_elements(By.CSS_SELECTOR, "input[type=file]")
    field = next(f for f in fields if f.find_element(By.XPATH, "./..").is_displayed() or f.is_displayed())
    field.send_keys(str(path))
    until(lambda: "kind that is read" in page.find_element(By.TAG_NAME, "body").text)


def test_another_model(page):
    field = page.find_element(By.CSS_SELECTOR, "input[aria-label=model]")
    page.execute_script("window.scrollTo(0, 0)")
    before = page.find_element(By.CSS_SELECTOR, ".about").text
    until(lambda: not page.find_elements(By.CSS_SELECTOR, ".toast-messages > *"))  # of the test before, over the field
    field.click()
    options = until(lambda: page.find_elements(By.CSS_SELECTOR, "[role=option]"))
    options[-1].click()
    until(lambda: page.find_element(By.CSS_SELECTOR, ".about").text != before)
    assert "critic" in page.find_element(By.CSS_SELECTOR, ".about").text
    until(
        lambda: {tile.get_attribute("alt") for tile in page.find_elements(By.CSS_SELECTOR, "#samples img")} == {"image"}
    )
    tab(page, "Explain")
    until(lambda: "nothing to explain" in page.find_element(By.TAG_NAME, "body").text)
    assert not seen(page, "explain")
    for name, button, shown in (("Draw", "draw", "samples"), ("Robustness", "attack", "attacked")):
        tab(page, name)
        until(lambda button=button: idle(page, button))
        before = sources(page, shown)
        if name == "Draw":
            type_in(page, "number input for steps K", 7)
        press(page, button)
        assert came(page, shown, before).std() > 10
    assert "rises" in until(lambda: text(page, "verdict"))


def seconds_used(pid):
    """Of processor time, by the server."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_who_comes_second_waits_until_the_first_has_closed_the_page(page, served):
    """What was asked for on a closed page is not carried out: the server has no work left."""
    second = page.current_window_handle
    page.switch_to.new_window("tab")
    page.get(served.url)
    until(lambda: sources(page, "samples"))
    for name, button, label in (
        ("Toy", "train", "number input for updates"),
        ("Explain", "explain", "number input for steps"),
        ("Draw", "draw", "number input for steps K"),
    ):
        tab(page, name)
        until(lambda button=button: idle(page, button))
        next(b for b in page.find_elements(By.CSS_SELECTOR, "button.label-wrap") if b.is_displayed()).click()
        time.sleep(0.5)
        type_in(page, label, 2000)  # the most that is taken
        press(page, button)
    until(lambda: "step" in page.find_element(By.TAG_NAME, "body").get_attribute("textContent"))
    first = page.current_window_handle
    page.switch_to.window(second)
    open_page(page, served.url)
    press(page, "draw")
    until(lambda: "waiting" in text(page, "sampled"))
    page.switch_to.window(first)
    page.close()
    page.switch_to.window(second)
    before = seconds_used(served.pid)
    until(lambda: "images in" in text(page, "sampled"))
    until(lambda: (now := seconds_used(served.pid)) and (time.sleep(1) or seconds_used(served.pid) - now < 0.2), 20)
    print(f"{seconds_used(served.pid) - before:.1f} s of work after the page was closed")
    assert seconds_used(served.pid) - before < 4


def test_nothing_came_from_elsewhere(page, served):
    """After everything that was done on it."""
    asked = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    hosts = {urlparse(url).netloc for url in urls if urlparse(url).scheme.startswith(("http", "ws"))}
    assert hosts == {urlparse(served.url).netloc}


def test_nothing_went_wrong_in_the_browser(page):
    assert not errors(page)
