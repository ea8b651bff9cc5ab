"""The site builds strictly, and a browser loads every page without an error, wide and narrow."""

import functools
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def address(site):
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
def test_every_page_loads_without_an_error_and_fits_its_window(site, address):
    from playwright.sync_api import sync_playwright

    pages = sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    assert len(pages) > 25
    faults = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        # What a page still loads when the next one is called is aborted, which is no fault.
        page.on("requestfailed", lambda request: "ABORTED" in request.failure or faults.append(f"{request.url} failed"))
        page.on("response", lambda response: response.status >= 400 and faults.append(f"{response.url}: no such file"))
        page.on("request", lambda request: request.url.startswith(address) or faults.append(f"asks {request.url}"))
        for name in pages:
            for width in (1280, 390):
                page.set_viewport_size({"width": width, "height": 900})
                page.goto(f"{address}/{name}/", wait_until="load")
                assert page.locator("h1").count() == 1, name
                wide = page.evaluate("document.documentElement.scrollWidth")
                faults += [f"{name} is {wide} wide in a window of {width}"] * (wide > width)
        browser.close()
    assert not faults


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("# Page\n[lost](lost.md)\n", "lost.md"),
        ("# Page\n[lost](../examples/lost.py)\n", "lost.py"),
        ('# Page\n```\n--8<-- "examples/lost.py"\n```\n', "lost.py"),
    ],
)
def test_a_dead_link_ends_the_build(tmp_path, text, fault):
    (tmp_path / "docs").mkdir()
    for name in ("aadl", "examples", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    settings = (ROOT / "mkdocs.yml").read_text("utf-8").partition("\nnav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings.replace("extra_css: [site.css]", ""), "utf-8")
    (tmp_path / "docs" / "hooks.py").write_text((ROOT / "docs" / "hooks.py").read_text("utf-8"), "utf-8")
    (tmp_path / "docs" / "index.md").write_text(text, "utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0 and fault in result.stderr


def test_a_missing_docstring_is_found(tmp_path):
    package = tmp_path / "aadl"
    package.mkdir()
    (package / "__init__.py").write_text(
        '__all__ = ["a", "B"]\ndef a(): ...\nclass B:\n    """B."""\n    def c(self): ...\n    def _d(self): ...\n'
    )
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "hooks.py", tmp_path / "docs" / "hooks.py")
    command = [sys.executable, "-c", "import hooks; print(*hooks.undocumented())"]
    result = subprocess.run(command, cwd=tmp_path / "docs", capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["aadl.B.c", "aadl.a"]
