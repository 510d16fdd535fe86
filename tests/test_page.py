"""The page of a run and of a sweep: complete, self-contained, and drawn by a browser."""

import dataclasses
import json
import re
import shutil
import subprocess

import pytest
import torch
from strategies import SHORT

from rmprune import page as pages
from rmprune import runs, sweep
from rmprune.backends import Platform
from rmprune.checkpoints import SlimConfig, Task
from rmprune.errors import UsageError

CONFIG = dataclasses.replace(SHORT, threshold=0.3)
pytestmark = pytest.mark.filterwarnings("ignore::rmprune.measure.WideSpreadWarning")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def run_folder(tiny, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    sparse = runs.train(folder, CONFIG, tiny)
    finished = runs.prune_and_finetune(folder, sparse, CONFIG, tiny)
    runs.report(folder, sparse, finished, tiny)
    return folder


@pytest.fixture(scope="module")
def sweep_folder(tiny, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sweep")
    methods = ("rm", "torch-pruning:group-norm")
    plan = sweep.Sweep(CONFIG, (("resnet20", None),), methods, (1e-2,), ("macs=0.5",), (0,))
    sweep.run(folder, plan, lambda: tiny, say=lambda _: None)
    sweep.time_all(folder, [Platform()], Task.of(tiny), lambda _: None, 2, 0.001)
    return folder


def content(html):
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)
    return json.loads(found[1])


def test_nothing_is_fetched(run_folder):
    html = pages.page(run_folder)
    links = re.findall(r"https?://[^\s\"']+", html)
    assert set(links) == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.search(r"<(link|img|iframe)|src=|@import|url\(", html)


def test_a_run_s_page(run_folder):
    found = content(pages.page(run_folder))
    assert found["title"] == "resnet20 on digits"
    names = [point["name"] for point in found["points"]]
    assert names[0] == "residual, untrained"
    assert all(row["channels"] >= row["reserved"] for row in found["layers"][names[-1]])
    assert len(found["curves"][0]["epochs"]) == 2


def test_a_sweep_s_page(sweep_folder):
    found = content(pages.page(sweep_folder))
    assert {p["curve"] for p in found["points"]} == {
        *("rmprune", "rmprune, plain net", "Torch-Pruning, group norm"),
    }
    for point in found["points"]:
        assert set(point["values"]) == {axis["key"] for axis in found["axes"]}
        layers = found["layers"][point["id"]]
        assert sum(row["macs"] for row in layers) > 0
        assert "MMACs" in point["text"]


def test_a_sweep_without_all_of_its_nets_has_a_page(sweep_folder, tmp_path):
    folder = shutil.copytree(sweep_folder, tmp_path / "kept")
    gone, *kept = sorted(path.name for path in (folder / "nets").iterdir())
    (folder / "nets" / gone).unlink()
    found = content(pages.page(folder))
    assert {p["id"] for p in found["points"]} == {gone, *kept}
    assert found["layers"].keys() == set(kept)
    assert "1 without files, so without layers" in found["subtitle"]


def test_points_of_several_models_say_which(sweep_folder):
    rows = sweep.timed_results(sweep_folder)
    own = rows[rows["net"] == rows["net"].iloc[-1]]
    alone, beside = (pages._sweep_point("net", own, several) for several in (False, True))
    assert beside["curve"] == f"{alone['curve']}, resnet20"
    assert beside["name"].startswith(beside["curve"])


def test_names_cannot_leave_the_data(run_folder, monkeypatch):
    monkeypatch.setattr(
        pages,
        "read_config",
        lambda _: SlimConfig(data="folder:</script><script>alert(1)</script>"),
    )
    html = pages.page(run_folder)
    assert "alert(1)</script>" not in html
    assert content(html)["title"].endswith("<script>alert(1)</script>")


def test_what_has_no_page(tmp_path):
    with pytest.raises(UsageError, match=r"no report\.csv of a run and no latencies\.csv"):
        pages.page(tmp_path)


def drawn(html, act, tmp_path):
    """The page as Chromium has it after a script of a reader's acts, and what went wrong."""
    file = tmp_path / "page.html"
    file.write_text(html.replace("</body>", f"<script>{act}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run(
        [BROWSER, *flags, "--virtual-time-budget=2000", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "Uncaught" not in done.stderr
    return done.stdout.partition("<script")[0]


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_browser_draws_it(kind, run_folder, sweep_folder, tmp_path):
    html = pages.page(run_folder if kind == "run" else sweep_folder)
    act = """
      const dots = document.querySelectorAll("circle.point");
      dots[0].dispatchEvent(new Event("mouseenter"));
      dots[dots.length - 1].dispatchEvent(new Event("click"));
    """
    page = drawn(html, act, tmp_path)
    points = content(html)["points"]
    assert page.count('class="point') == len(points)
    assert page.count("point chosen") == 1
    assert points[0]["text"].splitlines()[0] in page
    assert "<th>parameters</th>" in page


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_a_browser_begins_with_a_net_that_has_layers(sweep_folder, tmp_path):
    folder = shutil.copytree(sweep_folder, tmp_path / "kept")
    *_, last = content(pages.page(folder))["points"]
    (folder / "nets" / last["id"]).unlink()
    html = pages.page(folder)
    assert "<th>parameters</th>" in drawn(html, "", tmp_path)
    act = f"""
      document.querySelector("circle[data-net='{last["id"]}']").dispatchEvent(new Event("click"));
      const axis = document.getElementById("axis");
      axis.selectedIndex = 1;
      axis.dispatchEvent(new Event("change"));
    """
    page = drawn(html, act, tmp_path)
    assert "No layers are known of this net" in page
    assert re.search(rf'class="point chosen"[^>]*data-net="{re.escape(last["id"])}"', page)
