"""Names inside a part that is built from a dictionary: known to the part's configuration class, or refused with the nearest."""

import logging

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokenflex.errors import UserError
from tokenflex.model.build import _part_config

TYPES = sorted(CONFIG_MAPPING)[::25]
"""A spread over all of transformers' model types; all of them passed when this was written."""


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
