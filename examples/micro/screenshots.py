"""What MLflow, the report and the page to talk to a model show of the demo, as pictures for docs/.

    make demo && make screenshots

In a headless Chromium (CHROMIUM=path, or the one in PATH), by playwright.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from examples.micro.claims.runner import free_port
from train.tracked import Run, Store

MODEL = Path("runs/micro/blsp")
CLIP = Path("runs/micro/new-en.wav")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--use-fake-ui-for-media-stream")
_SECONDS = 120.0
_CLIP = {"x": 0, "y": 0, "width": 1200, "height": 820}


@contextmanager
def served(*command: str | Path) -> Iterator[str]:
    """A server of our own, ended with the block; `PORT` in its command is a free port."""
    port = str(free_port())
    words = [port if word == "PORT" else str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + _SECONDS
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{words[0]} does not answer at {address}") from None
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait()


def mlflow(page: Any, address: str, training: Run, evaluation: Run, out: Path) -> None:
    """Runs, charts, the table of scores, pictures, and what a run says of itself."""
    runs = f"{address}#/experiments/{training.experiment}/runs"
    places = {
        "runs": runs,
        "charts": f"{runs}?compareRunsMode=CHART",
        "run": f"{runs}/{training.run_id}",
        "metrics": f"{runs}/{training.run_id}/model-metrics",
        "packing": f"{runs}/{training.run_id}/artifacts/pictures/packing.png",
        "scores": f"{runs}/{evaluation.run_id}/artifacts/scores.json",
        "samples": f"{runs}/{evaluation.run_id}/artifacts/samples.json",
        "losses": f"{runs}/{evaluation.run_id}/artifacts/pictures/loss_by_task.png",
        "slots": f"{runs}/{evaluation.run_id}/artifacts/pictures/slots-00.png",
        "similarity": f"{runs}/{evaluation.run_id}/artifacts/pictures/similarity-00.png",
    }
    for name, place in places.items():
        page.goto("about:blank")
        page.goto(place)
        settle(page)
        # Without the panel at the right, which offers an assistant.
        page.screenshot(path=out / f"mlflow_{name}.png", clip=_CLIP)


def talk(page: Any, address: str, out: Path) -> None:
    """One answer to a recording."""
    page.goto(address)
    page.locator("#ask").wait_for()
    page.get_by_label("Upload file").click()
    with page.expect_response("**/upload**"):
        page.locator("input[type=file]").first.set_input_files(str(CLIP))
    box = page.locator("#instruction input")
    box.fill("repeat the sentence")
    box.press("Enter")
    page.locator("#ask").click()
    page.wait_for_function("document.querySelector('#speed textarea').value != ''")
    page.locator("#similarity img").wait_for()
    settle(page)
    page.screenshot(path=out / "talk.png", full_page=True)


def settle(page: Any) -> None:
    """Wait for what the page fetches, and for its drawing; MLflow's never stops asking."""
    page.wait_for_load_state("load")
    page.wait_for_timeout(10_000)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uri", default="sqlite:///mlflow.db", help="of the tracker (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/img"), help="(%(default)s)")
    args = parser.parse_args()
    browser_path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if browser_path is None:
        parser.error("no chromium: install it, or set CHROMIUM to its path")
    from playwright.sync_api import sync_playwright

    store = Store(args.uri)
    runs = store.find(["micro-blsp"])
    training = [run for run in runs if run.stage == "train"][-1]
    evaluation = [run for run in runs if run.stage == "evaluate"][-1]
    report = Path("build/report.html").absolute()
    words = [sys.executable, "-m", "train.report", training.run_id, evaluation.run_id,
             "--uri", args.uri, "--out", str(report)]  # fmt: skip
    subprocess.run(words, check=True)
    bin_ = Path(sys.executable).parent
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browser_path, args=list(_FLAGS))
        page = browser.new_page(viewport={"width": 1600, "height": 820})
        page.set_default_timeout(1000 * _SECONDS)
        ui = (bin_ / "mlflow", "ui", "--backend-store-uri", args.uri, "--port", "PORT")
        with served(*ui, "--workers", "1") as address:
            mlflow(page, address, training, evaluation, args.out)
        page.goto(report.as_uri())
        settle(page)
        page.screenshot(path=args.out / "report.png")
        listen = (sys.executable, "train/listen.py", MODEL, "--ui", "--port", "PORT")
        with served(*listen) as address:
            talk(page, address, args.out)
        browser.close()


if __name__ == "__main__":
    main()
