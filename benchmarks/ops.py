"""Times the two ops of csrc/ against what others do, and against the limit of the machine.

    python -m benchmarks.ops [--json FILE] [--device cuda] [--quick] [--case TEXT]

Names: `hearken` ours; `floor` the limit: for ragged_conv1d the faster of matmul and of the
library's convolution at the same useful FLOPs, for pack_embeddings all bytes that must move over
the bandwidth of a copy. `padded`: F.conv1d on the padded batch, with transposes and mask, without
which it is wrong; `packed95`: the same on sequences of which 95 % is useful, as many useful rows;
`per_sequence`: F.conv1d one by one; `compile`: torch.compile of `padded`. `loop`: cat per sample;
`masked_scatter`; `index_where`: two look-ups and a where.

Everything of one case is measured in turn, in one run; figures are medians.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.report import Report
from train.ops import Segments, pack_embeddings, ragged_conv1d

FRAMES_PER_SECOND = 50
KERNEL, STRIDE, PADDING = 5, 2, 2  # of BLSP's adapter

CONV_SIZES = {  # channels in and out of the adapter's first convolution
    "micro": (128, 256),
    "whisper-small-llama2": (768, 1536),
    "mms-1b-bloomz-7b1": (1280, 4096),
}
# Large sizes take minutes a round on a CPU; their medians are of fewer rounds.
_CASE_SECONDS, _FEWEST = 100.0, 3

PACK_SIZES = {"micro": (512, 256), "llama2": (32000, 4096)}  # vocabulary, hidden

# A forward returns what it made, and the tensors whose gradient is wanted.
Run = Callable[[], tuple[Tensor, Sequence[Tensor]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few rounds, no torch.compile")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    options = parser.parse_args()
    if options.device == "cpu":
        recycle_memory()
    report = Report("ops")
    rounds = 3 if options.quick else 9
    for dtype in (torch.float32, torch.bfloat16):
        tail = f"{str(dtype).removeprefix('torch.')} {options.device}"
        for size in CONV_SIZES:
            if options.case in (case := f"ragged_conv1d {size} {tail}"):
                runs = conv_runs(*CONV_SIZES[size], dtype, options.device, not options.quick)
                measure(report, case, runs, rounds, options.device)
        for size in PACK_SIZES:
            if options.case in (case := f"pack_embeddings {size} {tail}"):
                runs = pack_runs(*PACK_SIZES[size], dtype, options.device)
                measure(report, case, runs, rounds, options.device)
        if options.json:
            report.write(options.json)
    print(report.markdown())


def recycle_memory() -> None:
    """Keep freed memory in the process, as a caching allocator does.

    Otherwise glibc gives every large result fresh pages, whose faults take longer than what is
    measured, for all alike.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: no result is mapped on its own
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not given back


def librispeech_lengths(count: int = 32, seed: int = 0) -> list[int]:
    """Frames of utterances drawn like LibriSpeech's: 1-35 s, 12 s on average, most near 14 s."""
    draw = random.Random(seed)
    seconds = []
    for _ in range(count):
        long = draw.random() < 0.55
        seconds.append(draw.gauss(14.5, 1.5) if long else draw.triangular(1.5, 24, 3))
    seconds[0] = 34.0  # the longest decides how much a padded batch wastes
    scale = 12 * count / sum(seconds)
    return [round(min(35.0, max(1.0, s * scale)) * FRAMES_PER_SECOND) for s in seconds]


def conv_runs(
    channels: int, out_channels: int, dtype: torch.dtype, device: str, compiled: bool
) -> dict[str, Run | _Moves]:
    lengths = librispeech_lengths()
    weight = _leaf(out_channels, KERNEL, channels, scale=0.02, dtype=dtype, device=device)
    plain = weight.detach().transpose(1, 2).contiguous().requires_grad_()
    bias = _leaf(out_channels, scale=0.02, dtype=dtype, device=device)
    even = round(sum(lengths) / len(lengths) / 0.95)

    def padded_run(pitch: int, lengths: list[int], function: Callable[..., Tensor]) -> Run:
        x = _leaf(len(lengths), pitch, channels, dtype=dtype, device=device)
        out = Segments.padded(lengths, pitch).conv(KERNEL, STRIDE, PADDING).host_lengths
        steps = torch.arange((pitch - 1) // STRIDE + 1, device=device)
        mask = (steps < torch.tensor(out, device=device)[:, None])[..., None].to(dtype)
        ragged = torch.arange(pitch, device=device) < torch.tensor(lengths, device=device)[:, None]
        x.data *= ragged[..., None].to(dtype)  # what stands beyond a sequence would leak into it
        return lambda: (function(x, plain, bias, mask), (x, plain, bias))

    pitch = max(lengths)
    segments = Segments.padded(lengths, pitch, device)
    x_padded = _leaf(segments.rows, channels, dtype=dtype, device=device)
    sequences = [_leaf(n, channels, dtype=dtype, device=device) for n in lengths]
    rows = segments.conv(KERNEL, STRIDE, PADDING).total
    panel = _leaf(rows, KERNEL * channels, dtype=dtype, device=device)
    matrix = _leaf(out_channels, KERNEL * channels, scale=0.02, dtype=dtype, device=device)
    long = _leaf(1, channels, rows * STRIDE, dtype=dtype, device=device)

    def ours() -> tuple[Tensor, Sequence[Tensor]]:
        y, _ = ragged_conv1d(
            x_padded,
            weight,
            bias,
            segments,
            stride=STRIDE,
            padding=PADDING,
            activation="gelu",
            impl="fused",
        )
        return y, (x_padded, weight, bias)

    def one_by_one() -> tuple[Tensor, Sequence[Tensor]]:
        ys = [F.gelu(F.conv1d(s.t()[None], plain, bias, STRIDE, PADDING)[0].t()) for s in sequences]
        return torch.cat(ys), (*sequences, plain, bias)

    runs: dict[str, Run | _Moves] = {
        "hearken": ours,
        "floor_matmul": lambda: (F.linear(panel, matrix), (panel, matrix)),
        "floor_conv": lambda: (F.conv1d(long, plain, None, STRIDE, PADDING), (long, plain)),
        "padded": padded_run(pitch, lengths, _padded_conv),
        "packed95": padded_run(even, [round(even * 0.95)] * len(lengths), _padded_conv),
        "per_sequence": one_by_one,
    }
    if compiled:
        runs["compile"] = padded_run(pitch, lengths, torch.compile(_padded_conv))
    return runs


def _padded_conv(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """x: [B, F, C] -> [B, F', D]"""
    return F.gelu(F.conv1d(x.transpose(1, 2), weight, bias, STRIDE, PADDING)).transpose(1, 2) * mask


def pack_runs(
    vocabulary: int, hidden: int, dtype: torch.dtype, device: str
) -> dict[str, Run | _Moves]:
    draw = random.Random(0)
    slots = [max(1, n // 8) for n in librispeech_lengths()]
    texts = [(draw.randint(8, 24), draw.randint(16, 64)) for _ in slots]
    table = torch.randn(vocabulary, hidden, device=device).to(dtype)
    speech = _leaf(sum(slots), hidden, dtype=dtype, device=device)
    ln_weight = _leaf(hidden, dtype=dtype, device=device)
    ln_bias = _leaf(hidden, dtype=dtype, device=device)
    source: list[int] = []
    for (before, behind), count in zip(texts, slots, strict=True):
        first = sum(v < 0 for v in source)
        source += [draw.randrange(vocabulary) for _ in range(before)]
        source += [-1 - first - i for i in range(count)]
        source += [draw.randrange(vocabulary) for _ in range(behind)]
    plan = torch.tensor(source, device=device)
    ids, is_speech = plan.clamp(min=0), (plan < 0)[:, None]
    sizes = [
        n
        for (before, behind), count in zip(texts, slots, strict=True)
        for n in (before, count, behind)
    ]
    wanted = (speech, ln_weight, ln_bias)

    def normed() -> Tensor:
        return F.layer_norm(speech, (hidden,), ln_weight, ln_bias)

    def loop() -> Tensor:
        rows, first = [], 0
        chunks = plan.split(sizes)
        for sample, count in enumerate(slots):
            before, _, behind = chunks[3 * sample : 3 * sample + 3]
            heard = F.layer_norm(speech[first : first + count], (hidden,), ln_weight, ln_bias)
            rows.append(torch.cat([F.embedding(before, table), heard, F.embedding(behind, table)]))
            first += count
        return torch.cat(rows)

    def index_where() -> Tensor:
        return torch.where(
            is_speech,
            normed().index_select(0, (-1 - plan).clamp(min=0)),
            table.index_select(0, ids),
        )

    # Forward reads and writes every position, LayerNorm reads its rows once more; backward reads
    # the gradient's and the speech's rows, each once more, and writes the speech's gradient.
    row = hidden * table.element_size()
    return {
        "hearken": lambda: (
            pack_embeddings(table, speech, plan, ln_weight, ln_bias, 1e-5, impl="fused"),
            wanted,
        ),
        "floor": _Moves(
            forward=(2 * len(source) + len(speech)) * row,
            backward=5 * len(speech) * row,
            device=device,
        ),
        "loop": lambda: (loop(), wanted),
        "masked_scatter": lambda: (
            F.embedding(ids, table).masked_scatter(is_speech, normed()),
            wanted,
        ),
        "index_where": lambda: (index_where(), wanted),
    }


class _Moves:
    """Moves bytes as fast as the machine can: a copy reads one half of them, writes the other."""

    def __init__(self, forward: int, backward: int, device: str) -> None:
        self.source = {
            phase: torch.zeros(size // 2, dtype=torch.uint8, device=device)
            for phase, size in (("forward", forward), ("backward", backward))
        }
        self.target = {phase: torch.zeros_like(t) for phase, t in self.source.items()}

    def move(self, phase: str) -> None:
        self.target[phase].copy_(self.source[phase])


def measure(
    report: Report, case: str, runs: Mapping[str, Run | _Moves], rounds: int, device: str
) -> None:
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "backward": [], "forward_backward": []} for name in runs
    }
    began = time.perf_counter()
    for round_ in range(rounds + 1):  # the first warms up
        if round_ > _FEWEST and time.perf_counter() - began > _CASE_SECONDS:
            break
        for name, run in runs.items():
            forward, backward = _time(run, device)
            if round_:
                seconds[name]["forward"].append(forward)
                seconds[name]["backward"].append(backward)
                seconds[name]["forward_backward"].append(forward + backward)
    for metric in ("forward", "backward", "forward_backward"):
        medians = {name: statistics.median(taken[metric]) for name, taken in seconds.items()}
        floors = [medians.pop(name) for name in list(medians) if name.startswith("floor")]
        for name, value in medians.items():
            report.add(case, name, f"{metric}_seconds", value, "s")
        report.add(case, "floor", f"{metric}_seconds", min(floors), "s")
    for name, run in runs.items():
        if not isinstance(run, _Moves) and not name.startswith("floor"):
            report.add(case, name, "peak_bytes", _peak_bytes(run, device), "B")


def _time(run: Run | _Moves, device: str) -> tuple[float, float]:
    if isinstance(run, _Moves):
        moves = run
        return (
            _clock(lambda: moves.move("forward"), device),
            _clock(lambda: moves.move("backward"), device),
        )
    made: list[tuple[Tensor, Sequence[Tensor]]] = []
    forward = _clock(lambda: made.append(run()), device)
    y, wanted = made[0]
    grad = torch.ones_like(y)
    return forward, _clock(lambda: torch.autograd.grad(y, wanted, grad), device)


def _clock(work: Callable[[], object], device: str) -> float:
    if device == "cpu":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize()
    return begin_event.elapsed_time(end_event) / 1000


def _peak_bytes(run: Run, device: str) -> int:
    """Memory that forward and backward took beyond what was there before."""
    gc.collect()
    if device == "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed must not count as already there
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status_bytes("VmRSS")
        _time(run, device)
        return max(0, _status_bytes("VmHWM") - before)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _time(run, device)
    return torch.cuda.max_memory_allocated() - before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype, device: str) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


if __name__ == "__main__":
    main()
