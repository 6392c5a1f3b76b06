"""What a request asks of sampling, in vLLM's terms."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from bridge.engines.errors import RequestRefused
from jaxrl.types import MOST_BEAMS, Sampling

_MIN_TEMPERATURE = 0.01  # vLLM raises smaller ones to this, and would sample something else
_FIELDS = {field.name for field in dataclasses.fields(Sampling)}
_OF_TEXT = ("stop_strings", "bad_words", "regex", "json_schema")


def sampling_of(request: Mapping[str, Any], tokenizer: bool) -> Sampling:
    """The options of a request; those that it does not name are off.

    Raises:
      RequestRefused: an option that vLLM would change or pass over in silence: a temperature that
        it does not have, or one about text while it has no `tokenizer`. It refuses the others.
        Options that a beam search does not go with.
    """
    sampling = Sampling(**{name: request[name] for name in _FIELDS & request.keys()})
    temperature = sampling.temperature
    if not (temperature == 0 or temperature >= _MIN_TEMPERATURE):
        raise RequestRefused(
            f"temperature {temperature}: use 0 for greedy, or at least {_MIN_TEMPERATURE}"
        )
    if sampling.n < 1 or sampling.max_new_tokens < 1 or request["seed"] < 0:
        raise RequestRefused(
            f"n {sampling.n} and max_new_tokens {sampling.max_new_tokens} must be at least 1, and "
            f"seed {request['seed']} at least 0"
        )
    of_text = [name for name in _OF_TEXT if getattr(sampling, name)]
    if of_text and not tokenizer:
        raise RequestRefused(
            f"{', '.join(of_text)}: the engine works on tokens alone, and has no text to look at; "
            "start it with EngineSettings.tokenizer and the tokenizer's files"
        )
    if sampling.beams != 1:
        _check_beams(sampling)
    return sampling


def _check_beams(sampling: Sampling) -> None:
    if not sampling.n <= sampling.beams <= MOST_BEAMS:
        raise RequestRefused(
            f"beams {sampling.beams}: give as many as completions (n {sampling.n}) or more, "
            f"and {MOST_BEAMS} at most"
        )
    alone = dataclasses.replace(sampling, beams=1)
    if sampling.temperature != 0 or not alone.exact or sampling.stop_strings:
        raise RequestRefused(
            f"beams {sampling.beams}: a beam search draws nothing, and knows no option but n, "
            "max_new_tokens and stop_tokens; set temperature to 0 and leave the others out, or "
            "beams to 1"
        )


def check_tokens(tokens: Sequence[int], new: int, max_model_len: int, vocab_size: int) -> None:
    """Raises RequestRefused for what engines cut short, or may die of: `tokens` with `new` ones
    behind them are too many, or not the model's."""
    if not tokens or len(tokens) + new > max_model_len:
        raise RequestRefused(
            f"{len(tokens)} prompt tokens and {new} new ones: there must be a prompt, and both "
            f"must fit into max_model_len = {max_model_len}"
        )
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        raise RequestRefused(
            f"tokens {min(tokens)} to {max(tokens)} are not all in the model's vocabulary of "
            f"{vocab_size}; does the tokenizer belong to the model?"
        )


def sampling_params(sampling: Sampling, seed: int, likeliest: int = 0) -> Any:
    """vLLM's SamplingParams of one completion, which comes with the log-probs of so many other
    tokens at each place, the likeliest there.

    A bad word is what the tokenizer makes of it, alone and behind a space: the same letters from
    other tokens may come.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    structure = None
    if sampling.regex is not None or sampling.json_schema is not None:
        structure = StructuredOutputsParams(regex=sampling.regex, json=sampling.json_schema)
    return SamplingParams(
        seed=seed,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=list(sampling.stop_tokens),
        # Only the request's own stop tokens stop it, but what a structure ends with is the
        # tokenizer's end of sequence, and nothing holds the tokens after it to the structure.
        ignore_eos=structure is None,
        stop=list(sampling.stop_strings),
        detokenize=bool(sampling.stop_strings),
        bad_words=list(sampling.bad_words),
        structured_outputs=structure,
        logprobs=likeliest,  # beside the sampled token's
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # nobody else uses it
    )
