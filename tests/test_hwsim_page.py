"""The report's page in a real browser: no script error, tables sort, pictures are drawn, dark and narrow screens fit.

Skipped where there is no Chromium, unless MDSNN_TEST_CHROMIUM=required.
"""

from __future__ import annotations

import html as markup
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mdsnn.hwsim import build_report, ms_resnet, render_html, uniform

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)

PROBE = """
<script>
var table = document.querySelectorAll("table.sort")[1], heads = table.querySelectorAll("th"), seen = {};
function column(at) {
  return Array.from(table.tBodies[0].rows).map(function (row) {
    return row.cells[at].dataset.v || row.cells[at].textContent;
  });
}
var energy = Array.from(heads).findIndex(function (h) { return h.textContent === "energy uJ"; });
heads[energy].click();
seen.up = column(energy).map(Number);
heads[energy].click();
seen.down = column(energy).map(Number);
heads[0].dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
seen.names = column(0);
seen.drawn = Array.from(document.querySelectorAll("svg")).map(function (s) {
  var box = s.getBoundingClientRect();
  return [box.width, box.height, s.querySelectorAll("rect").length];
});
seen.overflow = document.documentElement.scrollWidth - window.innerWidth;
seen.clipped = Math.max(...Array.from(document.querySelectorAll(".scroll")).map(function (s) {
  return s.scrollWidth - s.clientWidth;
}));
seen.background = getComputedStyle(document.body).backgroundColor;
seen.errors = window.faults;
document.body.setAttribute("data-seen", JSON.stringify(seen));
</script></body>"""


def seen(page: str, folder: Path, *arguments: str) -> Any:
    catcher = "<script>window.faults = []; window.onerror = function (m) { window.faults.push(m); };</script>"
    path = folder / "page.html"
    path.write_text(page.replace("<title>", catcher + "<title>", 1).replace("</body>", PROBE, 1), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, *arguments, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'data-seen="([^"]*)"', done.stdout)
    assert found is not None, done.stdout[-500:]
    return json.loads(markup.unescape(found[1]))


@pytest.fixture(scope="module")
def page() -> str:
    if CHROMIUM is None:
        if os.environ.get("MDSNN_TEST_CHROMIUM") == "required":
            raise AssertionError("Chromium is required here, but there is none")
        pytest.skip("there is no Chromium")
    workload = ms_resnet(18, (3, 32, 32), 4)
    return render_html(build_report(workload, uniform(workload, 0.1)))


def test_tables_sort_and_pictures_are_drawn(page: str, tmp_path: Path) -> None:
    result = seen(page, tmp_path, "--window-size=1280,900")
    assert result["errors"] == []
    assert result["up"] == sorted(result["up"])
    assert result["down"] == sorted(result["up"], reverse=True)
    assert len(set(result["up"])) > 5
    assert result["names"] == sorted(result["names"])
    assert len(result["drawn"]) == 8
    assert all(width > 100 and height > 20 and shapes > 0 for width, height, shapes in result["drawn"])
    assert result["overflow"] <= 0
    assert result["clipped"] <= 0
    assert result["background"] == "rgb(255, 255, 255)"


def test_a_printed_page_holds_every_column(page: str, tmp_path: Path) -> None:
    paper = page.replace("@media print{", "@media all{", 1)
    result = seen(paper, tmp_path, "--window-size=718,900")  # A4 with margins of 1 cm
    assert result["overflow"] <= 0
    assert result["clipped"] <= 0


def test_a_dark_narrow_screen_fits(page: str, tmp_path: Path) -> None:
    result = seen(page, tmp_path, "--window-size=500,900", "--blink-settings=preferredColorScheme=0")
    assert result["errors"] == []
    assert result["overflow"] <= 0
    assert result["background"] == "rgb(20, 24, 29)"
