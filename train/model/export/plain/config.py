"""Settings of a model as they were resolved; stands in for `train.config`, which checks them."""

from __future__ import annotations

from typing import Any


class ConfigError(ValueError):
    """The configuration names something unknown, missing or out of range."""


class Section:
    """Settings by name; a list becomes a tuple."""

    def __init__(self, **settings: Any):
        for name, value in settings.items():
            setattr(self, name, tuple(value) if isinstance(value, list) else value)


class LoRA(Section): ...


class Encoder(Section): ...


class Decoder(Section): ...


class ConvAdapter(Section): ...


class StackMLPAdapter(Section): ...


class EBranchformerAdapter(Section): ...


_ADAPTERS = {
    "conv": ConvAdapter,
    "stack_mlp": StackMLPAdapter,
    "ebranchformer": EBranchformerAdapter,
}


class Model(Section):
    @classmethod
    def model_validate(cls, tree: dict[str, Any]) -> Model:
        """As pydantic's, of settings that `train.config` has checked when the model was trained."""
        return cls(
            **tree
            | {
                "encoder": Encoder(**_with_lora(tree["encoder"])),
                "adapter": _ADAPTERS[tree["adapter"]["kind"]](**tree["adapter"]),
                "decoder": Decoder(**_with_lora(tree["decoder"])),
            }
        )


def _with_lora(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"lora": LoRA(**tree["lora"]) if tree["lora"] else None}
