"""bench/: input sets that defeat the caches, turns of lanes, statistics, the check of steps."""

import functools
import time

import pytest
import torch

from bench import contestants, host, measure, step, workloads


def test_input_sets_together_exceed_the_cache():
    large, medium, _ = workloads.step_workloads().values()
    cache = 36 << 20
    assert workloads.sets_to_defeat_cache(large, "adamw", "float32", cache, 99) == 1
    count = workloads.sets_to_defeat_cache(medium, "sgd", "bfloat16", cache, 99)
    assert (count - 1) * medium.numel * 3 * 2 < 6 * cache <= count * medium.numel * 3 * 2
    huge_cache = workloads.sets_to_defeat_cache(large, "adamw", "float32", 1 << 40, 99)
    assert huge_cache * large.numel * 16 <= 4e9
    mixed = workloads.sets_to_defeat_cache(medium, "adamw", workloads.MIXED, cache, 99)
    assert (mixed - 1) * medium.numel * 12 < 6 * cache <= mixed * medium.numel * 12


def test_the_in_place_pass_lies_between_two_turns_of_a_set():
    """Then fewer sets than would fill the caches are enough."""
    tiny = workloads.Workload("tiny", ((16,),))
    calls = []
    lanes = [measure.Lane({}, [measure.Runner(lambda: calls.append("pass"))])]
    count = workloads.sets_to_defeat_cache(tiny, "adamw", "float32", 36 << 20, turns=5)
    assert count == 10
    for _ in range(4):
        runners = [measure.Runner(lambda i=i: calls.append(i)) for i in range(count)]
        lanes.append(measure.Lane({}, runners))
    measure.interleave(lanes, range(40), warmup=0)
    last = {}
    for place, call in enumerate(calls):
        if call in last:
            assert "pass" in calls[last[call] : place]
        if call != "pass":
            last[call] = place
    assert len(last) == count


@pytest.mark.parametrize("clip", [False, True])
def test_operators_of_a_step_do_not_grow_with_tensors_groups_and_dtypes(clip):
    """The gate on dispatch: torch's for-loop calls some for each tensor, fusedopt none at all."""
    counts = {}
    for name in ("fusedopt", "torch-for-loop"):
        for count, groups in ((3, 1), (60, 1), (60, 20)):
            inputs = workloads.InputSet(
                workloads.Workload("w", ((8,),) * count, groups), "float32", 0
            )
            contestant = contestants.CONTESTANTS[name]
            _, run = contestant.build("adamw", inputs.param_groups(), clip)
            run()
            counts[name, count, groups] = measure.operators_of(run)
    assert {n for (name, *_), n in counts.items() if name == "fusedopt"} == {0}
    grown = counts["torch-for-loop", 60, 1] - counts["torch-for-loop", 3, 1]
    assert grown >= 9 * 57


def test_operators_inside_of_others_are_not_counted():
    x = torch.ones(4)

    def two() -> None:
        with torch.profiler.record_function("a range"):
            torch.nn.functional.linear(x, x[None])
            x.add_(1)

    # linear calls others inside; indexing is one more, outside of it
    assert measure.operators_of(two) == 3
    assert measure.operators_of(lambda: None) == 0


@pytest.mark.parametrize("dtype", workloads.DTYPES)
def test_grads_make_clipping_clip_and_can_be_restored_and_renewed(dtype):
    inputs = workloads.InputSet(workloads.Workload("w", ((300, 7), (5,))), dtype, seed=3)
    norm = torch.cat([p.grad.float().flatten() for p in inputs.params]).norm().item()
    assert norm == pytest.approx(workloads.GRAD_NORM, rel=0.1)
    assert all((p.grad != 0).all() and (p != 0).all() for p in inputs.params)
    torch.nn.utils.clip_grad_norm_(inputs.params, workloads.MAX_NORM)
    assert not torch.equal(inputs.params[0].grad, inputs.pristine[0])
    inputs.restore_grads()
    before = [p.grad.data_ptr() for p in inputs.params]
    assert all(map(torch.equal, [p.grad for p in inputs.params], inputs.pristine))
    inputs.renew_grads()
    assert not set(before) & {p.grad.data_ptr() for p in inputs.params}
    assert all(map(torch.equal, [p.grad for p in inputs.params], inputs.pristine))


def test_interleave_gives_each_lane_one_turn_a_round_and_drops_the_warmup():
    calls = []

    def lane(name, runners):
        steps = [measure.Runner(lambda i=i: calls.append((name, i))) for i in range(runners)]
        return measure.Lane({"contestant": name}, steps)

    lanes = [lane("a", 1), lane("b", 3), lane("c", 2)]
    measure.interleave(lanes, range(7), warmup=2)
    assert [len(lane.samples) for lane in lanes] == [5, 5, 5]
    rounds = [[name for name, _ in calls[i : i + 3]] for i in range(0, len(calls), 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len({tuple(names) for names in rounds}) > 1  # not always the same predecessor
    assert {i for name, i in calls if name == "b"} == {0, 1, 2}
    assert {i for name, i in calls if name == "c"} == {0, 1}


class FixedTimes(measure.Runner):
    """A runner that takes the given seconds instead of running anything."""

    def __init__(self, *seconds):
        self.seconds = iter(seconds)

    def time(self):
        return next(self.seconds)


def test_settling_keeps_the_first_step_apart_and_samples_after_the_given_time():
    turns = [9.0, 1.0], [5.0, 0.5, 0.5, 2.0], [3.0, 2.0, 0.9, 0.1, 3.0]
    lane = measure.Lane({}, [FixedTimes(*turns[0], *turns[1], *turns[2])])
    measure.interleave([lane], range(3), warmup=1, settle=6.0)
    assert lane.cold == [5.0, 3.0]
    assert lane.samples == [2.0, 3.0]


def test_preparation_and_restoring_are_not_timed():
    runner = measure.Runner(lambda: None, lambda: time.sleep(0.05), lambda: time.sleep(0.05))
    start = time.perf_counter()
    assert runner.time() < 0.05
    assert time.perf_counter() - start >= 0.1


def test_quartiles_and_paired_ratio():
    assert measure.quartiles([4.0, 1.0, 3.0, 2.0, 50.0]) == (2.0, 3.0, 4.0)
    assert measure.quartiles([7.0]) == (7.0, 7.0, 7.0)
    # Round by round, not the ratio of the medians, which is 2 here.
    assert measure.paired_ratio([1.0, 20.0, 300.0], [1.0, 10.0, 3.0]) == 2.0
    assert measure.paired_ratio([9.0, 2.0, 4.0], [3.0, 2.0, 1.0]) == 3.0


def test_all_contestants_step_the_same_tensors():
    names = ["fusedopt", "torch-fused", "torch-foreach", "torch-for-loop"]
    present, absent = contestants.present_and_absent(names, ["adamw"])
    assert absent == []
    inputs = workloads.InputSet(workloads.Workload("w", ((300, 7), (5,))), "float32", seed=0)
    shared = {}
    for contestant in present:
        instance, one_step = contestant.build("adamw", inputs.param_groups(), clip=True)
        one_step()
        step.share_state(instance, shared)
        assert len(shared) == 4
        before = {key: value.clone() for key, value in shared.items()}
        one_step()
        assert all(not torch.equal(before[key], shared[key]) for key in shared), contestant.name


def test_a_compiled_step_has_one_input_set_and_finds_it_out_of_the_caches(monkeypatch):
    monkeypatch.setattr(contestants, "compiled", lambda step: step)
    names = ("torch-compiled", "torch-fused")
    entries = [(contestants.CONTESTANTS[name], False, 0.0) for name in names]
    in_place = measure.InPlacePass()
    tiny = workloads.Workload("w", ((16,), (3,)))
    compiled, fused = step.build_lanes(tiny, "adamw", "float32", entries, None, in_place)
    assert (len(compiled.runners), len(fused.runners)) == (1, 2 * 3)
    assert compiled.runners[0].before == in_place.run
    assert fused.runners[0].before is measure.nothing


@torch._dynamo.config.patch(fail_on_recompile_limit_hit=False)  # compiled() sets it for good
def test_a_compiled_step_that_torch_would_run_uncompiled_is_an_error(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    x, name = torch.ones(3), [""]
    run = contestants.compiled(lambda: x + len(name[0]))

    def run_with_20_strings() -> None:
        for i in range(20):  # a graph for each, of which 8 are kept
            name[0] = str(i)
            run()

    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        run_with_20_strings()


def test_variants_of_the_host_benchmark_change_what_they_say():
    workload = workloads.host_workloads()["300-tiny-10-groups"]
    inputs = workloads.InputSet(workload, "float32", seed=0)
    instance, _ = contestants.CONTESTANTS["torch-fused"].build("sgd", inputs.param_groups(), False)

    def grads_and_lrs():
        return [(p.grad.data_ptr(), g["lr"]) for g in instance.param_groups for p in g["params"]]

    before = grads_and_lrs()

    def changed(variant, times):
        """How many params have another grad tensor, and how many another lr, than at first."""
        prepare = host.VARIANTS[variant](instance, inputs)
        for _ in range(times):
            prepare()
        pairs = list(zip(before, grads_and_lrs(), strict=True))
        return [sum(old[column] != new[column] for old, new in pairs) for column in (0, 1)]

    assert changed("steady", 1) == [0, 0]
    assert changed("lr-changes", 2) == [0, 300]
    assert changed("fresh-grads", 1) == [300, 300]


class AdamWThatSkipsElements(torch.optim.AdamW):
    """Leaves the last element of every param as it was."""

    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        last = [p.detach().flatten()[-1].clone() for p in params]
        super().step()
        for param, value in zip(params, last, strict=True):
            param.data.view(-1)[-1] = value


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", workloads.DTYPES)
@pytest.mark.parametrize("optimizer", contestants.HYPERPARAMETERS)
def test_right_steps_are_within_two_roundings_of_float64(optimizer, dtype, clip):
    for name in ("torch-foreach", "torch-for-loop"):
        error = contestants.step_error(contestants.CONTESTANTS[name], optimizer, dtype, clip)
        assert 0 < error < 2


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", workloads.DTYPES)
def test_one_element_that_is_not_updated_is_found(monkeypatch, dtype, clip):
    monkeypatch.setattr(torch.optim, "Skipping", AdamWThatSkipsElements, raising=False)
    wrong = contestants.Contestant("wrong", "torch.optim", {"adamw": "Skipping"})
    assert contestants.step_error(wrong, "adamw", dtype, clip) > contestants.ERROR_LIMIT
