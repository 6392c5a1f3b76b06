"""Where prompts come from: an endless, resumable stream, and held-out prompts it never yields."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from jaxrl.config import Config, DataSection
from jaxrl.models.config import DecoderConfig
from jaxrl.types import Prompt, UserError

EPOCH = 1_000_000  # prompts of a procedural task before it is seeded anew
SKIPS_IN_A_ROW = 20_000  # unusable prompts in a row that end the search for a usable one


class Source(Protocol):
    """An endless sequence of (prompt text, task), the same for the same seed."""

    def __call__(self, index: int) -> tuple[str, Mapping[str, Any]]: ...


class PromptStream:
    """Training prompts in order. `cursor`, an index into the source, is all of its state."""

    def __init__(
        self, source: Source, held_out: list[Prompt], encode: "Encoder", max_prompt_tokens: int
    ) -> None:
        self._source, self._encode, self._most = source, encode, max_prompt_tokens
        self._held_out = {prompt.text for prompt in held_out}
        self.cursor = 0
        self.skipped_too_long = 0

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts; held-out and over-long ones are passed over."""
        prompts: list[Prompt] = []
        skipped = 0
        while len(prompts) < count:
            prompt = self.at(self.cursor)
            self.cursor += 1
            if len(prompt.tokens) > self._most:
                self.skipped_too_long += 1
            elif prompt.text not in self._held_out:
                prompts.append(prompt)
                skipped = 0
                continue
            skipped += 1
            if skipped == SKIPS_IN_A_ROW:
                raise UserError(
                    f"data: {skipped} prompts in a row are held out or longer than "
                    f"data.max_prompt_tokens = {self._most}: there is nothing left to train on"
                )
        return prompts

    def at(self, index: int) -> Prompt:
        """The prompt that has this id, whether `take` yields it or passes it over."""
        return self._encode(index, *self._source(index))

    def peek(self) -> Prompt:
        """The next prompt, which `take` will yield again."""
        cursor, skipped = self.cursor, self.skipped_too_long
        prompt = self.take(1)[0]
        self.cursor, self.skipped_too_long = cursor, skipped
        return prompt


class Encoder:
    """Question -> `Prompt`, by the template and the policy's tokenizer.

    The tokenizer's own special tokens (a BOS, where it has one) are added.
    """

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self._tokenizer, self._template = tokenizer, template

    def __call__(self, index: int, question: str, task: Mapping[str, Any]) -> Prompt:
        text = self._template.replace("{prompt}", question)
        return Prompt(index, text, tuple(self._tokenizer.encode(text).ids), task)


def open_data(c: Config, tokenizer: Tokenizer) -> tuple[PromptStream, list[Prompt]]:
    """The training stream and the held-out prompts.

    Raises:
      UserError: the task or file is missing, empty or malformed (bad rows by number).
    """
    encode = Encoder(tokenizer, c.data.prompt_template)
    if c.data.source == "reasoning_gym":
        train, held_out_source, held_out = _open_task(c.data, c.run.seed)
    else:
        train, held_out_source, held_out = _open_jsonl(c.data, c.run.seed)
    prompts = _distinct(held_out_source, held_out, encode, c.data.max_prompt_tokens)
    return PromptStream(train, prompts, encode, c.data.max_prompt_tokens), prompts


def load_tokenizer(model_dir: Path, config: DecoderConfig) -> Tokenizer:
    """Raises UserError unless the tokenizer exists and its ids fit the policy's vocabulary."""
    path = model_dir / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; the policy needs its own tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise UserError(f"{path}: not a tokenizer: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"{path}: has token id {largest}, but the policy's vocab_size is {config.vocab_size}: "
            "this tokenizer belongs to another model"
        )
    missing = [i for i in config.eos_token_ids if tokenizer.id_to_token(i) is None]
    if missing:
        raise UserError(
            f"{path}: has no token for the end-of-sequence ids {missing} of config.json: "
            "this tokenizer belongs to another model"
        )
    return tokenizer


def fingerprint(c: DataSection) -> str:
    """SHA-256 of what the stream is made from: a resumed run must read the same data."""
    digest = hashlib.sha256(c.model_dump_json().encode())
    for path in (c.path, c.held_out_path):
        if path:
            digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def _distinct(source: Source, count: int, encode: Encoder, most: int) -> list[Prompt]:
    """The first `count` prompts with different texts, no longer than `most` tokens."""
    prompts: dict[str, Prompt] = {}
    for index in range(count + SKIPS_IN_A_ROW):
        if len(prompts) == count:
            break
        text, task = source(index)
        prompt = encode(index, text, task)
        if len(prompt.tokens) <= most:
            prompts.setdefault(prompt.text, prompt)
    if len(prompts) < count:
        raise UserError(
            f"data.held_out = {count}, but the data has only {len(prompts)} different prompts of "
            f"at most data.max_prompt_tokens = {most} tokens to hold out"
        )
    return list(prompts.values())


def _open_task(c: DataSection, seed: int) -> tuple[Source, Source, int]:
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "data.source = reasoning_gym needs that library: pip install 'jaxrl-bridge[tasks]'"
        ) from None

    def tasks(first_seed: int) -> Source:
        datasets: dict[int, Any] = {}

        def at(index: int) -> tuple[str, Mapping[str, Any]]:
            epoch, place = divmod(index, EPOCH)
            if epoch not in datasets:
                datasets.clear()
                datasets[epoch] = reasoning_gym.create_dataset(
                    c.task or "", seed=first_seed + epoch * EPOCH, size=EPOCH, **c.task_args
                )
            entry = datasets[epoch][place]
            return entry["question"], entry

        try:
            at(0)
        except Exception as error:
            raise UserError(f"data.task = {c.task!r} with {c.task_args}: {error}") from None
        return at

    # The held-out prompts are the same for every run.seed, so that runs can be compared.
    return tasks((1 + seed) * 1_000_003 % 2**31), tasks(2**31), c.held_out


def _open_jsonl(c: DataSection, seed: int) -> tuple[Source, Source, int]:
    assert c.path is not None
    rows = _read_rows(Path(c.path))
    held_out = _read_rows(Path(c.held_out_path)) if c.held_out_path else rows[: c.held_out]
    train = rows if c.held_out_path else rows[c.held_out :]
    if not train:
        raise UserError(
            f"{c.path}: {len(rows)} rows, of which data.held_out = {c.held_out} are kept for "
            "evaluation: none is left to train on"
        )
    return (
        _shuffled(train, seed),
        _in_order(held_out),
        min(c.held_out, len({text for text, _ in held_out})),
    )


def _in_order(rows: list[tuple[str, Mapping[str, Any]]]) -> Source:
    def at(index: int) -> tuple[str, Mapping[str, Any]]:
        return rows[index % len(rows)]

    return at


def _shuffled(rows: list[tuple[str, Mapping[str, Any]]], seed: int) -> Source:
    """Every row once an epoch, in an order of its own for each epoch."""
    orders: dict[int, np.ndarray] = {}

    def at(index: int) -> tuple[str, Mapping[str, Any]]:
        epoch, place = divmod(index, len(rows))
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(rows))
        return rows[orders[epoch][place]]

    return at


def _read_rows(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    rows, problems = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            problems.append(f"line {number}: not JSON: {error}")
            continue
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) and row[key].strip() for key in ("prompt", "answer")
        ):
            problems.append(f"line {number}: needs the texts 'prompt' and 'answer', both not empty")
        else:
            rows.append((row["prompt"], row))
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError(f"{path}:\n  " + "\n  ".join(problems[:20] + more))
    if not rows:
        raise UserError(f"{path}: the file has no rows: there is nothing to train on")
    return rows
