"""Choosing a configuration: comparison, timing, the rule, stored choices, a pin; on the CPU with stand-in launches."""

import json
import logging

import pytest
import torch
from kernel_checks import leave_out, pinned
from tokenflex_kernels import choose, export_choices, import_choices, set_tuning

GOOD = torch.linspace(-1, 1, 64).reshape(8, 8)
CANDIDATES = [choose.Candidate(name, name) for name in ("first", "second", choose.UNFUSED)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A new state, and a GPU as far as choosing asks for one."""
    monkeypatch.setattr(choose, "_state", choose._State())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choose.target, "device_name", lambda device: "stand-in")


@pytest.fixture
def times(monkeypatch):
    """Milliseconds by name of what is timed, to be set; a list of the names that were."""
    table = {"first": 3.0, "second": 2.0, "unfused": 4.0, "timed": []}

    def do_bench(function, **options):
        (name,) = function.args
        function()
        table["timed"].append(name)
        return table[name]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    return table


def key(device="cuda", kernel="gated"):
    return (kernel, torch.device(device), torch.float32, 8, 64)


def launcher(**outputs):
    """A launch that returns (its output, what ran); by default every configuration is right."""

    def launch(config):
        output = outputs.get(config, GOOD)
        if isinstance(output, Exception):
            raise output
        launch.ran.append(config)
        return output.clone() if torch.is_tensor(output) else output

    launch.ran = []
    return launch


def chosen(launch, key=key(), candidates=CANDIDATES):  # noqa: B008  a constant
    choose.run(key, lambda: candidates, launch)
    return launch.ran[-1]


def test_a_trial_stands_in_for_a_launch_that_spoils_what_it_reads(times):
    """It alone is compared and timed; the launch itself runs once, by the winner."""
    launch, trial = launcher(), launcher(second=GOOD + 1)
    choose.run(key(), lambda: CANDIDATES, launch, trial)
    assert launch.ran == ["first"] and trial.ran.count("unfused") == 2 and times["timed"] == ["first", "unfused"]


def test_without_a_gpu_the_rule_decides_and_nothing_is_compared():
    launch = launcher(first=GOOD + 1)
    assert chosen(launch, key("cpu")) == "first" and launch.ran == ["first"]
    assert export_choices()["chosen"] == {"gated|stand-in|float32|64|8": "first"}


def test_a_timing_decides_once_and_is_kept(times):
    assert [chosen(launcher()) for _ in range(3)] == ["second"] * 3
    assert times["timed"] == ["first", "second", "unfused"]
    assert export_choices()["timings_ms"] == {
        "gated|stand-in|float32|64|8": {"first": 3.0, "second": 2.0, "unfused": 4.0}
    }


def broken(kind):
    errors = pytest.importorskip("triton.runtime.errors")
    spoilt = GOOD.clone()
    spoilt[3, 5] = {"one element": 0.9, "NaN": float("nan")}.get(kind, 0.0)
    return {
        "does not fit": errors.OutOfResources(2, 1, "shared memory"),
        "does not compile": RuntimeError("ptxas failed"),
        "asserts": AssertionError("strides must be 16-byte aligned"),
        "another shape": GOOD[:4],
    }.get(kind, spoilt)


@pytest.mark.parametrize("mode", ["measure", "rule"])
@pytest.mark.parametrize("kind", ["one element", "NaN", "does not fit", "does not compile", "asserts", "another shape"])
def test_what_is_wrong_or_fails_is_left_out_by_name(kind, mode, times, caplog):
    set_tuning(mode)
    times["first"] = 0.1  # the fastest by far, and wrong
    with caplog.at_level(logging.WARNING):
        assert chosen(launcher(first=broken(kind))) == "second"
    (record,) = caplog.records
    assert "gated|stand-in|float32|64|8: first is left out" in record.getMessage()
    assert list(export_choices()["dropped"]["gated|stand-in|float32|64|8"]) == ["first"]


def test_with_none_right_the_unfused_runs_and_its_own_failure_is_told(times):
    bad = {"first": GOOD * 2, "second": RuntimeError("no")}
    assert chosen(launcher(**bad)) == "unfused"
    choose._state = choose._State()
    with pytest.raises(RuntimeError, match="the card is gone"):
        chosen(launcher(unfused=RuntimeError("the card is gone")))


def test_several_outputs_and_absent_ones_are_compared():
    assert choose.difference((GOOD, None), (GOOD, None)) is None
    assert "output 1" in choose.difference((GOOD, GOOD), (GOOD, GOOD[0] * 1.1 + 0.3))
    assert "another shape" in choose.difference((GOOD, None), (GOOD, GOOD))
    for shape in ((4100, 24), (1, 24), (24,), (0, 8)):  # more rows than are compared at a time, one, a vector, none
        for dtype, last in ((torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)):
            exact = torch.randn(shape)
            assert choose.difference(exact.to(dtype), (exact * (1 + last)).to(dtype)) is None
            if exact.numel():
                wrong = exact.clone()
                wrong.view(-1)[-1] += 3
                assert choose.difference(wrong.to(dtype), exact.to(dtype)) is not None


def test_a_spoilt_step_proves_nothing(times):
    """With a NaN in the data the unfused runs; the next clean call compares and chooses."""
    nan = torch.full((8, 8), float("nan"))
    assert chosen(launcher(first=nan, second=nan, unfused=nan)) == "unfused" and not export_choices()["chosen"]
    assert chosen(launcher()) == "second"


def test_no_memory_to_compare_or_time_is_no_fault_of_a_configuration(times):
    assert chosen(launcher(second=torch.OutOfMemoryError("full"))) == "first"
    assert not export_choices()["dropped"]


def test_a_capturing_stream_runs_what_needs_no_trust(monkeypatch, times):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(launcher()) == "unfused"
    assert not export_choices()["chosen"]  # so that a later plain call still chooses
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert chosen(launcher()) == "second"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert chosen(launcher()) == "second"  # compared before


def test_the_rule_mode_never_times(times):
    set_tuning("rule")
    assert chosen(launcher()) == "first" and not times["timed"]
    with pytest.raises(ValueError, match="must be one of"):
        set_tuning("guess")


def test_choices_travel_as_plain_data_and_are_compared_again(times):
    assert chosen(launcher()) == "second"
    stored = json.loads(json.dumps(export_choices()))
    choose._state = choose._State()
    import_choices(stored)
    times["timed"].clear()
    assert chosen(launcher()) == "second" and not times["timed"]
    choose._state = choose._State()
    import_choices(stored)
    assert chosen(launcher(second=GOOD + 1)) == "first"


def test_choices_that_no_release_ships_are_made_anew_and_other_data_is_refused(times):
    import_choices({"chosen": {"gated|stand-in|float32|64|8": "retired"}})
    assert chosen(launcher()) == "second"
    for data in ({}, [], {"chosen": {"a": 1}}, {"chosen": ["a"]}):
        with pytest.raises(ValueError, match="export_choices"):
            import_choices(data)


def test_what_was_left_out_beforehand_never_runs(times, monkeypatch):
    monkeypatch.setattr(choose, "run", choose.run)  # put back afterwards
    leave_out("gated", "second")
    launch = launcher()
    assert chosen(launch) == "first" and "second" not in launch.ran
    with pytest.raises(AssertionError, match="what the others are compared with"):
        leave_out("gated", "unfused")


def test_a_pin_holds_within_its_block_and_must_exist(times):
    with pinned("gated", "first"):
        assert chosen(launcher()) == "first"
        assert chosen(launcher(), key(kernel="dgated")) == "second"
    assert chosen(launcher()) == "second"
    with pinned("gated", "third"), pytest.raises(KeyError, match="third"):
        chosen(launcher())


def test_keys_bucket_rows_and_tell_apart_what_matters():
    x = torch.zeros(2, 8)
    assert choose.key("gated", x, 1025, 8) == choose.key("gated", x, 2048, 8) != choose.key("gated", x, 1024, 8)
    assert len({choose.key(kernel, t, 4, 8) for kernel in ("gated", "dgated") for t in (x, x.half())}) == 4
    assert choose.key("gated", x, 0, 8) and choose.text_of(choose.key("gated", x, 1, 8, True)).endswith("float32|8|1|1")


def test_the_rule_depends_on_the_key_alone():
    """Whatever row count of a bucket comes first, the same configuration: a resumed run repeats its bits."""
    pytest.importorskip("triton")
    from tokenflex_kernels import gated

    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    for shipped in (gated.GATED_CONFIGS, gated.DGATED_CONFIGS):
        for low, high in ((1, 1), (65, 128), (129, 256), (1025, 2048)):
            names = [[c.name for c in gated.candidates(shipped, x, rows, 128, True)] for rows in (low, high)]
            assert names[0] == names[1] and names[0][-1] == gated.UNFUSED


def test_small_batches_take_small_tiles(monkeypatch):
    pytest.importorskip("triton")
    from tokenflex_kernels import gated, target

    monkeypatch.setattr(target, "num_processors", lambda device: 132)
    x = torch.zeros(1, 1152, dtype=torch.bfloat16)
    first = lambda rows: gated.candidates(gated.GATED_CONFIGS, x, rows, 3456, True)[0].config  # noqa: E731
    assert (first(16384).m, first(16384).n) == (128, 128)
    assert first(256).m * first(256).n < 128 * 128
    assert gated.candidates(gated.GATED_CONFIGS, x.float(), 256, 3456, True)[0].config == gated.UNFUSED


def test_one_row_of_odd_strides_is_laid_out_anew():
    """A single row calls itself contiguous whatever its strides; a descriptor would refuse them."""
    pytest.importorskip("triton")
    from tokenflex_kernels import gated

    row = torch.zeros(64, 1).t()
    assert row.is_contiguous() and row.stride() == (1, 1)
    assert gated.dense(row).stride() == (64, 1)


def test_a_warm_up_leaves_nothing_to_choose(monkeypatch):
    """On the CPU nothing is to be chosen, but every call of a training step and of inference is made."""
    import tokenflex_kernels

    called = []
    for name in ("project", "project_training", "project_backward_"):
        operator = getattr(torch.ops.tokenflex_kernels, name)
        call = lambda *args, operator=operator, name=name: (called.append(name), operator(*args))[1]  # noqa: E731
        monkeypatch.setattr(tokenflex_kernels.ops._OPS, name, call)
    plans = [tokenflex_kernels.pool_plan([(3, 3)] * n, [(2, 2)] * n) for n in (1, 2)]
    options = {"dtype": torch.float32, "device": "cpu"}
    for frozen in ((), ("features",), ("features", "norm", "gate_up", "down")):
        choices = tokenflex_kernels.warm_up(plans, 8, 12, 4, frozen=frozen, **options)
        import_choices(json.loads(json.dumps(choices)))
        step = ["project", "project_training", "project_backward_"] if len(frozen) < 4 else ["project", "project"]
        assert called == step * 2
        called.clear()
    with pytest.raises(ValueError, match="may name"):
        tokenflex_kernels.warm_up(plans, 8, 12, 4, frozen=["nose"], **options)
