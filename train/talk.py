"""The page of `python train/listen.py MODEL --ui`: record, ask, and see what the model makes of it.

It is served on this machine's loopback alone, fetches nothing from outside and reports nothing.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

# Before gradio reads it.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import torch
from matplotlib.figure import Figure

from data.audio import SAMPLE_RATE, AudioError
from data.templates import TemplateError, read_templates
from train import config as cfg
from train.listen import check_language, record
from train.model.respond import Question, Responder
from train.model.transcribe import Transcriber
from train.similarity import picture, similarity

REPEAT = "repeat the sentence"
_KEPT_SECONDS = 600  # recordings and uploads
_WORDINGS = 200
_MAX_FILE = "64mb"


class Talk:
    """A model that answers recordings, with what is shown beside the answer."""

    def __init__(self, config: cfg.Config, responder: Responder):
        self.config, self.responder = config, responder
        self.languages = list(config.model.encoder.languages)
        try:
            encoder = config.model.encoder
            self._transcriber: Transcriber | None = Transcriber(
                encoder.path, responder.device, encoder.languages, config.model.trust_remote_code
            )
        except cfg.ConfigError:  # no head of its own: then the model is asked to repeat
            self._transcriber = None

    @property
    def transcribed_by(self) -> str:
        return "the encoder" if self._transcriber else f"the model, asked to {REPEAT!r}"

    def instructions(self) -> list[str]:
        """The wordings that the run's own template file has; where it is gone, a few."""
        behave = self.config.behave
        try:
            templates = read_templates(behave.templates) if behave else []
        except (TemplateError, OSError):
            templates = []
        wordings = [t.instruction for t in templates if "{input}" not in t.instruction]
        return list(dict.fromkeys([REPEAT, *wordings]))[:_WORDINGS]

    @torch.no_grad()
    def answer(
        self, audio: str | None, instruction: str, language: str, max_new_tokens: float
    ) -> tuple[str, str, Figure | None, str]:
        """(answer, transcript, picture, speed) of a recording.

        Raises:
            AudioError: there is none, or it cannot be heard.
            ConfigError: the encoder has no adapter for its language.
        """
        if not audio:
            raise AudioError("no recording yet: record or upload one first")
        check_language(language, self.languages)
        responder, languages = self.responder, (language,)
        wave = record(Path(audio), self.config.data.max_seconds, responder.rule)
        seconds = len(wave) / SAMPLE_RATE
        began = time.perf_counter()
        (slots_RH,) = responder.listen([wave], languages)
        heard = time.perf_counter()
        (said,) = responder.answer(
            [Question(instruction or "", slots_RH)], max_new_tokens=int(max_new_tokens)
        )
        ended = time.perf_counter()
        if self._transcriber is not None:
            (transcript,) = self._transcriber([wave], languages)
        else:
            (transcript,) = responder.answer([Question(REPEAT, slots_RH)], max_new_tokens=128)
        shown = None
        if transcript:
            found = similarity(responder, instruction or "", slots_RH, transcript)
            shown = picture(found, seconds)
        tokens = len(responder.prompt.encode(said)) + 1
        speed = (
            f"{seconds:.2f} s of audio, {len(slots_RH)} slots. Heard in {heard - began:.2f} s, "
            f"answered in {ended - heard:.2f} s: {tokens / (ended - heard):.0f} tokens/s, "
            f"real-time factor {(ended - began) / seconds:.2f}."
        )
        return said, transcript, shown, speed


def page(talk: Talk) -> gr.Blocks:
    """The page; errors that a user can mend are shown on it in one line."""

    def answer(*asked: object) -> tuple[str, str, Figure | None, str]:
        try:
            return talk.answer(*asked)  # type: ignore[arg-type]
        except (AudioError, ValueError) as error:
            raise gr.Error(str(error), print_exception=False) from None

    title = f"Hearken: {talk.config.run.name}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(60, _KEPT_SECONDS)) as made:
        gr.Markdown(f"## {title}")
        with gr.Row():
            with gr.Column():
                audio = gr.Audio(
                    sources=["microphone", "upload"], type="filepath", label="Recording",
                    buttons=["download"],  # not "share", which posts it on Hugging Face
                )  # fmt: skip
                wordings = talk.instructions()
                instruction = gr.Dropdown(
                    wordings, value=wordings[0], allow_custom_value=True,
                    label="Instruction: choose one or write your own", elem_id="instruction",
                )  # fmt: skip
                languages = talk.languages or [""]
                language = gr.Dropdown(
                    languages, value=languages[0], label="Language of the recording",
                    visible=bool(talk.languages), elem_id="language",
                )  # fmt: skip
                limit = gr.Slider(1, 512, 64, step=1, label="Tokens, at most")
                ask = gr.Button("Ask", variant="primary", elem_id="ask")
            with gr.Column():
                said = gr.Textbox(label="Answer", elem_id="answer")
                transcript = gr.Textbox(
                    label=f"Transcript (by {talk.transcribed_by})", elem_id="transcript"
                )
                speed = gr.Textbox(label="Speed", elem_id="speed")
        gr.Markdown("Slots of speech (across) and the transcript's tokens (down), within the LLM:")
        shown = gr.Plot(show_label=False, elem_id="similarity")
        ask.click(
            answer, [audio, instruction, language, limit], [said, transcript, shown, speed],
            api_visibility="private",
        )  # fmt: skip
    return made


def serve(talk: Talk, port: int) -> None:
    """Serve the page on the loopback until interrupted."""
    page(talk).launch(
        server_name="127.0.0.1",
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        max_file_size=_MAX_FILE,
        # The system's own fonts, so that there is nothing to fetch.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )
    print(f"talk to it at http://127.0.0.1:{port} (Ctrl-C ends it)", flush=True)
    while True:
        time.sleep(3600)
