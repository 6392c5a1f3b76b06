"""Prompts come in an order that can be resumed, and held-out ones never come; nor do those that a
curriculum passes over."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxrl import data
from jaxrl.config import Config, SftConfig
from jaxrl.data import SKIPS_IN_A_ROW, fingerprint, load_tokenizer, open_data, open_examples
from jaxrl.models.config import DecoderConfig
from jaxrl.types import UserError

CHAIN_SUM = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def make_tokenizer(size: int = 64, bos: bool = False) -> Tokenizer:
    """A token for each letter, digit and sign; every word counts its characters."""
    letters = ["<s>", "</s>", *" abcdefghijklmnopqrstuvwxyz0123456789+-=.?QASta:"]
    vocabulary = {letter: i for i, letter in enumerate(dict.fromkeys(letters))}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return tokenizer


def make_config(seed: int = 0, **data) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "test", "steps": 20, "seed": seed},
            "model": {"path": "nowhere"},
            "data": {"source": "jsonl", "held_out": 3} | data,
            "reward": {"kind": "exact"},
        }
    )


def task_config(seed: int = 0, **data) -> Config:
    task = {"source": "reasoning_gym", "task": "chain_sum", "task_args": CHAIN_SUM}
    return make_config(seed, **(task | data))


def write_rows(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows(count: int, prefix: str = "q"):
    return [{"prompt": f"{prefix}{i}", "answer": str(i)} for i in range(count)]


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def described(prompts):
    return [(prompt.id, prompt.text, prompt.tokens, dict(prompt.task)) for prompt in prompts]


@pytest.fixture(params=["task", "jsonl"])
def config(request, tmp_path):
    """A config of each source, as a function of the seed."""
    path = write_rows(tmp_path / "rows.jsonl", rows(10))
    return task_config if request.param == "task" else lambda seed: make_config(seed, path=path)


# --- streams ---


def test_the_same_seed_gives_the_same_prompts_and_another_one_others(config, tokenizer):
    first, again, other = (open_data(config(seed), tokenizer)[0].take(25) for seed in (0, 0, 1))
    assert described(first) == described(again)
    assert [p.text for p in first] != [p.text for p in other]


def test_a_stream_goes_on_where_its_cursor_stands(config, tokenizer):
    whole, _ = open_data(config(0), tokenizer)
    expected = described(whole.take(30))
    for stop in (1, 7, 20):
        first, _ = open_data(config(0), tokenizer)
        taken = described(first.take(stop))
        resumed, _ = open_data(config(0), tokenizer)
        resumed.cursor = first.cursor
        assert taken + described(resumed.take(30 - stop)) == expected


def test_ids_are_places_in_the_stream_and_never_repeat(config, tokenizer):
    ids = [prompt.id for prompt in open_data(config(0), tokenizer)[0].take(40)]
    assert ids == sorted(set(ids))


def test_peek_shows_what_take_will_yield(config, tokenizer):
    stream, _ = open_data(config(0), tokenizer)
    stream.take(3)
    cursor = stream.cursor
    shown = described([stream.peek()])
    assert stream.cursor == cursor and stream.skipped_too_long == 0
    assert described(stream.take(1)) == shown


def test_held_out_prompts_are_never_yielded(tokenizer):
    """Sums of two digits: 200 texts or so, of which many would come by chance."""
    stream, held_out = open_data(task_config(held_out=40), tokenizer)
    kept = {prompt.text for prompt in held_out}
    assert len(held_out) == len(kept) == 40
    taken = stream.take(1000)
    assert stream.cursor > 1000  # some were passed over
    assert not kept & {prompt.text for prompt in taken}


def test_held_out_prompts_of_a_task_are_the_same_for_every_run_seed(tokenizer):
    one, other = (open_data(task_config(seed, held_out=10), tokenizer)[1] for seed in (0, 5))
    assert described(one) == described(other)


def test_no_prompts_need_be_held_out(config, tokenizer):
    c = config(0)
    c = c.model_copy(update={"data": c.data.model_copy(update={"held_out": 0})})
    stream, held_out = open_data(c, tokenizer)
    assert held_out == [] and len(stream.take(5)) == 5


# --- jsonl ---


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows(23))
    stream, held_out = open_data(make_config(path=path), tokenizer)
    assert [prompt.text for prompt in held_out] == ["q0", "q1", "q2"]
    epochs = [[prompt.text for prompt in stream.take(20)] for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(f"q{i}" for i in range(3, 23))
    assert all(a != b for a, b in itertools.combinations(epochs, 2))


def test_a_file_of_held_out_prompts_leaves_the_other_whole(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows(5))
    held = write_rows(tmp_path / "held.jsonl", [*rows(4, "h"), *rows(4, "h")])
    stream, held_out = open_data(make_config(path=path, held_out_path=held, held_out=6), tokenizer)
    assert [prompt.text for prompt in held_out] == ["h0", "h1", "h2", "h3"]
    assert {prompt.text for prompt in stream.take(5)} == {f"q{i}" for i in range(5)}


def test_a_held_out_text_that_stands_in_the_training_file_too_is_passed_over(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows(5), *rows(5)])
    stream, _ = open_data(make_config(path=path, held_out=2), tokenizer)
    assert {prompt.text for prompt in stream.take(30)} == {"q2", "q3", "q4"}


def test_the_whole_row_is_the_task_of_its_prompt(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows(3), {"prompt": "p", "answer": "a", "x": 1}])
    stream, _ = open_data(make_config(path=path), tokenizer)
    assert stream.take(1)[0].task == {"prompt": "p", "answer": "a", "x": 1}


def test_blank_lines_and_unicode_separators_inside_a_text_do_not_break_rows(tokenizer, tmp_path):
    texts = ["a\u2028b", "c\u0085d", "e\u2029f", "g\x0bh"]
    lines = [json.dumps({"prompt": t, "answer": "1"}, ensure_ascii=False) for t in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\r\n".join(lines) + "\n\n", encoding="utf-8")
    stream, _ = open_data(make_config(path=str(path), held_out=0), tokenizer)
    assert sorted(prompt.text for prompt in stream.take(4)) == sorted(texts)


def test_malformed_rows_are_named_by_number_all_together(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(rows(1)[0])
    bad = [
        "{",
        "[]",
        '{"prompt": "x"}',
        '{"prompt": "x", "answer": 3}',
        '{"prompt": " ", "answer": "1"}',
    ]
    path.write_text("\n".join([good, bad[0], "", good, *bad[1:]]))
    with pytest.raises(UserError) as error:
        open_data(make_config(path=str(path)), tokenizer)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{path}:" and "not JSON" in lines[1]
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        f"line {number}" for number in (2, 5, 6, 7, 8)
    ]


def test_of_many_malformed_rows_twenty_are_named_and_the_rest_counted(tokenizer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 53)
    with pytest.raises(UserError, match=r"line 20: .*\n.*and 33 more$"):
        open_data(make_config(path=str(path)), tokenizer)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_an_error(content, tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(UserError, match="has no rows"):
        open_data(make_config(path=str(tmp_path / "rows.jsonl")), tokenizer)


def test_a_missing_file_is_an_error_that_names_it(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: there is no such file"):
        open_data(make_config(path=str(tmp_path / "gone.jsonl")), tokenizer)


@pytest.mark.parametrize("where", ["path", "held_out_path"])
def test_a_file_that_is_not_text_is_an_error_that_names_it(where, tokenizer, tmp_path):
    good = write_rows(tmp_path / "rows.jsonl", rows(9))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary: cannot be read as text"):
        open_data(make_config(**({"path": good} | {where: str(tmp_path / "binary")})), tokenizer)


@pytest.mark.parametrize("count", [2, 3])
def test_too_few_rows_to_hold_out_and_train_is_an_error_with_both_numbers(
    count, tokenizer, tmp_path
):
    path = write_rows(tmp_path / "rows.jsonl", rows(count))
    with pytest.raises(UserError, match=rf"{count} rows, of which data\.held_out = 3"):
        open_data(make_config(path=path), tokenizer)


# --- curriculum ---


def curriculum(tokenizer, path: str, said=None, per_step: int = 4, **data):
    """The stream with one."""
    config = make_config(path=path, **({"held_out": 0} | data))
    rollout = config.rollout.model_copy(update={"prompts_per_step": per_step})
    said = [] if said is None else said
    return open_data(config.model_copy(update={"rollout": rollout}), tokenizer, said.append)[0]


def epochs(stream, count: int, reward_of) -> list[list[str]]:
    """The texts of so many epochs of 20 rows, each measured when the next is drawn."""
    found = [[] for _ in range(count + 1)]
    while not found[count]:
        (prompt,) = stream.take(1)
        found[prompt.id // 20].append(prompt.text)
        stream.measured(prompt.id, reward_of(prompt.text, prompt.id // 20))
    return [sorted(texts) for texts in found[:count]]


def test_easy_rows_do_not_come_again_and_hard_ones_some_epochs_later(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows(20))
    easy, hard, unknown = ["q0", "q11"], ["q1", "q2", "q3"], ["q5"]

    def reward_of(text, epoch):
        if text in unknown:
            return math.nan
        return 0.9 if text in easy else 0.125 if text in hard and epoch == 0 else 0.5

    stream = curriculum(tokenizer, path, easy=0.9, hard=0.125, revisit=2)
    every = {f"q{i}" for i in range(20)}
    middling = sorted(every - {*easy, *hard})
    assert epochs(stream, 5, reward_of) == [
        sorted(every),
        middling,
        middling,
        sorted([*middling, *hard]),
        sorted([*middling, *hard]),
    ]
    assert stream.metrics() == {"data/skipped_too_long": 0, "data/easy": 2, "data/hard": 0}


@pytest.mark.parametrize("stop", [1, 13, 37, 90, 141])
def test_a_resumed_curriculum_makes_the_same_choice(tokenizer, tmp_path, stop):
    """With rows that cannot be asked for, and with all of the others passed over in the end."""
    texts = [*(f"q{i}" for i in range(9)), "far too long", "q0", *(f"r{i}" for i in range(9))]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": t, "answer": "1"} for t in texts])
    held = write_rows(tmp_path / "held.jsonl", rows(1))

    def opened():
        return curriculum(
            tokenizer,
            path,
            easy=0.75,
            hard=0.0,
            held_out_path=held,
            held_out=1,
            max_prompt_tokens=4,
        )

    def go_on(stream, steps) -> list[tuple]:
        taken = []
        for _ in range(steps):
            prompts = stream.take(4)
            taken += described(prompts)
            for prompt in prompts:
                learned = min(1.0, prompt.id / 1000 + int(prompt.text[1:]) / 8)
                stream.measured(prompt.id, round(4 * learned) / 4)
        return taken

    whole = opened()
    expected = go_on(whole, 150)
    assert whole.metrics()["data/easy"] > 10
    first = opened()
    taken = go_on(first, stop)
    resumed = opened()
    resumed.cursor = first.cursor
    resumed.restore(json.loads(json.dumps(first.state())))
    assert taken + go_on(resumed, 150 - stop) == expected


def test_when_all_rows_are_passed_over_those_sampled_longest_ago_come(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows(20), {"prompt": "toolong", "answer": "1"}])
    said: list[str] = []
    stream = curriculum(tokenizer, path, said, per_step=5, easy=1.0, max_prompt_tokens=4)
    came = Counter()
    for _ in range(40):
        prompts = stream.take(5)
        came.update(prompt.text for prompt in prompts)
        for prompt in prompts:
            stream.measured(prompt.id, 1.0)
    assert len(came) == 20 and min(came.values()) >= 8 and max(came.values()) <= 12
    assert len(said) == 1 and "data.easy" in said[0]
    assert stream.metrics() == {"data/skipped_too_long": 1, "data/easy": 20, "data/hard": 0}


# --- lengths and templates ---


def test_prompts_longer_than_the_limit_are_skipped_and_counted(tokenizer, tmp_path):
    texts = [*["qq"] * 2, *["a", "bb", "ccc", "dddd", "eeeee", "ffffff"]]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": t, "answer": "1"} for t in texts])
    stream, held_out = open_data(make_config(path=path, held_out=1, max_prompt_tokens=4), tokenizer)
    assert [prompt.text for prompt in held_out] == ["qq"]
    taken = stream.take(8)
    assert {prompt.text for prompt in taken} == {"a", "bb", "ccc", "dddd"}
    assert max(len(prompt.tokens) for prompt in taken) == 4
    while stream.cursor < 10 * 7:  # ten epochs, of two such prompts each
        stream.take(1)
    assert 20 <= stream.skipped_too_long <= 22


def test_peeking_counts_no_skipped_prompts(tokenizer, tmp_path):
    texts = ["q", *["toolong"] * 9, "a"]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": t, "answer": "1"} for t in texts])
    stream, _ = open_data(make_config(path=path, held_out=1, max_prompt_tokens=3), tokenizer)
    stream.peek()
    assert (stream.cursor, stream.skipped_too_long) == (0, 0)


def test_data_with_nothing_left_to_train_on_is_an_error_and_not_a_loop(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [*rows(2), {"prompt": "toolong", "answer": "1"}])
    c = make_config(path=path, held_out=2, max_prompt_tokens=4)
    stream, _ = open_data(c, tokenizer)
    with pytest.raises(UserError, match=rf"{SKIPS_IN_A_ROW} prompts in a row .* = 4"):
        stream.take(1)


def test_many_skipped_prompts_that_are_not_in_a_row_are_no_error(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SKIPS_IN_A_ROW", 3)  # two epochs can put two in a row
    texts = ["a", "b", "toolong", "c"]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": t, "answer": "1"} for t in texts])
    stream, _ = open_data(make_config(path=path, held_out=0, max_prompt_tokens=3), tokenizer)
    assert len(stream.take(60)) == 60 and stream.skipped_too_long >= 19


def test_too_few_different_prompts_to_hold_out_is_an_error(tokenizer):
    with pytest.raises(UserError, match=r"data\.held_out = 5000.*only \d+ different prompts"):
        open_data(task_config(held_out=5000), tokenizer)


def test_the_template_surrounds_the_question(tokenizer, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a{prompt}b", "answer": "1"}] * 2)
    c = make_config(path=path, held_out=0, prompt_template="Q: {prompt} A:")
    stream, _ = open_data(c, tokenizer)
    prompt = stream.take(1)[0]
    assert prompt.text == "Q: a{prompt}b A:"
    assert prompt.tokens == tuple(tokenizer.encode(prompt.text).ids)
    assert len(prompt.tokens) == len(prompt.text)


def test_the_tokenizer_s_own_beginning_of_sequence_is_added(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows(4))
    stream, _ = open_data(make_config(path=path), make_tokenizer(bos=True))
    assert stream.take(1)[0].tokens[0] == 0


# --- tasks ---


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"task": "no_such_task"}, "no_such_task"),
        ({"task_args": {"no_such_argument": 1}}, "no_such_argument"),
        ({"task_args": {"min_terms": 5, "max_terms": 2}}, "terms"),
        ({"task_args": {"seed": 3}}, "seed"),
    ],
)
def test_a_task_that_cannot_be_made_is_an_error_that_names_it(changes, named, tokenizer):
    with pytest.raises(UserError, match=named) as error:
        open_data(task_config(**changes), tokenizer)
    assert "data.task" in str(error.value)


def test_the_task_of_a_prompt_is_what_its_scorer_needs(tokenizer):
    import reasoning_gym

    prompt = open_data(task_config(), tokenizer)[0].take(1)[0]
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    assert score(prompt.task["answer"], prompt.task) == 1.0
    left, sign, right = prompt.text.split(":")[1].split("=")[0].split()
    assert int(prompt.task["answer"]) == int(left) + int(f"{sign}{right}")


# --- what a resumed run compares ---


def test_the_fingerprint_changes_with_the_file_and_with_the_settings(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows(9))
    held = write_rows(tmp_path / "held.jsonl", rows(9, "h"))
    c = make_config(path=path, held_out_path=held).data
    first = fingerprint(c)
    assert fingerprint(make_config(path=path, held_out_path=held).data) == first
    changed = make_config(path=path, held_out_path=held, prompt_template="{prompt}!").data
    assert fingerprint(changed) != first
    for name in ("rows.jsonl", "held.jsonl"):
        before = fingerprint(c)
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        assert fingerprint(c) != before


# --- tokenizers ---


def decoder_config(vocab_size: int, *eos: int) -> DecoderConfig:
    return DecoderConfig(vocab_size, 8, 8, 1, 1, 1, 8, 1e4, 1e-6, True, 64, eos)


def test_a_tokenizer_of_the_policy_s_vocabulary_is_accepted(tmp_path):
    make_tokenizer(64).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path, decoder_config(64, 1, 63))
    assert loaded.encode("q1").ids == make_tokenizer(64).encode("q1").ids


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    make_tokenizer(64).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"token id 63, but the policy's vocab_size is 63"):
        load_tokenizer(tmp_path, decoder_config(63))


def test_a_tokenizer_without_the_end_of_sequence_token_is_refused(tmp_path):
    make_tokenizer(64).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=r"end-of-sequence ids \[99\]"):
        load_tokenizer(tmp_path, decoder_config(128, 1, 99))


@pytest.mark.parametrize("content", [None, "", "{}", "[1]"])
def test_a_tokenizer_that_is_missing_or_damaged_is_an_error_that_names_it(content, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, decoder_config(64))


def sft_config(path: str, **data) -> SftConfig:
    return SftConfig.model_validate(
        {
            "run": {"name": "test", "steps": 20},
            "model": {"path": "nowhere"},
            "data": {"source": "jsonl", "path": path, "held_out": 0} | data,
        }
    )


def test_a_completion_is_tokenized_alone_and_ends_with_one_end(tmp_path):
    tokenizer = make_tokenizer(bos=True)
    start, end, other_end = (tokenizer.token_to_id(x) for x in ("<s>", "</s>", "<60>"))
    rows = [{"prompt": "aa", "completion": "bc", "answer": "q"}, {"prompt": "aa", "answer": "c"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def completions(ends: tuple[int, ...], template: str) -> set[tuple[str | int, ...]]:
        c = sft_config(path, completion_template=template)
        stream, _ = open_examples(c, tokenizer, ends)
        examples = stream.take(2)
        assert stream.epochs == 1.0
        assert all(example.tokens[0] == start for example in examples)
        return {
            tuple(i if i in ends else tokenizer.id_to_token(i) for i in example.completion)
            for example in examples
        }

    assert completions((end, other_end), "{completion}.") == {("b", "c", ".", end), ("c", ".", end)}
    stop = tokenizer.token_to_id("c")
    assert completions((end, stop), "{completion}") == {("b", stop), (stop,)}


def test_examples_whose_completions_are_too_long_are_passed_over_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "aa", "completion": "b" * n} for n in (1, 2, 3, 4)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    stream, _ = open_examples(sft_config(path, max_completion_tokens=3), tokenizer, (1,))
    assert {len(example.completion) for example in stream.take(4)} == {2, 3}
    assert stream.skipped_too_long == stream.cursor - 4 > 0
    path = write_rows(tmp_path / "long.jsonl", rows[2:])
    stream, _ = open_examples(sft_config(path, max_completion_tokens=3), tokenizer, (1,))
    with pytest.raises(UserError, match=r"data\.max_completion_tokens = 3"):
        stream.take(1)
