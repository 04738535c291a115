"""lmms-eval's entry point: `lmms_eval.models` in this package's metadata names `manifest`."""

from typing import Any

MODEL = "tokenflex"


def manifest() -> Any:
    """What lmms-eval registers: `--model tokenflex` is a chat model of ours."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path="tokenflex.evaluate.harness.lmms_model.TokenFlexLmms")
