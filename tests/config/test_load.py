"""Strict configuration: what is written is what runs, and every mistake is one line that names its mend."""

import pytest
from conftest import ROOT

from tokenflex.config import RunConfig, apply_overrides, describe, load_config, save_config
from tokenflex.errors import UserError

WRONG = {
    "train.num_stps=3": ["unknown key train.num_stps", "did you mean train.num_steps"],
    "num_steps=3": ["unknown key num_steps", "did you mean train.num_steps"],
    "optimizer.text.lr=1": ["unknown key optimizer.text.lr", "learning_rate"],
    "train.num_steps=many": ["train.num_steps", "integer", "'many'"],
    "train.num_steps=0": ["train.num_steps", "greater than 0"],
    "train.num_steps=2.5": ["train.num_steps", "integer", "2.5"],
    "train.precision=fp8": ["train.precision", "'fp8'", "bf16"],
    "budget.num_visual_tokens=[0,64,256]": ["budget.num_visual_tokens.0", "greater than 0", "0"],
    "budget.num_visual_tokens=[-4,64,256]": ["budget.num_visual_tokens.0", "greater than 0", "-4"],
    "budget.num_visual_tokens=[64,64,256]": ["distinct counts"],
    "budget.probabilities=[0.5,0.5]": ["2 probabilities", "3 counts"],
    "budget.probabilities=[0.5,0.5,0.5]": ["sum to 1.5"],
    "budget.probabilities=[0,0,0]": ["sum to 0"],
    "budget.schedule=[[5,[1,0,0]],[5,[0,0,1]]]": ["must rise"],
    "data.lockstep_packs=7": ["lockstep_packs=7", "packs_per_step=64"],
    "name=../../etc": ["name", "../../etc"],
    "train": ["wanted section.key=value"],
    "train.num_steps.deep=1": ["train.num_steps"],
    "optimizer.betas=[0.9,nan]": ["optimizer.betas.1", "finite"],
    "optimizer.betas=[0.9,1.0]": ["optimizer.betas.1", "less than 1"],
    "optimizer.text.betas=often": ["optimizer.text.betas", "'often'"],
    "optimizer.text.layer_decay=1.5": ["optimizer.text.layer_decay", "less than or equal to 1"],
    "optimizer.schedule=wds": ["optimizer.schedule", "'wds'", "'wsd'"],
    "optimizer.warmup_steps=2000": ["warmup_steps=2000", "train.num_steps=1000", "shorten the warm-up"],
    "train.ema_decay=1": ["train.ema_decay", "less than 1"],
    "model.projector_adapter.rank=4": ["unknown key model.projector_adapter"],
    "model.text_adapter.rank=-1": ["model.text_adapter.rank", "greater than or equal to 0"],
    "model.text_adapter.dropout=1": ["model.text_adapter.dropout", "less than 1"],
    "train.export_adapter=true": ["needs an adapter", "model.init_from"],
    "train.compile=all": ["train.compile", "'all'", "'blocks'"],
    **{
        f"{key}=2": [f"unknown key {key}: there is no sequence parallelism here"]
        for key in (
            "train.sequence_ranks",
            "train.sequence_parallel_size",
            "data.context_parallel",
            "train.sp_size",
            "ulysses",
        )
    },
    "train.sequence=2": ["unknown key train.sequence;"],
    "train.export_average=true": ["train.ema_decay is 0", "no average is kept"],
}


@pytest.mark.parametrize("override", WRONG)
def test_a_mistake_is_one_line_that_names_it(override):
    with pytest.raises(UserError) as error:
        load_config(None, [override])
    assert "\n" not in str(error.value)
    for part in WRONG[override]:
        assert part in str(error.value), str(error.value)


def test_an_adapters_folder_with_single_rows_of_an_embedding_is_refused():
    adapter = ["model.text_adapter.rank=4", "model.init_from=x", "train.export_adapter=true"]
    with pytest.raises(UserError, match="optimizer.train_image_tokens=true: .*set one of them to false"):
        load_config(None, [*adapter, "optimizer.train_image_tokens=true"])


def test_compiled_blocks_and_checkpointed_ones_exclude_each_other():
    with pytest.raises(
        UserError, match="train.compile=blocks with model.gradient_checkpointing=true: .*set one of them off"
    ):
        load_config(None, ["train.compile=blocks", "model.gradient_checkpointing=true"])


@pytest.mark.parametrize("part", ["text", "vision"])
def test_an_adapter_on_a_frozen_part_is_refused(part):
    with pytest.raises(UserError, match=f"model.{part}_adapter .* but optimizer.{part}.train=false; set it"):
        load_config(None, [f"model.{part}_adapter.rank=4", f"optimizer.{part}.train=false"])


def test_a_run_that_trains_nothing_is_refused_and_one_that_trains_rows_is_not():
    frozen = [f"optimizer.{part}.train=false" for part in ("vision", "projector", "text")]
    with pytest.raises(
        UserError, match="vision, projector and text are all frozen; set optimizer.projector.train=true"
    ):
        load_config(None, frozen)
    assert load_config(None, [*frozen, "optimizer.train_image_tokens=true"]).optimizer.train_image_tokens


def test_a_recipe_that_extends_another_holds_what_differs(tmp_path):
    (tmp_path / "base.yaml").write_text("model: {image_size: [28, 28], max_tiles: 2}\ntrain: {num_steps: 7}\n")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "next.yaml").write_text("extends: ../base.yaml\nname: next\nmodel: {max_tiles: 3}\n")
    (inner / "last.yaml").write_text("extends: next.yaml\nname: last\n")
    config = load_config(inner / "last.yaml", ["train.log_every=3"])
    assert (config.name, config.model.max_tiles, config.model.image_size) == ("last", 3, (28, 28))
    assert (config.train.num_steps, config.train.log_every) == (7, 3)
    (inner / "next.yaml").write_text("extends: last.yaml\n")
    for text, part in (
        ("extends: none.yaml", "none.yaml: No such file"),
        ("extends: [a, b]", "wanted the name of one YAML file"),
    ):
        (inner / "wrong.yaml").write_text(text)
        with pytest.raises(UserError, match=part):
            load_config(inner / "wrong.yaml")
    with pytest.raises(UserError, match="extends itself, by way of"):
        load_config(inner / "last.yaml")


def test_overrides_reach_every_depth_and_keep_their_neighbours(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("optimizer:\n  vision: {train: false}\ntrain: {num_steps: 7}\n")
    config = load_config(
        path, ["optimizer.text.learning_rate=3e-3", "model.vision.model_type=clip_vision_model", "name=a-b.c"]
    )
    assert config.train.num_steps == 7 and not config.optimizer.vision.train
    assert config.optimizer.vision.learning_rate == RunConfig().optimizer.vision.learning_rate != 2e-5
    assert config.optimizer.text.learning_rate == 0.003
    assert config.model.vision == {"model_type": "clip_vision_model"} and config.name == "a-b.c"


def test_yaml_surprises_are_read_as_a_person_means_them(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "budget: {num_visual_tokens: [10, 20], probabilities: [.5, 5e-1]}\noptimizer: {eps: 1e-9}\ntrain: {wandb: off}\n"
    )
    config = load_config(path)
    assert config.optimizer.eps == 1e-9 and config.train.wandb == "off"
    assert config.budget.probabilities == (0.5, 0.5)


@pytest.mark.parametrize("text, part", [("a: [1", "not valid YAML"), ("- 1\n- 2", "list at the top")])
def test_a_broken_file_is_named(tmp_path, text, part):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=part) as error:
        load_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_config(tmp_path / "none.yaml")


def test_saved_configuration_loads_to_an_equal_one(tmp_path):
    config = load_config(None, ["train.num_steps=3", "budget.schedule=[[0,[1,0,0]],[10,[0,0,1]]]", "data.train=x.tar"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("given, wanted", [
    ("[0.333333,0.333333,0.333333]", [1 / 3] * 3),
    ("[0.33,0.33,0.33]", [1 / 3] * 3),
    ("[2,3,5]", [0.2, 0.3, 0.5]),
    ("[0,0,7]", [0, 0, 1]),
    ("[0.2,0.3,0.5000001]", [0.2, 0.3, 0.5000001]),  # as it was, to the bit
])  # fmt: skip
def test_shares_are_weights_and_come_out_as_probabilities(given, wanted, tmp_path):
    config = load_config(None, [f"budget.probabilities={given}", f"budget.schedule=[[9,{given}]]"])
    assert config.budget.probabilities == pytest.approx(wanted, abs=1e-15 if "7" not in given else 0)
    assert config.budget.schedule == ((9, config.budget.probabilities),)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_every_key_is_documented():
    text = describe()
    for key in ("train.num_steps=1000", "optimizer.vision.learning_rate=2e-06", "budget.probabilities=[0.2,0.3,0.5]"):
        assert key in text
    lines = text.splitlines()
    assert all(documentation.strip() for documentation in lines[1::2])


def test_overriding_does_not_touch_what_was_given():
    values = {"train": {"num_steps": 1}}
    apply_overrides(values, ["train.num_steps=2"])
    assert values == {"train": {"num_steps": 1}}


def test_the_default_image_is_a_whole_number_of_the_default_encoders_patches():
    """SigLIP-so400m has one patch per 14 pixels: 27 x 27 of them, as in the paper."""
    assert [pixels / 14 for pixels in RunConfig().model.image_size] == [27, 27]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_read(path):
    assert load_config(path).name == path.stem
