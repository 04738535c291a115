"""Laws of a resumed recipe: every key is of one kind, what a run is cannot change, and a complete run hides nothing."""

import pytest

from tokenflex.config import RunConfig, load_config
from tokenflex.config.load import _fields
from tokenflex.errors import UserError
from tokenflex.train.changes import BEGINNINGS, HOW, NEXT, check_branch, check_changes


def changes(*overrides, step=3, before=("train.num_steps=5",)):
    before = load_config(None, before).model_dump(mode="json")
    return check_changes(before, load_config(None, ["train.num_steps=5", *overrides]), "run runs/x", step)


KEYS = [key for key, _, _ in _fields(RunConfig)]


def test_the_lists_name_keys_that_exist_and_no_key_twice():
    for name in (*HOW, *NEXT):
        assert any(key == name or key.startswith(name) for key in KEYS), f"{name} is no key"
    assert not {key for key in KEYS if key.startswith(HOW) and key.startswith(NEXT)}


OTHER = {
    "optimizer.schedule": "linear",
    "train.loss_weighting": "token",
    "model.pooling_mode": "resize",
    "model.vision_position_embedding": "sine2d",
    "train.precision": "bf16",
    "optimizer.betas": "[0.8,0.9]",
    "model.image_tokens": '["<a>","<b>","<c>"]',
    "model.liger": "off",
    "train.wandb": "off",
}


@pytest.mark.parametrize("key", OTHER)
def test_each_kind_of_key_does_as_its_kind(key):
    override = f"{key}={OTHER[key]}"
    if key.startswith(HOW):
        assert changes(override) == []
    elif key.startswith(NEXT):
        (line,) = changes(override)
        assert line.startswith(f"changed   {key} was ") and line.endswith(" from here on")
    else:
        with pytest.raises(UserError, match=f"made with {key}=.*set it back, choose another name"):
            changes(override)


def test_a_rate_of_one_part_is_named_alone():
    (line,) = changes("optimizer.text.learning_rate=1e-3")
    assert line == "changed   optimizer.text.learning_rate was 2e-05, is 0.001 from here on"
    with pytest.raises(UserError, match="optimizer.vision.train=True, the recipe says False"):
        changes("optimizer.vision.train=false")


def test_a_complete_run_takes_no_change_that_its_steps_would_have_used():
    assert changes(step=5) == [] and changes("evaluate.batch_size=3", "train.log_every=1", step=5) == []
    with pytest.raises(UserError, match="its 5 steps are done, with optimizer.schedule=cosine, the recipe says linear"):
        changes("optimizer.schedule=linear", step=5)
    lines = changes("optimizer.schedule=linear", "train.num_steps=9", step=5)
    assert [line.split()[1] for line in lines] == ["optimizer.schedule", "train.num_steps"]


def other_than(value):
    """A value of the same kind that is another one; None where none is known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    return [*value, *value] if isinstance(value, (list, tuple)) and value else {"model_type": "other", "x": 1}


@pytest.mark.parametrize("key", [key for key in KEYS if key.startswith("model.")])
def test_a_branch_has_the_model_of_the_run_that_it_branches_off(key):
    """Every key of the model's section, whether a weight's shape tells of it or not."""
    recipe = load_config(None, ["train.num_steps=5", "name=branch", "optimizer.schedule=linear"])
    before = load_config(None, ["train.num_steps=5"]).model_dump(mode="json")
    check_branch(before, recipe, "run runs/x")
    name = key.removeprefix("model.").partition(".")[0]
    before["model"][name] = other_than(before["model"][name])
    if key.startswith((*HOW, *BEGINNINGS)):
        check_branch(before, recipe, "run runs/x")
    else:
        with pytest.raises(
            UserError, match=f"run runs/x: its checkpoints were made with model.{name}=.*; set it as there"
        ):
            check_branch(before, recipe, "run runs/x")


def test_fewer_steps_than_are_done_are_refused():
    with pytest.raises(UserError, match="train.num_steps=2, but 3 steps are done; set it to 3 or more"):
        changes("train.num_steps=2")


def test_several_changes_are_all_named_and_keys_of_this_release_are_none():
    with pytest.raises(UserError, match=r"model.pooling_mode=.*and 1 more: model.thumbnail"):
        changes("model.pooling_mode=resize", "model.thumbnail=false")
    before = load_config(None, ["train.num_steps=5"]).model_dump(mode="json")
    del before["model"]["thumbnail"]
    recipe = load_config(None, ["train.num_steps=5", "model.thumbnail=false"])
    assert check_changes(before, recipe, "run runs/x", 3) == []
