"""The page of `hf-xsam plot` in a real browser: on a phone and a desk, light and dark, by touch, mouse and keyboard."""

import json
import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from hf_xsam.cli.main import main
from hf_xsam.plotting.panels import number
from tests.runs_on_disk import trained_runs

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
LONG = "a_long_name_without_a_place_to_break_lr3e4_seed42_<b>bold & more"
PHONE, DESK = (360, 780), (1280, 900)

# The visible texts with their contrast to what is behind them (WCAG 2, 1.4.3) and their size in CSS pixels.
TEXTS = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).map((part) => {
    const x = part / 255;
    return x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (; element; element = element.parentElement) {
    const colour = getComputedStyle(element).backgroundColor;
    if (colour.startsWith("rgb(")) return colour;
  }
};
const contrast = (one, other) => {
  const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (light + 0.05) / (dark + 0.05);
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || !element.getClientRects().length) continue;
  const svg = element.closest("svg"), style = getComputedStyle(element);
  const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
  found.push([
    walker.currentNode.textContent.trim(),
    contrast(svg ? style.fill : style.color, behind(element)),
    scale * parseFloat(style.fontSize),
  ]);
}
const lines = [...document.querySelectorAll("svg [style*='--line']")].filter((line) => line.getClientRects().length);
const strokes = lines.map((line) => contrast(getComputedStyle(line).stroke, behind(line)));
return {texts: found, strokes: strokes, paper: luminance(behind(document.body))};
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    trained_runs(folder)
    shutil.copytree(folder / "xsam", folder / LONG)
    names = ("stock", "sam", "xsam", LONG)
    main(["plot", *(str(folder / name) for name in names), "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if missing:
        message = f"{' and '.join(missing)} not installed: apt-get install chromium chromium-driver"
        assert not os.environ.get("CI"), message
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def opened(driver, folder):
    """A function that opens the page at a size and in a colour scheme, and returns the browser."""

    def open_page(size=DESK, scheme="light", page=folder):
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get((page / "runs.html").as_uri())
        return driver

    return open_page


def chart(driver, title):
    """Return the figure of that title."""
    return driver.find_element(By.XPATH, f"//figure[.//h3[text()='{title}']]")


def values(figure):
    """Return the values that the chart shows below it, and at which x."""
    shown = [element.text for element in figure.find_elements(By.CSS_SELECTOR, ".value")]
    return figure.find_element(By.CSS_SELECTOR, ".x").text, shown


def losses(folder, name):
    history = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
    return [number(line["loss"]) for line in history if "loss" in line]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESK])
class TestEverywhere:
    def test_fits(self, opened, size, scheme):
        driver = opened(size, scheme)
        for details in driver.find_elements(By.TAG_NAME, "details"):
            driver.execute_script("arguments[0].open = true", details)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= size[0]
        boxes = [svg.rect for svg in driver.find_elements(By.CSS_SELECTOR, ".plot > svg")]
        assert len(boxes) == 11
        for box in boxes:
            assert box["width"] >= 300
            assert 0.6 < box["height"] / box["width"] < 0.75
            assert box["x"] + box["width"] <= size[0]
        for summary in driver.find_elements(By.TAG_NAME, "summary"):
            assert summary.rect["height"] >= 44

    def test_is_legible(self, opened, size, scheme):
        driver = opened(size, scheme)
        driver.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
        seen = driver.execute_script(TEXTS)
        assert len(seen["texts"]) > 200
        assert [text for text in seen["texts"] if text[1] < 4.5] == []
        assert [text for text in seen["texts"] if text[2] < 11.5] == []
        assert len(seen["strokes"]) > 20
        assert min(seen["strokes"]) >= 4.5
        assert (seen["paper"] < 0.02) if scheme == "dark" else (seen["paper"] > 0.85)


def test_asks_no_host_and_has_no_errors(opened, driver):
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    opened()
    messages = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
    requested = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len(requested) >= 1
    assert all(url.startswith(("file:", "data:")) for url in requested), requested
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("runs", [("stock", "sam"), ("stock", "sam", "xsam")])
@pytest.mark.parametrize("width", [800, 1100, 1280, 1600])
def test_charts_fill_their_rows(opened, folder, tmp_path, runs, width):
    main(["plot", *(str(folder / name) for name in runs), "--output", str(tmp_path)])
    driver = opened((width, 900), page=tmp_path)
    grids = driver.find_elements(By.CSS_SELECTOR, ".charts")
    assert len(grids) == 2
    for grid in grids:
        rows = {}
        for card in grid.find_elements(By.CSS_SELECTOR, ".card"):
            rows.setdefault(card.rect["y"], []).append(card.rect)
        for cards in rows.values():
            assert cards[-1]["x"] + cards[-1]["width"] == pytest.approx(grid.rect["x"] + grid.rect["width"], abs=1)
            assert len(cards) > 1 or width < 1168


def test_shows_settings_and_results(opened, folder):
    driver = opened()
    rows = driver.find_elements(By.CSS_SELECTOR, "section[aria-labelledby=settings] tbody tr")
    cells = {row.find_element(By.TAG_NAME, "th").text: row.find_elements(By.TAG_NAME, "td") for row in rows}
    assert [cell.text for cell in cells["Method"]] == ["stock Trainer", "SAM", "X-SAM", "X-SAM"]
    assert [cell.text for cell in cells["rho"]] == ["\N{EN DASH}", "0.01", "0.01", "0.01"]
    tested = json.loads((folder / "sam" / "all_results.json").read_text())["test_accuracy"]
    assert cells["Test accuracy"][1].text == number(tested)


def test_shows_the_numbers(opened, folder):
    driver = opened()
    figure = chart(driver, "Training loss")
    expected = [losses(folder, name) for name in ("stock", "sam", "xsam", LONG)]
    assert values(figure) == ("6", [column[-1] for column in expected])
    names = [label.text for label in figure.find_elements(By.CSS_SELECTOR, ".label")]
    assert names == ["stock", "sam", "xsam", LONG]
    figure.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    rows = figure.find_elements(By.CSS_SELECTOR, "tbody tr")
    cells = [[cell.text for cell in row.find_elements(By.CSS_SELECTOR, "th, td")] for row in rows]
    assert cells == [[str(step), *row] for step, row in enumerate(zip(*expected, strict=True), 1)]


def test_keyboard_reads_a_chart(opened, folder):
    driver = opened()
    ActionChains(driver).send_keys(2 * Keys.TAB).perform()  # the first is the table of settings, which may scroll
    plot = driver.switch_to.active_element
    figure = chart(driver, "Training loss")
    assert plot == figure.find_element(By.CSS_SELECTOR, ".plot")
    assert plot.aria_role == "slider"
    assert plot.value_of_css_property("outline-style") == "solid"
    first = losses(folder, "stock")
    for key, at in ((Keys.ARROW_LEFT, 4), (Keys.HOME, 0), (Keys.ARROW_LEFT, 0), (Keys.ARROW_RIGHT, 1), (Keys.END, 5)):
        ActionChains(driver).send_keys(key).perform()
        step, shown = values(figure)
        assert (step, shown[0], plot.get_attribute("aria-valuenow")) == (str(at + 1), first[at], str(at))
        assert plot.get_attribute("aria-valuetext").startswith(f"optimizer step {at + 1}: stock {first[at]}; sam ")
    assert figure.find_element(By.CSS_SELECTOR, ".cursor").is_displayed()
    assert "Training loss by optimizer step. stock: from " in plot.get_attribute("aria-label")


def test_pointer_reads_a_chart(opened, folder):
    driver = opened()
    figure = chart(driver, "Training loss")
    plot, cursor = (figure.find_element(By.CSS_SELECTOR, css) for css in (".plot", ".cursor"))
    axes = driver.execute_script("return arguments[0].querySelector('[id$=patch_2]').getBoundingClientRect()", plot)
    for share, step in ((0.05, 1), (0.5, 3), (0.95, 6)):
        x = axes["left"] + share * axes["width"] - (plot.rect["x"] + plot.rect["width"] / 2) - 1
        ActionChains(driver).move_to_element_with_offset(plot, int(x), 0).perform()
        assert values(figure)[0] == str(step)
        # matplotlib leaves a margin of 1/22 of the axes' width on either side of the first and the last point
        expected = axes["left"] + axes["width"] * (1 + (step - 1) / 5 * 20) / 22
        assert cursor.rect["x"] == pytest.approx(expected, abs=2)
        assert cursor.rect["height"] == pytest.approx(axes["height"], abs=2)


def test_a_curve_without_a_point_there_shows_its_last_one_before(opened, folder):
    driver = opened()
    figure = chart(driver, "Measured top eigenvalue of the Hessian")
    history = json.loads((folder / "xsam" / "trainer_state.json").read_text())["log_history"]
    measured = {line["step"]: number(line["sharpness/top_eigenvalue"]) for line in history if "sharpness/loss" in line}
    plot = figure.find_element(By.CSS_SELECTOR, ".plot")
    plot.send_keys(Keys.ARROW_LEFT)
    assert values(figure)[1][1] == f"{measured[3]} at 3"
    plot.send_keys(Keys.HOME)
    assert values(figure)[1][1] == "\N{EN DASH}"


def test_touch_reads_a_chart(opened):
    driver = opened(PHONE)
    figure = chart(driver, "Training loss")
    assert not figure.find_element(By.CSS_SELECTOR, ".cursor").is_displayed()
    plot = figure.find_element(By.CSS_SELECTOR, ".plot")
    driver.execute_script("arguments[0].scrollIntoView()", plot)
    box = driver.execute_script("return arguments[0].getBoundingClientRect()", plot)
    for share, step in ((0.15, "1"), (0.97, "6")):
        touch = {"x": box["x"] + share * box["width"], "y": box["y"] + box["height"] / 2}
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [touch]})
        driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        assert values(figure)[0] == step
    assert figure.find_element(By.CSS_SELECTOR, ".cursor").is_displayed()
