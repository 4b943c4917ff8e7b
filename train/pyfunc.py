"""An exported folder as an MLflow model, from code: this file is copied into the model.

    python train/export.py runs/micro/blsp exported --merged --mlflow exported-mlflow
    mlflow models serve -m exported-mlflow --env-manager local --port 5001

Where the model is served there is no checkout, so nothing but `data` is imported from it, which is
copied beside this file. A row has a recording and an instruction; over HTTP a recording is base64:

    {"dataframe_records": [{"audio": "UklGR…", "instruction": "repeat the sentence"}]}
"""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, set_model
from mlflow.pyfunc import PythonModel, save_model
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from transformers import AutoModel, AutoProcessor

from data.audio import AudioError, decode

BATCH = 16
"""Rows that the model answers at once."""

SIGNATURE = ModelSignature(
    Schema(
        [
            ColSpec(DataType.binary, "audio"),
            ColSpec(DataType.string, "instruction"),
            ColSpec(DataType.string, "language", required=False),
        ]
    ),
    Schema([ColSpec(DataType.string)]),
    ParamSchema(
        [
            ParamSpec("max_new_tokens", DataType.integer, 64),
            ParamSpec("num_beams", DataType.integer, 1),
        ]
    ),
)
"""`audio` is the bytes of a file that libsndfile reads; `language` is for models that have adapters
of languages."""

# What the code needs where MLflow makes an environment of its own.
REQUIREMENTS = ("mlflow", "transformers", "torch", "torchaudio", "soundfile", "numpy", "pandas")


class SpeechModel(PythonModel):
    """Answers rows of recordings and instructions."""

    def load_context(self, context: Any) -> None:
        folder = context.artifacts["exported"]
        # The folder's own code, which whoever made this model has put there.
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.model = AutoModel.from_pretrained(folder, trust_remote_code=True)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[str]:
        """One answer per row.

        Raises:
            MlflowException: a recording that cannot be heard; the endpoint answers 400.
        """
        rows = model_input.to_dict("records")
        answers: list[str] = []
        for at in range(0, len(rows), BATCH):
            try:
                inputs = self._inputs(rows[at : at + BATCH], at)
            except ValueError as e:
                raise MlflowException.invalid_parameter_value(str(e)) from None
            tokens = self.model.generate(**inputs, **(params or {}))
            answers += [self._text(row.tolist()) for row in tokens]
        return answers

    def _text(self, tokens: list[int]) -> str:
        """Up to the first end, whether the tokenizer takes that for a special token or not."""
        ends = self.model.generation_config.eos_token_id
        said = list(takewhile(lambda token: token not in ends, tokens))
        return str(self.processor.decode(said, skip_special_tokens=True)).strip()

    def _inputs(self, rows: list[dict[str, Any]], first: int) -> Any:
        waves = []
        for number, row in enumerate(rows, first):
            try:
                waves.append(decode(row["audio"], max_seconds=self.processor.max_seconds))
            except AudioError as e:
                raise ValueError(f"row {number}: audio: {e}") from None
        languages = [row.get("language") or "" for row in rows]
        return self.processor(
            audio=waves,
            text=[row["instruction"] for row in rows],
            languages=languages if self.processor.languages else (),
        )


def save(exported: Path, out: Path) -> None:
    """Write the MLflow model of an exported folder."""
    here = Path(__file__)
    save_model(
        path=str(out),
        python_model=str(here),
        artifacts={"exported": str(exported)},
        signature=SIGNATURE,
        code_paths=[str(here.parents[1] / "data")],
        pip_requirements=list(REQUIREMENTS),
    )


set_model(SpeechModel())
