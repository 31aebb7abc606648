"""What a person does on the page, and sees."""

import base64
import io
import time

import numpy as np
from PIL import Image
from selenium.common.exceptions import (
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

PATIENCE = 120


def until(true, seconds=PATIENCE):
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        try:
            if found := true():
                return found
        except (ElementNotInteractableException, NoSuchElementException, StaleElementReferenceException):
            pass
        time.sleep(0.1)
    raise AssertionError("it did not come")


def open_page(driver, url):
    """Opens the page and waits for its first pictures."""
    driver.get(url)
    until(lambda: sources(driver, "samples"))
    time.sleep(0.5)


def tab(page, name):
    """Opens a tab, which on a narrow page may be in the menu behind the dots."""
    page.execute_script("window.scrollTo(0, 0)")

    def click():
        for places in ("button[role=tab]", ".overflow-dropdown button"):
            for button in page.find_elements(By.CSS_SELECTOR, places):
                if button.text.strip() == name and button.is_displayed():
                    button.click()
                    return True
        page.find_element(By.CSS_SELECTOR, ".overflow-menu > button").click()
        return False

    until(click)
    time.sleep(0.5)


def press(page, element):
    button = until(lambda: page.find_element(By.ID, element))
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()


def seen(page, element):
    """Whether it is there and shown."""
    return any(e.is_displayed() for e in page.find_elements(By.ID, element))


def idle(page, element):
    """Whether a button can be pressed, and the one that stops its work is gone."""
    return page.find_element(By.ID, element).is_enabled() and not seen(page, f"{element}-stop")


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


def type_in(page, label, value):
    """Into the visible field that a label names."""
    fields = page.find_elements(By.CSS_SELECTOR, f"input[aria-label^='{label}']")
    field = next(f for f in fields if f.is_displayed())
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(str(value), Keys.TAB)


def resize(page, width, height):
    settings = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", settings)
    time.sleep(0.5)


def photograph(page, width=1280, height=900):
    """The whole page at a width, without what is empty below."""
    resize(page, width, height)
    resize(page, width, max(height, page.execute_script("return document.documentElement.scrollHeight")))
    page.execute_script("window.scrollTo(0, 0)")
    shot = Image.open(io.BytesIO(page.get_screenshot_as_png())).convert("RGB")
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    filled = (np.asarray(shot) != np.asarray(shot)[-1, 0]).any((1, 2)).nonzero()[0]
    return shot.crop((0, 0, shot.width, min(shot.height, int(filled.max(initial=0)) + 24)))
