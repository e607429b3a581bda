"""Generate text with a model: `python launch/generate.py run_dir=DIR prompt="Once upon a time"`

`prompt=` may be given several times; its text is used literally, whatever characters it has, in the Unicode form that
training text has (NFC). `prompt_file=PATH` reads one prompt per line or, from a .jsonl file, the field `prompt` of each
line. A continuation depends on its prompt, the seed and its number, and not on what else is generated. A single one is
printed as it is generated. With chat=true, each prompt is what the user says in a dialogue; without a prompt, you type
what the user says, line by line. With json=true the last line on stdout is JSON.
A model trained with objective=mlm fills masks instead: write its mask token, such as <mask>, where a token is hidden,
and the `top_k` (5 by default) most probable tokens are printed for each.
Exit codes: 0 done, 2 the input or configuration is wrong.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pretrain.command import begin

begin(__name__, interrupted="nothing was written")

from omegaconf import MISSING

from pretrain.config import Precision, Weights, Which, run_command
from pretrain.config.texts import PathText, VerbatimText
from pretrain.errors import ConfigError
from pretrain.files import read_lines
from pretrain.printing import say, visible

if TYPE_CHECKING:
    from pretrain.corpus.tokenizer import Tokenizer
    from pretrain.generation.sampling import Sampling
    from pretrain.generation.writer import Writer
    from pretrain.model.decoder import Decoder
    from pretrain.trained import TrainedModel

REPORT_EVERY_S = 5.0
OF_CONTINUATIONS = (
    "n_samples",
    "max_new_tokens",
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop",
    "seed",
    "batch_sequences",
)
"""Options that say how a text goes on, and so nothing to a model that fills masks."""


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """What to generate, and how."""

    run_dir: PathText = MISSING
    """Folder of the run."""
    prompt: list[VerbatimText] = field(default_factory=list)
    """Texts to continue, or whose masks are filled. Without any prompt, the model starts a new document."""
    prompt_file: PathText | None = None
    """File with more prompts."""
    step: int | None = None
    """Step of the checkpoint to use; null means the one that `which` says."""
    which: Which = Which.newest
    """Checkpoint to use where no step is given: `newest`, or `best`, the one with the lowest held-out loss."""
    weights: Weights = Weights.trained
    """Weights to use: `trained`, or `ema`, their moving average (ema.decay)."""
    checkpoint_target: PathText | None = None
    """URL of the run's checkpoints, if they are at a URL. A URL that the run folder names is opened only if it is also
    given here."""
    n_samples: int = 1
    """Number of continuations per prompt."""
    max_new_tokens: int = 128
    """Largest number of tokens in a continuation, which may end earlier."""
    temperature: float = 0.8
    """Number by which the logits are divided; 0 always chooses the most probable token."""
    top_k: int | None = None
    """Sample only from this many of the most probable tokens; null samples from all. For masks: the number of tokens
    to print, of which null means 5."""
    top_p: float = 0.95
    """Sample only from the smallest set of most probable tokens whose total probability is at least this; 1 samples
    from all."""
    min_p: float = 0.0
    """Sample only from tokens that are at least this many times as probable as the most probable one."""
    repetition_penalty: float = 1.0
    """Number by which the positive logits of tokens that the text already has are divided, and the negative ones
    multiplied; 1 changes nothing."""
    stop: list[VerbatimText] = field(default_factory=list)
    """Texts at which a continuation ends; they are not part of it."""
    chat: bool = False
    """Write the answers of the assistant in a dialogue, for a model that was trained on dialogues."""
    system: VerbatimText | None = None
    """What the system says at the start of the dialogue."""
    seed: int = 0
    """Seed of the sampling."""
    batch_sequences: int = 16
    """Number of continuations that are generated at a time."""
    precision: Precision = Precision.auto
    """Precision of the computation. `auto` means bf16 where the device computes it in hardware, and fp32 otherwise."""
    json: bool = False
    """Print the result as JSON on the last line of stdout."""

    def __post_init__(self) -> None:
        for name in ("n_samples", "max_new_tokens", "batch_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be greater than 0")
        if self.system is not None and not self.chat:
            raise ConfigError("system= is part of a dialogue; give chat=true as well")


def main(config: GenerateConfig) -> None:
    """Read the prompts, load the model, and continue or fill them."""
    from data_tools.text import clean
    from pretrain.generation.sampling import Sampling

    sampling = Sampling(
        repetition_penalty=config.repetition_penalty,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )
    # Text is normalized as in training, where the model has seen no other form of it.
    texts = list(map(clean, config.prompt + read_prompts(config.prompt_file)))

    from pretrain.device import own_device
    from pretrain.model.kernels import DTYPES
    from pretrain.trained import check_writes_text, load_trained, precision_on

    trained = load_trained(
        config.run_dir, config.step, config.checkpoint_target, which=config.which, weights=config.weights
    )
    check_writes_text(trained, config.run_dir)
    check_prompts(texts, trained, config)
    device = own_device()
    precision = precision_on(device, config.precision)
    model = trained.decoder(device, DTYPES[precision])
    if not model.causal:
        records = fill_texts(config, texts, model, trained.tokenizer)
    elif config.chat and not texts:
        from pretrain.generation.conversation import converse

        converse(writer_of(model, trained, config, sampling), trained.sequence_length, clean)
        return
    else:
        writer = writer_of(model, trained, config, sampling)
        records = continue_all(writer, texts or [""], config, trained.sequence_length)
    if config.json:
        facts = {"run_dir": config.run_dir, "step": trained.step, "precision": precision.value}
        print(json.dumps({**facts, "samples": records}))


def writer_of(model: Decoder, trained: TrainedModel, config: GenerateConfig, sampling: Sampling) -> Writer:
    """What writes the texts that the configuration asks for."""
    from data_tools.text import clean
    from pretrain.generation.writer import Writer

    return Writer(
        model,
        trained.tokenizer,
        sampling=sampling,
        max_new_tokens=config.max_new_tokens,
        stop=config.stop,
        seed=config.seed,
        chat=trained.chat() if config.chat else None,
        system=clean(config.system) if config.system is not None else None,
    )


def check_prompts(texts: list[str], trained: TrainedModel, config: GenerateConfig) -> None:
    """Raise ConfigError for a prompt with a mask that the model cannot fill, or without one where it does only that."""
    tokenizer = trained.tokenizer
    mask = None if tokenizer.mask_id is None else tokenizer.piece(tokenizer.mask_id)
    if not trained.config.causal and config.chat:
        raise ConfigError(
            f"chat=true: the model of run_dir={config.run_dir} was trained with objective=mlm, which fills masks and "
            "writes no answers; give prompt= with a mask"
        )
    if not trained.config.causal:
        check_options_of_masks(config)
    for text in texts or [""]:
        if trained.config.causal and mask is not None and mask in text:
            raise ConfigError(
                f"prompt={text!r} has the mask token {mask}, and the model of run_dir={config.run_dir} was trained "
                "with objective=causal, which continues a text and fills no masks; leave it out"
            )
        if not trained.config.causal and mask is not None and mask not in text:
            raise ConfigError(
                f"prompt={text!r} has no mask token, and the model of run_dir={config.run_dir} was trained with "
                f"objective=mlm, which fills masks and continues no text; write {mask} where a token is hidden"
            )


def check_options_of_masks(config: GenerateConfig) -> None:
    """Raise ConfigError for an option that a model that fills masks cannot heed, if it was given."""
    unchanged = GenerateConfig()
    for name in OF_CONTINUATIONS:
        if (value := getattr(config, name)) != getattr(unchanged, name):
            raise ConfigError(
                f"{name}={value} has no effect: the model of run_dir={config.run_dir} was trained with objective=mlm, "
                "which fills each mask with its most probable tokens; leave it out"
            )


def fill_texts(
    config: GenerateConfig, texts: list[str], model: Decoder, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """Print the most probable tokens of each mask of each prompt. Returns them as records."""
    from pretrain.generation.fill_mask import fill_masks

    records = []
    for text in texts:
        masks = fill_masks(model, tokenizer, text, config.top_k or 5)
        records.append({"prompt": text, "masks": [[vars(candidate) for candidate in mask] for mask in masks]})
        print(visible(text, keep="\n\t"))
        for number, mask in enumerate(masks, 1):
            print(f"mask {number}:" if len(masks) > 1 else "mask:")
            for candidate in mask:
                print(f"  {candidate.probability:7.2%}  {visible(repr(candidate.text))}", flush=True)
    return records


def continue_all(
    writer: Writer, texts: list[str], config: GenerateConfig, trained_length: int
) -> list[dict[str, Any]]:
    """Generate and print the continuations of all prompts, in groups. Returns what the JSON says of each."""
    from pretrain.corpus.chat_template import DialogueError

    samples = [(text, number) for text in texts for number in range(config.n_samples)]
    try:
        prompts = [
            writer.answer_to(text, number) if config.chat else writer.after(text, number)
            for text, number in samples
        ]
    except DialogueError as error:
        raise ConfigError(f"a prompt {error}") from error
    longest = max(len(prompt.tokens) for prompt in prompts) + config.max_new_tokens
    if longest > trained_length:
        say(
            f"note: up to {longest} tokens, but the model was trained on {trained_length}: the end may be poor"
        )
    streamed = Stream() if len(prompts) == 1 else None
    progress = Progress(len(prompts) * config.max_new_tokens, is_shown=streamed is None)
    records = []
    for first in range(0, len(prompts), config.batch_sequences):
        group = slice(first, first + config.batch_sequences)
        if streamed is not None and not config.chat:
            streamed.show(samples[0][0])
        answers = writer.write(prompts[group], progress.advance, streamed.show if streamed else None)
        progress.finish(len(answers) * config.max_new_tokens)
        for (text, number), answer in zip(samples[group], answers, strict=True):
            finished = answer.ending == "stop"
            record = {"prompt": text, "sample": number, "text": answer.text, "tokens": answer.tokens}
            records.append({**record, "finished": finished})
            if streamed is not None:
                streamed.end(finished)
            else:
                show(text, number, "" if config.chat else text, answer.text, finished)
    progress.end()
    return records


def read_prompts(path: str | None) -> list[str]:
    """The prompts in a file; none where `path` is None. Raises ConfigError."""
    if path is None:
        return []
    try:
        lines = read_lines(Path(path).expanduser())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"prompt_file={path} cannot be read: {reason}") from error
    found = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.endswith(".jsonl"):
        found = [(number, json_prompt(path, number, line)) for number, line in found]
    if not found:
        raise ConfigError(f"prompt_file={path} holds no prompt")
    return [text for _, text in found]


def json_prompt(path: str, number: int, line: str) -> str:
    """The prompt of one JSON line."""
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise ConfigError(
            f"prompt_file={path}: line {number} is not a JSON object with a string in the field 'prompt'"
        )
    return prompt


def show(prompt: str, number: int, before: str, text: str, finished: bool) -> None:
    """Print one continuation after its prompt."""
    print(f"--- {prompt!r}, sample {number}")
    print(visible(before + text + ("" if finished else " …"), keep="\n\t"), flush=True)


class Stream:
    """Prints a single continuation as it is generated."""

    def show(self, piece: str) -> bool:
        """Print a piece of text. The continuation is wanted to its end."""
        print(visible(piece, keep="\n\t"), end="", flush=True)
        return True

    def end(self, finished: bool) -> None:
        """End the line."""
        print("" if finished else " …", flush=True)


class Progress:
    """Prints lines on stderr: tokens generated, rate, and the longest time that is left; at the end, the rate."""

    def __init__(self, total_tokens: int, is_shown: bool) -> None:
        self.total, self.written, self.done = total_tokens, 0, 0
        self.is_shown = is_shown
        self.start = self.last = time.monotonic()

    def advance(self, n_rows: int) -> None:
        """Count one more token for each of `n_rows` continuations."""
        self.written += n_rows
        now = time.monotonic()
        if self.is_shown and now - self.last >= REPORT_EVERY_S:
            self.last = now
            left_s = (self.total - self.done) / max(self.rate(), 1e-9)
            say(
                f"generating: {self.written:,} tokens, {self.rate():,.1f} tokens/s, at most {left_s:,.0f} s left"
            )

    def rate(self) -> float:
        """Tokens per second so far, including the reading of the prompts."""
        return self.written / max(time.monotonic() - self.start, 1e-9)

    def finish(self, n_tokens: int) -> None:
        """Count a group as complete that could have had up to `n_tokens` tokens."""
        self.done += n_tokens

    def end(self) -> None:
        """Say how fast it was."""
        say(f"generated {self.written:,} tokens, {self.rate():,.1f} tokens/s")


if __name__ == "__main__":
    sys.argv[1:] = ["json=true" if argument == "--json" else argument for argument in sys.argv[1:]]
    run_command(GenerateConfig, main, doc=__doc__)
