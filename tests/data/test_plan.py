"""The plan: exact, pure, within its budgets, well filled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.audio import SAMPLE_RATE
from data.packing import best_fit, level
from data.plan import Plan, bins_of


def made_plan(shards, tokens, samples, seed=0, budget=(64, 4.0), bins=3, window=2, **more) -> Plan:
    shard_of = np.repeat(np.arange(len(shards)), shards)
    return Plan(
        shard_of,
        np.asarray(tokens),
        np.asarray(samples),
        seed=seed,
        tokens_per_bin=budget[0],
        seconds_per_bin=budget[1],
        bins_per_step=bins,
        window_shards=window,
        **more,
    )


@st.composite
def plans(draw) -> tuple[Plan, np.ndarray, np.ndarray]:
    shards = draw(st.lists(st.integers(0, 13), min_size=0, max_size=7))
    total = sum(shards)
    tokens = np.array(draw(st.lists(st.integers(0, 70), min_size=total, max_size=total)), int)
    samples = np.array(draw(st.lists(st.integers(1, 70_000), min_size=total, max_size=total)), int)
    plan = made_plan(
        shards,
        tokens,
        samples,
        seed=draw(st.sampled_from([0, 1, 2**63, 2**64 - 1])),
        bins=draw(st.integers(1, 7)),
        window=draw(st.integers(1, 4)),
    )
    return plan, tokens, samples


@given(plans(), st.integers(0, 3))
def test_exact_and_within_both_budgets(made, epoch) -> None:
    plan, tokens, samples = made
    steps = list(plan.iterate(epoch))
    assert len(steps) == plan.steps_in_epoch(epoch)
    assert all(len(bins) == plan.bins_per_step for bins in steps)
    trained = [i for bins in steps for bin in bins for i in bin.tolist()]
    skipped = [i for i, _ in plan.skipped(epoch)]
    assert sorted(trained + skipped) == list(range(len(tokens)))
    for bins in steps:
        for bin in bins:
            assert tokens[bin].sum() <= 64
            assert samples[bin].sum() <= 4 * SAMPLE_RATE
    for i in skipped:
        assert tokens[i] > 64 or samples[i] > 4 * SAMPLE_RATE
    for bins in steps[:-1]:
        assert all(len(bin) for bin in bins)


@given(plans(), st.integers(1, 16), st.data())
def test_ranks_share_each_step_whole(made, world, data) -> None:
    plan, _, _ = made
    if not plan.steps_in_epoch(0):
        return
    bins = plan.step(0, data.draw(st.integers(0, plan.steps_in_epoch(0) - 1)))
    shares = [bins_of(rank, world, bins) for rank in range(world)]
    assert {len(share) for share in shares} == {-(-len(bins) // world)}
    taken = [(n, bin.tolist()) for share in shares for n, bin in share if n >= 0]
    assert sorted(taken) == [(n, bin.tolist()) for n, bin in enumerate(bins)]
    assert all(not len(bin) for share in shares for n, bin in share if n < 0)


def corpus(shards: int = 40, per_shard: int = 50) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Lengths about as LibriSpeech's: 1.5 to 35 s, most about 14."""
    draw = np.random.default_rng(0)
    total = shards * per_shard
    short = draw.random(total) < 0.35
    seconds = np.where(short, draw.uniform(1.5, 16, total), draw.normal(14, 2, total))
    samples = (np.clip(seconds, 1.5, 35) * SAMPLE_RATE).astype(np.int64)
    return [per_shard] * shards, 20 + samples * 9 // SAMPLE_RATE, samples


def test_pure_and_seekable() -> None:
    shards, tokens, samples = corpus()
    plan = made_plan(shards, tokens, samples, 5, (2048, 400))
    steps = [[b.tolist() for b in s] for s in plan.iterate(1)]
    other = made_plan(shards, tokens, samples, 5, (2048, 400))
    for i in reversed(range(len(steps))):
        assert [b.tolist() for b in other.step(1, i)] == steps[i]
    assert [[b.tolist() for b in s] for s in other.iterate(1, 2)] == steps[2:]
    with pytest.raises(IndexError):
        other.step(1, len(steps))


def test_order_is_this_one_on_any_machine() -> None:
    plan = made_plan([4, 4, 4], np.arange(12) % 5 + 10, np.full(12, 1600), seed=7)
    found = [[b.tolist() for b in step] for step in plan.iterate(0)]
    assert found == GOLDEN


GOLDEN = [[[4, 2, 1, 5], [9, 7, 6, 10], [3, 8, 11, 0]]]


def test_seed_epoch_and_budget_change_the_order() -> None:
    shards, tokens, samples = corpus()
    plan = made_plan(shards, tokens, samples, 0, (2048, 400))
    first = plan.step(0, 0)[0].tolist()
    assert first != plan.step(1, 0)[0].tolist()
    assert first != made_plan(shards, tokens, samples, 1, (2048, 400)).step(0, 0)[0].tolist()


def test_one_window_makes_other_bins_each_epoch() -> None:
    shards, tokens, samples = corpus(2, 300)
    plan = made_plan(shards, tokens, samples, 0, (2048, 400), window=8)
    bins = [{frozenset(b.tolist()) for s in plan.iterate(e) for b in s} for e in (0, 1)]
    assert len(bins[0] & bins[1]) <= 1


def test_bins_are_full_and_steps_are_even() -> None:
    shards, tokens, samples = corpus(200, 100)
    plan = made_plan(shards, tokens, samples, 0, (8192, 4000), bins=16, window=16)
    loads = np.array([[tokens[b].sum() for b in step] for step in plan.iterate(0)])
    filled = loads[loads > 0]
    assert filled.sum() / (len(filled) * 8192) >= 0.99
    whole = loads[:-1]
    assert (whole.max(1) / whole.mean(1) - 1).max() < 0.03


def test_samples_of_a_bin_come_from_few_shards_and_like_lengths() -> None:
    shards, tokens, samples = corpus(200, 100)
    plan = made_plan(shards, tokens, samples, 0, (8192, 4000), bins=4, window=10)
    bins = [b for step in plan.iterate(0) for b in step if len(b)]
    assert np.median([len(np.unique(b // 100)) for b in bins]) <= 12
    longest = sum(len(b) * samples[b].max() for b in bins)
    assert samples.sum() / longest > 0.75


def test_nothing_waits_for_ever() -> None:
    """Samples that always fill a bin badly are trained near their shard's turn, not at the end."""
    awkward = np.arange(4000) % 100 == 0
    tokens = np.where(awkward, 600, 500)
    plan = made_plan([100] * 40, tokens, np.full(4000, 16), 0, (1000, 100.0), bins=8, window=2)
    steps = list(plan.iterate(0))
    trained_at = np.concatenate([np.full(sum(map(len, s)), n) for n, s in enumerate(steps)])
    order = np.concatenate([b for s in steps for b in s])
    assert abs(trained_at[awkward[order]].mean() / trained_at.mean() - 1) < 0.15


def test_shards_come_in_another_order_each_epoch() -> None:
    plan = made_plan([10] * 20, np.full(200, 30), np.full(200, 16), bins=1, window=1)
    epochs = [np.concatenate([bins[0] for bins in plan.iterate(e)]) for e in (0, 1)]
    orders = [list(dict.fromkeys((epoch // 10).tolist())) for epoch in epochs]
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_refused_samples_are_named_and_left_out() -> None:
    plan = made_plan([4], [10, 65, 10, 10], [16, 16, 16, 70_000], refused={2: "too short"})
    assert plan.skipped(0) == [
        (1, "tokens 65 over the budget of 64 per bin"),
        (2, "too short"),
        (3, "seconds 4.375 over the budget of 4 per bin"),
    ]
    assert [b.tolist() for b in plan.step(0, 0)] == [[0], [], []]


def test_costs_may_change_with_the_epoch() -> None:
    plan = made_plan([2], [0, 0], [16, 16])
    assert plan.skipped(0) == []
    changing = Plan(
        np.zeros(2, int), lambda epoch: np.array([10, 60 + 10 * epoch]), np.array([16, 16]),
        seed=0, tokens_per_bin=64, seconds_per_bin=4, bins_per_step=1,
    )  # fmt: skip
    assert (len(changing.skipped(0)), len(changing.skipped(1))) == (0, 1)


@pytest.mark.parametrize(
    "wrong",
    [{"budget": (0, 1)}, {"budget": (1, 0)}, {"bins": 0}, {"window": 0}, {"seed": -1}],
)
def test_wrong_arguments(wrong) -> None:
    with pytest.raises(ValueError, match="but is"):
        made_plan([2], [1, 1], [1, 1], **wrong)
    with pytest.raises(ValueError, match="shard by shard"):
        Plan(
            np.array([1, 0]), np.ones(2, int), np.ones(2, int),
            seed=0, tokens_per_bin=1, seconds_per_bin=1, bins_per_step=1,
        )  # fmt: skip


@given(st.lists(st.integers(1, 100), max_size=60))
@settings(max_examples=200)
def test_best_fit_places_every_item_once(costs) -> None:
    bins = best_fit(np.array(costs, dtype=np.int64), 100)
    assert sorted(i for bin in bins for i in bin) == list(range(len(costs)))
    assert all(sum(costs[i] for i in bin) <= 100 for bin in bins)
    loads = sorted(sum(costs[i] for i in bin) for bin in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > 100


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=9), min_size=1, max_size=6))
def test_levelled_bins_hold_the_same_items_no_less_evenly(found) -> None:
    costs = np.array([cost for costs in found for cost in costs], dtype=np.int64)
    edges = np.cumsum([len(costs) for costs in found])[:-1]
    bins = np.split(np.arange(len(costs)), edges)
    dealt = level(costs, bins)
    assert len(dealt) == len(bins)
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(costs)))
    loads = [[costs[items].sum() for items in these] for these in (dealt, bins)]
    assert max(loads[0]) <= max(loads[1])


def test_level_makes_equal_bins_of_unequal_ones() -> None:
    costs = np.array([7, 6, 5, 4, 3, 2], dtype=np.int64)
    dealt = level(costs, [np.array([0, 1, 2]), np.array([3]), np.array([4, 5])])
    assert [costs[items].sum() for items in dealt] == [9, 9, 9]
    equal = [np.array([0, 5]), np.array([1, 4])]
    assert level(costs, equal) is equal


def test_a_step_of_uneven_bins_is_levelled() -> None:
    """Best fit leaves 64, 64 and 16 where 51, 48 and 45 can be had."""
    tokens = np.array([33, 32, 31, 20, 16, 12], dtype=np.int64)
    (step,) = made_plan([6], tokens, np.full(6, 16), bins=3, window=1).iterate(0)
    assert sorted(int(tokens[b].sum()) for b in step) == [45, 48, 51]
