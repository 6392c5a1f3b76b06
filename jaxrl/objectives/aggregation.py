"""Which share of the loss each token is: the denominators, over the whole batch, on the host.

A share depends on how many tokens of which completion are trained on, and on nothing else. It is
found before rows, shards and micro-batches exist, so that none of them can change the loss.
"""

from collections.abc import Callable

import numpy as np

Shares = Callable[[np.ndarray], np.ndarray]  # trained tokens [P, G] -> share of each of them [P, G]


def make_shares(aggregation: str, constant: int) -> Shares:
    """With n_i trained tokens in completion i, S completions that have any, and P prompts that do:

    token_mean                    1 / sum of all n
    sequence_mean_token_mean      1 / (S n_i)
    sequence_mean_token_sum       1 / S
    sequence_mean_token_sum_norm  1 / (S constant)
    prompt_mean                   1 / (P sum of n over the prompt's completions)
    """

    def shares(tokens_PG: np.ndarray) -> np.ndarray:
        tokens_PG = np.asarray(tokens_PG, np.float64)
        denominators = {
            "token_mean": lambda: tokens_PG.sum(),
            "sequence_mean_token_mean": lambda: (tokens_PG > 0).sum() * tokens_PG,
            "sequence_mean_token_sum": lambda: (tokens_PG > 0).sum(),
            "sequence_mean_token_sum_norm": lambda: (tokens_PG > 0).sum() * constant,
            "prompt_mean": lambda: (
                tokens_PG.any(axis=1).sum() * tokens_PG.sum(axis=1, keepdims=True)
            ),
        }
        return 1 / np.maximum(np.broadcast_to(denominators[aggregation](), tokens_PG.shape), 1.0)

    return shares


token_mean = make_shares("token_mean", 1)
