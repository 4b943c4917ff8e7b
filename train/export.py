"""A trained model as a Hugging Face folder, for programs that have transformers and torch alone.

    python train/export.py runs/micro/blsp exported
    python train/export.py runs/micro/blsp exported --merged
    python train/export.py runs/micro/blsp exported --merged --mlflow exported-mlflow
    python train/export.py runs/micro/blsp exported --merged --mlflow exported-mlflow --log

Without `--merged` the folder has what was trained (a few MB), and the names and hashes of the
encoder and the LLM that it belongs to; with it, these too. Its README.md says how to use it.
`--mlflow` writes the same as a model for `mlflow models serve` (see `train/pyfunc.py`); `--log`
sends this one to the tracker, where it stands under the run that trained it. That is a flag of its
own, for merged models have gigabytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train import checkpoint as ckpt
from train import config as cfg
from train.card import model_card
from train.cli import guarded, leave, trusting
from train.model.export.folder import write_folder
from train.progress import console


def export(run: Path, out: Path, merged: bool, trusted: bool = False) -> ckpt.Checkpoint:
    """Write the model of a run, or of one of its checkpoints, to `out`; returns the checkpoint.

    Raises:
        CheckpointError, ConfigError: there is none, or it cannot be exported so.
    """
    found = ckpt.find(run)
    config = cfg.recorded(found.state.config, str(found.path), trusted)
    write_folder(config, found.weights, out, merged)
    card = model_card(found, config, out.name, merged)
    (out / "README.md").write_text(card, encoding="utf-8")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="run.output, or a checkpoint")
    parser.add_argument("out", type=Path, help="new folder")
    parser.add_argument("--merged", action="store_true", help="with encoder and LLM")
    parser.add_argument("--mlflow", type=Path, metavar="FOLDER", help="also as an MLflow model")
    parser.add_argument(
        "--log", action="store_true", help="with --mlflow: send it to the run that trained it"
    )
    trusting(parser)
    args = parser.parse_args(argv)
    if args.log and args.mlflow is None:
        parser.error("--log sends what --mlflow writes; give --mlflow FOLDER, too")
    if args.mlflow is not None and args.mlflow.exists():
        raise cfg.ConfigError(f"{args.mlflow} exists; remove it, or name another folder")
    found = export(args.checkpoint, args.out, args.merged, args.trust_remote_code)
    size = sum(f.stat().st_size for f in args.out.rglob("*") if f.is_file()) / 1e6
    console.print(f"{args.out} is the model of {found.path} ({size:.1f} MB)")
    if args.mlflow is not None:
        from train.pyfunc import save  # MLflow takes seconds to import

        save(args.out, args.mlflow)
        console.print(f"to serve it: mlflow models serve -m {args.mlflow} --env-manager local")
    if args.log:
        from train.tracking import log_model

        address = log_model(found.state, args.mlflow)
        console.print(f"{address} is the same under run {found.state.tracker_run} in MLflow")


if __name__ == "__main__":
    leave(guarded(main))
