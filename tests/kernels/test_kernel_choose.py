"""Choosing a configuration: the rule, a loaded table, a pin, a timing; on the CPU with stand-in launches."""

import json

import pytest
import torch
from tokenflex_kernels import choose, load_choices, save_choices, set_tuning

CANDIDATES = [choose.Candidate("first", 1), choose.Candidate("second", 2)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(choose, "_state", choose._State())


def launch(config):
    return config


def test_without_a_gpu_the_rule_decides():
    assert choose.run("pool|x", CANDIDATES, launch, CPU) == 1
    assert choose.choices() == {"pool|x": "first"}


def test_a_timing_decides_once_and_is_kept(monkeypatch):
    times = iter([3.0, 2.0])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("triton.testing.do_bench", lambda function, **options: (function(), next(times))[1])
    cuda = torch.device("cuda")
    assert [choose.run("pool|x", CANDIDATES, launch, cuda) for _ in range(3)] == [2, 2, 2]
    assert next(times, None) is None


def test_what_does_not_fit_the_device_is_passed_over(monkeypatch):
    errors = pytest.importorskip("triton.runtime.errors")

    def do_bench(function, **options):
        if function() == 1:
            raise errors.OutOfResources(2, 1, "shared memory")
        return 5.0

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    assert choose.run("pool|x", CANDIDATES, launch, torch.device("cuda")) == 2


def test_a_capturing_stream_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert choose.run("pool|x", CANDIDATES, launch, torch.device("cuda")) == 1
    assert choose.choices() == {}  # so that a later plain call still chooses


def test_the_rule_mode_never_times():
    set_tuning("rule")
    assert choose.run("pool|x", CANDIDATES, launch, torch.device("cuda")) == 1
    with pytest.raises(ValueError, match="must be one of"):
        set_tuning("guess")


def test_choices_survive_a_file(tmp_path):
    choose._state.chosen["pool|x"] = "second"
    save_choices(tmp_path / "choices.json")
    choose._state.chosen.clear()
    assert choose.run("pool|x", CANDIDATES, launch, CPU) == 1
    choose._state.chosen.clear()
    load_choices(tmp_path / "choices.json")
    assert choose.run("pool|x", CANDIDATES, launch, CPU) == 2
    assert set(json.loads((tmp_path / "choices.json").read_text())) == {"chosen", "timings_ms"}


def test_a_choice_that_a_release_no_longer_ships_is_made_anew():
    choose._state.chosen["pool|x"] = "retired"
    assert choose.run("pool|x", CANDIDATES, launch, CPU) == 1


def test_a_pin_holds_within_its_block_and_must_exist():
    with choose.pinned("pool", "second"):
        assert choose.run("pool|x", CANDIDATES, launch, CPU) == 2
        assert choose.run("gated|x", CANDIDATES, launch, CPU) == 1
    assert choose.run("pool|x", CANDIDATES, launch, CPU) == 1
    with choose.pinned("pool", "third"), pytest.raises(KeyError, match="pinned to 'third'"):
        choose.run("pool|x", CANDIDATES, launch, CPU)


def test_keys_bucket_rows_and_tell_apart_what_matters():
    x = torch.zeros(2, 8)
    assert (
        choose.key("gated", x, 8, rows=1025)
        == choose.key("gated", x, 8, rows=2048)
        != choose.key("gated", x, 8, rows=1024)
    )
    assert len({choose.key(kernel, t, 8, rows=4) for kernel in ("gated", "dgated") for t in (x, x.half())}) == 4
    assert choose.key("gated", x, 8, rows=0) and choose.key("gated", x, 8, rows=1) == "gated|cpu|float32|8|1"


def test_the_rule_depends_on_the_key_alone():
    """Whatever row count of a bucket comes first, the same configuration: a resumed run repeats its bits."""
    pytest.importorskip("triton")
    from tokenflex_kernels import gated

    x = torch.zeros(1, 64, dtype=torch.bfloat16)
    for shipped in (gated.GATED_CONFIGS, gated.DGATED_CONFIGS):
        for low, high in ((1, 1), (65, 128), (129, 256), (1025, 2048)):
            names = [[c.name for c in gated._candidates(shipped, (x,), rows, 128, 64)] for rows in (low, high)]
            assert names[0] == names[1] and names[0][-1] == gated.UNFUSED


def test_small_batches_take_small_tiles(monkeypatch):
    pytest.importorskip("triton")
    from tokenflex_kernels import gated, target

    monkeypatch.setattr(target, "num_processors", lambda device: 132)
    x = torch.zeros(1, 1152, dtype=torch.bfloat16)
    first = lambda rows: gated._candidates(gated.GATED_CONFIGS, (x,), rows, 3456, 1152)[0].config  # noqa: E731
    assert (first(16384).m, first(16384).n) == (128, 128)
    assert first(256).m * first(256).n < 128 * 128
    assert gated._candidates(gated.GATED_CONFIGS, (x.float(),), 256, 3456, 1152)[0].config == gated.UNFUSED
