"""The exported folder where there is no checkout: the code that it brings along."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import bare
from tests.train.stored import stored, tree_of
from tests.train.test_adapters import SMALL
from tests.train.test_export import LORA
from train import checkpoint as ckpt
from train import config as cfg
from train.export import export
from train.model.export import bundle
from train.model.respond import Question, Responder

INSTRUCTIONS = ["repeat this", "continue this", "the old dog :"]


def outside(module: str) -> ast.Module:
    """A shipped file without its imports from beside it."""
    tree = ast.parse(bundle.flat(module))

    class Without(ast.NodeTransformer):
        def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
            return None if node.level else node

    return Without().visit(tree)


def original(module: str) -> ast.Module:
    tree = ast.parse(bundle.source_of(module).read_text())
    dropped = {ast.dump(node) for node in bundle._imports(module)}

    class Without(ast.NodeTransformer):
        def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom | None:
            return None if ast.dump(node) in dropped else node

    return Without().visit(tree)


def test_shipped_code_is_the_checkouts() -> None:
    modules = bundle.needed()
    assert {"train.model.encoder", "train.ops.ragged_conv1d"} <= modules
    for module in modules:
        assert ast.dump(outside(module)) == ast.dump(original(module))


def test_shipped_code_needs_transformers_and_torch_alone() -> None:
    allowed = {name.replace("-", "_") for name in bare.distributions(*bare.ROOTS)}
    allowed |= set(sys.stdlib_module_names)
    for module in bundle.needed():
        for node in ast.walk(ast.parse(bundle.flat(module))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, module


ASK = """
import json
import numpy as np
import threading
from transformers import AutoModel, AutoProcessor, TextIteratorStreamer

folder, clips, texts = sys.argv[1], np.load(sys.argv[2]), json.loads(sys.argv[3])
waves = [clips[name] for name in clips.files]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
inputs = processor(audio=waves, text=texts)
ends = model.generation_config.eos_token_id


def words(row):
    ids = row.tolist()
    ended = [at for at, token in enumerate(ids) if token in ends]
    return processor.decode(ids[: ended[0]] if ended else ids, skip_special_tokens=True)


said = {
    beams: [words(row) for row in model.generate(**inputs, max_new_tokens=9, num_beams=beams)]
    for beams in (1, 3)
}
one = processor(audio=waves[0], text=texts[0])
streamer = TextIteratorStreamer(processor.tokenizer, skip_special_tokens=True)
task = threading.Thread(
    target=model.generate, kwargs={**one, "max_new_tokens": 9, "streamer": streamer}
)
task.start()
streamed = "".join(streamer)
ours = [name for name in sys.modules if name.split(".")[0] in ("train", "data", "peft", "pydantic")]
kind = type(model).__module__
print(json.dumps({"said": said, "streamed": streamed, "ours": ours, "kind": kind}))
"""


@pytest.mark.slow
def test_it_says_the_same_without_the_checkout(tmp_path: Path) -> None:
    packages = bare.site(tmp_path / "packages")
    rng = np.random.default_rng(0)
    waves = [(0.2 * rng.normal(size=n)).astype(np.float32) for n in (9_000, 31_999, 14_001)]
    np.savez(tmp_path / "clips.npz", *waves)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    lora = {"encoder": {"lora": LORA}, "decoder": {"lora": LORA}}
    own_length = {"adapter": SMALL["languages"], "encoder": {"own_length": True}}
    cases = [
        ("wav2vec2", "bloom", lora, False),
        ("whisper", "llama", own_length, True),
        ("whisper", "llama", {"adapter": SMALL["stack_mlp"]}, True),
    ]
    for number, (encoder, llm, settings, merged) in enumerate(cases):
        run = stored(tmp_path, tree_of(tmp_path, encoder, llm, **settings), f"run{number}")
        export(run, tmp_path / f"out{number}", merged)
        found = ckpt.find(run)
        responder = Responder(cfg.parse(found.state.config, "state"), found.weights)
        heard = responder.listen(waves)
        asked = [Question(i, s) for i, s in zip(INSTRUCTIONS, heard, strict=True)]
        printed = bare.run(
            packages, ASK, tmp_path / f"out{number}", tmp_path / "clips.npz",
            json.dumps(INSTRUCTIONS), cwd=elsewhere,
        )  # fmt: skip
        told = json.loads(printed.splitlines()[-1])
        assert told["ours"] == []
        assert told["kind"].startswith("transformers_modules.")
        for beams in (1, 3):
            wanted = responder.answer(asked, max_new_tokens=9, num_beams=beams)
            assert len(set(wanted)) > 1
            assert [text.strip() for text in told["said"][str(beams)]] == wanted
        # What streams has the end in it, where the tokenizer does not take that for special.
        first = responder.answer(asked[:1], max_new_tokens=9)[0].split()
        assert told["streamed"].split()[: len(first)] == first
