"""The inspection page: it says what training would do, and hostile data stays text in it."""

import html
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tokenflex.cli.main import main
from tokenflex.data import Limits
from tokenflex.errors import UserError
from tokenflex.prepare.inspect import render_page, survey_shards
from tokenflex.prepare.inspect.plots import histogram

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from bad_samples import JPEG, Case, cases, good_bytes, record, tar_bytes, write_bad_shard

HOSTILE = '</span><script>alert(1)</script><img src=x onerror=alert(1)> "&amp;'


class Tags(HTMLParser):
    """Every tag that a browser would see, with its attributes."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def handle_starttag(self, tag, attrs):
        self.found.setdefault(tag, []).append(dict(attrs))


@pytest.fixture
def shard(tmp_path):
    hostile = Case([("json", record(question=HOSTILE, answer=HOSTILE)), ("0.jpg", JPEG)])
    shard = tmp_path / "s.tar"
    shard.write_bytes(
        good_bytes("a")
        + tar_bytes("<b>bold", hostile)
        + tar_bytes("t", Case([("json", record(images=0))]))
        + bytes(1024)
    )
    return shard


def spans(page, kind):
    return [
        html.unescape(text) for text in re.findall(rf'<span class="{kind}" title="[^"]*">(.*?)</span>', page, re.DOTALL)
    ]


def test_the_page_shows_the_mask_and_the_costs_that_training_has(shard, processor):
    survey = survey_shards([shard], processor, Limits())
    page = render_page(survey, [shard], processor, (4, 12))
    assert survey.tally.num_good == 3 and survey.images == [1, 1, 0]
    for surveyed in survey.shown:
        encoded = processor.encode(surveyed.sample.messages, [12] * len(surveyed.sample.images))
        assert surveyed.num_text + 12 * sum(surveyed.tiles) == len(encoded.input_ids)
        assert surveyed.num_learned == sum(encoded.is_target)
        assert f"12: {len(encoded.input_ids)}" in page
    learned = spans(page, "learned")
    assert sorted(learned) == sorted(["a slope<|im_end|>", "a slope<|im_end|>", HOSTILE + "<|im_end|>"])
    assert "a slope" not in "".join(spans(page, "context"))
    assert page.count('src="data:image/jpeg;base64,') == 2


def test_hostile_data_stays_text_and_the_page_needs_no_network(shard, processor):
    for page in (
        render_page(survey_shards([shard], processor, Limits()), [shard], processor, (4,)),
        render_page(survey_shards([shard], None, Limits()), [shard]),
    ):
        assert html.escape(HOSTILE) in page and "default-src 'none'" in page
        tags = Tags()
        tags.feed(page)
        assert "script" not in tags.found and "img" in tags.found and len(tags.found["b"]) >= 3
        for attributes in (attributes for every in tags.found.values() for attributes in every):
            assert not any(name.startswith("on") or name == "href" for name in attributes)
            assert attributes.get("src", "data:").startswith("data:")


def test_shown_samples_are_drawn_by_the_seed_alone(tmp_path):
    shard = tmp_path / "s.tar"
    shard.write_bytes(b"".join(good_bytes(f"k{i}") for i in range(30)) + bytes(1024))
    keys = lambda seed: [
        shown.sample.key for shown in survey_shards([shard], None, Limits(), num_shown=5, seed=seed).shown
    ]  # noqa: E731
    assert keys(0) == keys(0) != keys(1) and len(keys(0)) == 5
    assert survey_shards([shard], None, Limits(), max_samples=7).tally.num_samples == 7


def test_bad_samples_are_on_the_page_and_a_set_without_a_good_one_is_refused(tmp_path):
    shard = tmp_path / "bad.tar"
    write_bad_shard(shard, {"truncated jpeg": cases()["truncated jpeg"]})
    page = render_page(survey_shards([shard], None, Limits()), [shard])
    assert "truncated_jpeg" in page and "image-data" in page
    (tmp_path / "empty.tar").write_bytes(bytes(1024))
    with pytest.raises(UserError, match="none is good"):
        survey_shards([tmp_path / "empty.tar"], None, Limits())


@pytest.mark.parametrize("values", [[], [0], [5, 5, 5], [1, 10**6], [0, 0, 1], list(range(100)), [0.5, 0.25]])
def test_plots_take_any_values(values):
    for is_log in (False, True):
        svg = histogram(values, "t", "u", is_log=is_log)
        counts = [int(number) for number in re.findall(r"<title>(\d+) samples", svg)]
        assert sum(counts) == len(values) and "nan" not in svg


def test_the_command_writes_the_page(shard, tmp_path, capsys):
    assert main(["data", "inspect", str(shard), "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert main(["data", "inspect", str(shard), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "--out" in capsys.readouterr().err


def test_the_page_says_how_many_of_how_many_were_counted(tmp_path):
    shards = [tmp_path / f"{number}.tar" for number in range(2)]
    for shard in shards:
        shard.write_bytes(b"".join(good_bytes(f"{shard.stem}-{i}") for i in range(9)) + bytes(1024))
    survey = survey_shards(shards, None, Limits(), max_samples=6)
    assert "<h1>2 shards, 6 of 18 samples counted</h1>" in render_page(survey, shards)
    survey = survey_shards(shards, None, Limits())
    assert "<h1>2 shards, 18 samples</h1>" in render_page(survey, shards)
