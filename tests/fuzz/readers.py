"""What reads strangers' files: seeds to mutate, what to do with an input, how it may be refused."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import yaml

from data.archive import ContentError, ShardError, index_path, key_fault
from data.audio import AudioError, decode, encode_flac
from data.build import plan_jobs, scan
from data.convert import convert
from data.corpora import CorpusError, manifest
from data.parsing import parse_json
from data.promptsource import read_promptsource
from data.shards import Overlay, ShardSet, write_overlay
from data.targets import parse_targets
from data.templates import Choice, TemplateError, read_templates
from data.words import parse_words
from tests.data import made
from train import checkpoint as ckpt
from train import config as cfg

CORPUS = Path(__file__).parent.parent / "corpus"


@dataclass(frozen=True)
class Reader:
    """One reader of strangers' files."""

    name: str
    make_seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]
    """(input, an empty folder that may be written to) -> whatever it makes of it."""
    refusals: tuple[type[Exception], ...]
    words: tuple[bytes, ...] = ()
    """Pieces that its format knows, to be put in."""

    def seeds(self) -> list[bytes]:
        """Good files, and the findings so far."""
        return self.make_seeds() + [path.read_bytes() for path in self.findings()]

    def findings(self) -> list[Path]:
        """Inputs that once broke it."""
        return sorted((CORPUS / self.name).glob("*"))


@cache
def _shard() -> tuple[bytes, bytes]:
    """A tar of three samples, and its index."""
    with TemporaryDirectory() as folder:
        made.shards(Path(folder), [3])
        tar = Path(folder) / "train-000000.tar"
        return tar.read_bytes(), index_path(tar).read_bytes()


@cache
def _overlay() -> tuple[bytes, bytes]:
    """Targets for them."""
    with TemporaryDirectory() as folder:
        root = Path(folder)
        base = _open(*_shard(), root / "s")
        record = {"targets": [made.target(), made.target(1)]}
        tar = root / "t" / "targets-000000.tar"
        write_overlay(tar, [(key, record) for key in base.keys.to_pylist()], base=base)
        return tar.read_bytes(), index_path(tar).read_bytes()


def _open(tar: bytes, index: bytes, folder: Path) -> ShardSet:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train-000000.tar"
    path.write_bytes(tar)
    index_path(path).write_bytes(index)
    return ShardSet.open(path)


def _use(shards: ShardSet) -> None:
    """All that a run takes from a shard."""
    for each in (shards.texts, shards.languages, shards.column("speaker")):
        each.to_pylist()
    # Whoever writes a file by a sample's name writes it where it should be.
    assert not any(map(key_fault, shards.keys.to_pylist()))
    assert len(shards) == len(shards.num_samples) == len(shards.shard_of)
    assert shards.digest
    assert isinstance(shards.lost, dict)
    for i in range(len(shards)):
        with suppress(ContentError, AudioError):
            shards.read_json(i)
            decode(shards.read(i, "flac"), max_seconds=2)


def odd_indexes() -> list[bytes]:
    """Indexes that are Parquet, but say what cannot be."""
    table = pq.read_table(pa.BufferReader(_shard()[1]))
    odd = {
        "key": (["../../x", "/etc/x", "a\0"], ["a", "a", "b"], [None, "a", "b"], ["", "a.b", "c"]),
        "flac_offset": ([-1, -5, 1 << 50], [0, 1, 2], [None, 512, 512], [512, 1 << 62, 512]),
        "flac_size": ([-1, 1 << 40, 0], [1 << 62, 5, 5], [1 << 31, 1, 1]),
        "json_size": ([0, 0, 0], [1, 2, 3]),
        "num_samples": ([-1, 0, 1], [1 << 62, 1, 1], [None, 1, 1]),
        "text": ([None, "", "\ud7ff"],),
        "language": ([None, "en", "en"],),
    }
    tables = [
        table.set_column(table.schema.get_field_index(name), name, pa.array(v, table[name].type))
        for name, variants in odd.items()
        for v in variants
    ]
    for name in odd:
        at = table.schema.get_field_index(name)
        for other in (pa.array([1.5, 2.5, 3.5]), pa.array([["x"], [], None]), pa.nulls(3)):
            tables.append(table.set_column(at, name, other))
        tables.append(table.remove_column(at))
    bad_text = pa.StringArray.from_buffers(
        3, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe\xfd")
    )
    tables += [
        table.set_column(table.schema.get_field_index(n), n, bad_text) for n in ("key", "text")
    ]
    own = json.loads(table.schema.metadata[b"hearken"])
    for change in (
        {"tar_bytes": -1}, {"tar_bytes": "x"}, {"tar_bytes": 1 << 62}, {"tar_sha256": "../" * 9},
        {"format": 9}, {"tar_bytes": 600},
    ):  # fmt: skip
        meta = {b"hearken": json.dumps(own | change).encode()}
        tables.append(table.replace_schema_metadata(meta))
    for text in (b"", b"[]", b"[" * 9000, b"\xff", b"1"):
        tables.append(table.replace_schema_metadata({b"hearken": text}))
    tables.append(pa.concat_tables([table] * 4000))  # more rows than the tar can hold
    found = []
    for each in tables:
        buffer = io.BytesIO()
        pq.write_table(each, buffer)
        found.append(buffer.getvalue())
    return found


def record_seeds() -> list[bytes]:
    words = {"words": [{"text": "a", "start": 0.1, "end": 0.5, "score": 0.5}], "unaligned": ""}
    return [
        json.dumps(each).encode() for each in ({"targets": [made.target(), made.target(1)]}, words)
    ]


def read_tar(data: bytes, folder: Path) -> None:
    _use(_open(data, _shard()[1], folder))


def read_index(data: bytes, folder: Path) -> None:
    _use(_open(_shard()[0], data, folder))


def read_overlay(data: bytes, folder: Path) -> None:
    """The index of targets; a first byte says how long it is, and then their tar follows."""
    base = _open(*_shard(), folder / "s")
    size = int.from_bytes(data[:4], "little")
    _open(data[4 + size :], data[4 : 4 + size], folder / "t")
    targets = Overlay.open(folder / "t", base)
    targets.column("num_tokens").to_pylist()
    targets.column("instruction").to_pylist()
    for i in range(len(base)):
        with suppress(ContentError):
            parse_targets(targets.record(i))


def overlay_seeds() -> list[bytes]:
    tar, index = _overlay()
    return [len(index).to_bytes(4, "little") + index + tar]


def read_record(data: bytes, folder: Path) -> None:
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ContentError(str(error)) from None
    for parse in (parse_targets, parse_words):
        if isinstance(value, dict):
            with suppress(ContentError):
                parse(value)


def read_audio(data: bytes, folder: Path) -> None:
    wave = decode(data, max_seconds=1.0)
    assert wave.dtype == np.float32
    assert len(wave) <= 17_000
    assert np.isfinite(wave).all()


def audio_seeds() -> list[bytes]:
    wave = made.noise(3000, 1)
    seeds = [encode_flac(wave)]
    for kind, subtype, rate in (
        ("WAV", "PCM_16", 16_000), ("WAV", "FLOAT", 44_100), ("OGG", "VORBIS", 22_050),
        ("MP3", "MPEG_LAYER_III", 16_000), ("AIFF", "PCM_24", 8_000), ("CAF", "ALAC_16", 16_000),
        ("WAV", "MS_ADPCM", 16_000), ("OGG", "OPUS", 48_000), ("W64", "PCM_16", 16_000),
    ):  # fmt: skip
        buffer = io.BytesIO()
        soundfile.write(buffer, np.stack([wave, wave], 1), rate, format=kind, subtype=subtype)
        seeds.append(buffer.getvalue())
    return seeds


_OPTIONS = argparse.Namespace(
    src=Path("in.jsonl"), out=Path("out"), split=None, language=None, samples_per_shard=2,
    max_seconds=1.0,
)  # fmt: skip


def read_manifest(data: bytes, folder: Path) -> None:
    """A manifest to shards, as `data.build` does it; a first byte of "t" makes it TSV."""
    path = folder / ("m.tsv" if data[:1] == b"t" else "m.jsonl")
    path.write_bytes(data[1:])
    (folder / "a.wav").write_bytes(_wav())
    options = argparse.Namespace(**vars(_OPTIONS) | {"src": path, "out": folder / "out"})
    for name, split in scan(manifest.read(path), options).items():
        for job in plan_jobs(name, split, options):
            convert(job)


@cache
def _wav() -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, made.noise(2000, 1), 16_000, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def manifest_seeds() -> list[bytes]:
    row = {"key": "a", "audio": "a.wav", "text": "one", "language": "en", "split": "train"}
    rows = [row, row | {"key": "b", "speaker": "s", "extra": [1, None]}]
    tsv = "key\taudio\ttext\tlanguage\na\ta.wav\tone\ten\nb\ta.wav\ttwo\ten\n"
    return [
        b"j" + "".join(json.dumps(r) + "\n" for r in rows).encode(),
        b"j" + json.dumps(row).encode(), b"t" + tsv.encode(),
    ]  # fmt: skip


def read_config(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    config = cfg.load(path)
    config.flat()
    json.dumps(config.shown())


def config_seeds() -> list[bytes]:
    tree = {
        "run": {"name": "x", "output": "x"},
        "model": {"encoder": {"path": "x"}, "adapter": {"bottleneck": 8}, "decoder": {"path": "x"}},
        "prompt": "{instruction} {input}",
        "data": {"shards": ["x"], "targets": ["x"], "tokens_per_bin": 96},
        "train": {"steps": 6, "lr": 0.01},
    }
    return [yaml.safe_dump(tree).encode(), b"a: &a [*a]", b"{a: 2001-01-01, b: !!int 1, c: 0x1}"]


def read_checkpoint(data: bytes, folder: Path) -> None:
    """A first byte says which of its files the rest is; checksums fit, as a stranger's would."""
    path, name = _checkpoint(folder / "step-00000001"), _FILES[data[0] % 3] if data else _FILES[0]
    (path / name).write_bytes(data[1:])
    if name != "state.json":
        state = json.loads((path / "state.json").read_bytes())
        state["checksums"][name] = hashlib.sha256(data[1:]).hexdigest()
        (path / "state.json").write_text(json.dumps(state))
    found = ckpt.find(path)
    assert found.state.step is not None


_FILES = ("state.json", "adapter.safetensors", "optimizer.safetensors")


def _checkpoint(path: Path) -> Path:
    state = ckpt.State(1, 0, 1, 8, "plan", "run", {"a": 1}, "rev")
    ckpt.write(path, state, {"w": torch.arange(5.0)}, {"exp_avg/w": torch.ones(5)})
    return path


def checkpoint_seeds() -> list[bytes]:
    with TemporaryDirectory() as folder:
        path = _checkpoint(Path(folder) / "c")
        state = json.loads((path / "state.json").read_bytes())
        del state["checksums"]["state.json"]  # or whatever is bent would end there
        (path / "state.json").write_text(json.dumps(state))
        return [bytes([n]) + (path / name).read_bytes() for n, name in enumerate(_FILES)]


def read_wordings(data: bytes, folder: Path) -> None:
    path = folder / "prompts.yaml"
    path.write_bytes(data)
    found = read_templates(path)
    for language in ("en", "en_us"):
        list(Choice(found, {"*": 1}, 1).of("key", language))


def wording_seeds() -> list[bytes]:
    row = {"name": "n", "task": "t", "language": "en", "instruction": "do {input} x"}
    other = row | {"name": "m", "language": ["de", "!en"], "heldout": True, "origin": "o"}
    return [yaml.safe_dump([row, other]).encode(), yaml.safe_dump(row).encode()]


def read_prompts(data: bytes, folder: Path) -> None:
    path = folder / "templates.yaml"
    path.write_bytes(data)
    read_promptsource(path, language="en")


def prompt_seeds() -> list[bytes]:
    jinja = (
        "{{ text }} is what? ||| {{ y }}",
        "{% if text %}Choose {{ answer_choices | join(', ') }}: {{ text }}{% endif %}",
        "{% for a in [1, 2] %}{{ a * 3 }}{% endfor %} {{ text }} {{ 'a' | upper }}",
    )
    about = {"name": "n", "answer_choices": "a|||b"}
    trees = [{"dataset": "d", "templates": {"1": about | {"jinja": each}}} for each in jinja]
    return [yaml.safe_dump(tree).encode() for tree in trees]


_DEEP, _LONG = b"[" * 3000, b"9" * 5000
_JSON = (
    *rb'" { } [ null NaN 1e999 "\ud800" -1 ../ /etc/x \u0000'.split(),
    *(_DEEP, _LONG, b"\x00", b"\n"),
)
_YAML = (
    *b"&a *a !!int !!float !!binary !!set =  ~ ' 2001-99-99 0b2 1:99:99 .inf .nan".split(),
    *(b": ", b"- ", b"<<: ", b"? ", b"| ", b"\n", b"  ", _DEEP, _LONG),
    b"!!python/object/apply:os.system [x]",
)
_JINJA = (
    *b"{{ }} {% %} | join ** 9 ~ 'x' m() __class__ format cycler loop self recursive %".split(),
    *b"range(99999) center(99999999) lipsum(n=99) namespace()".split(),
    *(b"{% for x in y %}", b"{% endfor %}", b"{% set x = x ~ x %}", b"{% include 'x' %}"),
    *(b"{% macro m() %}", b"{% endmacro %}"),
)
_PLACES = tuple(
    number.to_bytes(8, "little", signed=True) for number in (-1, 0, 511, 1 << 20, 1 << 40, 1 << 62)
)

READERS = {
    reader.name: reader
    for reader in (
        Reader("shard", lambda: [_shard()[0]], read_tar, (ShardError,), (b"\0" * 512, *_JSON)),
        Reader("index", lambda: [_shard()[1], *odd_indexes()], read_index, (ShardError,), _PLACES),
        Reader("overlay", overlay_seeds, read_overlay, (ShardError,), (*_PLACES, *_JSON)),
        Reader("record", record_seeds, read_record, (ContentError,), _JSON),
        Reader("audio", audio_seeds, read_audio, (AudioError,), _PLACES),
        Reader("manifest", manifest_seeds, read_manifest, (CorpusError, ShardError), _JSON),
        Reader(
            "checkpoint",
            checkpoint_seeds,
            read_checkpoint,
            (ckpt.CheckpointError,),
            (*_JSON, *_PLACES),
        ),
        Reader("config", config_seeds, read_config, (cfg.ConfigError,), _YAML),
        Reader("templates", wording_seeds, read_wordings, (TemplateError,), _YAML),
        Reader("promptsource", prompt_seeds, read_prompts, (TemplateError,), (*_YAML, *_JINJA)),
    )
}
