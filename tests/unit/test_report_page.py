"""The page in a browser: what it shows, that it asks for nothing, and that its script has no errors."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_runs import write_lines, write_run
from test_report import HOSTILE

from megatrain.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BROWSERS_OWN = re.compile(r"(google|googleapis|gvt1)\.com$")  # which every start of it asks for
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no chromium here")

# added to a copy of the page: moves the mouse over the first chart, and says what came of it; and asks for a picture
PROBE = """
<img src="http://canary.invalid/x.png" alt="">
<script>
const said = document.createElement("pre");
said.id = "probe";
document.body.append(said);
const chart = document.querySelector("svg[data-chart]");
const frame = chart.getBoundingClientRect();
chart.dispatchEvent(new PointerEvent("pointermove", {clientX: frame.right - 1, clientY: frame.top + 20}));
said.textContent = `tip: ${document.querySelector(".tip").textContent}; wide: ${document.documentElement.scrollWidth}`;
</script>
"""


def open_page(page: Path, profile: Path) -> tuple[str, str, set[str]]:
    """(the document after its script ran, what went to the console, hosts that the page asked for)"""
    network = profile / "network.json"
    profile.mkdir()
    ended = subprocess.run(
        [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-extensions"),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *("--enable-logging=stderr", "--log-level=0", f"--log-net-log={network}", f"--user-data-dir={profile}"),
            *("--virtual-time-budget=2000", "--window-size=400,900", "--dump-dom", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HOME": str(profile)},
        check=True,
    )
    console = "\n".join(line for line in ended.stderr.splitlines() if ":CONSOLE" in line)
    hosts = set(re.findall(r'"url":"(?:https?|wss?|ftp)://([^/"]+)', network.read_text()))
    return ended.stdout, console, {host for host in hosts if not BROWSERS_OWN.search(host)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("page") / "run")
    write_lines(run / "samples.jsonl", [{"step": 40, "prompt": HOSTILE, "text": HOSTILE}])
    return run


def test_the_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    page = write_report(run)
    shown, console, hosts = open_page(page, tmp_path / "profile")
    assert console == ""
    assert "base/model, bf16" in shown and "Where a step's time went" in shown and 'class="tip"' in shown
    assert hosts == set()


def test_the_mouse_shows_values_and_the_page_is_as_wide_as_a_phone(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "probed.html").read_text()
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", PROBE + "</body>")
    (tmp_path / "probed.html").write_text(text)
    shown, console, hosts = open_page(tmp_path / "probed.html", tmp_path / "profile")
    assert hosts == {"canary.invalid"}  # the log would show it if the page itself asked for something
    assert all("canary.invalid" in line for line in console.splitlines())
    found = re.search(r'<pre id="probe">tip: (.*?); wide: (\d+)', shown, re.DOTALL)
    assert found is not None
    assert found[1] == "step 40\nloss  1.311\nsmoothed  1.377\neval held out  4.35\neval code  6.5"
    assert int(found[2]) <= 500  # chromium's windows are no narrower


def test_the_policy_holds_what_escaping_would_let_through(run: Path, tmp_path: Path) -> None:
    """A script in the page that is not its own does not run."""
    text = write_report(run, tmp_path / "injected.html").read_text()
    (tmp_path / "injected.html").write_text(text.replace("</main>", "<script>document.title = 'run'</script></main>"))
    shown, console, _ = open_page(tmp_path / "injected.html", tmp_path / "profile")
    assert "<title>run</title>" not in shown
    assert "Content Security Policy" in console
