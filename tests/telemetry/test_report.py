"""The report: everything of a run on one page that reaches nothing, whatever stands in the run's files."""

import html
import json
import re
import shutil
import tarfile
from html.parser import HTMLParser

import pytest

from tokenflex import cli
from tokenflex.errors import UserError
from tokenflex.telemetry.report import read_run, render_page
from tokenflex.telemetry.report.assets import POLICY
from tokenflex.telemetry.report.charts import MAX_POINTS, Series, line_chart, number

HOSTILE = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
VOID = {"meta", "img", "br", "line", "polyline"}


class Page(HTMLParser):
    """The elements of a page; a tag that is closed in the wrong place fails."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, forge, corpus):
    """A real run with a step that is not finite and a sample whose picture has decayed since it was indexed."""
    folder = tmp_path_factory.mktemp("report")
    shards = folder / "shards"
    shards.mkdir()
    (source,) = (corpus / "train").glob("*.tar")
    data = bytearray(source.read_bytes())
    with tarfile.open(source) as tar:
        picture = next(member for member in tar if member.name.endswith((".jpg", ".png")))
    half = picture.offset_data + picture.size // 2
    data[half : picture.offset_data + picture.size] = bytes(picture.offset_data + picture.size - half)
    (shards / "0.tar").write_bytes(data)
    overrides = [f"data.train={shards}", f"model.tokenizer={corpus}/tokenizer", "evaluate.every=2"]
    forge.done(folder, 1, *overrides, "train.num_steps=4", faults="nan@loss,step=1")
    return folder / "crash"


def test_a_run_is_on_one_page_that_reaches_nothing(run_folder, capsys):
    assert cli.main(["report", str(run_folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    text = (run_folder / "report.html").read_text()
    page = Page(text)
    words = " ".join(page.texts)
    for part in (
        "Training loss per visual-token count", "Validation loss per visual-token count", "Where the time of a step went",
        "Fill, and balance over ranks", "step skipped", "loss is nan", "step-00000004 (latest)", "deepspeed", "data.pack_length",
        "best validation loss",
    ):  # fmt: skip
        assert part in words, part
    assert page.of("meta")[1] == {"http-equiv": "Content-Security-Policy", "content": POLICY}
    assert len(page.of("script")) == 1 and not re.search(r"https?://|url\(|@import", text)
    pictures = page.of("img")
    assert pictures and all(picture["src"].startswith("data:image/jpeg;base64,") for picture in pictures)
    losses = next(chart for chart in page.of("div") if '"training"' in chart.get("data-chart", ""))
    drawn = {one["name"]: one["points"] for one in json.loads(losses["data-chart"])["series"]}
    logged = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert drawn["training"] == [
        [line["step"], pytest.approx(line["loss"], rel=1e-4)] for line in logged if line["loss"]
    ]
    assert [step for step, _ in drawn["validation"]] == [2, 4]


@pytest.fixture
def hostile(run_folder, tmp_path):
    """The same run, whose files have been written by somebody who wishes the reader ill."""
    folder = tmp_path / "run"
    shutil.copytree(run_folder, folder)
    shard = run_folder.parent / "shards" / "0.tar"
    with tarfile.open(shard) as tar:
        first = next(iter(tar))
    (folder / "bad-samples").mkdir(exist_ok=True)
    records = [
        {
            "step": 3,
            "shard": str(shard),
            "key": first.name.split(".")[0],
            "offset": 0,
            "reason": HOSTILE,
            "detail": HOSTILE,
        },
        {"step": HOSTILE, "shard": HOSTILE, "key": HOSTILE, "offset": HOSTILE, "reason": ["x"], "detail": None},
        {"step": 1, "shard": "/etc/passwd", "key": "root", "offset": 0, "reason": "length", "detail": "x"},
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "bad-samples" / "rank-00000.jsonl").write_text("\n".join([*lines, "[1]", "{no json"]))
    with open(folder / "metrics.jsonl", "a") as file:
        record = {
            "step": 9,
            "loss": "x",
            "loss_per_count": {HOSTILE: 1.0},
            "seconds_per_step": {HOSTILE: 1.0},
            "work_s": [1],
        }
        file.write(json.dumps({**record, "loss_parts": {HOSTILE: 2.0}}) + "\n" + '{"step": 10, "lo')
    with open(folder / "validation.jsonl", "a") as file:
        file.write(json.dumps({"step": 9, "loss": 0.1, "loss_per_task": {HOSTILE: {HOSTILE: 1.0}}}) + "\n")
    with open(folder / "events.jsonl", "a") as file:
        file.write(
            json.dumps({"event": "skip", "step": 3, "reason": HOSTILE, "samples": [HOSTILE, f"{shard}:x", 7]}) + "\n"
        )
    (folder / "accuracy.json").write_text(json.dumps({"accuracy": {HOSTILE: {HOSTILE: 0.5}}, "trained": [HOSTILE]}))
    (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + f"hostile: {json.dumps(HOSTILE)}\n")
    return folder


def test_what_stands_in_the_files_is_text_and_no_more(hostile):
    text = render_page([read_run(hostile)])
    page = Page(text)
    assert len(page.of("script")) == 1 and "alert(1)" not in re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    assert not any(name.startswith("on") for _, attributes in page.found for name in attributes)
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in page.of("img"))
    assert html.escape(HOSTILE) in text and " ".join(page.texts).count("alert(1)") >= 6
    assert "3 lines of the runs' files could not be read" in text


def test_two_runs_stand_side_by_side_with_what_differs(run_folder, hostile):
    page = Page(render_page([read_run(run_folder), read_run(hostile)]))
    words = " ".join(page.texts)
    assert "Above: crash; below: run." in words and "differs" in page.texts and "hostile" in page.texts
    assert any('"dashed": true' in chart.get("data-chart", "") for chart in page.of("div"))


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    (tmp_path / "metrics.jsonl").write_text("")
    Page(render_page([read_run(tmp_path)]))
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "loss": 1.5, "images_per_count": {"64": 3}}\n'
    )  # an older release's
    assert "1.5" in " ".join(Page(render_page([read_run(tmp_path)])).texts)


@pytest.mark.parametrize("make, part", [
    (lambda folder: None, "no such folder"),
    (lambda folder: folder.mkdir(), "no run there"),
    (lambda folder: folder.write_text("x"), "no such folder"),
    (lambda folder: (folder.mkdir(), (folder / "metrics.jsonl").write_text("")), "no run there"),
])  # fmt: skip
def test_a_folder_that_is_no_run_is_refused_in_one_line(make, part, tmp_path, capsys):
    make(tmp_path / "x")
    assert cli.main(["report", str(tmp_path / "x")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: report ") and part in line and "runs/quickstart" in line


def test_a_page_that_cannot_be_written_is_said_in_one_line(run_folder, tmp_path, capsys):
    assert cli.main(["report", str(run_folder), "--out", str(tmp_path / "none" / "r.html")]) == 2
    assert "--out" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "none")


def test_long_curves_are_thinned_and_odd_values_left_out():
    points = [(step, 1.0 if step % 2 else 3.0) for step in range(10 * MAX_POINTS)]
    chart = line_chart("x", [Series("a", points, 0), Series("b", [(1, float("nan")), (2, float("inf"))], 1)])
    (one,) = json.loads(html.unescape(re.search(r'data-chart="([^"]*)"', chart)[1]))["series"]
    assert len(one["points"]) == MAX_POINTS and {value for _, value in one["points"]} == {2.0}
    assert line_chart("x", []) == line_chart("x", [Series("a", [], 0)]) == ""
    assert "polyline" in line_chart("x", [Series("a", [(3, 0.0)], 0)]), "one point, and a flat curve, can be drawn"


@pytest.mark.parametrize("value, text", [(0, "0"), (1234, "1234"), (123456, "123.5k"), (2.5e9, "2.5G"), (0.1234, "0.123"), (2e-5, "2.0e-05"), (-3.5, "-3.5")])  # fmt: skip
def test_numbers_are_short(value, text):
    assert number(value) == text
