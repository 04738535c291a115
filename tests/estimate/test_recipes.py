"""The shipped recipes load, their parts have the makers' sizes, and the estimates of docs/training.md are what is estimated."""

import pytest
import recipes
import torch
from conftest import ROOT
from recipes import PARAMETERS, RECIPES

from tokenflex.config import load_config
from tokenflex.model.build import shaped_model

SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_recipe_loads_and_those_of_real_parts_are_estimated(name):
    assert load_config(ROOT / "configs" / f"{name}.yaml").name == name
    assert name in RECIPES or name in ("quickstart", "paper", "paper27")


@pytest.mark.parametrize(
    "vision, text", [("SO400M", "QWEN2_5_7B"), ("INTERNVIT_300M", "QWEN2_5_3B"), ("SO400M", "QWEN3_8B")]
)
def test_parts_have_the_sizes_of_their_makers(vision, text):
    config = load_config(
        ROOT / "configs" / "internvit-pretrain.yaml" if "VIT" in vision else ROOT / "configs" / "pretrain.yaml"
    )
    parts = {"vision": getattr(recipes, vision), "text": getattr(recipes, text)}
    shaped = shaped_model(config.model.model_copy(update=parts), config.budget, torch.bfloat16)
    assert shaped.vision_tower.num_parameters() == pytest.approx(PARAMETERS[vision], rel=0.003)
    assert shaped.language_model.num_parameters() == PARAMETERS[text]
    assert shaped.patch_grid == ((32, 32) if "VIT" in vision else (27, 27))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pages_table_is_what_is_estimated():
    page = recipes.PAGE.read_text()
    for name in RECIPES:
        assert recipes.row(name) in page, recipes.row(name)
