"""The decoder's layers run again in the backward pass: the same bits in less memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from data.collate import dummy_batch
from tests import tiny
from tests.launch import launch
from tests.train import mix, recompute_on_ranks
from tests.train.conftest import Workspace
from tests.train.test_runs import same_weights
from train import config as cfg
from train.dryrun import planned
from train.flops import Flops, Rows
from train.footprint import Live, Planned
from train.model.attention import prepare, set_packed
from train.model.build import build, load_decoder
from train.model.kernels import Packing
from train.model.recompute import RecomputedLayer, layers_of, recompute_layers

LOSSES = recompute_on_ranks.LOSSES


@contextmanager
def runs(decoder: PreTrainedModel) -> Iterator[list[int]]:
    """How often each layer's inner modules have run inside the context."""
    layers = layers_of(decoder)
    counts = [0] * len(layers)

    def count(at: int) -> Any:
        def hook(*_: Any) -> None:
            counts[at] += 1

        return hook

    inner = (next(layer.children()) for layer in layers)
    handles = [module.register_forward_hook(count(at)) for at, module in enumerate(inner)]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def awake(model: nn.Module) -> None:
    """Updates begin as zero, which would hide a gradient that is missing."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.3 * torch.randn_like(p))


@pytest.mark.parametrize("llm", ["llama", "bloom", "gemma2"])
@pytest.mark.parametrize("case", recompute_on_ranks.CASES)
def test_the_same_bits(case: str, llm: str, tmp_path: Path) -> None:
    """Shared prompts, a dummy, a bin without clips; the pass of the teacher is not run again."""
    world = mix.World(tmp_path, llm=llm, **recompute_on_ranks.CASES[case])
    model, settings = world.model.train(), world.config.model
    awake(model)
    batches = [world.pack([0, 1, 3]), dummy_batch(world.silence), world.pack_written([0, 1])]
    assert batches[0].num_shared
    with runs(model.decoder) as before:
        sums, expected = mix.gradients(model, batches)
    decoder = settings.decoder.model_copy(update={"checkpointing": True})
    again = build(
        settings.model_copy(update={"decoder": decoder}), "fp32", seed=3,
        losses=world.config.losses,
    ).train()  # fmt: skip
    awake(again)
    assert not any(layer.training for layer in layers_of(again.decoder))
    with runs(again.decoder) as after:
        found_sums, found = mix.gradients(again, batches)
    assert torch.equal(found_sums, sums)
    assert found.keys() == expected.keys()
    assert any(grad.any() for grad in expected.values())
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name
    passes = 2 if world.config.losses.kl else 1
    assert before == [passes * len(batches)] * len(before)
    assert after == [(passes + 1) * len(batches)] * len(before)
    with torch.no_grad(), runs(again.decoder) as scored:
        again(batches[0])
    assert scored == [passes] * len(before)


class Drawing(nn.Module):
    """Dropout that never sleeps."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return nn.functional.dropout(self.inner(*args, **kwargs), 0.3)


def passed(decoder: PreTrainedModel, inputs: torch.Tensor) -> torch.Tensor:
    """Last hidden states of two packed documents."""
    positions = torch.cat([torch.arange(5), torch.arange(6)])
    extras = set_packed(decoder, Packing.of((5, 6)))
    out = decoder.get_decoder()(
        inputs_embeds=inputs[None], position_ids=positions[None], use_cache=False, **extras
    )
    hidden: torch.Tensor = out.last_hidden_state
    return hidden


def frozen_decoder(root: Path, llm: str = "llama") -> PreTrainedModel:
    tiny.llm(root / "llm", llm)
    tree = {"encoder": {"path": "none"}, "decoder": {"path": str(root / "llm")}}
    return load_decoder(cfg.Model.model_validate(tree), torch.float32)


def test_what_a_layer_draws_is_drawn_again(tmp_path: Path) -> None:
    decoder = frozen_decoder(tmp_path)
    for layer in layers_of(decoder):
        layer.mlp = Drawing(layer.mlp)
    torch.manual_seed(0)
    inputs = torch.randn(11, 32, requires_grad=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        passed(decoder, inputs).square().sum().backward()
        found.append((inputs.grad, torch.get_rng_state()))
        inputs.grad = None
        if not isinstance(layers_of(decoder)[0], RecomputedLayer):
            recompute_layers(decoder)
    assert torch.equal(found[0][0], found[1][0])
    # What is drawn behind the pass is the same, too.
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[1][0], found[2][0])


@pytest.mark.parametrize("llm", tiny.FAMILIES)
def test_layers_that_need_no_gradient_run_once(llm: str, tmp_path: Path) -> None:
    decoder = frozen_decoder(tmp_path, llm)
    recompute_layers(decoder)
    inputs = torch.randn(11, 32)
    with runs(decoder) as counts:
        assert not passed(decoder, inputs).requires_grad
    assert counts == [1, 1]
    # The last layer alone is trained: the first needs no graph.
    trained = next(p for p in layers_of(decoder)[-1].parameters() if p.dim() == 2)
    trained.requires_grad_()
    with runs(decoder) as counts:
        passed(decoder, inputs).sum().backward()
    assert counts == [1, 2]
    assert trained.grad is not None
    trained.requires_grad_(False)
    with runs(decoder) as counts:
        passed(decoder, inputs.requires_grad_()).sum().backward()
    assert counts == [2, 2]


def test_layers_that_are_not_found_are_an_error(tmp_path: Path) -> None:
    decoder = frozen_decoder(tmp_path)
    decoder.config.num_hidden_layers = 7
    with pytest.raises(
        ValueError, match=r"checkpointing: LlamaForCausalLM has no list of 7 layers"
    ):
        recompute_layers(decoder)


def deep(root: Path, kind: str, layers: int, width: int = 64) -> AutoConfig:
    """A decoder folder of more layers than the tiny ones have."""
    tokens = len(tiny.tokenizer(root / "llm"))
    shape = {"hidden_size": width, "num_attention_heads": 4, "vocab_size": tokens}
    if kind == "llama":
        shape |= {"intermediate_size": 3 * width}
    config = AutoConfig.for_model(kind, num_hidden_layers=layers, eos_token_id=2, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "llm")
    return config


@pytest.mark.parametrize(
    ("kind", "train"), [("llama", "none"), ("bloom", "none"), ("llama", "full")]
)
def test_planned_activations_shrink_as_measured_ones(kind: str, train: str, tmp_path: Path) -> None:
    deep(tmp_path, kind, layers=10)
    tiny.encoder(tmp_path / "encoder")
    tree = tiny.config(tmp_path)
    tree["model"]["decoder"]["train"] = train
    found = []
    for again in (False, True):
        tree["model"]["decoder"]["checkpointing"] = again
        config = cfg.parse(tree, "tiny")
        plan = Planned(config)
        batch = plan.typical.batch(600)
        model = build(config.model, "fp32", seed=1, losses=config.losses).train()
        for p in model.trained().values():  # as the plan has them: they are counted elsewhere
            p.grad = torch.zeros_like(p)
        with Live() as live:
            model(batch).sum().backward()
        peak = plan.peak(600)
        assert peak == pytest.approx(live.peak, rel=0.02)
        found.append(peak)
    assert found[1] < 0.4 * found[0]


def test_frozen_weights_keep_nothing_when_a_layer_is_run_again(tmp_path: Path) -> None:
    """The layer's own peak in its backward: frozen, its products' inputs are not in it."""
    peaks = []
    for trained in (False, True):
        deep(tmp_path, "llama", layers=1)
        decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
        prepare(decoder)
        recompute_layers(decoder.requires_grad_(False))
        for module in decoder.modules():
            if isinstance(module, nn.Linear):
                module.requires_grad_(trained)
        inputs = torch.randn(11, 64, requires_grad=True)
        with Live() as live:
            out = passed(decoder, inputs).sum()
            # The weights' own gradients are not computed: what is kept for them is all there is.
            torch.autograd.grad(out, inputs)
        peaks.append(live.peak)
    # At least the widest, that of `down_proj`; others are alive at a frozen layer's peak anyway.
    assert peaks[1] - peaks[0] >= 4 * 11 * 3 * 64


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_the_operations_of_running_again(kind: str, tmp_path: Path) -> None:
    layers, width, length = 3, 64, 11
    deep(tmp_path, kind, layers, width)
    backward = []
    for again in (False, True):
        decoder = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").requires_grad_(False)
        prepare(decoder.eval())
        if again:
            recompute_layers(decoder)
        out = passed(decoder, torch.randn(length, width, requires_grad=True)).sum()
        with FlopCounterMode(display=False) as counter:
            out.backward()
        backward.append(counter.get_total_flops())
    tiny.encoder(tmp_path / "encoder")
    tree = tiny.config(tmp_path)
    tree["model"]["decoder"]["checkpointing"] = True
    plan = planned(cfg.parse(tree, "tiny"), 1, None)["flops_per_token"]
    assert 0.45 * plan["decoder"] < plan["decoder, again"] < 0.55 * plan["decoder"]
    parts = cfg.parse(tree, "tiny")
    model = build(parts.model, "fp32", seed=1)
    flops = Flops(model.encoder, model.adapter, decoder)  # type: ignore[arg-type]
    weights = flops.again(Rows((), (), (1,) * length, 0, read=(7, 7)))
    pairs = length * 4 * width * layers  # of each position with itself alone
    # What torch leaves out: the last product of each layer.
    last = 2 * length * width * (3 if kind == "llama" else 4) * width * layers
    found = backward[1] - backward[0] - _attention(decoder, length)
    assert weights.forward == 0
    assert found == weights.backward - pairs - last


def _attention(decoder: PreTrainedModel, length: int) -> int:
    """Operations of attention's forward as torch counts them: none for a CPU's own kernel."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        passed(decoder, torch.randn(length, decoder.config.hidden_size))
    linear = sum(
        2 * m.weight.numel() * length
        for m in layers_of(decoder).modules()
        if isinstance(m, nn.Linear)
    )
    return int(counter.get_total_flops()) - linear


def on_ranks(root: Path, llm: str, *cases: str) -> None:
    """Two ranks, of which one has a dummy: the same bits, and frozen weights gathered as often."""
    mix.World(root, LOSSES, llm)
    zero = {"zero_optimization": recompute_on_ranks.ZERO}
    (root / "zero.json").write_text(json.dumps(zero))
    launch("tests/train/recompute_on_ranks.py", root, *cases, ranks=2)
    for case in cases:
        found = torch.load(root / f"{case}.pt")
        kept, again = found["kept"], found["again"]
        assert again["means"] == kept["means"]
        assert again["moments"].keys() == kept["moments"].keys()
        for name, moment in kept["moments"].items():
            assert torch.equal(again["moments"][name], moment), (case, name)
        # Three micro-batches; where there is a teacher, it reads each of them once.
        assert kept["runs"] == (3 if case == "full" else 6)
        assert again["runs"] == kept["runs"] + 3
        assert again["gathers"][0] == again["gathers"][1]
        # The policy partitions each weight as soon as a module has run: so this is the most there
        # can be. What is trained is gathered once more where it does.
        if case == "frozen":
            assert sorted(again["gathers"][0]) == sorted(kept["gathers"][0])


@pytest.mark.slow
def test_two_ranks_with_a_dummy_equal_those_that_keep_all(tmp_path: Path) -> None:
    on_ranks(tmp_path, "llama", "frozen")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("llm", "cases"), [("llama", ("lora", "full")), ("bloom", ("frozen", "lora", "full"))]
)
def test_other_ranks_equal_those_that_keep_all(
    llm: str, cases: tuple[str, ...], tmp_path: Path
) -> None:
    on_ranks(tmp_path, llm, *cases)


@pytest.mark.slow
def test_a_run_equals_the_one_that_keeps_all(workspace: Workspace) -> None:
    """Three bins on two ranks: each step has an empty one."""
    policy = workspace.root / "partitioned.json"
    policy.write_text(json.dumps({"zero_optimization": recompute_on_ranks.ZERO}))
    for name, again in (("kept", False), ("again", True)):
        config = workspace.config(
            f"layers-{name}", train__engine=str(policy), data__bins_per_step=3,
            data__share_prompts=True,
        )  # fmt: skip
        launch(
            "train/main.py", config, "--set", f"model.decoder.checkpointing={again}",
            "--set", "train.steps=6", ranks=2,
        )  # fmt: skip
    assert workspace.curve("layers-again") == workspace.curve("layers-kept")
    assert same_weights(workspace, "layers-again", "layers-kept")
