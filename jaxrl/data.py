"""Where prompts come from: an endless, resumable stream, and held-out prompts it never yields."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer

from jaxrl.config import Config, DataSection, SftConfig, SftDataSection
from jaxrl.curriculum import Curriculum, Order
from jaxrl.models.config import DecoderConfig
from jaxrl.types import Example, Prompt, UserError

EPOCH = 1_000_000  # prompts of a procedural task before it is seeded anew
SKIPS_IN_A_ROW = 20_000  # unusable prompts in a row that end the search for a usable one

P = TypeVar("P", bound=Prompt)
P_co = TypeVar("P_co", bound=Prompt, covariant=True)
Row = tuple[str, Mapping[str, Any]]  # prompt text, task


class Source(Protocol):
    """An endless sequence of (prompt text, task), the same for the same seed."""

    def __call__(self, index: int) -> Row: ...


class Encode(Protocol[P_co]):
    """Question -> what is trained on."""

    limits: str  # beyond which it is too long, as the keys that set them

    def __call__(self, index: int, question: str, task: Mapping[str, Any]) -> P_co: ...

    def fits(self, prompt: Any) -> bool: ...


class PromptStream(Generic[P]):
    """Training prompts in order, less those that the curriculum passes over, if there is one.

    `cursor`, an index into the source, and `state()` are all of its state."""

    def __init__(
        self,
        source: Source,
        epoch: int,
        held_out: list[P],
        encode: Encode[P],
        curriculum: Curriculum | None = None,
    ) -> None:
        """`epoch`: after how many items of the source it begins anew, or in another order."""
        self._source, self._encode, self._epoch = source, encode, epoch
        self._curriculum = curriculum
        self._held_out = {prompt.text for prompt in held_out}
        self.cursor = 0
        self.skipped_too_long = 0

    @property
    def epochs(self) -> float:
        return self.cursor / self._epoch

    def take(self, count: int) -> list[P]:
        """The next `count` prompts; held-out and over-long ones are passed over."""
        prompts: list[P] = []
        skipped = 0
        while len(prompts) < count:
            if self._curriculum is not None:
                self.cursor = self._curriculum.next(self.cursor)
            prompt = self.at(self.cursor)
            self.cursor += 1
            if not self._encode.fits(prompt):
                self.skipped_too_long += 1
            elif prompt.text not in self._held_out:
                prompts.append(prompt)
                skipped = 0
                continue
            if self._curriculum is not None:
                self._curriculum.never(prompt.id)
            skipped += 1
            if skipped == SKIPS_IN_A_ROW:
                raise UserError(
                    f"data: {skipped} prompts in a row are held out or longer than "
                    f"{self._encode.limits}: there is nothing left to train on"
                )
        return prompts

    def at(self, index: int) -> P:
        """The prompt that has this id, whether `take` yields it or passes it over."""
        return self._encode(index, *self._source(index))

    def peek(self) -> P:
        """The next prompt, which `take` will yield again."""
        cursor, skipped = self.cursor, self.skipped_too_long
        prompt = self.take(1)[0]
        self.cursor, self.skipped_too_long = cursor, skipped
        return prompt

    def measured(self, index: int, reward: float) -> None:
        """The completions of the prompt with this id had this mean reward; NaN: nobody knows."""
        if self._curriculum is not None:
            self._curriculum.measured(index, reward)

    def state(self) -> dict[str, Any]:
        """Beside `cursor`; JSON-able."""
        return {} if self._curriculum is None else self._curriculum.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """`state`: what `state()` once returned."""
        if self._curriculum is not None:
            self._curriculum.restore(state)

    def metrics(self) -> dict[str, int]:
        passed_over = {}
        if self._curriculum is not None:
            easy, hard = self._curriculum.passed_over(self.cursor // self._epoch)
            passed_over = {"data/easy": int(easy.sum()), "data/hard": int(hard.sum())}
        return {"data/skipped_too_long": self.skipped_too_long, **passed_over}


class Encoder:
    """Question -> `Prompt`, by the template and the policy's tokenizer.

    The tokenizer's own special tokens (a BOS, where it has one) are added.
    """

    def __init__(self, tokenizer: Tokenizer, c: DataSection) -> None:
        self._tokenizer, self._template = tokenizer, c.prompt_template
        self._most = c.max_prompt_tokens
        self.limits = f"data.max_prompt_tokens = {self._most}"

    def __call__(self, index: int, question: str, task: Mapping[str, Any]) -> Prompt:
        text = self._template.replace("{prompt}", question)
        return Prompt(index, text, tuple(self._tokenizer.encode(text).ids), task)

    def fits(self, prompt: Prompt) -> bool:
        return len(prompt.tokens) <= self._most


class ExampleEncoder:
    """Question and answer -> `Example`.

    Each is tokenized by itself, as a policy meets them: it sees the tokens of a prompt, and gives
    those of a completion. No special tokens are added to that one but its end.
    """

    def __init__(self, tokenizer: Tokenizer, c: SftDataSection, ends: Sequence[int]) -> None:
        """`ends`: the policy's end-of-sequence tokens."""
        self._tokenizer, self._template, self._ends = tokenizer, c.completion_template, ends
        self._keys, self._most = c.answer_keys, c.max_completion_tokens
        self._prompt = Encoder(tokenizer, c)
        self.limits = (
            f"{self._prompt.limits}, or their completions than data.max_completion_tokens = "
            f"{self._most}"
        )

    def __call__(self, index: int, question: str, task: Mapping[str, Any]) -> Example:
        prompt = self._prompt(index, question, task)
        answer = _answer(task, self._keys)
        if not isinstance(answer, str):
            raise UserError(f"data: {question!r} has the answer {answer!r}, which is not a text")
        text = self._template.replace("{completion}", answer)
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not tokens or tokens[-1] not in self._ends:
            tokens.append(self._ends[0])
        return Example(index, prompt.text, prompt.tokens, task, tuple(tokens))

    def fits(self, prompt: Example) -> bool:
        return self._prompt.fits(prompt) and len(prompt.completion) <= self._most


def open_data(
    c: Config, tokenizer: Tokenizer, warn: Callable[[str], None] = print
) -> tuple[PromptStream[Prompt], list[Prompt]]:
    """The training stream and the held-out prompts.

    Raises:
      UserError: the task or file is missing, empty or malformed (bad rows by number).
    """

    def curriculum(order: Order, rows: int) -> Curriculum | None:
        if c.data.easy is None and c.data.hard is None:
            return None
        return Curriculum(order, rows, c.data, c.rollout.prompts_per_step, warn)

    return _open(c.data, c.run.seed, Encoder(tokenizer, c.data), curriculum)


def open_examples(
    c: SftConfig, tokenizer: Tokenizer, ends: Sequence[int]
) -> tuple[PromptStream[Example], list[Example]]:
    """As `open_data`, with the completions; `ends` are the policy's end-of-sequence tokens."""
    return _open(c.data, c.run.seed, ExampleEncoder(tokenizer, c.data, ends))


def _open(
    c: DataSection,
    seed: int,
    encode: Encode[P],
    curriculum: Callable[[Order, int], Curriculum | None] = lambda *_: None,
) -> tuple[PromptStream[P], list[P]]:
    opened = _open_task(c, seed) if c.source == "reasoning_gym" else _open_jsonl(c, seed)
    prompts = _distinct(opened.held_out, opened.held_out_count, encode)
    chosen = None if opened.order is None else curriculum(opened.order, opened.epoch)
    return PromptStream(opened.train, opened.epoch, prompts, encode, chosen), prompts


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


def _distinct(source: Source, count: int, encode: Encode[P]) -> list[P]:
    """The first `count` prompts with different texts that are not too long."""
    prompts: dict[str, P] = {}
    for index in range(count + SKIPS_IN_A_ROW):
        if len(prompts) == count:
            break
        text, task = source(index)
        prompt = encode(index, text, task)
        if encode.fits(prompt):
            prompts.setdefault(prompt.text, prompt)
    if len(prompts) < count:
        raise UserError(
            f"data.held_out = {count}, but the data has only {len(prompts)} different prompts to "
            f"hold out that are not longer than {encode.limits}"
        )
    return list(prompts.values())


class _Opened(NamedTuple):
    train: Source
    epoch: int  # of `train`, in items
    held_out: Source
    held_out_count: int
    order: Order | None = None  # of the rows of `train`; None: they never come again


def _open_task(c: DataSection, seed: int) -> _Opened:
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(
            "data.source = reasoning_gym needs that library: pip install 'jaxrl-bridge[tasks]'"
        ) from None

    def tasks(first_seed: int) -> Source:
        datasets: dict[int, Any] = {}

        def at(index: int) -> Row:
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
    return _Opened(tasks((1 + seed) * 1_000_003 % 2**31), EPOCH, tasks(2**31), c.held_out)


def _open_jsonl(c: DataSection, seed: int) -> _Opened:
    assert c.path is not None
    rows = _read_rows(Path(c.path), c.answer_keys)
    held_out = rows[: c.held_out]
    if c.held_out_path:
        held_out = _read_rows(Path(c.held_out_path), c.answer_keys)
    train = rows if c.held_out_path else rows[c.held_out :]
    if not train:
        raise UserError(
            f"{c.path}: {len(rows)} rows, of which data.held_out = {c.held_out} are kept for "
            "evaluation: none is left to train on"
        )
    order = _shuffle(len(train), seed)
    return _Opened(
        _shuffled(train, order),
        len(train),
        _in_order(held_out),
        min(c.held_out, len({text for text, _ in held_out})),
        order,
    )


def _in_order(rows: list[Row]) -> Source:
    def at(index: int) -> Row:
        return rows[index % len(rows)]

    return at


def _shuffle(rows: int, seed: int) -> Order:
    """Another order for each epoch."""

    @functools.lru_cache(maxsize=2)  # the last of an epoch end when the next has begun
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(rows)

    return order


def _shuffled(rows: list[Row], order: Order) -> Source:
    """Every row once an epoch."""

    def at(index: int) -> Row:
        epoch, place = divmod(index, len(rows))
        return rows[order(epoch)[place]]

    return at


def _answer(task: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What stands under the first of the keys that is there."""
    return next((task[key] for key in keys if key in task), None)


def _read_rows(path: Path, answer_keys: Sequence[str]) -> list[Row]:
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
            isinstance(text, str) and text.strip()
            for text in (row.get("prompt"), _answer(row, answer_keys))
        ):
            named = " or ".join(map(repr, answer_keys))
            problems.append(f"line {number}: needs the texts 'prompt' and {named}, both not empty")
        else:
            rows.append((row["prompt"], row))
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise UserError(f"{path}:\n  " + "\n  ".join(problems[:20] + more))
    if not rows:
        raise UserError(f"{path}: the file has no rows: there is nothing to train on")
    return rows
