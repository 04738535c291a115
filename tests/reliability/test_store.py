"""The store itself, in one process: failing disks, damaged files, hostile checkpoints, other numbers of ranks, retention.

A save of N ranks is driven part by part with the ranks taking turns, so that a failure can be put at every single call.
"""

import json
import os
import random
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import write_result
from safetensors import safe_open

from tokenflex import failpoints
from tokenflex.checkpoint import (
    CheckpointWriter,
    Damaged,
    EarlyCheck,
    Pieces,
    Retention,
    RunLock,
    check_files,
    check_fits,
    checked_manifest,
    entries,
    latest_tag,
    load_newest,
    named_pieces,
    read_slices,
    read_whole,
    store,
    tags,
)
from tokenflex.checkpoint.places import files_with
from tokenflex.checkpoint.shard import ShardReader, shard_name
from tokenflex.errors import UserError
from tokenflex.layout import tag_of
from tokenflex.parallel.slices import Slice

SHAPES = {"vision.weight": (7, 5), "vision.bias": (1,), "text.weight": (33, 3), "text.norm": (13,)}
FROZEN = {"vision.bias"}


class Turns:
    """The ranks of a job that take turns in one process: what each gives is given by all, and collected by the first."""

    def __init__(self, rank=0, num_ranks=1):
        self.rank, self.num_ranks = rank, num_ranks
        self.parts = {}

    def all_reduce_max(self, numbers):
        return numbers

    def all_gather(self, value):
        return [value]


def state_of(step, num_ranks, rank):
    """Slices cut evenly as ZeRO-3 does, filled with values that depend on the step and the place alone."""
    slices = []
    for number, (name, shape) in enumerate(SHAPES.items()):
        length = torch.Size(shape).numel()
        per_rank = -(-length // num_ranks)
        begin, end = min(length, per_rank * rank), min(length, per_rank * (rank + 1))
        if begin < end:
            kinds = ("weight",) if name in FROZEN else ("weight", "exp_avg", "exp_avg_sq")
            places = torch.arange(begin, end, dtype=torch.float32)
            moved = 0 if name in FROZEN else 100_000 * step
            tensors = {kind: places + 1000 * number + moved + k * 0.25 for k, kind in enumerate(kinds)}
            slices.append(Slice(name=name, shape=shape, start=begin, tensors=tensors, is_shared=False))
    return slices


def describe(progress):
    parameters = {name: [list(shape), "float32", name not in FROZEN] for name, shape in SHAPES.items()}
    constant = {"parameters": parameters, "buffers": ["scale"], "config": {}, "model": {}, "versions": {}}
    return {**constant, "num_updates": progress["step"], "score": progress.get("score")}


def writer_for(folder, keep=2, **retention):
    folder.mkdir(exist_ok=True)
    return CheckpointWriter(folder, Turns(), Retention(last=keep, **retention), "attempt", describe)


def save(writer, step, **progress):
    """Save on one rank; returns `Saved`."""
    writer.start(
        named_pieces(state_of(step, 1, 0), 0, 1),
        {"buffer/scale": torch.tensor([float(step)])},
        {"step": step, **progress},
    )
    return writer.finish()


def save_over(folder, step, num_ranks):
    """A checkpoint by several ranks: each writes its file, then rank 0 names the whole."""
    folder.mkdir(exist_ok=True)
    writers = [
        CheckpointWriter(folder, Turns(rank, num_ranks), Retention(last=9), "attempt", describe)
        for rank in range(num_ranks)
    ]
    for rank, writer in enumerate(writers):
        writer.start(named_pieces(state_of(step, num_ranks, rank), rank, num_ranks), {}, {"step": step})
        writer._thread.join()
    writers[0].ranks.all_gather = lambda value: [w._result for w in writers] if isinstance(value, dict) else [value]
    assert not writers[0].finish().problem


def load(folder, num_ranks=1, rank=0, say=lambda text: None):
    """The newest good checkpoint into fresh slices; returns (Loaded, slices)."""
    slices = [
        Slice(
            name=s.name,
            shape=s.shape,
            start=s.start,
            is_shared=False,
            tensors={k: torch.full_like(t, -1) for k, t in s.tensors.items()},
        )
        for s in state_of(0, num_ranks, rank)
    ]
    loaded = load_newest(folder, Turns(), lambda manifest, place: read_slices(place, manifest, slices, rank), say=say)
    return loaded, slices


def assert_is_step(slices, step, num_ranks=1, rank=0):
    for found, wanted in zip(slices, state_of(step, num_ranks, rank), strict=True):
        for kind in wanted.tensors:
            torch.testing.assert_close(found.tensors[kind], wanted.tensors[kind], rtol=0, atol=0)


@pytest.mark.parametrize("written", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("read", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_any_other_wrote(written, read, tmp_path):
    save_over(tmp_path, 5, written)
    for rank in range(read):
        loaded, slices = load(tmp_path, read, rank)
        assert_is_step(slices, 5, read, rank)
        assert loaded.manifest.num_ranks == written
    whole = read_whole(tmp_path / tag_of(5), loaded.manifest)
    for piece in state_of(5, 1, 0):
        assert torch.equal(whole[piece.name].flatten(), piece.tensors["weight"])


def test_the_files_are_plain_safetensors(tmp_path):
    save(writer_for(tmp_path), 3)
    with safe_open(tmp_path / tag_of(3) / "rank-00000-of-00001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("buffer/scale"), torch.tensor([3.0]))
        assert file.get_tensor("weight/text.weight@0").shape == (99,)
    assert latest_tag(tmp_path) == tag_of(3)


def count_calls(tmp_path, operation):
    """How often a save of one rank calls an operation."""
    never = failpoints.Fault("io", operation, count=10**9)
    writer = writer_for(tmp_path / f"count-{operation}")
    save(writer, 1), save(writer, 2)
    with failpoints.planned(never):
        assert not save(writer, 3).problem
    return never.seen


WORDS = {
    "ENOSPC": "No space left",
    "EIO": "Input/output error",
    "EDQUOT": "quota",
    "EROFS": "Read-only",
    "ESTALE": "Stale",
}


def test_every_call_of_a_save_may_fail(tmp_path):
    """Every k-th write, fsync and rename, with a full disk, an input/output error, a quota, and cut short.

    Whichever call failed: it is told with path and free bytes, a whole checkpoint is there (the one before, or the new
    one if it already had its name), nothing is left lying about, and the next save works.
    """
    num_cases = 0
    for operation in ("write", "fsync", "rename", "link"):
        calls = count_calls(tmp_path, operation)
        assert calls >= {"write": 12, "fsync": 4, "rename": 2, "link": 1}[operation], (operation, calls)
        errors = [*WORDS, "short"] if operation == "write" else WORDS
        for count in range(1, calls + 1):
            for error in errors:
                folder = tmp_path / f"{operation}-{count}-{error}"
                writer = writer_for(folder)
                save(writer, 1), save(writer, 2)
                with failpoints.planned(failpoints.Fault("io", operation, count=count, error=error)):
                    saved = save(writer, 3)
                num_cases += 1
                told = saved.problem + saved.note
                assert bool(told) == (error != "short"), (operation, count, error, told)
                if told:  # a short write is carried on by another: nothing has failed
                    assert WORDS[error] in told and str(folder) in told and "bytes free" in told, told
                loaded, slices = load(folder)
                has_name = not saved.problem or (operation, count) in (("fsync", 4),)  # the sync after the renaming
                assert loaded.manifest.step == (3 if has_name else 2), (operation, count, error)
                assert_is_step(slices, loaded.manifest.step)
                assert not [path for path in folder.iterdir() if path.name.startswith(".")]
                assert not save(writer, 4).problem
                assert_is_step(load(folder)[1], 4)
                assert latest_tag(folder) == tag_of(4)
    write_result("failing disk", cases=num_cases, failures=0)
    assert num_cases >= 100, num_cases


def frozen_inodes(folder):
    """{tag: inode} of the frozen file of one rank's checkpoints."""
    return {tag: (folder / tag / "frozen-00000-of-00001.safetensors").stat().st_ino for tag in tags(folder)}


def test_frozen_weights_are_written_twice_and_then_linked_by_turns(tmp_path):
    writer = writer_for(tmp_path, keep=9)
    sizes = [save(writer, step).num_bytes for step in range(1, 7)]
    one, two, three, four, five, six = frozen_inodes(tmp_path).values()
    assert one != two and (three, four, five, six) == (one, two, one, two)
    frozen = (tmp_path / tag_of(1) / "frozen-00000-of-00001.safetensors").stat().st_size
    assert sizes[0] == sizes[1] == sizes[2] + frozen and sizes[2:] == [sizes[2]] * 4
    for step in range(1, 7):
        manifest = checked_manifest(tmp_path / tag_of(step))
        check_files(tmp_path / tag_of(step), manifest)
        assert len(manifest.files) == 2, "a checkpoint is complete in its own folder"


@pytest.mark.parametrize("keep, num_inodes", [(1, 1), (2, 2), (3, 2)])
def test_what_retention_removes_takes_no_frozen_weight_along(keep, num_inodes, tmp_path):
    writer = writer_for(tmp_path, keep=keep)
    sizes = [save(writer, step).num_bytes for step in range(1, 8)]
    assert len(set(frozen_inodes(tmp_path).values())) == num_inodes
    assert len({*sizes[2:]}) == 1 and sizes[2] < sizes[0], "nothing frozen is written from the third save on"
    loaded, slices = load(tmp_path)
    assert_is_step(slices, 7)


def test_the_next_start_links_what_it_finds_by_its_bytes(tmp_path):
    first = writer_for(tmp_path, keep=9)
    save(first, 1), save(first, 2)
    before = frozen_inodes(tmp_path)
    path = tmp_path / tag_of(2) / "frozen-00000-of-00001.safetensors"
    flip(path, random.Random(0))
    again = writer_for(tmp_path, keep=9)
    save(again, 3), save(again, 4), save(again, 5)
    inodes = frozen_inodes(tmp_path)
    assert inodes[tag_of(3)] not in before.values(), "one good copy was there: a second is written"
    assert inodes[tag_of(4)] == before[tag_of(1)] and inodes[tag_of(5)] == inodes[tag_of(3)]
    assert_is_step(load(tmp_path)[1], 5)


@pytest.mark.parametrize("error", ["EPERM", "EXDEV", "EOPNOTSUPP", "EMLINK"])
def test_without_hard_links_frozen_weights_are_written_every_time(error, tmp_path):
    writer = writer_for(tmp_path, keep=9)
    faults = [failpoints.Fault("io", "link", count=count, error=error) for count in range(1, 9)]
    with failpoints.planned(*faults):
        assert all(not save(writer, step).problem for step in range(1, 6))
    assert len(set(frozen_inodes(tmp_path).values())) == 5
    assert_is_step(load(tmp_path)[1], 5)


def test_damage_to_both_copies_is_not_repaired_and_passed_over(tmp_path):
    writer = writer_for(tmp_path, keep=9)
    save(writer, 1), save(writer, 2), save(writer, 3)
    for step in (2, 3):  # step 1 shares its inode with step 3
        flip(tmp_path / tag_of(step) / "frozen-00000-of-00001.safetensors", random.Random(step))
    with pytest.raises(UserError, match="none of 3 can be loaded"):
        load(tmp_path)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: os.truncate(path, 3)])
def test_a_frozen_file_that_is_gone_or_cut_is_found_again(damage, tmp_path):
    writer = writer_for(tmp_path, keep=9)
    save(writer, 1), save(writer, 2)
    damage(tmp_path / tag_of(2) / "frozen-00000-of-00001.safetensors")
    said = []
    loaded, slices = load(tmp_path, say=said.append)
    assert loaded.manifest.step == 2 and "a good copy was found in" in said[0]
    assert_is_step(slices, 2)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(1, 500), st.sampled_from(["blocks", "even", "own"]), st.data())
def test_the_manifest_names_the_files_with_a_stretch_and_no_other(num_ranks, total, cut, data):
    """By brute force: each element lies on one rank; those of a stretch are what is named."""
    start = data.draw(st.integers(0, total - 1))
    length = data.draw(st.integers(1, total - start))
    if cut == "own":
        ends = sorted(data.draw(st.lists(st.integers(0, total), min_size=num_ranks - 1, max_size=num_ranks - 1)))
        begins, ends = [0, *ends], [*ends, total]
        owner = {at: rank for rank, (a, b) in enumerate(zip(begins, ends)) for at in range(a, b)}
        place = [[rank, a, b - a] for rank, (a, b) in enumerate(zip(begins, ends)) if b > a]
    else:
        pieces = [
            Slice(name="w", shape=(total,), start=0, tensors={"weight": torch.arange(total)}, is_shared=cut == "even")
            for _ in range(num_ranks)
        ]
        if cut == "even":
            held = [piece.share(rank, num_ranks)[1]["weight"].tolist() for rank, piece in enumerate(pieces)]
            place = pieces[0].place(0, num_ranks)
        else:
            per_rank = -(-total // num_ranks)
            held, place = (
                [list(range(total))[per_rank * rank : per_rank * (rank + 1)] for rank in range(num_ranks)],
                "blocks",
            )
        owner = {at: rank for rank, some in enumerate(held) for at in some}
    assert owner.keys() == set(range(total))
    manifest = SimpleNamespace(places={"w": place}, parameters={"w": [[total], "float32", True]}, num_ranks=num_ranks)
    ranks = sorted({owner[at] for at in range(start, start + length)})
    assert files_with(manifest, "w", start, length) == [shard_name(rank, num_ranks) for rank in ranks]


@pytest.mark.parametrize("written, read, most", [(8, 8, 2), (8, 4, 4), (4, 8, 2), (8, 1, 16)])
def test_a_rank_opens_the_files_with_its_slices_alone(written, read, most, tmp_path, monkeypatch):
    """As many ranks as before: its own two; half as many: two ranks' each."""
    save_over(tmp_path, 5, written)
    opened = []
    monkeypatch.setattr(store, "ShardReader", lambda path: opened.append(path.name) or ShardReader(path))
    for rank in range(read):
        opened.clear()
        _, slices = load(tmp_path, read, rank)
        assert_is_step(slices, 5, read, rank)
        own = {name for piece in slices for name in files_with(checked_manifest(tmp_path / tag_of(5)), piece.name,
               piece.start, piece.tensors["weight"].numel())}  # fmt: skip
        assert len(opened) == len(set(opened)) <= most and set(opened) <= own


DAMAGE_ROUNDS = 1000


def flip(path, draw):
    data = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path, draw):
    os.truncate(path, draw.randrange(path.stat().st_size))


@pytest.mark.parametrize("damage, rounds", [(flip, DAMAGE_ROUNDS), (truncate, 200)])
def test_every_damage_is_found_and_the_one_before_is_taken(damage, rounds, tmp_path):
    for step in (1, 2):
        save_over(tmp_path, step, 2)
    draw = random.Random(0)
    files = sorted((tmp_path / tag_of(2)).iterdir())
    assert len(files) == 4
    for _ in range(rounds):
        path = draw.choice(files)
        before = path.read_bytes()
        damage(path, draw)
        assert path.read_bytes() != before
        said = []
        loaded, slices = load(tmp_path, say=said.append)
        has_copy = path.name.startswith("frozen")  # in the checkpoint before, by another inode
        assert loaded.manifest.step == (2 if has_copy else 1), f"{path.name}: damage went unnoticed"
        assert_is_step(slices, loaded.manifest.step)
        assert len(said) == 1 and tag_of(2) in said[0] and ("a good copy" if has_copy else "passed over") in said[0]
        assert not has_copy or path.read_bytes() == before
        path.unlink()
        path.write_bytes(before)
    assert load(tmp_path)[0].manifest.step == 2
    write_result(f"damage: {damage.__name__}", cases=rounds, found=rounds)


def mixes(folder):
    """Other ways in which a checkpoint comes to be wrong: name -> what does it to the checkpoint of step 2."""
    one, two = folder / tag_of(1), folder / tag_of(2)
    first, second = "rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"
    return {
        "a file is gone": lambda: (two / first).unlink(),
        "the manifest is gone": lambda: (two / "manifest.json").unlink(),
        "a file of another step": lambda: (two / first).write_bytes((one / first).read_bytes()),
        "the manifest of another step": lambda: (two / "manifest.json").write_bytes(
            (one / "manifest.json").read_bytes()
        ),
        "the ranks' files swapped": lambda: swap(two / first, two / second),
        "an empty file": lambda: (two / second).write_bytes(b""),
        "a longer file": lambda: (two / second).write_bytes((two / second).read_bytes() + b"\0"),
        "a link instead of a file": lambda: link(two / first, one / first),
        "a folder instead of a file": lambda: ((two / first).unlink(), (two / first).mkdir()),
        "a link instead of the checkpoint": lambda: (two.rename(folder / "away"), two.symlink_to(one)),
    }


def swap(a, b):
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


def link(path, target):
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("mix", mixes(Path()))
def test_missing_and_mixed_files_are_found(mix, tmp_path):
    for step in (1, 2):
        save_over(tmp_path, step, 2)
    mixes(tmp_path)[mix]()
    said = []
    loaded, slices = load(tmp_path, say=said.append)
    assert loaded.manifest.step == 1 and said
    assert_is_step(slices, 1)


def test_an_early_check_is_believed_only_while_nothing_changes(tmp_path):
    save_over(tmp_path, 1, 2), save_over(tmp_path, 2, 2)
    path = tmp_path / tag_of(2) / "rank-00001-of-00002.safetensors"

    def newest(early):
        return load_newest(
            tmp_path, Turns(), lambda manifest, place: None, say=lambda text: None, check=early
        ).manifest.step

    early = EarlyCheck(tmp_path, 0, 1)
    early._thread.join()
    assert newest(early) == 2
    flip(path, random.Random(1))
    assert newest(early) == 1, "what was found before the damage was believed"
    assert newest(EarlyCheck(tmp_path, 0, 1)) == 1
    assert newest(EarlyCheck(tmp_path / "empty", 0, 1)) == 1


def test_where_nothing_is_good_the_run_does_not_begin_anew(tmp_path):
    save(writer_for(tmp_path), 1)
    (tmp_path / tag_of(1) / "rank-00000-of-00001.safetensors").unlink()
    with pytest.raises(UserError, match="none of 1 can be loaded.*is missing.*--fresh"):
        load(tmp_path)
    assert load(tmp_path / "empty")[0] is None


class Trap:
    """A pickle that would leave a file behind if anything unpickled it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def rewritten(folder, change):
    """Change the manifest as one who knows its checksum would."""
    from blake3 import blake3

    path = folder / "manifest.json"
    record = json.loads(path.read_bytes())
    record.pop("blake3")
    change(record)
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({**record, "blake3": blake3(text).hexdigest()}))


def entry_for(path):
    from tokenflex.checkpoint.disk import checksum_of

    return {"size": path.stat().st_size, "blake3": checksum_of(path)}


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "rank-00000-of-00001.safetensors/../../outside", "a.pkl", ""]
)
def test_a_manifest_cannot_name_files_outside(name, tmp_path):
    save(writer_for(tmp_path), 1)
    (tmp_path / "outside").write_bytes(b"secret")
    folder = tmp_path / tag_of(1)
    rewritten(folder, lambda record: record.update(files={name: entry_for(tmp_path / "outside")}))
    with pytest.raises(Damaged, match="none of a checkpoint's"):
        checked_manifest(folder)


def hostile_files(marker):
    """Bytes that a reader might run or choke on, with checksums that fit."""
    import pickle

    header = json.dumps({"weight/a@0": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}).encode()
    return {
        "pickle": pickle.dumps(Trap(marker)),
        "oversized header": struct.pack("<Q", 2**62) + b"{}",
        "header beyond the library's limit": struct.pack("<Q", 200_000_000) + b" " * 64,
        "offsets outside the file": struct.pack("<Q", len(header)) + header + b"\0" * 16,
        "header that is no JSON": struct.pack("<Q", 8) + b"\xff" * 8,
    }


@pytest.mark.parametrize("kind", hostile_files(""))
def test_a_hostile_file_with_a_fitting_checksum_runs_nothing(kind, tmp_path):
    save(writer_for(tmp_path), 1)
    folder, marker = tmp_path / tag_of(1), tmp_path / "ran"
    path = folder / "rank-00000-of-00001.safetensors"
    path.write_bytes(hostile_files(marker)[kind])
    rewritten(folder, lambda record: record.update(files={path.name: entry_for(path)}))
    check_files(folder, checked_manifest(folder))  # the attacker knows the format
    with pytest.raises(Damaged, match="cannot be read"):
        load(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"null", b"[" * 100_000, b'{"format": 2}', b"\xff\xfe", b"{}" * 9])
def test_a_manifest_that_is_none_is_damage(text, tmp_path):
    save(writer_for(tmp_path), 1), save(writer_for(tmp_path), 2)
    (tmp_path / tag_of(2) / "manifest.json").write_bytes(text)
    assert load(tmp_path)[0].manifest.step == 1


def test_retention_keeps_last_every_and_best(tmp_path):
    writer = writer_for(tmp_path, keep=2, every=4, best=1)
    for step in range(1, 11):
        save(writer, step, score=abs(step - 3.1))
    assert tags(tmp_path) == [tag_of(step) for step in (3, 4, 8, 9, 10)]


def test_retention_never_removes_the_last_good_one(tmp_path):
    writer = writer_for(tmp_path, keep=1)
    save(writer, 1)
    save(writer_for(tmp_path, keep=9), 2)
    os.truncate(tmp_path / tag_of(2) / "rank-00000-of-00001.safetensors", 9)
    found = entries(tmp_path)
    assert [bool(entry.manifest) for entry in found] == [True, False]
    assert Retention(last=1).kept(found) == {tag_of(1), tag_of(2)}
    save(writer, 4)
    assert tags(tmp_path) == [tag_of(4)]


def test_the_state_just_saved_is_not_saved_again(tmp_path):
    writer = writer_for(tmp_path)
    assert save(writer, 1).num_bytes > 0
    before = (tmp_path / tag_of(1)).stat().st_ino
    assert save(writer, 1) is None
    assert (tmp_path / tag_of(1)).stat().st_ino == before


def test_a_second_save_waits_for_the_first(tmp_path):
    writer = writer_for(tmp_path)
    for step in (1, 2, 3):
        writer.start(named_pieces(state_of(step, 1, 0), 0, 1), {}, {"step": step})
    writer.finish()
    assert tags(tmp_path) == [tag_of(2), tag_of(3)]
    assert_is_step(load(tmp_path)[1], 3)


def test_the_snapshot_is_of_the_moment(tmp_path):
    """What passes may change at once, what is trained after `before_update`: neither change is seen in the file."""
    for step in range(1, 30):
        writer, live, passing = writer_for(tmp_path), state_of(step, 1, 0), torch.full((1000,), float(step))
        writer.start(named_pieces(live, 0, 1), {"buffer/scale": passing}, {"step": step})
        passing.fill_(float("nan"))
        writer.before_update()
        for piece in live:
            for tensor in piece.tensors.values() if piece.name not in FROZEN else ():
                tensor.fill_(float("nan"))
        assert writer.finish().stall_s > 0
        loaded, slices = load(tmp_path)
        assert_is_step(slices, step)
        assert torch.equal(
            read_whole(tmp_path / loaded.tag, loaded.manifest)["scale"], torch.full((1000,), float(step))
        )


def test_an_error_that_is_not_the_disks_ends_the_run(tmp_path):
    """A programming error in the thread is raised in the step loop; nothing waits for ever."""
    writer = writer_for(tmp_path)
    writer.start(Pieces({"weight/a@0": torch.zeros(3, dtype=torch.complex64)}), {}, {"step": 1})
    writer.before_update()
    with pytest.raises(KeyError, match="complex64"):
        writer.finish()


def test_a_checkpoint_of_another_model_is_named(tmp_path):
    save(writer_for(tmp_path), 1)
    other = [Slice(name="text.weight", shape=(4, 3), start=0, is_shared=False, tensors={"weight": torch.zeros(12)})]
    with pytest.raises(UserError, match=r"text.weight has shape \[33, 3\], the model's is \[4, 3\]"):
        load_newest(tmp_path, Turns(), lambda manifest, place: read_slices(place, manifest, other, 0))
    fewer = {name: (list(shape), name not in FROZEN) for name, shape in SHAPES.items() if name != "text.norm"}
    with pytest.raises(UserError, match="has a parameter text.norm that the model lacks"):
        check_fits("x", checked_manifest(tmp_path / tag_of(1)), fewer, is_whole=True)
    frozen = [Slice(name="text.norm", shape=(13,), start=0, is_shared=False, tensors={"weight": torch.zeros(13)})]
    with pytest.raises(UserError, match="text.norm was trained, now it is frozen"):
        load_newest(tmp_path, Turns(), lambda manifest, place: read_slices(place, manifest, frozen, 0))


def test_one_writer_per_run_folder(tmp_path):
    """The lock is a record lock of the process, so the second writer must be another process."""
    lock = RunLock(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            RunLock(tmp_path, wait_s=0)
        except UserError as error:
            os._exit(0 if "another job writes there" in str(error) and str(os.getppid()) in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    lock.release()
    RunLock(tmp_path, wait_s=0).release()
