"""The LLM that a run has trained whole, as a folder that transformers loads.

    python train/save_llm.py runs/blsp_prepare runs/blsp_prepare/llm
    deepspeed train/main.py configs/blsp.yaml --set model.decoder.path=runs/blsp_prepare/llm

Weights are rounded to the run's precision, in which it computed with them. The tokenizer goes
along.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM

from train import checkpoint as ckpt
from train import config as cfg
from train.cli import guarded, leave, trusting
from train.model.build import DTYPES, load_tokenizer
from train.model.respond import load_trained
from train.progress import console

_PART = "decoder."


def save_llm(run: Path, out: Path, trusted: bool = False) -> ckpt.Checkpoint:
    """Write the LLM of a run, or of one of its checkpoints, to `out`; returns the checkpoint.

    Raises:
        CheckpointError: there is none, or its run left the LLM as it was.
    """
    found = ckpt.find(run)
    config = cfg.recorded(found.state.config, str(found.path), trusted)
    if config.model.decoder.train != "full":
        raise ckpt.CheckpointError(
            f"{found.path}: its run did not train the LLM whole (model.decoder.train: full); the "
            f"LLM is {config.model.decoder.path}, as it was"
        )
    decoder = AutoModelForCausalLM.from_pretrained(
        config.model.decoder.path,
        dtype=DTYPES[config.train.precision],
        trust_remote_code=config.model.trust_remote_code,
    )
    weights = found.weights.items()
    load_trained(decoder, {n.removeprefix(_PART): w for n, w in weights if n.startswith(_PART)})
    decoder.save_pretrained(out)
    load_tokenizer(config.model).save_pretrained(out)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run.output, or a checkpoint")
    parser.add_argument("out", type=Path)
    trusting(parser)
    args = parser.parse_args(argv)
    found = save_llm(args.run, args.out, args.trust_remote_code)
    console.print(f"{args.out} is the LLM of {found.path}; name it as model.decoder.path")


if __name__ == "__main__":
    leave(guarded(main))
