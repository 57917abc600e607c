"""Instance filters: one contract for all of them, and what the early instance filter does on its own."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

import edgetrain as et
from edgetrain.devices import load_profile
from edgetrain.errors import CheckpointError, MemoryBudgetError, UsageError
from edgetrain.filters import Judge
from edgetrain.filters.base import KeptShare
from edgetrain.graph import Graph
from edgetrain.policies import parse_policy, policy_names

SHAPE, CLASSES = (1, 8, 8), 3
PROFILE = load_profile("generic-x86_64")
FILTERS = {
    "eif": et.EarlyInstanceFilter(rate=0.3, start=64),
    "eif-hard": et.EarlyInstanceFilter(rate=0.3, start=64, labels="hard"),
    "eif-top": et.EarlyInstanceFilter(rate=0.3, start=64, power=math.inf),
    "selective": et.SelectiveBackprop(rate=0.3),
    "selective-top": et.SelectiveBackprop(rate=0.3, rule="top"),
    "random": et.RandomFilter(rate=0.3),
}
JUDGE = Judge(lambda x, y: np.ones(len(y)), 10_000, lambda: 10_000)
EVERY_FILTER = pytest.mark.parametrize("name", FILTERS)


def network(seed: int = 0, channels: int = 16) -> Graph:
    rng = np.random.default_rng(seed)
    graph = Graph("small", input_shape=SHAPE)
    weight = graph.parameter("conv.weight", rng.normal(0, 0.3, (channels, 1, 3, 3)))
    x = graph.add("Relu", [graph.add("Conv", ["input", weight], name="conv", kernel_shape=[3, 3], pads=[1] * 4)])
    x = graph.add("Flatten", [graph.add("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])])
    dense = [graph.parameter("fc.weight", rng.normal(0, 0.1, (CLASSES, 16 * channels))),
             graph.parameter("fc.bias", np.zeros(CLASSES))]  # fmt: skip
    graph.set_outputs([graph.add("Gemm", [x, *dense], name="fc", transB=1)])
    return graph


def learner(instance_filter=None, **options) -> et.Learner:
    options = {"batch_size": 16, "threads": 1, "optimizer": et.SGD(lr=0.05, momentum=0.9)} | options
    return et.Learner(network(), PROFILE, instance_filter=instance_filter, **options)


def instances(count: int, seed: int = 0, hard: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return images whose brightest quarter tells the class, labels, and which have a wrong label: always hard."""
    rng = np.random.default_rng((seed, count))
    y = rng.integers(0, CLASSES, count)
    x = rng.normal(0, 0.3, (count, *SHAPE)).astype(np.float32)
    for label in range(CLASSES):
        x[y == label, :, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 1
    odd = rng.random(count) < hard
    x[odd] *= -1  # what the class looks like is turned round, and so is visible before the network runs
    y[odd] = rng.integers(0, CLASSES, odd.sum())
    return x, y, odd


def stream_through(some: et.Learner, count: int, size: int = 40, **options) -> list[et.StepResult]:
    x, y, _ = instances(count)
    return [some.observe(x[i : i + size], y[i : i + size], **options) for i in range(0, count, size)]


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_the_early_filter_may_keep_everything(labels):
    """No loss is expected to be low then; those that are have a weight all the same."""
    some = learner(et.EarlyInstanceFilter(rate=1.0, start=0, labels=labels))
    results = stream_through(some, 800)
    assert sum(result.instances_kept for result in results) == 800
    assert math.isfinite(some.stream.facts["threshold"])


# ---- the contract ----------------------------------------------------------------------------------------------------


@EVERY_FILTER
@pytest.mark.parametrize("size", [1, 40])
def test_of_a_picture_that_stands_still_the_wanted_share_is_kept(name, size):
    some, (x, y, _) = learner(FILTERS[name]), instances(1)
    x, y = np.repeat(x, size, 0), np.repeat(y, size)
    for _ in range(2000 // size):
        some.observe(x, y)
    kept, first = some.stream.totals["train"].instances_kept, some.instance_filter.start
    assert (kept - first) / (2000 - first) == pytest.approx(0.3, abs=0.05)


@EVERY_FILTER
@pytest.mark.parametrize("size", [1, 40])
def test_the_kept_share_converges_to_the_target(name, size):
    some = learner(FILTERS[name])
    count = 4000 if size > 1 else 1500
    stream_through(some, 1500)
    before = some.stream.totals["train"].instances_kept
    stream_through(some, count, size)
    share = (some.stream.totals["train"].instances_kept - before) / count
    assert share == pytest.approx(0.3, abs=0.05)


@EVERY_FILTER
def test_every_operation_is_accounted_for(name):
    some = learner(FILTERS[name])
    forward, step = some.graph.macs(), some.plans.step_macs
    for result in stream_through(some, 1200):
        assert result.macs_dense - result.macs_done == result.saved_filter
        trained = result.instances_trained * step
        assert result.macs_done == trained + result.macs_selection
        assert result.macs_dense == trained + (result.instances_seen - result.instances_kept) * step
        assert result.instances_kept <= result.instances_seen
        if name.startswith("selective"):
            assert result.macs_selection == result.instances_seen * forward
        if name == "random":
            assert result.macs_selection == 0
    total = some.stream.totals["train"]
    assert total.instances_seen == 1200
    assert total.instances_kept == total.instances_trained + some.stream.waiting


@EVERY_FILTER
def test_the_same_seed_gives_the_same_parameters_whatever_the_threads(name):
    def run(**options) -> dict[str, bytes]:
        some = learner(FILTERS[name], **options)
        stream_through(some, 600)
        return {key: array.tobytes() for key, array in some.parameters().items()}

    first = run(seed=1)
    assert run(seed=1, threads=2) == first
    if name != "selective-top":  # nothing in it is left to chance
        assert run(seed=2) != first


@pytest.mark.parametrize(("stored", "own"), [
    ("random:rate=0.5", "eif:rate=0.5,start=8"), ("selective:rate=0.5", "random:rate=0.5"),
    ("eif:rate=0.5,start=8,cells=4", "eif:rate=0.5,start=8,cells=8"), ("none", "random:rate=0.5"),
    ("random:rate=0.5", "none"),
])  # fmt: skip
def test_the_state_of_another_filter_is_refused_and_changes_nothing(stored, own):
    x, y, _ = instances(64)
    first, second = (learner(parse_policy("filter", text)) for text in (stored, own))
    first.observe(x, y)
    before = {name: array.tobytes() for name, array in second.parameters().items()}
    with pytest.raises(CheckpointError, match="the state belongs to another"):
        second.restore(*first.state())
    assert {name: array.tobytes() for name, array in second.parameters().items()} == before
    assert (second.step_count, second.stream.position) == (0, 0)


@EVERY_FILTER
def test_a_restored_learner_decides_as_the_first_would_have(name, tmp_path):
    x, y, _ = instances(1500)
    whole = learner(FILTERS[name])
    whole.observe(x[:777], y[:777])
    whole.save(tmp_path / "middle.safetensors")
    again = et.Learner.load(tmp_path / "middle.safetensors")
    assert again.instance_filter == FILTERS[name]
    assert (again.stream.waiting, again.stream.position) == (whole.stream.waiting, 777)
    for start in range(777, 1500, 50):
        results = [some.observe(x[start : start + 50], y[start : start + 50]) for some in (whole, again)]
        assert [r.instances_kept for r in results] == [results[0].instances_kept] * 2
    for key, array in whole.parameters().items():
        assert array.tobytes() == again.parameters()[key].tobytes(), key


@EVERY_FILTER
def test_fit_trains_on_full_batches_of_kept_instances(name):
    x, y, _ = instances(1000)
    some, sizes = learner(FILTERS[name]), []
    partial_fit = some.partial_fit
    some.partial_fit = lambda x, y: sizes.append(len(y)) or partial_fit(x, y)
    history = some.fit((x, y), epochs=3)
    assert [record.instances_seen for record in history.epochs] == [1000] * 3
    assert sum(record.instances_trained for record in history.epochs) == sum(sizes)
    assert history.epochs[-1].instances_trained == pytest.approx(300, abs=60)
    assert sum(size < 16 for size in sizes) <= 3, "only the last batch of an epoch may be smaller"


@EVERY_FILTER
def test_fit_goes_on_exactly_in_the_middle_of_an_epoch(name, tmp_path):
    x, y, _ = instances(1000)
    whole, stopped, asked = learner(FILTERS[name]), learner(FILTERS[name]), []
    whole.fit((x, y), epochs=2)
    stopped.fit((x, y), epochs=2, should_stop=lambda: asked.append(0) or len(asked) > 7)
    assert not stopped.history.finished
    stopped.save(tmp_path / "stopped.safetensors")
    again = et.Learner.load(tmp_path / "stopped.safetensors")
    again.fit((x, y), epochs=2)
    for key, array in whole.parameters().items():
        assert array.tobytes() == again.parameters()[key].tobytes(), key


@EVERY_FILTER
@pytest.mark.parametrize("size", [1, 37, 600])
def test_exactly_the_first_instances_pass_however_many_come_at_a_time(name, size):
    some, (x, y, _) = learner(replace(FILTERS[name], start=64)), instances(600)
    kept = []
    choose = some.stream._choose
    some.stream._choose = lambda x, y, losses: kept.append(choose(x, y, losses)) or kept[-1]
    for i in range(0, 600, size):
        some.observe(x[i : i + size], y[i : i + size])
    keep = np.concatenate([choice.keep for choice in kept])
    assert keep[:64].all()
    assert keep[64:].mean() < 0.45


@EVERY_FILTER
def test_partial_fit_takes_exactly_its_batch(name):
    filtered, plain = learner(FILTERS[name]), learner()
    x, y, _ = instances(16)
    assert filtered.partial_fit(x, y).instances_trained == 16
    plain.partial_fit(x, y)
    for key, array in plain.parameters().items():
        assert array.tobytes() == filtered.parameters()[key].tobytes()


@EVERY_FILTER
def test_a_filter_works_for_regression(name):
    x, _, _ = instances(600)
    y = np.stack([x.mean((1, 2, 3)), x.max((1, 2, 3)), x.min((1, 2, 3))], 1)
    some = learner(FILTERS[name], loss="mse", optimizer=et.SGD(lr=0.01))
    results = [some.observe(x[i : i + 50], y[i : i + 50], predict=i >= 300) for i in range(0, 600, 50)]
    assert sum(r.instances_trained for r in results) > 100
    assert results[-1].loss < results[6].loss * 2
    assert math.isfinite(results[-1].loss)


@pytest.mark.parametrize("bad", [{"rate": 0.0}, {"rate": 1.5}, {"rate": math.nan}, {"start": -1}, {"start": 0.5}])
@pytest.mark.parametrize("kind", [et.EarlyInstanceFilter, et.SelectiveBackprop, et.RandomFilter])
def test_settings_out_of_range_are_refused(kind, bad):
    (key,) = bad
    with pytest.raises(UsageError, match=f"{kind.__name__}: {key}="):
        kind(**bad)


@pytest.mark.parametrize("power", [100.0, 160.0, 1000.0, math.inf])
def test_large_powers_of_small_scores_keep_the_share(power):
    share = KeptShare(0.3)
    assert share.probabilities(np.full(512, 0.01), power).mean() == pytest.approx(0.3, abs=1e-3)
    assert share.probabilities(np.linspace(0.01, 0.3, 512), power)[-100:].mean() > 0.9


def test_what_waits_for_a_label_and_cannot_be_predicted_is_left_out():
    some = learner(et.EarlyInstanceFilter(rate=0.3, start=0, uncertain=1.0))
    selector, (x, y, _) = some.stream._selector, instances(400)
    some.observe(x[:40], y[:40])
    selector._queue.add(np.full((1, *SHAPE), 3e38, np.float32), y[:1], np.ones(1), np.full(1, -1.0))
    waited, results = selector._queue.count, [some.observe(x[i : i + 40], y[i : i + 40]) for i in range(40, 400, 40)]
    assert waited > 1
    assert selector._queue.count < 256
    assert math.isfinite(selector.facts["threshold"])
    assert sum(result.instances_uncertain for result in results) > 100


def test_a_label_that_cannot_be_had_is_paid_for():
    some = learner(et.EarlyInstanceFilter(rate=0.3, start=0))
    selector, (_, y, _) = some.stream._selector, instances(1)
    selector._queue.add(np.full((1, *SHAPE), 3e38, np.float32), y, np.ones(1), np.full(1, -1.0))
    lesson = selector._lessons()
    assert (lesson.uncertain, lesson.macs) == (1, some.graph.macs())


@pytest.mark.parametrize("kind", [et.EarlyInstanceFilter, et.SelectiveBackprop, et.RandomFilter])
def test_networks_with_several_inputs_are_refused_when_the_learner_is_made(kind):
    graph = Graph("two", input_shape=(4,))
    x = graph.add("Add", ["input", graph.add_input("more", (4,))])
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("w", np.ones((2, 4)))], transB=1)])
    with pytest.raises(UsageError, match=f"{kind.__name__}: the network 'two' has the inputs input, more"):
        et.Learner(graph, instance_filter=kind())
    some = et.Learner(graph)
    with pytest.raises(UsageError, match="fit takes networks with one input, 'two' has input, more; use"):
        some.fit(({"input": np.ones((3, 4)), "more": np.ones((3, 4))}, [0, 1, 0]), 1)


def test_every_filter_of_the_table_has_been_tested():
    assert {parse_policy("filter", name).name for name in policy_names("filter")} == {f.name for f in FILTERS.values()}


# ---- keeping the share -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 2.0, math.inf])
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_probabilities_average_to_the_rate_and_rise_with_the_score(power, rate):
    share, rng = KeptShare(rate), np.random.default_rng(0)
    scores = np.sort(rng.random(512) ** 3)
    probabilities = share.probabilities(scores, power)
    assert probabilities.mean() == pytest.approx(rate, abs=2e-3)
    assert all(a <= b for a, b in pairwise(probabilities))
    assert 0 <= probabilities.min() <= probabilities.max() <= 1


@pytest.mark.parametrize("count", [1, 40, 600])
def test_without_ties_ranks_and_thresholds_are_the_plain_ones(count):
    share, rng = KeptShare(0.3), np.random.default_rng(count)
    for _ in range(5):
        scores = rng.random(count)
        found = share.probabilities(scores, math.inf)
        plain = np.searchsorted(np.sort(share.recent), scores, "right") / len(share.recent)
        assert share.quantiles(scores).tobytes() == plain.tobytes()
        assert found.tobytes() == (scores >= np.quantile(share.recent, 1 - share.level(count))).astype(float).tobytes()


def test_equal_scores_share_the_middle_of_their_ranks_and_what_the_larger_leave():
    share, scores = KeptShare(0.5), np.array([5.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0, 9.0])
    assert share.probabilities(scores, math.inf).tolist() == [1, 0, *[0.4] * 5, 1]  # 2 of the wanted 4 are larger
    assert share.quantiles(scores).tolist() == [7 / 8, 1 / 8, *[4 / 8] * 5, 1]


def test_what_was_kept_too_much_is_made_up_for():
    share = KeptShare(0.3)
    share.count(np.ones(100, bool))
    assert share.level(1) < 0.3
    share.count(np.zeros(400, bool))
    assert share.level(1) > 0.3


def test_no_more_is_made_up_for_than_a_block_or_so():
    """Else nearly nothing would pass for long after pictures that were all new, and nearly all after dull ones."""
    share = KeptShare(0.3)
    for keep, sign in ((np.ones(64, bool), 1), (np.zeros(64, bool), -1)):
        for _ in range(50):
            share.count(keep)
        assert share.surplus == sign * 128
    share.count(np.ones(1000, bool))
    assert share.surplus == pytest.approx(700 - 128)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("block", [1, 40, 128, 256, 700, 3000])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", ["eif", "selective", "selective-top"])
def test_the_share_is_kept_whatever_comes_at_a_time(kind, ordered, block, rate):
    share, rng, kept = KeptShare(rate), np.random.default_rng(block), []
    for _ in range(max(20, 6000 // block)):
        scores = rng.exponential(size=block) * np.where(np.arange(block) < 0.7 * block, 1, 3 if ordered else 1)
        if kind == "selective":
            share.remember(scores)
            probabilities = share.quantiles(scores) ** (1 / share.level(block) - 1)
        else:
            probabilities = share.probabilities(scores, math.inf if kind == "selective-top" else 1.25)
        kept.append(rng.random(block) < probabilities)
        share.count(kept[-1])
    shares = np.array([keep.mean() for keep in kept[len(kept) // 4 :]])
    assert shares.mean() == pytest.approx(rate, abs=0.1 * rate + 0.003)
    if block >= 256:  # and no block makes up for more than the ones before kept too much
        assert abs(shares - rate).max() < 6 * (2 * rate * (1 - rate) / min(block, 512)) ** 0.5


def test_what_waits_for_labels_follows_the_instances_not_the_calls():
    x, y, _ = instances(4096)
    entropies = []
    for block in (256, 4096):
        some = learner(et.EarlyInstanceFilter(start=0))
        selector = some.stream._selector
        for _ in range(0, 4096, block):
            selector._put_aside((x[:block], y[:block], np.zeros(block)), np.full(block, 0.01), np.ones(block, bool))
        entropies.append(selector._entropy)
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-6) and entropies[0] < 0.47


# ---- the early instance filter ---------------------------------------------------------------------------------------


def test_it_finds_the_hard_instances():
    some, (x, y, odd) = learner(FILTERS["eif"]), instances(4000)
    kept = []
    choose = some.stream._choose
    some.stream._choose = lambda x, y, losses: kept.append(choose(x, y, losses)) or kept[-1]
    for i in range(0, 4000, 40):
        some.observe(x[i : i + 40], y[i : i + 40])
    late = np.concatenate([choice.keep for choice in kept])[2000:]
    assert late[odd[2000:]].mean() > 1.5 * late[~odd[2000:]].mean()


def dense_network(seed: int = 0) -> Graph:
    rng, graph = np.random.default_rng(seed), Graph("dense", input_shape=SHAPE)
    x, width = graph.add("Flatten", ["input"]), 64
    for size in (128, 64, CLASSES):
        weight = graph.parameter(f"weight{size}", rng.normal(0, (2 / width) ** 0.5, (size, width)))
        x, width = graph.add("Gemm", [x, weight, graph.parameter(f"bias{size}", np.zeros(size))], transB=1), size
        x = x if size == CLASSES else graph.add("Relu", [x])
    graph.set_outputs([x])
    return graph


@pytest.mark.parametrize("name", ["eif", "eif-hard", "selective"])
@pytest.mark.parametrize("make", [network, dense_network])
def test_of_a_rare_new_kind_more_are_kept_than_by_chance(make, name):
    """Behind 2,000 instances of one kind every tenth is turned round and has another label."""
    shares = []
    for seed in range(6):
        some, keep = et.Learner(make(seed), PROFILE, batch_size=16, threads=1, seed=seed, instance_filter=FILTERS[name],
                                optimizer=et.SGD(lr=0.05, momentum=0.9)), []  # fmt: skip
        x, y, _ = instances(3000, seed, hard=0.0)
        new = (np.arange(3000) >= 2000) & (np.random.default_rng(seed).random(3000) < 0.1)
        x[new], y[new] = -x[new], (y[new] + 1) % CLASSES
        choose = some.stream._choose
        some.stream._choose = lambda *args, choose=choose, keep=keep: keep.append(choose(*args)) or keep[-1]
        for i in range(0, 3000, 40):
            some.observe(x[i : i + 40], y[i : i + 40])
        kept = np.concatenate([choice.keep for choice in keep])
        shares.append((kept[new].mean(), kept[2000:].mean()))
    of_new, of_all = np.mean(shares, 0)
    assert of_all == pytest.approx(0.3, abs=0.03)
    assert of_new > 1.15 * of_all  # chance alone: 0.3, with a deviation of 0.02


def test_everything_passes_at_the_start():
    some = learner(et.EarlyInstanceFilter(rate=0.2, start=200))
    results = stream_through(some, 400, 40)
    assert [r.instances_kept for r in results[:5]] == [40] * 5
    assert sum(r.instances_kept for r in results[5:]) < 100


def test_the_filter_takes_a_twentieth_of_the_network_and_no_more():
    settings = et.EarlyInstanceFilter()
    whole = settings.network((3, 32, 32), 10**9).macs()
    smaller = settings.network((3, 32, 32), 20 * whole - 1).macs()
    assert smaller < whole == settings.network((3, 32, 32), 20 * whole).macs()
    assert settings.network((3, 32, 32), 20 * smaller).macs() == smaller
    for main in np.geomspace(2_000, 10**6, 40).astype(int):
        assert settings.network((1, 8, 8), int(main)).macs() <= 0.05 * main


def test_the_threshold_follows_the_losses_of_all_by_their_weights():
    """One high loss that stands for eight says more than eight low ones: an unweighted share would be a ninth."""
    some = learner(et.EarlyInstanceFilter(rate=0.3, start=0))
    stream_through(some, 80)
    judge = some.stream._selector
    judge._threshold = 1.0
    judge._follow(np.array([2.0] + 8 * [0.5]), np.array([8.0] + 8 * [1.0]))
    assert judge._threshold == pytest.approx(math.exp(0.1 / 64 * 9 * (0.5 - 0.3)))


def test_the_threshold_falls_as_the_network_learns():
    some = learner(FILTERS["eif"])
    thresholds = []
    for _ in range(8):
        stream_through(some, 800)
        thresholds.append(some.stream.facts["threshold"])
    assert thresholds[-1] < 0.7 * thresholds[0]


def test_uncertain_instances_are_judged_and_paid_for():
    none = learner(et.EarlyInstanceFilter(rate=0.3, start=0, uncertain=0.0))
    some = learner(et.EarlyInstanceFilter(rate=0.3, start=0, uncertain=0.2))
    without, judged = (sum(r.instances_uncertain for r in stream_through(each, 2000)) for each in (none, some))
    assert without == 0
    assert judged == pytest.approx(0.2 * 0.7 * 2000, rel=0.3)
    totals = [each.stream.totals["train"] for each in (none, some)]
    spent = totals[1].macs_selection - totals[0].macs_selection
    assert spent > judged * some.graph.macs()


@pytest.mark.parametrize("predict", [False, True], ids=["train", "predict"])
def test_the_whole_cost_of_the_filter_is_counted(predict):
    some, steps = learner(et.EarlyInstanceFilter(rate=0.3, start=40, uncertain=0.2)), []
    own = some.stream._selector._learner
    partial_fit = own.partial_fit
    own.partial_fit = lambda x, y: steps.append(partial_fit(x, y)) or steps[-1]
    results = stream_through(some, 840, predict=predict)
    assert results[0].macs_selection == 0  # the first instances pass unseen
    uncertain, training = sum(r.instances_uncertain for r in results), sum(step.macs_done for step in steps)
    assert (uncertain > 0) != predict
    assert training == sum(step.instances_trained for step in steps) * own.plans.step_macs > 0
    spent = 800 * own.graph.macs() + uncertain * some.graph.macs() + training
    assert sum(r.macs_selection for r in results) == spent


def test_the_less_sure_a_prediction_is_the_likelier_is_its_label_asked_for():
    selector = et.EarlyInstanceFilter(rate=0.3, uncertain=0.1).selector(learner(), JUDGE)
    scores = np.repeat([0.02, 0.5, 0.9], 2000)
    x, y, rejected = np.zeros((6000, *SHAPE), np.float32), np.repeat([0, 1, 2], 2000), np.ones(6000, bool)
    selector._put_aside((x, y, np.full(6000, -1.0)), scores, rejected)
    _, kinds, weights, _ = selector._queue.take()
    entropy = -scores * np.log(scores) - (1 - scores) * np.log(1 - scores)
    wanted = 0.1 * (entropy + 0.01)[::2000] / selector._entropy
    for kind, chance in enumerate(wanted):
        assert (kinds == kind).sum() == pytest.approx(2000 * chance, rel=0.2)
        np.testing.assert_allclose(weights[kinds == kind], 1 / chance)
    assert wanted[1] > 2 * wanted[2] > 4 * wanted[0]


def test_of_hard_labels_each_kind_weighs_as_much_as_the_other():
    selector, lessons = FILTERS["eif-hard"].selector(learner(), JUDGE), []
    train = selector._train
    selector._train = lambda x, target, weights: lessons.append((target, weights)) or train(x, target, weights)
    x, y, _ = instances(100)
    selector._lesson(x, y, np.ones(100), np.arange(100.0))
    ((target, weights),) = lessons
    assert target.tolist() == [0.0] * 70 + [1.0] * 30
    np.testing.assert_allclose(weights, [0.5 / 0.7] * 70 + [0.5 / 0.3] * 30)


def test_losses_known_from_predicting_cost_no_forward_pass():
    some = learner(et.EarlyInstanceFilter(rate=0.3, start=0, uncertain=0.2))
    results = stream_through(some, 800, predict=True)
    assert sum(r.instances_uncertain for r in results) == 0
    assert sum(r.macs_selection for r in results) < 0.2 * 800 * some.graph.macs()


@pytest.mark.parametrize("model", ["lenet5", "resnet8", "mobilenet_v1_0.25", "ds_cnn", "cnn1d"])
def test_the_filter_takes_at_most_a_twentieth_of_the_forward_pass(model):
    from edgetrain.catalog import build_model

    graph = build_model(model)
    tiny = et.EarlyInstanceFilter().network(graph.input_shape, graph.macs())
    assert 0 < tiny.macs() <= 0.05 * graph.macs()
    assert tiny.output_shape == (1,)


def test_its_size_can_be_chosen():
    tiny = et.EarlyInstanceFilter(cells=2, hidden=5).network((1, 8, 8), 100)
    assert tiny.arrays["hidden.weight"].shape == (5, 4)


def test_a_network_too_small_for_a_filter_is_refused():
    with pytest.raises(UsageError, match="only 30 multiply-accumulates"):
        et.EarlyInstanceFilter().network((1, 8, 8), 30)


def test_a_learner_whose_network_is_too_small_for_its_filter_is_not_made():
    graph = Graph("tiny", input_shape=(1, 8, 8))
    x = graph.add("Flatten", [graph.add("AveragePool", ["input"], kernel_shape=[8, 8])])
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("w", np.ones((3, 1)))], transB=1)])
    with pytest.raises(UsageError, match="only 3 multiply-accumulates"):
        et.Learner(graph, PROFILE, instance_filter=et.EarlyInstanceFilter())
    chosen = et.EarlyInstanceFilter(start=0, cells=1, hidden=1)
    x, y, _ = instances(16)
    assert et.Learner(graph, PROFILE, instance_filter=chosen).observe(x, y).instances_seen == 16


def test_a_filter_runs_on_the_threads_of_the_main_learner():
    some, (x, y, _) = learner(et.EarlyInstanceFilter(rate=0.3, start=0)), instances(64)
    for threads in (2, 1):
        some.threads = threads
        some.observe(x, y)
        team = some.stream._selector._learner.plans.team
        assert team is some.plans.team
        assert team.threads == threads


def test_the_queue_of_lessons_is_bounded_where_next_to_nothing_is_kept():
    some = learner(et.EarlyInstanceFilter(rate=0.01, start=0, uncertain=1.0))
    x, y, _ = instances(1000)
    longest = uncertain = 0
    for _ in range(3):
        for i in range(0, 1000, 20):
            uncertain += some.observe(x[i : i + 20], y[i : i + 20]).instances_uncertain
            longest = max(longest, some.stream._selector._queue.count)
    assert longest < 256
    assert some.stream.totals["train"].instances_uncertain == uncertain > 2500
    assert some.step_count < 3


def test_a_state_does_not_change_when_the_filter_goes_on():
    some, (x, y, _) = learner(et.EarlyInstanceFilter(start=1000)), instances(400)
    some.observe(x[:100], y[:100])
    tensors, _ = some.state()
    before = {name: array.copy() for name, array in tensors.items()}
    assert any("queue" in name for name in tensors)
    for start in range(100, 400, 20):
        some.observe(x[start : start + 20], y[start : start + 20])
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_a_long_queue_is_learned_from_in_steps_of_a_planned_size():
    some, (x, y, _) = learner(et.EarlyInstanceFilter(rate=0.01, start=0, uncertain=1.0)), instances(3000)
    sizes, own = [], some.stream._selector._learner
    partial_fit = own.partial_fit
    own.partial_fit = lambda x, y: sizes.append(len(y)) or partial_fit(x, y)
    assert some.observe(x, y).instances_uncertain > 2500
    assert sum(sizes) > 2500
    assert max(sizes) <= 256


def test_the_memory_of_a_filter_is_part_of_the_plan_and_of_the_budget():
    plain, plan = learner().memory_plan(), learner(FILTERS["eif"]).memory_plan()
    own = {name: size for name, size in plan.parts.items() if name not in plain.parts}
    assert {name: plan.parts[name] for name in plain.parts} == plain.parts
    assert list(own) == ["waiting instances", "filter network", "filter queue"]
    assert own["waiting instances"] == 16 * (4 * 64 + 8)
    some, (x, y, _) = learner(FILTERS["eif"], memory_budget=plan.peak_bytes), instances(400)
    some.observe(x, y)
    assert own["filter network"] == some.stream._selector._learner.memory_plan(256).peak_bytes
    tight = learner(FILTERS["eif"], memory_budget=plan.peak_bytes - 1)
    with pytest.raises(MemoryBudgetError, match="filter network"):
        tight.observe(x, y)


def test_the_filter_computes_with_the_threads_of_its_learner():
    some, (x, y, _) = learner(et.EarlyInstanceFilter(start=0)), instances(16)
    some.threads = 2
    some.observe(x, y)
    assert some.stream._selector._learner.threads == 2


def test_the_weight_of_an_instance_multiplies_its_squared_error():
    selector = FILTERS["eif"].selector(learner(), JUDGE)
    tiny, x = selector._learner, instances(2)[0]
    roots, target = np.sqrt([3.0, 0.5]), np.array([0.9, 0.2])
    given = (roots * target).astype(np.float32)[:, None]
    both = tiny.gradients(selector._inputs(x, roots), given)["hidden.weight"]
    singles = [tiny.gradients(selector._inputs(x[i : i + 1], np.ones(1)), target[i : i + 1, None].astype(np.float32))
               for i in range(2)]  # fmt: skip
    expected = (3.0 * singles[0]["hidden.weight"] + 0.5 * singles[1]["hidden.weight"]) / 2
    np.testing.assert_allclose(both, expected, rtol=1e-4, atol=1e-7)
