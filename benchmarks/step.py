"""One training step: ours beside what users have today, on the same model and utterances.

    python -m benchmarks.step [--size small] [--json FILE] [--device cuda] [--rounds N] [--tune]

Names: `hearken` ours; `padded_30s`: batches padded to the longest, Whisper's window of 30 s for
every clip, rows joined sample by sample, logits of all positions, which is what BLSP's public code
does; `grouped`: the same, grouped by length and trimmed to the longest clip of a batch, a careful
Hugging Face Trainer; `greedy`: packs filled as utterances come, documents kept apart by positions
(as WEST does), trimmed likewise. All have the same weights, optimizer, precision and attention
kernel, and no data loading: features and micro-batches are ready, as a loader's workers leave them.

Each system is a process of its own, so that its peak memory is its own. Every round runs one step
of each in turn (on a GPU, where they might not fit at once, one system after the other). A ratio is
the median over rounds of the rival's seconds over ours. The predicted one is of the seconds

    operations of `train.flops` / rate of a large product + bytes of all other ops / rate of a copy

with the rows that the system wants to run, and bytes as counted in one step: what every operation
that is no product reads and writes. `mfu` counts useful rows alone. `--tune` first tries the sizes
of micro-batch in `KNOBS` and goes on with each system's quickest of those that fit the GPU.
`--json` is written anew after every mix.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
from typing import Any

import torch

from benchmarks.ops import recycle_memory
from benchmarks.report import Report
from benchmarks.step_cases import MIXES, SIZES
from benchmarks.step_worker import Spec, work
from train.peak import measured_flops

SECONDS = 900  # that a worker may take to answer
# Utterances, or LLM positions, of a micro-batch: the first is taken without --tune.
KNOBS = {
    "cpu": {
        "hearken": (1024, 512, 2048),
        "padded_30s": (4, 2, 8),
        "grouped": (8, 4, 16),
        "greedy": (1024, 512, 2048),
    },
    "cuda": {
        "hearken": (8192, 4096, 16_384),
        "padded_30s": (16, 8, 32),
        "grouped": (32, 16, 64),
        "greedy": (8192, 4096, 16_384),
    },
}
COUNT = {"cpu": 32, "cuda": 256}


class DoesNotFit(RuntimeError):
    """A step took more memory than the GPU has."""


class Worker:
    """A system in a process of its own, which answers what it is asked."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        context = mp.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=work, args=(there, spec), daemon=True)
        self._process.start()
        there.close()

    def ask(self, question: str, knob: int) -> dict[str, Any]:
        """Raises DoesNotFit where the GPU's memory is too small; another question can follow."""
        self._here.send((question, knob))
        if not self._here.poll(SECONDS):
            raise TimeoutError(f"{self.spec.system} did not answer {question} in {SECONDS} s")
        try:
            found: dict[str, Any] = self._here.recv()
        except EOFError:
            raise RuntimeError(f"{self.spec.system} ended; see above") from None
        if why := found.get("does_not_fit"):
            raise DoesNotFit(f"{self.spec.system} at {knob} a micro-batch: {why}")
        return found

    def close(self) -> None:
        self._here.close()
        self._process.join(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--mix", choices=MIXES, action="append", help="(default: all)")
    parser.add_argument("--precision", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, help="utterances of one step")
    parser.add_argument("--tune", action="store_true")
    options = parser.parse_args()
    device = options.device
    precision = options.precision or ("fp32" if device == "cpu" else "bf16")
    count = options.count or COUNT[device]
    if device == "cpu":
        recycle_memory()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    rates = {"flops": best_flops(device, dtype), "bytes": copy_rate(device)}
    report = Report("step")
    for mix in options.mix or MIXES:
        specs = {
            name: Spec(name, options.size, mix, count, device, precision) for name in KNOBS[device]
        }
        case = f"{options.size}, {mix}, {count} utterances, {precision} {device}"
        found = measure(specs, options.rounds, options.tune)
        summarise(report, case, found, rates)
        if options.json:
            report.write(options.json)
    print(report.markdown())


def measure(specs: dict[str, Spec], rounds: int, tune: bool) -> dict[str, dict[str, Any]]:
    """By system: its `knob`, the `rounds` that it answered, its `peak` and its `count`."""
    together = next(iter(specs.values())).device == "cpu"
    found: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in specs}
    groups = [list(specs)] if together else [[name] for name in specs]
    for group in groups:
        for name in group:
            knobs = KNOBS[specs[name].device][name]
            found[name]["knob"] = best_knob(specs[name], knobs) if tune else knobs[0]
        workers = {name: Worker(specs[name]) for name in group}
        for name, worker in workers.items():
            worker.ask("time", found[name]["knob"])  # warms up
        for _ in range(rounds):
            for name, worker in workers.items():
                found[name]["rounds"].append(worker.ask("time", found[name]["knob"]))
        for name, worker in workers.items():
            for question in ("peak", "count"):
                found[name] |= worker.ask(question, found[name]["knob"])
            worker.close()
    return found


def best_knob(spec: Spec, knobs: tuple[int, ...]) -> int:
    """The quickest of two tries each, after one to warm up, in a process that then ends: what it
    has taken does not count as the peak of the one that is measured. A size whose step does not fit
    the GPU's memory is named, and out.

    Raises:
        DoesNotFit: none fits.
    """
    worker, tries = Worker(spec), dict[int, float]()
    for knob in knobs:
        try:
            seconds = [worker.ask("time", knob)["seconds"] for _ in range(2 if tries else 3)]
        except DoesNotFit as e:
            print(f"does not fit: {e}", flush=True)
        else:
            tries[knob] = min(seconds[-2:])
    worker.close()
    if not tries:
        raise DoesNotFit(f"{spec.system}: no size of micro-batch fits, tried {knobs}")
    print(spec.system, {k: round(seconds, 3) for k, seconds in tries.items()}, flush=True)
    return min(tries, key=tries.__getitem__)


def summarise(
    report: Report, case: str, found: dict[str, dict[str, Any]], rates: dict[str, float]
) -> None:
    def median(name: str, of: str) -> float:
        return statistics.median(each[of] for each in found[name]["rounds"])

    predicted = {
        name: one["flops"] / rates["flops"] + one["bytes"] / rates["bytes"]
        for name, one in found.items()
    }
    ours = [each["seconds"] for each in found["hearken"]["rounds"]]
    for name, one in found.items():
        seconds = median(name, "seconds")
        report.add(case, name, "micro_batch", one["knob"], one["unit"])
        report.add(case, name, "step_seconds", seconds, "s")
        report.add(case, name, "audio_seconds_per_second", one["audio"] / seconds, "1")
        report.add(case, name, "label_tokens_per_second", one["labels"] / seconds, "1/s")
        report.add(case, name, "mfu", 100 * one["useful"] / seconds / rates["flops"], "%")
        report.add(case, name, "peak_bytes", one["peak"], "B")
        pairs = zip(one["rounds"], ours, strict=True)
        measured = statistics.median(each["seconds"] / our for each, our in pairs)
        report.add(case, name, "slower_measured", measured, "x ours")
        forecast = predicted[name] / predicted["hearken"]
        report.add(case, name, "slower_predicted", forecast, "x ours")
        report.add(case, name, "measured_over_predicted", 100 * measured / forecast, "%")
    where = f"where the time goes: {case}"
    for name, one in found.items():
        for part in one["rounds"][0]["parts"]:
            of_round = [each["parts"][part] / each["seconds"] for each in one["rounds"]]
            report.add(where, name, part, 100 * statistics.median(of_round), "%")
        report.add(where, name, "operations", one["flops"], "FLOP")
        report.add(where, name, "moved", one["bytes"], "B")
        report.add(where, name, "loss", one["rounds"][0]["loss"], "")


def best_flops(device: str, dtype: torch.dtype) -> float:
    return max(measured_flops(device, dtype, 1024 if device == "cpu" else 8192) for _ in range(4))


def copy_rate(device: str) -> float:
    """Bytes read and written in a second, by the quickest of ten copies of a large tensor."""
    import time

    source = torch.zeros(2**28 if device == "cpu" else 2**31, dtype=torch.uint8, device=device)
    target, best = torch.zeros_like(source), float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        target.copy_(source)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * source.numel() / best


if __name__ == "__main__":
    main()
