"""The page as a person meets it: each tab is opened, used and looked at.

ADVEBM_PICTURES names a folder for pictures of it.
"""

import base64
import io
import json
import os
import time
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("selenium")
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PATIENCE = 120


@pytest.fixture(scope="module")
def page(driver, served):
    driver.get(served.url)
    until(lambda: driver.find_elements(By.ID, "draw"))
    return driver


def until(true, seconds=PATIENCE):
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        try:
            if found := true():
                return found
        except (NoSuchElementException, StaleElementReferenceException):
            pass
        time.sleep(0.1)
    raise AssertionError("it did not come")


def tab(page, name):
    button = next(b for b in page.find_elements(By.CSS_SELECTOR, "button[role=tab]") if b.text.strip() == name)
    page.execute_script("window.scrollTo(0, 0)")
    button.click()
    time.sleep(0.5)


def press(page, element):
    button = until(lambda: page.find_element(By.ID, element))
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()


def sources(page, element):
    return [i.get_attribute("src") for i in page.find_elements(By.CSS_SELECTOR, f"#{element} img")]


def came(page, element, before):
    """Waits for a picture that was not there before, and returns its pixels."""
    until(lambda: (now := sources(page, element)) and now != before)
    return pixels(page, element)


def pixels(page, element):
    """Of the picture itself, as it was served."""
    script = """
    const done = arguments[1], image = document.querySelector('#' + arguments[0] + ' img');
    fetch(image.src).then(r => r.blob()).then(b => {
      const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(b);
    });"""
    data = page.execute_async_script(script, element)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB"))


def text(page, element):
    return page.find_element(By.ID, element).text


def look(page, name):
    """A picture of the tab: something is on it; kept where that is asked for."""
    page.execute_script("window.scrollTo(0, 0)")
    ActionChains(page).move_by_offset(0, 0).perform()
    time.sleep(0.7)
    shot = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")
    low = max(y for y in range(0, shot.height, 4) if len(shot.crop((0, y, 1240, y + 1)).getcolors(4096) or [0, 0]) > 1)
    shot = shot.crop((0, 0, 1262, min(shot.height, low + 24)))
    assert len(shot.getcolors(1 << 24)) > 50, "the page is empty"
    if folder := os.environ.get("ADVEBM_PICTURES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shot.quantize(250).save(Path(folder) / f"page-{name}.png", optimize=True)


def errors(page):
    return [line for line in page.get_log("browser") if line["level"] == "SEVERE"]


def test_the_page_opens_and_takes_everything_from_here(page, served):
    assert page.title == "advebm"
    names = [b.text.strip() for b in page.find_elements(By.CSS_SELECTOR, "button[role=tab]")]
    assert [n for n in names if n] == ["Sample", "Edit", "Explain", "Robustness", "Landscape", "Toy", "Runs"]
    asked = [json.loads(line["message"])["message"] for line in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    hosts = {urlparse(url).netloc for url in urls if urlparse(url).scheme.startswith(("http", "ws"))}
    assert hosts == {urlparse(served.url).netloc}


def test_sample(page):
    tab(page, "Sample")
    before = sources(page, "samples")
    press(page, "draw")
    until(lambda: "images in" in text(page, "sampled"))
    seen = came(page, "samples", before)
    assert seen.shape[1] > 400
    assert seen.std() > 20
    look(page, "sample")


def test_stop(page):
    tab(page, "Sample")
    field = page.find_element(By.CSS_SELECTOR, "input[aria-label^='number input for K']")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("200", Keys.TAB)
    count = "input[aria-label^='number input for images']"
    if not page.find_elements(By.CSS_SELECTOR, count) or not page.find_element(By.CSS_SELECTOR, count).is_displayed():
        next(b for b in page.find_elements(By.CSS_SELECTOR, "button") if b.text.strip().startswith("more")).click()
        time.sleep(0.5)
    field = page.find_element(By.CSS_SELECTOR, count)
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("100", Keys.TAB)
    press(page, "draw")
    until(lambda: "step" in text(page, "sampled"))
    next(b for b in page.find_elements(By.CSS_SELECTOR, "button") if b.text == "Stop" and b.is_displayed()).click()
    until(lambda: "stopped" in text(page, "sampled"), 5)


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


def type_in(page, label, value):
    """Into the visible field of a slider."""
    field = next(f for f in page.find_elements(By.CSS_SELECTOR, f"input[aria-label^='{label}']") if f.is_displayed())
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value), Keys.TAB)


def test_edit(page):
    tab(page, "Edit")
    press(page, "edit")
    until(lambda: "nothing is brushed over" in text(page, "change"))  # stays after the message has gone
    assert not page.find_elements(By.CSS_SELECTOR, "#edited .error")
    brush(page)
    type_in(page, "number input for steps", 200)
    before = sources(page, "edited")
    press(page, "edit")
    assert came(page, "edited", before).std() > 20
    until(lambda: "nats" in text(page, "change"))
    until(lambda: not page.find_elements(By.CSS_SELECTOR, ".toast-messages > *"))
    look(page, "edit")


def test_explain(page):
    tab(page, "Explain")
    press(page, "explain")
    until(lambda: "probability" in text(page, "explained"))
    look(page, "explain")


def test_robustness(page):
    tab(page, "Robustness")
    before = sources(page, "attacked")
    press(page, "attack")
    assert came(page, "attacked", before).std() > 20
    until(lambda: "taken for" in text(page, "verdict"))
    look(page, "robustness")


def test_landscape(page):
    tab(page, "Landscape")
    before = sources(page, "slice")
    press(page, "measure")
    assert len(np.unique(came(page, "slice", before).reshape(-1, 3), axis=0)) > 50
    look(page, "landscape")


def test_toy(page):
    tab(page, "Toy")
    before = sources(page, "plane")
    press(page, "train")
    assert len(np.unique(came(page, "plane", before).reshape(-1, 3), axis=0)) > 50
    until(lambda: "updates of" in text(page, "played"))
    look(page, "toy")


def test_runs(page):
    tab(page, "Runs")
    press(page, "report")
    frame = until(lambda: page.find_element(By.CSS_SELECTOR, "#shown iframe"))
    page.switch_to.frame(frame)
    until(lambda: page.find_element(By.TAG_NAME, "h1").text)
    page.switch_to.default_content()
    look(page, "runs")


def test_a_file_that_is_no_picture(page, tmp_path):
    tab(page, "Robustness")
    path = tmp_path / "picture.png"
    path.write_text("no picture")
    fields = page.find_elements(By.CSS_SELECTOR, "input[type=file]")
    field = next(f for f in fields if f.find_element(By.XPATH, "./..").is_displayed() or f.is_displayed())
    field.send_keys(str(path))
    until(lambda: "can be read" in page.find_element(By.TAG_NAME, "body").text)


def test_another_model(page, served):
    if len(served.folders) < 2:
        pytest.skip("one model")
    field = page.find_element(By.CSS_SELECTOR, "input[aria-label=model]")
    page.execute_script("window.scrollTo(0, 0)")
    before = page.find_element(By.CSS_SELECTOR, ".about").text
    until(lambda: not page.find_elements(By.CSS_SELECTOR, ".toast-messages > *"))  # of the test before, over the field
    field.click()
    options = until(lambda: page.find_elements(By.CSS_SELECTOR, "[role=option]"))
    options[-1].click()
    until(lambda: page.find_element(By.CSS_SELECTOR, ".about").text != before)
    assert "critic" in page.find_element(By.CSS_SELECTOR, ".about").text
    assert not sources(page, "samples")  # what another model made is gone
    tab(page, "Explain")
    until(lambda: "nothing to explain" in page.find_element(By.TAG_NAME, "body").text)
    assert page.find_element(By.ID, "explain").get_attribute("disabled")
    for name, button, seen in (("Sample", "draw", "samples"), ("Robustness", "attack", "attacked")):
        tab(page, name)
        before = sources(page, seen)
        press(page, button)
        assert came(page, seen, before).std() > 10
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
    until(lambda: page.find_elements(By.ID, "draw"))
    for name, button, label in (
        ("Toy", "train", "number input for updates"),
        ("Explain", "explain", "number input for steps"),
        ("Sample", "draw", "number input for K"),
    ):
        tab(page, name)
        type_in(page, label, 2000)  # the most that is taken
        press(page, button)
    until(lambda: "step" in page.find_element(By.TAG_NAME, "body").get_attribute("textContent"))
    first = page.current_window_handle
    page.switch_to.window(second)
    page.get(served.url)
    until(lambda: page.find_elements(By.ID, "draw"))
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
