"""What a study keeps and judges: bits come back, a changed protocol is refused, what does not belong is named and left out."""

import itertools
import json
import re

import numpy as np
import pytest
from conftest import ROOT, TINY, run_ranks

from tokenflex.config import load_config
from tokenflex.corpus import resolve_embedded
from tokenflex.errors import UserError
from tokenflex.layout import RunLayout
from tokenflex.study.arms import FLEXIBLE, chosen, core_arms, further_arms
from tokenflex.study.jobs import Job, Runs
from tokenflex.study.record import NOT_OF_A_RUN, MadeBy, Record, meaning, protocol_version
from tokenflex.study.report import PLOTS, TABLES, Findings, filled
from tokenflex.study.shards import without_images
from tokenflex.study.study import Study, judge
from tokenflex.study.times import predicted, times_table

COUNTS = (9, 25, 64)
MADE_BY = MadeBy("code", "parts")
TASKS = ["coarse", "dense", "text"] * 20


@pytest.fixture(scope="module")
def recipe():
    return load_config("configs/paper.yaml", [])


def write_run(root, rng, mean, counts, shards=(("a.tar", 5, "00", 3),)):
    """A run's folder with the files that a record reads."""
    layout = RunLayout(root)
    root.mkdir(parents=True)
    keys = [f"eval-{number:03d}" for number in range(len(TASKS))]
    right = {str(count): "".join("01"[int(hit)] for hit in rng.random(len(TASKS)) < mean) for count in counts}
    layout.answers.write_text(json.dumps({"keys": keys, "tasks": TASKS, "right": right}))
    lines = [
        {"num_tokens": 10, "num_visual_tokens": 4, "num_samples": 2, "seconds": 0.5, "loss": 2.0 - i / 20}
        for i in range(20)
    ]
    layout.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    layout.data.write_text(json.dumps({"digest": "d", "sources": [{"shards": [list(shard) for shard in shards]}]}))
    return layout


@pytest.fixture(scope="module")
def study(recipe, tmp_path_factory):
    """A record of every arm at two seeds, and the findings."""
    folder, rng, record = tmp_path_factory.mktemp("study"), np.random.default_rng(0), Record("p", {}, {})
    arms = [*core_arms(recipe), *further_arms(recipe, 4)]
    for arm in arms:
        for seed in range(2):
            job = Job(arm, seed, 20)
            shards = (("a.tar", 9, "11", 3),) if arm.without_images else (("a.tar", 5, "00", 3),)
            mean = 0.1 if arm.name.startswith(("no-", "small-")) else 0.5
            record.add(job, write_run(folder / job.name, rng, mean, arm.counts, shards), MADE_BY)
    return record, arms, folder


def test_answers_come_back_from_the_file_bit_for_bit(study, tmp_path):
    record, arms, folder = study
    record.save(tmp_path / "paper.json")
    again = Record.open(tmp_path / "paper.json", "p")
    assert again == record
    for arm in arms:
        for seed in range(2):
            stored = json.loads((folder / f"{arm.name}-seed{seed}" / "answers.json").read_text())["right"]
            for count in arm.counts:
                assert (
                    "".join("01"[int(hit)] for hit in again.right(f"{arm.name}-seed{seed}", count))
                    == stored[str(count)]
                )
    run = again.runs["flexible-seed0"]
    assert (run["tokens"], run["visual_tokens"], run["samples"], run["seconds"]) == (200, 80, 40, 10.0)
    assert run["half_time_loss"] == pytest.approx(2 - 10.5 / 20) and run["final_loss"] == pytest.approx(2 - 18.5 / 20)


def test_a_protocol_changed_after_results_is_refused(study, tmp_path):
    (tmp_path / "protocol.md").write_text("arms and seeds")
    (tmp_path / "recipe.yaml").write_text("name: a")
    before = protocol_version(tmp_path / "protocol.md", tmp_path / "recipe.yaml")
    record = Record(before, study[0].questions, study[0].runs)
    record.save(tmp_path / "paper.json")
    for name in ("protocol.md", "recipe.yaml"):
        with open(tmp_path / name, "a") as file:
            file.write(" and one more")
        now = protocol_version(tmp_path / "protocol.md", tmp_path / "recipe.yaml")
        with pytest.raises(UserError, match=f"under the protocol {before}, .* is {now} now; restore it"):
            Record.open(tmp_path / "paper.json", now)
    overridden = protocol_version(tmp_path / "protocol.md", tmp_path / "recipe.yaml", ("train.num_steps=3",))
    assert overridden != now
    Record(before, {}, {}).save(tmp_path / "paper.json")
    assert Record.open(tmp_path / "paper.json", now).protocol == now  # nothing was found under the other
    with pytest.raises(UserError, match="the protocol and its recipe come first"):
        protocol_version(tmp_path / "none.md", tmp_path / "recipe.yaml")


def test_other_questions_are_refused_and_a_run_without_answers_is_named(study, tmp_path):
    record, arms, _ = study
    layout = write_run(tmp_path / "run", np.random.default_rng(1), 0.5, COUNTS)
    answers = json.loads(layout.answers.read_text())
    layout.answers.write_text(json.dumps({**answers, "keys": answers["keys"][::-1]}))
    with pytest.raises(UserError, match="was asked other questions"):
        record.add(Job(arms[0], 7, 20), layout, MADE_BY)
    layout.answers.unlink()
    with pytest.raises(UserError, match="was not evaluated: run it again"):
        record.add(Job(arms[0], 7, 20), layout, MADE_BY)


@pytest.mark.parametrize("what", ["missing", "code", "corpus", "parts"])
def test_what_does_not_belong_is_named_and_not_averaged(study, what):
    record, arms, _ = study
    runs = {name: dict(run) for name, run in record.runs.items()}
    if what == "missing":
        del runs["fixed-25-seed1"]
    else:
        runs["fixed-25-seed1"][what] = "another"
    findings = Findings.of(Record("p", record.questions, runs), arms, [0, 1])
    assert "fixed-25" not in findings.runs and "fixed-9" in findings.runs
    assert findings.problems == [
        "fixed-25-seed1: missing" if what == "missing" else f"fixed-25-seed1: of another {what} than flexible"
    ]
    del runs["flexible-seed0"]
    with pytest.raises(UserError, match="the arm flexible is not whole .*flexible-seed0: missing"):
        Findings.of(Record("p", record.questions, runs), arms, [0, 1])


def test_without_the_flexible_arm_nothing_is_judged_whatever_else_there_is(study):
    record, arms, _ = study
    others = {name: run for name, run in record.runs.items() if not name.startswith("flexible")}
    with pytest.raises(UserError, match="the arm flexible is not whole .flexible-seed0, flexible-seed1: missing."):
        Findings.of(Record("p", record.questions, others), arms, [0, 1])


def test_runs_from_other_weights_are_told_apart(recipe, tmp_path):
    part = tmp_path / "encoder"
    part.mkdir()
    config = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vision": str(part)})})
    found = set()
    for weights in (b"one", b"two", b"one"):
        (part / "model.safetensors").write_bytes(weights)
        found.add(MadeBy.here(config))
    assert len(found) == 2 and len({made_by.code for made_by in found}) == 1


def test_means_are_over_tasks_that_are_judged(study):
    record, arms, _ = study
    findings = Findings.of(record, arms, [0, 1])
    hits, tasks = record.right("flexible-seed1", 25), np.array(TASKS)
    wanted = (hits[tasks == "coarse"].mean() + hits[tasks == "dense"].mean()) / 2
    assert findings.accuracy("flexible", 25)[1] == pytest.approx(wanted)
    assert findings.difference("flexible", 25, "fixed-25", 25).mean == pytest.approx(
        (findings.accuracy("flexible", 25) - findings.accuracy("fixed-25", 25)).mean()
    )


def test_every_table_and_plot_is_made_of_the_record(study, tmp_path):
    record, arms, _ = study
    findings = Findings.of(record, arms, [0, 1])
    page = "".join(f"# {name}\n<!-- table: paper/{name} -->\nold\n<!-- end -->\n" for name in TABLES)
    made = filled(page, findings, "paper")
    assert "old" not in made and filled(made, findings, "paper") == made
    assert filled(page, findings, "another") == page
    verdicts = TABLES["verdicts"](findings).splitlines()[2:]
    assert [line.split("|")[1:3] for line in verdicts] == [
        [f" {equal} ", f" {count} "] for equal in ("samples", "tokens") for count in COUNTS
    ]
    assert "| fixed at 64, equal tokens | 20 | 40 | 0.00M | 0.00M | 10 s | 1.00 | 1.00 |" in TABLES["cost"](findings)
    assert len(TABLES["others"](findings).splitlines()) == 2 + 7 * 3 + 3 * 1 + 1
    assert len(TABLES["others-verdicts"](findings).splitlines()) == 2 + 7 * 3 * 2
    assert len(TABLES["hard"](findings).splitlines()) == len(TABLES["reading"](findings).splitlines()) == 2 + 3
    for name, plot in PLOTS.items():
        plot(findings, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    with pytest.raises(UserError, match="wants the table 'nothing'"):
        filled("<!-- table: paper/nothing -->\n<!-- end -->", findings, "paper")


def test_two_records_together_keep_their_own_pairs(study):
    """Of the other record, an arm is missing and the flexible runs are all right: no other pair gains by that."""
    record, arms, _ = study
    runs = {name: dict(run) for name, run in record.runs.items() if not name.startswith("fixed-64-equal")}
    for name in ("flexible-seed0", "flexible-seed1"):
        runs[name]["right"] = dict.fromkeys(runs[name]["right"], "ff" * 8)
        runs[name]["parts"] = "others"
    for name in runs:
        runs[name]["parts"] = "others"
    one, other = (Findings.of(Record("p", record.questions, some), arms, [0, 1]) for some in (record.runs, runs))
    both = Findings.together([one, other])
    assert [arm.name for arm in both.arms] == [arm.name for arm in other.arms] and both.seeds == [0, 1, 2, 3]
    differences = [found.difference("flexible", 9, "fixed-9", 9) for found in (one, other, both)]
    assert differences[2].num_seeds == 4 and differences[1].mean > differences[0].mean + 0.2
    assert differences[2].mean == pytest.approx((differences[0].mean + differences[1].mean) / 2)
    assert (both.answers("flexible", 9)[2:] == other.answers("flexible", 9)).all() and both.answers("flexible", 9)[
        2:
    ].all()
    assert TABLES["verdicts"](both).count("\n") == 1 + 3 + 2  # with no specialist for 64 at equal tokens
    strange = Record("p", {**record.questions, "digest": "0"}, runs)
    with pytest.raises(UserError, match="records of different questions"):
        Findings.together([one, Findings.of(strange, arms, [0, 1])])


@pytest.mark.parametrize("why", ["whole", "another protocol", "not whole", "missing"])
def test_a_record_beside_another_is_shown_or_named_and_left_out(study, why, tmp_path):
    """Whatever is wrong with it, what the study itself found reaches the page."""
    record, arms, _ = study
    runs = {name: run for name, run in record.runs.items() if why != "not whole" or name != "flexible-seed1"}
    if why != "missing":
        Record("p" if why != "another protocol" else "q", record.questions, runs).save(tmp_path / "other.json")
    page = tmp_path / "page.md"
    stems = ("own", "other", "together")
    page.write_text("".join(f"<!-- table: {stem}/verdicts -->\nold\n<!-- end -->\n" for stem in stems))
    shapes = resolve_embedded(load_config("configs/paper.yaml", [f"data.cache_dir={tmp_path}"]), with_weights=False)
    asked, said = Study(Runs(tmp_path, (), shapes, []), tmp_path / "own.json", record), []
    judge(asked, [0, 1], page, said.append, tmp_path / "other.json")
    assert page.read_text().count("\nold\n") == (0 if why == "whole" else 2)
    assert page.read_text().startswith(
        f"<!-- table: own/verdicts -->\n{TABLES['verdicts'](Findings.of(record, arms, [0, 1]))}"
    )
    assert any(line.startswith(f"left out  {tmp_path / 'other.json'}: ") for line in said) == (why != "whole")


RECORDS = [
    name
    for name in ("paper", "paper-second", "paper-x4", "paper-many")
    if (ROOT / f"docs/results/{name}.json").exists()
]
"""Those that have been made or begun, by the command of their name in the Makefile; the second by that of the first."""


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_is_made_of_the_committed_records(name):
    """Each record is of the protocol that stands beside it and of one code and parts; the page's tables are those of its whole seeds."""
    target = "paper" if name == "paper-second" else name
    command = re.search(rf"^{target}: .*\n\t((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)[1]
    overrides = tuple(re.findall(r"[\w.]+=\S+", command.replace("\\\n", " ")))
    protocol = protocol_version(ROOT / "docs/paper-protocol.md", ROOT / "configs/paper.yaml", overrides)
    record = Record.open(ROOT / f"docs/results/{name}.json", protocol)
    assert len({(run["code"], run["parts"]) for run in record.runs.values()}) == 1
    recipe = load_config("configs/paper.yaml", list(overrides))
    arms = [*core_arms(recipe), *further_arms(recipe, 4)]
    core = [arm.name for arm in core_arms(recipe)] if target == "paper" else [FLEXIBLE]
    seeds = list(
        itertools.takewhile(lambda seed: all(f"{arm}-seed{seed}" in record.runs for arm in core), itertools.count(1))
    )
    page = (ROOT / "docs/paper.md").read_text()
    if name == "paper-second" and len(seeds) < 5:
        assert f"<!-- table: {name}/verdicts -->\nnot whole yet\n" in page and f"table: {name}/accuracy" not in page
        return
    assert f"<!-- table: {name}/accuracy -->" in page
    assert filled(page, Findings.of(record, arms, seeds), name) == page
    assert name != "paper" or len(seeds) >= 5


def test_arms_differ_from_the_recipe_as_they_say(recipe):
    arms = [*core_arms(recipe), *further_arms(recipe, 4)]
    assert len({arm.name for arm in arms}) == len(arms) == 1 + 6 + 7 + 3 + 1
    for arm in arms:
        config = load_config("configs/paper.yaml", arm.settings(7, 3, f"{arm.name}-seed3"))
        assert (config.train.num_steps, config.train.seed, config.name) == (7, 3, f"{arm.name}-seed3")
        assert config.evaluate.num_visual_tokens == arm.counts
        if arm.specialist:
            assert config.budget.num_visual_tokens == (arm.specialist,)
        assert config.data.max_images_per_pack == recipe.data.max_images_per_pack
    sizes = {arm.counts[0]: arm.overrides["model.image_size"] for arm in arms if arm.name.startswith("small-image")}
    assert sizes == {9: [12, 12], 25: [20, 20], 64: [32, 32]}
    assert chosen(arms, ["all", "flexible"])[1] == arms[0]
    with pytest.raises(UserError, match="there is no arm 'fixed-10'; known are core, all, flexible, fixed-9"):
        chosen(arms, ["fixed-10"])


def test_shards_without_images_keep_everything_else(corpus, processor, tmp_path):
    from tokenflex.data import Limits, find_shards
    from tokenflex.data.shards import walk_shard

    folder = without_images(corpus / "train", tmp_path / "blind")
    assert without_images(corpus / "train", folder) == folder
    for blind, seen in zip(find_shards([str(folder)]), find_shards([str(corpus / "train")]), strict=True):
        for (ours, _, _), (theirs, _, _) in zip(walk_shard(blind, Limits()), walk_shard(seen, Limits()), strict=True):
            assert ours.keys() == {"__key__", "json"} and ours["__key__"] == theirs["__key__"]
            texts = [
                [
                    item["text"]
                    for message in json.loads(members["json"])["messages"]
                    for item in message["content"]
                    if "text" in item
                ]
                for members in (ours, theirs)
            ]
            assert texts[0] == texts[1] and '"type": "image"' not in ours["json"].decode()


def test_time_is_predicted_image_by_image_from_the_specialists_of_the_same_round():
    def run(seconds, **images):
        return {"seconds": seconds, "images": {count.removeprefix("n"): number for count, number in images.items()}}

    times = {
        "arms": {
            "fixed-9": [run(10, n9=100), run(20, n9=100)],
            "fixed-64": [run(30, n64=100), run(60, n64=100)],
            "flexible": [run(20, n9=50, n64=50), run(44, n9=50, n64=50)],
        }
    }
    assert predicted(times, "flexible").tolist() == [20, 40]
    assert "| flexible | 3.6 | 0.700 | 0.667 | 1.050 (1.000 to 1.100) |" in times_table(times)
    assert times_table({}) == "not measured yet"


def test_code_is_compared_by_what_it_means():
    code = 'class A:\n    """Doc."""\n    x = "kept"  # why\n\n    def f(self):\n        """Doc."""\n        return 1\n'
    said_otherwise = (
        'class A:\n    x = (\n        "kept"\n    )\n    """What x is."""\n    def f(self):\n        return 1\n'
    )
    assert meaning(code) == meaning(said_otherwise)
    for change in (code.replace("return 1", "return 2"), code.replace("kept", "other"), code.replace("def f", "def g")):
        assert meaning(change) != meaning(code)
    assert meaning('def f(a="x"): ...') != meaning('def f(a="y"): ...')


def test_what_a_run_never_enters_is_no_part_of_its_code(cache_dir, tmp_path):
    """A whole run with its questions, and which of the package's modules it ended with."""
    tell = "import atexit, runpy, sys; sys.argv = sys.argv[1:]; "
    tell += "atexit.register(lambda: print('\\nmodules', *(name for name in sys.modules if 'tokenflex' in name))); "
    tell += "runpy.run_path(sys.argv[0], run_name='__main__')"
    settings = [f"output_dir={tmp_path}", f"data.cache_dir={cache_dir}", "evaluate.at_end=true", "train.num_steps=2"]
    (end,) = run_ranks(1, ["-c", tell, "launch/train.py", "--config", TINY, *settings])
    assert end.status == 0, end.output[-2000:]
    entered = {
        name.split(".")[1] for name in end.output.split("\nmodules ")[1].split() if name.startswith("tokenflex.")
    }
    assert {"model", "evaluate", "train"} <= entered and not entered & set(NOT_OF_A_RUN)
