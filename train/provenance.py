"""Whether models, prompts and data that belong together are together.

Targets are what one LLM said to one prompt, stored states what one encoder heard, and an adapter
lies between those two. A path is not enough to tell: a folder may be written anew.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from data.archive import ShardError, read_meta
from data.parsing import brief
from data.remote import PIPE
from data.sources import expand, index_address
from train import config as cfg
from train.model.export.sources import weight_files

if TYPE_CHECKING:
    from train.checkpoint import State
    from train.feed import Feed

_ADDRESSES = ("shards", "targets", "words", "states")
Sources = Mapping[str, str]
"""`encoder` and `decoder` → `weights_of` them."""
_BLOCKS, _BLOCK = 256, 1 << 16
"""Of each file so many blocks of so many bytes are read: every rank does it at every start, and
training leaves no part of a model as it was."""


def weights_of(path: str) -> str:
    """A digest that tells a model's weights from any others, wherever they lie.

    Raises:
        ConfigError: there is no such model, or it has no weights.
    """
    digest = hashlib.sha256()
    for name, file in sorted(weight_files(path).items()):
        size = file.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with file.open("rb") as f:
            for at in range(0, size, max(_BLOCK, size // _BLOCKS)):
                f.seek(at)
                digest.update(f.read(_BLOCK))
    return digest.hexdigest()


def sources_of(config: cfg.Config, feed: Feed | None = None) -> Sources:
    """Which encoder and LLM the configuration names.

    Args:
        feed: whose stored states, if it has any, stand for an encoder that need not be there.
    """
    found = {"decoder": weights_of(config.model.decoder.path)}
    if feed is None or feed.stream.states is None:
        found["encoder"] = weights_of(config.model.encoder.path)
    else:
        stored = {meta.get("encoder_weights") for meta in feed.stream.states.metas}
        if len(stored) == 1 and (one := stored.pop()):
            found["encoder"] = one
    return found


def targets_say(addresses: Iterable[str]) -> list[dict[str, Any]]:
    """What target shards say of how they were made; nothing where they are gone.

    A checkpoint's addresses may be a stranger's, so commands (`pipe:`) are not run for it.
    """
    if any(address.startswith(PIPE) for address in addresses):
        return []
    try:
        return [read_meta(index_address(address)) for address in expand(list(addresses))]
    except (ShardError, OSError):
        return []


def recorded_again(state: State, overrides: list[str], origin: str) -> cfg.Config:
    """A checkpoint's configuration, changed, to run on its data once more.

    Raises:
        ConfigError: it, and no override, names code or a command that would be run.
    """
    config = cfg.parse(cfg.changed(copy.deepcopy(state.config), overrides), origin)
    said = {override.partition("=")[0] for override in overrides}
    asked = {"model.trust_remote_code": config.model.trust_remote_code} | {
        f"data.{name}": any(a.startswith(PIPE) for a in getattr(config.data, name))
        for name in _ADDRESSES
    }
    for name, runs in asked.items():
        if runs and name not in said:
            raise cfg.ConfigError(
                f"{origin} has a {name} that runs code; if you trust where it is from, say so by "
                f"giving it once more: --set {name}=..."
            )
    return config


def check_feed(config: cfg.Config, feed: Feed, sources: Sources, section: str = "data") -> None:
    """Raise `ConfigError` where a run's data were made with other models, or another prompt."""
    again = "make it again in another folder, or change the configuration back"
    for meta in feed.stream.targets.metas:
        if meta.get("prompt", config.prompt) != config.prompt:
            raise cfg.ConfigError(
                f"{section}.targets: made with prompt {meta['prompt']!r}, but the configuration "
                f"has {config.prompt!r}; {again}"
            )
        other = meta.get("teacher_weights") not in (None, sources["decoder"])
        if other and not config.data.any_teacher:
            raise cfg.ConfigError(
                f"{section}.targets: answered by {meta['teacher']!r}, whose weights were "
                f"others than those of {config.model.decoder.path!r} now; {again}; if another "
                "LLM's answers are meant, set data.any_teacher"
            )
    metas = feed.stream.states.metas if feed.stream.states else ()
    if any(meta.get("encoder_weights") != sources.get("encoder") for meta in metas):
        raise cfg.ConfigError(f"{section}.states: of encoders with different weights; {again}")


def check_checkpoint(config: cfg.Config, state: State, where: str) -> None:
    """Raise `ConfigError` where the checkpoint `where` is of other models, or another prompt."""
    same = f"go on with the configuration that {where} was trained with"
    then, now = _answering(state.config), _answering(config.resolved())
    for name in now.keys() & then.keys():
        if then[name] != now[name]:
            raise cfg.ConfigError(
                f"{name} was {brief(then[name])} in training, but the configuration has "
                f"{brief(now[name])}; {same}"
            )
    for part, weights in state.sources.items():
        path = getattr(config.model, part).path
        if weights_of(path) != weights:
            raise cfg.ConfigError(
                f"model.{part}.path: {path!r} has other weights than "
                f"{state.config['model'][part]['path']!r} had in training; {same}"
            )


def _answering(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what is answered, by name; not which kernels run, nor what is trained."""
    model = tree["model"]
    found = {"prompt": tree["prompt"]}
    found |= _named("model.adapter", model["adapter"], set(model["adapter"]) - _TRAINING)
    found |= _named("model.encoder", model["encoder"], _HEARING)
    return found | _named("model.decoder", model["decoder"], {"lora"})


_TRAINING = {"train", "dropout", "layerdrop"}
_HEARING = {"own_length", "window_seconds", "layers", "languages", "lora"}


def _named(prefix: str, section: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {f"{prefix}.{name}": section[name] for name in names if name in section}
