"""Charts of a task's metrics and of the server's load, and the API reference with the site's theme and navigation."""

from datetime import UTC, datetime, timedelta

import pytest

from doubles.browser import accessibility_violations
from doubles.deployment import Deployment, wait_until
from doubles.stored_tasks import StoredTasks
from sandbox.model.events import Metrics, Usage

GIB = 1024**3


@pytest.fixture(scope="module")
def server_url(tmp_path_factory):
    deployment = Deployment(tmp_path_factory.mktemp("charts"))
    tasks = StoredTasks(deployment.data_dir)
    tasks.current_time = datetime.now(UTC) - timedelta(hours=1)
    recorder = tasks.add_running_task("sampled", lines=0)
    for at in range(20):
        tasks.current_time += timedelta(seconds=60 if at == 10 else 5)
        cpu = 50.0 + at if at else None
        recorder.record(Metrics(cpu, 2 * GIB, memory_total_bytes=8 * GIB, disk_used_bytes=at, disk_total_bytes=100))
    recorder.record(Usage("claude", 3000, 400, 500, 0, cost_usd=0.25))
    tasks.current_time += timedelta(seconds=1)
    recorder.record(Usage("claude", 1000, 100, cost_usd=0.5))
    tasks.complete(recorder)
    tasks.add_completed_task("unsampled", lines=0)
    tasks.index()
    deployment.model_url = "http://127.0.0.1:9"  # not used
    deployment.start_server()
    yield deployment.server.ready_message["http"]
    deployment.close()


@pytest.fixture
def base_url(server_url, browser):
    """The server's URL. After the test, the fixture fails on console errors or requests to other hosts."""
    yield server_url
    browser.assert_no_errors(server_url)


def chart(page, name):
    return page.locator(".chart", has=page.get_by_role("heading", name=name))


def test_charts_show_axes_and_units_and_values_and_gaps(base_url, browser):
    page = browser.open(f"{base_url}/tasks/sampled#metrics")
    cpu = chart(page, "CPU, % of one CPU")
    cpu.locator("path.stroke").first.wait_for()
    # The task has 4 CPUs. Samples on both sides of the gap are not connected.
    assert cpu.locator(".chart-foot").inner_text() == "peak 69 % of 400 %; 19 samples"
    assert (cpu.locator("path.stroke").count(), cpu.locator("rect.no-data").count()) == (2, 1)
    assert cpu.locator("rect.no-data title").text_content() == "No samples for 1 min"
    assert cpu.locator("text").all_text_contents()[:4] == ["0 %", "50 %", "100 %", "0 s"]
    svg = cpu.locator("svg")
    assert svg.get_attribute("aria-label") == "CPU, % of one CPU: peak 69 % of 400 %; 19 samples"
    svg.hover(position={"x": 60, "y": 60})
    assert cpu.locator(".chart-value").inner_text().startswith("51 % at ")
    page.mouse.move(0, 0)
    assert cpu.locator(".chart-value").inner_text() == "69 %"

    assert chart(page, "Memory").locator(".chart-foot").inner_text() == "peak 2.0 GiB of 8.0 GiB; 20 samples"
    assert chart(page, "Cost").locator(".chart-foot").inner_text() == "total $0.7500"
    assert chart(page, "Input tokens per request").locator(".chart-foot").inner_text() == "peak 3,500; 2 requests"
    # Nothing was refused.
    assert chart(page, "Refused connections").count() == 0
    assert accessibility_violations(page) == []


def test_missing_metrics_are_reported(base_url, browser):
    page = browser.open(f"{base_url}/tasks/unsampled#metrics")
    page.get_by_text("No metrics were recorded.").wait_for()
    assert page.locator(".chart").count() == 0


def test_ticks_are_round_numbers(base_url, browser):
    page = browser.open(f"{base_url}/server")
    ticks = """async ([peak, base, isWhole]) => (await import("/assets/chart.js")).valueTicks(peak, base, isWhole)"""
    for arguments, expected in {
        (100, 10, False): [0, 50, 100],
        (7, 10, True): [0, 5, 10],
        (1, 10, True): [0, 1],
        (0, 10, False): [0, 1],
        (0.02, 10, False): [0, 0.01, 0.02],
        (3 * GIB, 2, False): [0, GIB, 2 * GIB, 3 * GIB],
    }.items():
        assert page.evaluate(ticks, list(arguments)) == pytest.approx(expected), arguments


def test_server_load_chart_survives_a_refresh(base_url, browser):
    page = browser.open(f"{base_url}/server")
    memory = chart(page, "Memory of the host")
    memory.locator("text").first.wait_for()
    assert "sample" in memory.locator(".chart-foot").inner_text()
    page.evaluate("document.getElementById('load').dataset.mark = 'same'")
    requests = len(browser.requests_to("/server"))
    page.evaluate("window.htmx.trigger('#server', 'refresh')")
    wait_until(lambda: len(browser.requests_to("/server")) > requests, 30, "the refresh")
    wait_until(lambda: page.locator("#load[data-mark=same] .chart").count() == 6, 30, "the charts after the refresh")
    running = chart(page, "Running tasks").locator(".chart-value")
    assert running.inner_text() == "0"


def test_api_reference_has_the_theme_and_navigation_of_the_site(base_url, browser):
    page = browser.open(f"{base_url}/docs", scheme="dark")
    page.locator(".opblock").first.wait_for()
    assert page.locator("html.dark-mode").count() == 1
    page.get_by_role("link", name="Server", exact=True).click()
    page.wait_for_url("**/server")
