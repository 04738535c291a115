"""Evaluation reads on past whatever training reads past: by the same rules, counted, named, and no question lost beside it."""

import functools
import http.server
import json
import threading
from collections import Counter
from pathlib import Path

import pytest
from bad_samples import JPEG, Case, cases, conversation, good_bytes, key_of, raw, tar_bytes, write_bad_shard

from tokenflex.config import load_config
from tokenflex.data import Limits
from tokenflex.data.remote import locate_shards
from tokenflex.data.shards import as_shards
from tokenflex.errors import UserError
from tokenflex.evaluate.questions import MAX_NAMED, read_questions

LIMITS = Limits(max_member_bytes=2**20)
CASES = cases()
BLANK = {"blank answer"}
"""Nothing to learn in training, but an answer that can be asked for."""


@pytest.fixture(scope="module")
def bad_shard(tmp_path_factory):
    shard = tmp_path_factory.mktemp("bad") / "bad.tar"
    write_bad_shard(shard, CASES)
    return shard


def test_every_kind_of_damage_is_left_out_named_and_costs_no_other(bad_shard):
    questions = read_questions(as_shards([bad_shard]), 10**6, LIMITS)
    skipped = {name: case for name, case in CASES.items() if case.skip and name not in BLANK}
    assert Counter(problem.reason for problem in questions.problems) == Counter(c.skip for c in skipped.values())
    named = {problem.key for problem in questions.problems if problem.key}
    assert named == {key_of(name) for name in skipped} - {key_of("headers wiped")}
    asked = {sample.key for sample in questions.samples}
    assert asked >= {key_of(name) for name, case in CASES.items() if case.repair}
    assert sum(key.startswith("good-") for key in asked) == len(CASES) + 1
    assert all(str(problem).startswith(str(bad_shard)) for problem in questions.problems)


def test_they_are_told_and_not_all_of_them(bad_shard):
    questions, lines = read_questions(as_shards([bad_shard]), 10**6, LIMITS), []
    questions.tell(lines.append)
    assert len(lines) == MAX_NAMED + 1
    assert all(line.startswith(f"left out  {bad_shard}, sample ") for line in lines[:MAX_NAMED])
    assert lines[-1] == f"left out  {len(questions.problems) - MAX_NAMED} more; tokenflex data validate names all"
    lines.clear()
    good = Path(bad_shard).with_name("good.tar")
    good.write_bytes(good_bytes("a") + bytes(1024))
    read_questions(as_shards([good]), 9, LIMITS).tell(lines.append)
    assert not lines


@pytest.mark.parametrize("last", ["user", "system"])
def test_a_sample_without_the_expected_answer_is_a_bad_one(last, tmp_path):
    turns = [*conversation(), {"role": last, "content": "and then?"}]
    case = tar_bytes("open", Case([("json", raw(turns)), ("0.jpg", JPEG)]))
    (tmp_path / "s.tar").write_bytes(good_bytes("a") + case + good_bytes("b") + bytes(1024))
    questions = read_questions(as_shards([tmp_path / "s.tar"]), 9, LIMITS)
    assert [sample.key for sample in questions.samples] == ["a", "b"]
    (problem,) = questions.problems
    assert (problem.key, problem.reason) == ("open", "no-answer") and f"ends with a {last} message" in str(problem)


def test_the_limits_are_those_of_the_configuration(tmp_path):
    (tmp_path / "s.tar").write_bytes(good_bytes("a") + bytes(1024))
    for limits in (Limits(max_image_pixels=99), Limits(max_member_bytes=9)):
        with pytest.raises(UserError, match="of 1 samples in 1 shards none is good"):
            read_questions(as_shards([tmp_path / "s.tar"]), 9, limits)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="none.tar: No such file"):
        read_questions(as_shards([tmp_path / "none.tar"]), 9, LIMITS)


def test_bad_ones_do_not_use_up_the_questions_of_a_task(tmp_path):
    broken = tar_bytes("x", Case([("json", json.dumps({"messages": conversation()}).encode()), ("0.jpg", JPEG[:-400])]))
    shard = tmp_path / "s.tar"
    shard.write_bytes(broken + good_bytes("a") + good_bytes("b") + good_bytes("c") + bytes(1024))
    questions = read_questions(as_shards([shard]), 2, LIMITS)
    assert [sample.key for sample in questions.samples] == ["a", "b"] and len(questions.problems) == 1


def test_questions_behind_a_url_are_read_as_training_reads_them(tmp_path):
    """A real server on the loopback; the copy goes into the run's cache."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "s.tar").write_bytes(good_bytes("a") + good_bytes("b") + bytes(1024))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(served))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/s.tar"
        data = load_config(None, [f"data.evaluation=[{url}]", f"data.cache_dir={tmp_path}/cache"]).data
        shards = locate_shards(data.evaluation, data, "data.evaluation")
        questions = read_questions(shards, 9, Limits.of(data))
        server.shutdown()
    assert [sample.key for sample in questions.samples] == ["a", "b"] and not questions.problems
    assert list((tmp_path / "cache").rglob("*.tar"))


def test_tasks_are_chosen_by_name(corpus):
    shards = as_shards(sorted((corpus / "eval").glob("*.tar")))
    every = Counter(sample.task for sample in read_questions(shards, 2, Limits()).samples)
    some = read_questions(shards, 2, Limits(), tasks=("dense", "control"))
    assert Counter(sample.task for sample in some.samples) == {task: every[task] for task in ("dense", "control")}
    with pytest.raises(
        UserError, match=r"evaluate.tasks: no good question of task 'denser'; there are coarse, control"
    ) as error:
        read_questions(shards, 2, Limits(), tasks=("dense", "denser"))
    assert "\n" not in str(error.value)
