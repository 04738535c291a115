"""What makes an index another one: nothing that a call changes, and the date only where the template writes it."""

import copy
import datetime
import json

import numpy as np
import pytest
from test_places import build, data  # noqa: F401  a fixture
from test_shards import LIMITS, good, write_shard

from tokenflex.data import PackDataset
from tokenflex.data import index as index_module
from tokenflex.data.index import fingerprint, load_index, load_or_build_index, tells_date
from tokenflex.data.loader import MicroBatchPlan
from tokenflex.data.sources import locate_sources, settle_date
from tokenflex.plan import Position

LONG = [
    {"role": "user", "content": [{"type": "text", "text": "digit at B3 " * 40}]},
    {"role": "assistant", "content": [{"type": "text", "text": "seven " * 40}]},
]


def with_switches(processor, truncation, padding):
    """The processor of a tokenizer whose `tokenizer.json` has truncation and padding switched on."""
    other = copy.copy(processor)
    other.tokenizer = copy.deepcopy(processor.tokenizer)
    backend = other.tokenizer.backend_tokenizer
    if truncation:
        backend.enable_truncation(**truncation)
    if padding:
        backend.enable_padding(**padding)
    other._template_cache = {}
    return other


SWITCHES = {
    "truncation": ({"max_length": 8}, None),
    "truncation from the left": ({"max_length": 5, "direction": "left"}, None),
    "truncation with a stride": ({"max_length": 8, "stride": 2}, None),
    "padding to the longest": (None, {"pad_id": 0}),
    "padding to a length": (None, {"length": 512, "pad_id": 1, "direction": "left"}),
    "both": ({"max_length": 8}, {"length": 16}),
}


@pytest.mark.parametrize("case", SWITCHES)
def test_switches_of_a_tokenizer_file_change_neither_fingerprint_nor_tokens(case, processor, tmp_path):
    """A tokenizer's call sets them anew: a fingerprint taken from them would be another after the first call."""
    switched = with_switches(processor, *SWITCHES[case])
    assert fingerprint(switched) == fingerprint(processor)
    assert switched.encode(LONG, []).input_ids == processor.encode(LONG, []).input_ids  # nothing cut, nothing added
    assert len(switched.encode(LONG, []).input_ids) > 80
    assert fingerprint(switched) == fingerprint(processor)
    shard = write_shard(tmp_path / "s.tar", [good("a"), good("b", images=2)])
    fresh = with_switches(processor, *SWITCHES[case])
    index = load_or_build_index([shard], fresh, tmp_path / "index", LIMITS)
    for again in (with_switches(processor, *SWITCHES[case]), fresh, processor):
        assert load_or_build_index([shard], again, tmp_path / "index", LIMITS).fingerprint == index.fingerprint


def test_no_call_of_the_processor_changes_the_fingerprint(processor):
    before = fingerprint(processor)
    message = {"role": "user", "content": "Hello"}
    calls = (
        lambda: processor.encode(LONG, []),
        lambda: processor.apply_chat_template([message], tokenize=True),
        lambda: processor.tokenizer("a b c", truncation=True, max_length=2),
        lambda: processor.tokenizer(["a", "b c"], padding=True),
        lambda: processor.tokenizer("<|im_end|>", split_special_tokens=True),
        lambda: processor.tokenizer("a", padding="max_length", max_length=9),
    )
    for number, call in enumerate(calls):
        call()
        assert fingerprint(processor) == before, number


# A date in the template


@pytest.fixture
def dated(processor):
    other = copy.copy(processor)
    other.chat_template = "{{ '<|im_start|>' + strftime_now('%d %b %Y') + '<|im_end|>' }}" + processor.chat_template
    other._template_cache = {}
    return other


def test_the_date_belongs_to_the_fingerprint_where_the_template_writes_it(processor, dated):
    assert tells_date(dated) and not tells_date(processor)
    plain, prints = copy.copy(processor), set()
    for date in ("2024-07-26", "2024-11-05"):
        plain.render_date = dated.render_date = date
        assert fingerprint(plain) == fingerprint(processor)
        prints.add(fingerprint(dated))
    assert len(prints) == 2


def test_a_run_on_a_later_day_takes_the_date_of_the_index_that_is_there(data, processor, dated):  # noqa: F811
    located = locate_sources(data)
    settle_date(dated, located, data, "2024-07-26")
    folder = build(data, dated)
    assert json.loads((folder / "manifest.json").read_text())["render_date"] == "2024-07-26"
    later = copy.copy(dated)
    later.render_date = ""
    settle_date(later, located, data)
    assert later.render_date == "2024-07-26" and build(data, later) == folder
    # another template that writes the date has no index here: its day is today
    other = copy.copy(dated)
    other.chat_template = dated.chat_template + " "
    settle_date(other, located, data)
    assert other.render_date == datetime.date.today().isoformat()
    # a run that began on its own day keeps it
    settle_date(later, located, data, "2024-01-01")
    assert later.render_date == "2024-01-01"
    # and where the template writes no date, there is none
    plain = copy.copy(processor)
    settle_date(plain, located, data, "2024-01-01")
    assert plain.render_date == "" and "render_date" not in json.loads(
        (build(data, plain) / "manifest.json").read_text()
    )


def test_an_index_of_an_earlier_release_is_found_by_its_fingerprint(processor):
    """The parts of a fingerprint are hashes of what they were, so that indexes go on being used."""
    import hashlib

    tokens = processor.image_start_token + processor.image_token + processor.image_end_token
    parts = (
        processor.tokenizer.backend_tokenizer.to_str() + "\0" + tokens,
        str(processor.chat_template),
        f"{index_module.tiling_of(processor)}\0002",
    )
    expected = "-".join(hashlib.sha256(part.encode()).hexdigest()[:8] for part in parts)
    processor.encode(LONG, [])
    assert fingerprint(processor) == expected


def test_samples_keep_their_lengths_on_another_day(data, dated):  # noqa: F811
    """Lengths counted as on one day are those that are read on any other: the template sees the run's date, not the clock's."""
    located = locate_sources(data)
    dated.chat_template = dated.chat_template.replace("%d %b %Y", "%A, the %d of %B %Y")
    for date in ("2024-07-26", "2025-09-03"):
        first, later = copy.copy(dated), copy.copy(dated)
        settle_date(first, located, data, date)
        index = load_index(build(data, first), located[0].shards, first)
        settle_date(later, located, data, date)  # as a run that goes on does
        batch = PackDataset(index, later, "sqrt", 4, LIMITS).batch(
            MicroBatchPlan(Position(), True, np.arange(len(index)), np.where(index.num_tiles > 0, 4, 0), 1.0)
        )
        assert not batch.skipped
        day = datetime.date.fromisoformat(date)
        assert f"{day:%A}, the {day:%d} of {day:%B %Y}" in later.tokenizer.decode(batch.input_ids[0])
