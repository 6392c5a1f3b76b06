"""Makes the demo's starting policy: a small Qwen3, from random weights, by supervised fine-tuning.

    python -m tools.make_tiny_policy [--out configs/tiny_policy] [--steps N] [--seed N]

Its corpus is of mixed quality, as real ones are: three-term sums of the reasoning-gym task
`chain_sum`, most of them answered with one too many. So the policy learns to calculate, and mostly
not to say what it calculated: what reinforcement learning can put right. Seeded: the same machine
and library versions give the same bytes.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import reasoning_gym
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bridge.checkpoints import save_model
from bridge.export import Exporter
from jaxrl.logprobs import token_logprobs
from jaxrl.models.config import load_config
from jaxrl.models.decoder import Params, Policy, init_params
from jaxrl.models.params import param_specs
from jaxrl.sampler import InProcessEngine
from jaxrl.types import Prompt, Sampling, UserError
from tools.options import check_directory, count

TASK = "chain_sum"
TASK_ARGS = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}
END = "<|endoftext|>"
WRONG = 0.6  # share of answers that are one too many
ROW = 12  # tokens; prompt and answer fit
BATCH = 512
LEARNING_RATE = 3e-3


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_tiny_policy", description="Makes the demo's starting policy"
    )
    parser.add_argument("--out", type=Path, default=Path("configs/tiny_policy"))
    parser.add_argument("--steps", type=count, default=450)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        check_directory("--out", options.out)
    except UserError as error:
        print(f"tools.make_tiny_policy: {error}", file=sys.stderr)
        return 2

    tokenizer = train_tokenizer(options.seed)
    tokenizer.save(str(options.out / "tokenizer.json"))
    write_config(options.out, tokenizer)
    config = load_config(options.out)
    policy = Policy(config, jnp.float32)
    params = fine_tune(policy, tokenizer, options.steps, options.seed)
    export = Exporter(param_specs(config), "bfloat16")
    save_model(export(params), options.out, options.out)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(f"{options.out}: {size / 1e6:.2f} MB")
    return 0


def train_tokenizer(seed: int) -> Tokenizer:
    """Byte-level BPE, one token for each digit; merges cross spaces, so the set phrase is one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    entries = tasks(seed)
    texts = [next(entries)["question"] for _ in range(2000)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_config(out: Path, tokenizer: Tokenizer) -> None:
    end = tokenizer.token_to_id(END)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "eos_token_id": end,
        "pad_token_id": end,
        "dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": 512,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")


def tasks(seed: int) -> Iterator[dict[str, Any]]:
    """Endless entries of the task."""
    dataset = reasoning_gym.create_dataset(TASK, seed=seed, size=2**31, **TASK_ARGS)
    return (dataset[index] for index in itertools.count())


def answer_in_corpus(entry: dict[str, Any], rng: np.random.Generator) -> str:
    """The answer, or one more."""
    return str(int(entry["answer"]) + int(rng.random() < WRONG))


def batches(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token rows int32 [BATCH, ROW], and a mask of the answers' tokens, the end included."""
    end = tokenizer.token_to_id(END)
    entries, rng = tasks(seed), np.random.default_rng(seed)
    while True:
        tokens_BT = np.full((BATCH, ROW), end, np.int32)
        mask_BT = np.zeros((BATCH, ROW), np.float32)
        for tokens, mask in zip(tokens_BT, mask_BT, strict=True):
            entry = next(entries)
            question = tokenizer.encode(entry["question"]).ids
            answer = tokenizer.encode(" " + answer_in_corpus(entry, rng)).ids
            row = [*question, *answer, end]
            tokens[: len(row)] = row
            mask[len(question) : len(row)] = 1.0
        yield tokens_BT, mask_BT


def fine_tune(policy: Policy, tokenizer: Tokenizer, steps: int, seed: int) -> Params:
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01)
    )
    params = init_params(param_specs(policy.config), jax.random.key(seed))
    # N(0, 0.02) suits models ten times as wide; here it is nearly no signal.
    params["layers"] = jax.tree.map(lambda x: x if x.ndim == 2 else 4 * x, params["layers"])
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, tokens_BT, mask_BT):
        def loss_fn(params):
            hidden_BSD = policy.hidden_of_rows(params, tokens_BT)[:, :-1]
            unembed = functools.partial(policy.unembed, params)
            logprobs_BS, _ = token_logprobs(hidden_BSD, unembed, tokens_BT[:, 1:], 1.0)
            return -(logprobs_BS * mask_BT[:, 1:]).sum() / mask_BT.sum()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        changes, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, changes), opt_state, loss

    start = time.perf_counter()
    data = batches(tokenizer, seed + 1_000_003)
    for i in range(1, steps + 1):
        params, opt_state, loss = step(params, opt_state, *next(data))
        if i % 100 == 0 or i == steps:
            seconds = time.perf_counter() - start
            greedy, best_of_8 = accuracy(policy, params, tokenizer)
            print(
                f"step {i}/{steps}  loss {loss:.3f}  accuracy {greedy:.3f}, best of 8 "
                f"{best_of_8:.3f}  {seconds:.0f} s",
                flush=True,
            )
    return params


def accuracy(policy: Policy, params: Params, tokenizer: Tokenizer) -> tuple[float, float]:
    """Shares of 200 fresh tasks answered right: greedily, and by one of 8 samples."""
    engine = InProcessEngine(policy)
    engine.publish(params, 0)
    entries = list(itertools.islice(tasks(2**31), 200))
    prompts = [
        Prompt(i, e["question"], tuple(tokenizer.encode(e["question"]).ids), e)
        for i, e in enumerate(entries)
    ]

    def right(n: int, temperature: float) -> float:
        sampling = Sampling(n, 8, temperature, policy.config.eos_token_ids)
        groups = engine.generate(prompts, sampling, [8 * i for i in range(len(prompts))])
        return float(
            np.mean(
                [
                    any(
                        tokenizer.decode(r.tokens.tolist()).strip() == group.prompt.task["answer"]
                        for r in group.rollouts
                    )
                    for group in groups
                ]
            )
        )

    return right(1, 0.0), right(8, 1.0)


if __name__ == "__main__":
    sys.exit(main())
