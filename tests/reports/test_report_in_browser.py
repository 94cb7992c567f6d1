"""The report in a real browser, which the extra `browser` and an installed Chromium provide."""

import shutil
import threading

import pytest

from cap_pretrain import reports
from cap_pretrain.reports import server
from tests.reports import made

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="the extra `browser` is not installed")
    names = ("chromium", "chromium-headless-shell", "google-chrome", "chromium-browser")
    found = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found)
        except api.Error:
            pytest.skip("there is no Chromium; `playwright install chromium` gets one")
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, request):
    """Returns a function that opens a page and fails the test for what it logs or requests."""
    troubles, contexts = [], []

    def open_page(url, width=1280, scheme="light"):
        size = {"width": width, "height": 900}
        contexts.append(chromium.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append("a dialog") or dialog.dismiss())
        page.on("request", lambda r: r.url.startswith(("data:", url)) or troubles.append(r.url))
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """Returns a function that writes the page of runs whose data is hostile; its URL."""
    folder = tmp_path_factory.mktemp("browser")
    runs = [made.workdir(folder / str(k), made.HOSTILE, optim__lr=10.0**-k) for k in range(2)]

    def write(count):
        path = folder / f"{count}.html"
        path.write_text(reports.render(runs[:count]))
        return path.as_uri()

    return write


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("runs", [1, 2])
def test_the_page_fits_and_answers_the_pointer(runs, width, scheme, opened, page_of):
    page = opened(page_of(runs), width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    chart = page.locator(".chart svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + box["height"] / 2)
    tip = page.locator(".tip:visible").inner_text()
    last = made.lines()[-2]["train/loss"]
    assert "step 300" in tip and f"{last:.5g}" in tip
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(255, 255, 255)") == (scheme == "light")


def test_zoom_by_pointer_and_values_by_keyboard(opened, page_of):
    page = opened(page_of(1))
    chart = page.locator(".chart svg").first
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    whole = chart.inner_html()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.5, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, middle)
    page.mouse.up()
    assert page.locator("button.reset").is_enabled()
    assert chart.inner_html() != whole
    chart.focus()
    page.keyboard.press("Escape")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    said = page.locator("[aria-live]").first.text_content()
    assert "step 2" in said and f"{made.lines()[1]['train/loss']:.5g}" in said
    page.get_by_label("logarithmic loss").check()
    page.get_by_label("across").select_option("examples")
    chart.focus()
    page.keyboard.press("End")
    assert "4,000" in page.locator("[aria-live]").first.text_content()


def test_a_served_page_refreshes_while_the_run_goes_on(opened, tmp_path):
    folder = made.workdir(tmp_path / "run")
    serving = server.server(lambda: reports.render(folder, live=1), 0)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    try:
        page = opened(f"http://127.0.0.1:{serving.server_address[1]}/")
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 400, "train/loss": 0.123456}\n')
        page.get_by_text("0.1235").first.wait_for(timeout=10_000)
    finally:
        serving.shutdown()
        serving.server_close()
