"""Every loss against its plain twin, packed against one by one, one rank against two."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from data.align import main as align
from data.collate import Batch, Clip, Sample, Word, collate, dummy_batch
from data.prompts import Text
from tests import tiny
from tests.launch import launch
from tests.train.conftest import STEPS, Workspace
from tests.train.losses_on_ranks import CASES, bins
from tests.train.mix import ALL, World, gradients
from train import config as cfg
from train.ctc import chunked_ctc, plain_ctc
from train.loss import Divergence, Head, alignment, chunked, counted, mixed, plain
from train.model.head import LossHead, answer_losses, choose, prepare_head

LABELS, HIDDEN, VOCABULARY = 37, 12, 101
# Float32 sums of some hundred terms of order one, in two orders.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}

KLS = [Divergence(1.0), Divergence(2.0), Divergence(2.0, top_k=5), Divergence(1.0, top_k=500)]


def draws(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def answer(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {
        "hidden": draws(LABELS, HIDDEN, seed=1).to(dtype),
        "teacher": draws(LABELS, HIDDEN, seed=2).to(dtype),
        "weight": draws(VOCABULARY, HIDDEN, seed=3).to(dtype),
        "bias": draws(VOCABULARY, seed=4).to(dtype),
        "ids": torch.arange(LABELS) * 7 % VOCABULARY,
    }


def by_chunks(given: dict[str, torch.Tensor], rows: int, **which: Any) -> list[torch.Tensor]:
    """Sums, and gradients of hidden, weight and bias of the sums weighted 1, 2."""
    inputs = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    shape = {name: which.pop(name) for name in ("scale", "softcap") if name in which}
    known = chunked(
        inputs[0], Head(inputs[1], inputs[2], **shape), given["ids"], trained=True,
        teacher_LH=given["teacher"], chunk_bytes=4 * VOCABULARY * rows, **which,
    )  # fmt: skip
    sums = known.attach(*inputs)
    weighted = (sums * torch.arange(1, len(sums) + 1)).sum()
    return [sums.detach(), *torch.autograd.grad(weighted, inputs)]


def by_logits(given: dict[str, torch.Tensor], **which: Any) -> list[torch.Tensor]:
    inputs = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    shape = {name: which.pop(name) for name in ("scale", "softcap") if name in which}
    head = Head(inputs[1], inputs[2], **shape)
    teacher = head.shaped(head.raw(given["teacher"])).detach()
    sums = plain(head.shaped(head.raw(inputs[0])), given["ids"], teacher_LV=teacher, **which)
    weighted = (sums * torch.arange(1, len(sums) + 1)).sum()
    return [sums.detach(), *torch.autograd.grad(weighted, inputs)]


@pytest.mark.parametrize("rows", [1, 5, 37, 64])
@pytest.mark.parametrize(
    "which",
    [
        {},
        {"scale": 0.3},
        {"softcap": 2.0},
        {"softcap": 2.0, "scale": 0.5},
        *({"kl": kl} for kl in KLS),
        *({"kl": kl, "ce": False} for kl in KLS),
        {"kl": KLS[1], "softcap": 2.0, "scale": 0.5},
    ],
    ids=str,
)
def test_chunks_are_the_whole_logits(rows: int, which: dict[str, Any]) -> None:
    found, expected = by_chunks(answer(), rows, **which), by_logits(answer(), **which)
    for ours, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, twin, **TOLERANCE)


@pytest.mark.parametrize("which", [{}, {"kl": KLS[1]}, {"kl": KLS[2], "ce": False}], ids=str)
def test_bfloat16_is_no_worse_than_twice_the_twins_error(which: dict[str, Any]) -> None:
    exact = by_logits({n: t.double() if n != "ids" else t for n, t in answer().items()}, **which)
    low = answer(torch.bfloat16)
    exact = by_logits({n: t.float() if n != "ids" else t for n, t in low.items()}, **which)
    for ours, twin, true in zip(
        by_chunks(low, 5, **which), by_logits(low, **which), exact, strict=True
    ):
        allowed = 2 * (twin.float() - true).abs().max() + 4e-3 * true.abs().max()
        assert (ours.float() - true).abs().max() <= allowed


def test_the_divergence_is_zero_where_both_are_the_same_and_positive_elsewhere() -> None:
    given = answer()
    for kl in KLS[:2]:
        same = by_chunks(given | {"teacher": given["hidden"]}, 5, kl=kl, ce=False)
        assert same[0].abs().max() < 1e-4
        assert all(grad.abs().max() < 1e-4 for grad in same[1:])
    assert all(by_chunks(given, 5, kl=kl, ce=False)[0] > 1 for kl in KLS)


def test_without_labels_there_are_zeros_of_the_right_shape() -> None:
    given = answer()
    empty = {n: t[:0] if n in ("hidden", "teacher", "ids") else t for n, t in given.items()}
    sums, hidden, weight, bias = by_chunks(empty, 5, kl=KLS[0])
    assert sums.tolist() == [0, 0]
    assert hidden.shape == (0, HIDDEN)
    assert not weight.any()
    assert not bias.any()


def test_no_tensor_of_all_logits_is_alive() -> None:
    """The dispatcher sees all that is made: no [n, VOCABULARY] of more rows than a chunk's."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            for out in made if isinstance(made, tuple | list) else [made]:
                if isinstance(out, torch.Tensor) and out.dim() == 2 and len(out) != HIDDEN:
                    largest = max(largest, len(out) * (out.shape[1] == VOCABULARY))
            return made

    given = answer()
    with Watch():
        chunked(
            given["hidden"], Head(given["weight"], given["bias"]), given["ids"], kl=KLS[2],
            teacher_LH=given["teacher"], chunk_bytes=4 * VOCABULARY * 8,
        )  # fmt: skip
    assert 1 <= largest <= 8


@pytest.mark.parametrize("kind", [*tiny.FAMILIES, "cohere", "granite"])
def test_logits_are_the_families_own(kind: str, tmp_path: Path) -> None:
    """Softcaps, scales and tied heads: the loss is transformers' own on a single document."""
    if kind in ("cohere", "granite"):
        extra = {"logit_scale": 0.25} if kind == "cohere" else {"logits_scaling": 4.0}
        tiny.FAMILIES[kind] = extra
    try:
        tiny.llm(tmp_path, kind)
    finally:
        tiny.FAMILIES.pop("cohere", None), tiny.FAMILIES.pop("granite", None)
    decoder = AutoModelForCausalLM.from_pretrained(tmp_path).eval().requires_grad_(False)
    if kind == "gemma2":
        decoder.config.final_logit_softcapping = 1.5
    ids = torch.tensor([[1, 9, 10, 11, 12, 2]])
    inputs = decoder.get_input_embeddings()(ids).detach().requires_grad_()
    logits = decoder(inputs_embeds=inputs, use_cache=False).logits[0, :-1]
    twin = F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
    (expected,) = torch.autograd.grad(twin, inputs)
    prepare_head(decoder)
    assert type(decoder.get_output_embeddings()) is LossHead
    for kernel in ("chunked", "plain"):
        hidden = decoder.get_decoder()(inputs_embeds=inputs, use_cache=False).last_hidden_state
        (loss,) = answer_losses(
            decoder, hidden[0, :-1], ids[0, 1:], None, ce=True, kl=None, kernel=kernel
        )
        (found,) = torch.autograd.grad(loss, inputs)
        assert loss.item() == pytest.approx(twin.item(), rel=1e-6)
        torch.testing.assert_close(found, expected, **TOLERANCE)
    # As a module the head is what it was.
    again = decoder(inputs_embeds=inputs, use_cache=False).logits[0, :-1]
    torch.testing.assert_close(again, logits)


def test_a_trained_head_gets_the_gradient_of_plain_logits(tmp_path: Path) -> None:
    decoder = AutoModelForCausalLM.from_pretrained(tiny.llm(tmp_path))
    prepare_head(decoder)
    ids = torch.tensor([9, 10, 11])
    hidden = draws(3, 32)
    found = []
    for kernel in ("chunked", "plain"):
        decoder.zero_grad()
        answer_losses(decoder, hidden, ids, None, ce=True, kl=None, kernel=kernel).sum().backward()
        found.append(decoder.get_output_embeddings().weight.grad.clone())
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1], **TOLERANCE)


def test_what_is_asked_for_by_name_and_cannot_be_raises() -> None:
    head = torch.nn.Linear(2, 2)
    assert choose("auto", head, "cpu", False) == "plain"
    with pytest.raises(ValueError, match="needs a plain linear head, found Linear"):
        choose("chunked", head, "cpu", False)
    head.__class__ = LossHead
    assert choose("auto", head, "cpu", True) == "chunked"
    with pytest.raises(ValueError, match="the cross entropy alone"):
        choose("liger", head, "cuda", True)
    with pytest.raises(RuntimeError, match="pip install liger-kernel"):
        choose("liger", head, "cpu", False)


# CTC


def spelled(*pairs: tuple[int, tuple[int, ...]]) -> Batch:
    """Clips of so many slots with so spelled transcripts."""
    text = (Text((1,)), Text((2,), labelled=True))
    return collate(
        [
            Sample(str(n), text, Clip(np.zeros(slots, np.float32), slots, slots, slots), None, ids)
            for n, (slots, ids) in enumerate(pairs)
        ]
    )


CLIPS = [
    (5, (3, 4)), (9, (7, 7, 7)), (1, (60,)), (4, (1, 1, 2, 3)), (7, ()), (3, (5, 6, 5)),
    (2, (8, 8)),
]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 6, 100])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_ctc_over_a_compact_alphabet_is_that_over_the_vocabulary(rows: int, scale: float) -> None:
    batch = spelled(*CLIPS)
    assert batch.transcripts is not None
    # (1, 1, 2, 3) needs five slots, (8, 8) three; an empty one has nothing to train.
    assert batch.transcripts.too_long == 2
    assert batch.num_transcript_tokens == 2 + 3 + 1 + 3
    results = []
    for kind in ("chunked", "plain", "exact"):
        dtype = torch.float64 if kind == "exact" else torch.float32
        table = draws(VOCABULARY, HIDDEN, seed=5).to(dtype)
        slots = draws(sum(batch.slots), HIDDEN, seed=6).to(dtype).requires_grad_()
        blank = draws(HIDDEN, seed=7).to(dtype).requires_grad_()
        given = (slots, table, blank, batch.slots, batch.transcripts, scale)
        if kind == "chunked":
            loss = chunked_ctc(*given, chunk_bytes=4 * VOCABULARY * rows).attach(slots, blank)[0]
        else:
            loss = plain_ctc(*given)
        results.append([loss.detach(), *torch.autograd.grad(3 * loss, [slots, blank])])
    # Torch's recursion in float32 is the larger error, and both have it.
    for found, twin, exact in zip(*results, strict=True):
        allowed = 2 * (twin - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (found - exact).abs().max() <= allowed
    # What is not trained gets no gradient: the fourth, fifth and seventh clip.
    gradient = results[0][1].split(batch.slots)
    assert [bool(part.any()) for part in gradient] == [True, True, True, False, False, True, False]


def test_ctc_is_the_sum_over_all_ways_to_spell() -> None:
    """Three slots, two tokens: the five paths, written out."""
    batch = spelled((3, (0, 1)))
    assert batch.transcripts is not None
    table, blank, slots = draws(4, HIDDEN, seed=1), draws(HIDDEN, seed=2), draws(3, HIDDEN, seed=3)
    p = torch.cat([table, blank[None]]).matmul(slots.T).softmax(0)  # [4 tokens and blank, slot]
    paths = [(0, 0, 1), (0, 1, 1), (4, 0, 1), (0, 4, 1), (0, 1, 4)]
    total = sum(p[a, 0] * p[b, 1] * p[c, 2] for a, b, c in paths)
    loss = chunked_ctc(slots, table, blank, batch.slots, batch.transcripts).sums[0]
    assert loss.item() == pytest.approx(-torch.log(torch.as_tensor(total)).item(), rel=1e-5)


# Alignment


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_words_against_a_plain_reading(distance: str) -> None:
    slots = draws(8, HIDDEN, seed=1).requires_grad_()
    tokens = draws(4, HIDDEN, seed=2)
    # Words of slots 1-2, 5, 6-7, of one, two and one token.
    found = alignment(
        slots, tokens, torch.tensor([1, 2, 5, 6, 7]), torch.tensor([0, 2, 3]),
        torch.tensor([0, 1, 3]), distance,
    )  # fmt: skip
    pairs = [(slots[1:3], tokens[:1]), (slots[5:6], tokens[1:3]), (slots[6:8], tokens[3:])]
    expected = torch.zeros(())
    for heard, read in ((a.mean(0), b.mean(0)) for a, b in pairs):
        if distance == "cosine":
            expected = expected + 1 - heard @ read / heard.norm() / read.norm()
        else:
            expected = expected + ((heard - read) ** 2).sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, slots)[0] for loss in (found, expected))
    )  # fmt: skip


def test_no_words_are_no_distance() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    slots = draws(3, HIDDEN).requires_grad_()
    for distance in ("cosine", "l2"):
        loss = alignment(slots, draws(0, HIDDEN), none, none, none, distance)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, slots)[0].any()


def test_words_are_placed_among_all_clips_slots() -> None:
    text = (Text((1,)), Text((2,), labelled=True))
    clip = Clip(np.zeros(4, np.float32), 4, 4, 4)
    words = (Word(0, 2, (5,)), Word(2, 0, (6,)), Word(3, 1, (7, 8)))
    batch = collate([Sample("a", text, clip), Sample("b", text, clip, words=words)])
    assert batch.words is not None
    assert batch.words.slot_rows.tolist() == [4, 5, 7]
    assert batch.words.slot_starts.tolist() == [0, 2]
    assert batch.words.token_ids.tolist() == [5, 7, 8]
    assert batch.words.token_starts.tolist() == [0, 1]
    assert batch.num_words == 2
    with pytest.raises(ValueError, match="b: a word lies in slots 3 to 5, but its clip has 4"):
        collate([Sample("b", text, clip, words=(Word(3, 2, (7,)),))])


# The mix


def test_each_loss_is_divided_by_its_own_count() -> None:
    sums = torch.tensor([6.0, 10.0, 7.0], requires_grad=True)
    total = mixed(sums, [1.0, 0.5, 2.0], [3, 5, 0])
    assert total.item() == pytest.approx(6 / 3 + 0.5 * 10 / 5 + 2 * 7)
    total.backward()
    assert sums.grad is not None
    assert sums.grad.tolist() == pytest.approx([1 / 3, 0.1, 2])


@pytest.mark.parametrize("llm", ["llama", "bloom", "gemma2"])
def test_all_losses_packed_equal_one_by_one(tmp_path: Path, llm: str) -> None:
    world = World(tmp_path, ALL, llm)
    assert list(world.model.losses.weights) == ["ce", "kl", "ctc", "align"]
    numbers = list(range(len(world.all)))
    one_by_one = gradients(world.model, [world.pack([n]) for n in numbers])
    assert all(loss > 0 for loss in one_by_one[0])
    for order in (numbers, numbers[::-1]):
        sums, found = gradients(world.model, [world.pack(order)])
        torch.testing.assert_close(sums, one_by_one[0], rtol=5e-6, atol=0)
        for name, expected in one_by_one[1].items():
            # Four losses' worth of the sums that test_packing.py compares.
            atol = 4 * 2e-5 + 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(found[name], expected, rtol=5e-5, atol=atol)


@pytest.mark.parametrize(
    "on",
    [{"kl": {}}, {"ctc": {}}, {"align": {"distance": "l2"}}, {"ce": 1.0, "ctc": {"scale": 2.0}}],
    ids=str,
)
def test_the_plain_kernel_is_the_twin_of_the_chunked(tmp_path: Path, on: dict[str, Any]) -> None:
    found = []
    for kernel in ("chunked", "plain"):
        world = World(tmp_path, {"ce": 0.0, **on, "kernel": kernel})
        found.append(gradients(world.model, [world.pack([0, 2, 3])]))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=5e-6, atol=0)
    for name, expected in found[1][1].items():
        atol = 2e-5 + 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(found[0][1][name], expected, rtol=5e-5, atol=atol)


def test_each_of_a_mix_is_what_it_is_alone(tmp_path: Path) -> None:
    world = World(tmp_path, ALL)
    together = gradients(world.model, [world.pack([0, 2, 4])])[0]
    for n, name in enumerate(["ce", "kl", "ctc", "align"]):
        world = World(tmp_path, {"ce": 0.0, name: ALL[name]})
        alone = gradients(world.model, [world.pack([0, 2, 4])])[0]
        torch.testing.assert_close(alone, together[n : n + 1])


def test_a_teacher_that_hears_what_it_reads_has_nothing_to_teach(tmp_path: Path) -> None:
    """The shift: read what is heard, and every label's two distributions are the same."""
    world = World(tmp_path, {"ce": 0.0, "kl": {"temperature": 1.0}})
    texts = [replace(s, document=s.read, read=s.read) for s in world.all if s.read]
    assert world.model(collate(texts)).item() == pytest.approx(0, abs=1e-4)
    other = [replace(s, document=s.read, read=(Text((1, 9)), s.read[-1])) for s in texts if s.read]
    assert world.model(collate(other)).item() > 0.1


def test_the_teacher_is_the_llm_without_its_updates(tmp_path: Path) -> None:
    world = World(tmp_path, {"ce": 0.0, "kl": {"temperature": 1.0}}, lora=True)
    texts = collate([replace(s, document=s.read) for s in world.all if s.read])
    assert world.model(texts).item() == pytest.approx(0, abs=1e-4)  # LoRA begins as nothing
    for name, parameter in world.model.decoder.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(0))
    assert world.model(texts).item() > 0.1


def test_a_loss_that_is_off_costs_nothing(tmp_path: Path) -> None:
    def calls(losses: dict[str, Any]) -> int:
        world = World(tmp_path, losses)
        seen = []
        world.model.decoder.get_decoder().register_forward_hook(lambda *_: seen.append(1))
        world.model(world.pack([0, 2])).sum().backward()
        return len(seen)

    assert calls({"ce": 1.0}) == 1
    assert calls({"ce": 1.0, "kl": {}}) == 2
    assert calls({"ce": 0.0, "ctc": {}, "align": {}}) == 0
    assert not any("ctc" in name for name in World(tmp_path, {"ce": 1.0}).model.trained())


def test_the_dummy_of_an_empty_bin_runs_every_loss_for_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, ALL)
    dummy = dummy_batch(world.silence)
    sums, found = gradients(world.model, [dummy])
    assert sums.tolist() == [0, 0, 0, 0]
    assert all(not grad.any() for grad in found.values())
    assert (dummy.num_labels, dummy.num_transcript_tokens, dummy.num_words) == (0, 0, 0)


def test_what_is_read_must_have_the_labels_of_what_is_heard(tmp_path: Path) -> None:
    world = World(tmp_path, {"kl": {}})
    sample = world.all[0]
    with pytest.raises(ValueError, match="0: what is read has other labels"):
        collate([replace(sample, read=world.all[1].read)])
    with pytest.raises(ValueError, match="0: has no document to read"):
        collate([world.all[1], replace(sample, read=None)])
    with pytest.raises(ValueError, match=r"losses\.kl needs what a teacher reads"):
        world.model(collate([replace(sample, read=None)]))


def test_losses_that_cannot_be_are_refused(tmp_path: Path) -> None:
    tree = tiny.config(tmp_path)
    with pytest.raises(cfg.ConfigError, match="every loss is off"):
        cfg.parse(tree | {"losses": {"ce": 0.0}}, "tiny")
    with pytest.raises(cfg.ConfigError, match=r"unknown key 'losses.kl.temp'.*temperature"):
        cfg.parse(tree | {"losses": {"kl": {"temp": 1}}}, "tiny")
    tree["model"]["decoder"]["table"] = "exchange"
    with pytest.raises(cfg.ConfigError, match=r"set model\.decoder\.table: whole"):
        cfg.parse(tree | {"losses": {"ctc": {}}}, "tiny")


# Ranks


def on_one_plain_model(world: World) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The losses' means over all ranks' bins, and the gradient of their mix."""
    weights, all_bins = world.config.losses.weights, list(chain(*bins(world)))
    totals = [sum(counted(batch, name) for batch in all_bins) for name in weights]
    sums = torch.zeros(len(weights))
    for batch in all_bins:
        found = world.model(batch)
        mixed(found, list(weights.values()), totals).backward()
        sums += found.detach()
    means = (sums / torch.tensor(totals)).tolist()
    gradients = {n: p.grad for n, p in world.model.trained().items() if p.grad is not None}
    return dict(zip(weights, means, strict=True)), gradients


def test_two_ranks_with_a_bin_that_says_nothing_equal_one_plain_model(tmp_path: Path) -> None:
    World(tmp_path, ALL, "gemma2")  # makes what the ranks load: a tied head, capped logits
    launch("tests/train/losses_on_ranks.py", tmp_path, ranks=2)
    for case, (losses, train) in CASES.items():
        means, gradients = on_one_plain_model(World(tmp_path, losses, "gemma2", train))
        found = torch.load(tmp_path / f"{case}.pt")
        assert found["means"] == pytest.approx(means, rel=1e-5)
        assert found["gradients"].keys() == gradients.keys()
        for name, expected in gradients.items():
            # Rounded at the scale of the tensor's largest element, not of each.
            atol = 2e-5 * expected.abs().max().item()
            torch.testing.assert_close(found["gradients"][name], expected, rtol=1e-4, atol=atol)


@pytest.mark.slow
def test_every_loss_trains_through_the_launcher_and_hands_on_to_the_next_stage(
    workspace: Workspace,
) -> None:
    root = workspace.root
    assert align([str(root / "shards"), str(root / "words"), "--model", str(root / "encoder")]) == 0
    words = {"data__words": [str(root / "words")], "train__schedule": "constant"}
    mix = ("--set", f"losses={json.dumps(ALL)}")
    for ranks in (1, 2):
        launch("train/main.py", workspace.config(f"mix-{ranks}", **words), *mix, ranks=ranks)
    cut = workspace.config("mix-cut", **words)
    launch("train/main.py", cut, *mix, "--set", "train.steps=5", ranks=2)
    launch("train/main.py", cut, *mix, ranks=2)
    for name in ("loss", *ALL):
        alone, shared, resumed = (
            [value for _, value in workspace.curve(f"mix-{run}", f"train/{name}")]
            for run in (1, 2, "cut")
        )
        assert resumed == shared
        # Another order of summation, fed back by Adam over the steps.
        assert alone == pytest.approx(shared, rel=1e-3), name
        assert len(shared) == STEPS
    # Embedding-CTC alone, then cross entropy from where it ended.
    stage = ("--set", "losses={ce: 0.0, ctc: {}}")
    launch("train/main.py", workspace.config("ctc", **words), *stage, ranks=2)
    spelled = [value for _, value in workspace.curve("ctc", "train/ctc")]
    assert sum(spelled[-3:]) < 0.95 * sum(spelled[:3])
    second = workspace.config("after-ctc", train__init=str(root / "ctc"), train__lr=1e-9)
    launch("train/main.py", second, "--set", "train.steps=1", ranks=2)
    before, after = workspace.checkpoint("ctc").weights, workspace.checkpoint("after-ctc").weights
    assert before.keys() - after.keys() == {"ctc.blank"}
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)
