"""Names inside a part that is built from a dictionary: known to the part's configuration class, or refused with the nearest."""

import logging
import math
import re

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenflex.errors import UserError
from tokenflex.model.build import _check_values, _part_config

TYPES = sorted({*sorted(CONFIG_MAPPING)[::25], "aria", "glm5_next"})
"""A spread over all of transformers' model types, one with numbers as names and one that hands what it does not know to its text
part; all of them passed when this was written."""


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_configurations_own_names_are_known_and_others_are_not(model_type):
    default = CONFIG_MAPPING[model_type]()
    names = [name for name, value in default.to_dict().items() if isinstance(value, (int, float)) and name[0] != "_"][
        :6
    ]
    values = {name: default.to_dict()[name] for name in names}
    _part_config("model.text", {"model_type": model_type, **values}, False)
    with pytest.raises(UserError, match="unknown key model.text.numbr_of_wheels: .* does not know it"):
        _part_config("model.text", {"model_type": model_type, **values, "numbr_of_wheels": 4}, False)


@pytest.mark.parametrize("part", [
    {"model_type": "qwen3", "rope_theta": 5.0},
    {"model_type": "llama", "torch_dtype": "float32", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"model_type": "gpt2", "hidden_size": 12},
    {"model_type": "siglip", "vision_config": {"hidden_size": 12}},
])  # fmt: skip
def test_older_and_other_names_of_a_setting_are_known(part):
    _part_config("model.text", part, False)


@pytest.mark.parametrize("part, nearest", [
    ({"model_type": "qwen2", "hiden_size": 64}, "model.text.hidden_size"),
    ({"model_type": "siglip", "vision_config": {"hidden_sise": 3}}, "model.text.vision_config.hidden_size"),
])  # fmt: skip
def test_the_nearest_name_is_said(part, nearest):
    with pytest.raises(UserError, match=f"unknown key model.text.*did you mean {nearest}"):
        _part_config("model.text", part, False)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_configurations_own_values_pass_and_no_others_that_cannot_be(model_type):
    """Every number of the default is taken; every share above one, size below one and number that is none is refused."""
    default = CONFIG_MAPPING[model_type]().to_dict()
    _check_values("model.text", default, default)
    numbers = {k: v for k, v in default.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    for name, value in numbers.items():
        refused = [math.nan, math.inf] + ([2, 1.0, -0.1] if "drop" in name and value < 1 else [])
        refused += [0, -8] if name.endswith(("_size", "_layers", "_heads", "_eps")) and value > 0 else []
        refused += [-1] if type(value) is int and value > 0 and not name.endswith("_token_id") else []
        for wrong in refused:
            with pytest.raises(UserError, match=rf"^model.text.{name} is {wrong}; wanted "):
                _check_values("model.text", {name: wrong}, default)


@pytest.mark.parametrize("part, said", [
    ({"model_type": "qwen3", "attention_dropout": 2}, "model.text.attention_dropout is 2; wanted a share from 0"),
    ({"model_type": "siglip", "vision_config": {"num_hidden_layers": 0}}, "model.text.vision_config.num_hidden_layers is 0; wanted a number above 0"),
    ({"model_type": "qwen3", "hidden_size": "64"}, "'hidden_size' expected int, got str"),
    ({"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4}, "is not a multiple of the number of attention heads"),
])  # fmt: skip
def test_a_value_that_cannot_be_is_refused_in_one_line(part, said):
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        _part_config("model.text", part, False)
    assert "\n" not in str(refusal.value)
