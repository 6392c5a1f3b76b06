"""Objectives equal their formulas, written out one token at a time; nothing else can reach them."""

import functools
import math
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrl.config import AlgorithmSection, UpdateSection
from jaxrl.objectives import choices
from jaxrl.objectives.aggregation import make_shares
from jaxrl.objectives.objective import make_objective
from jaxrl.objectives.policy import OWN
from jaxrl.objectives.tokens import Anchors
from jaxrl.packing import pack
from jaxrl.types import Group, Prompt, Rollout, TrainBatch, UserError

# Bounds that the cases below fall on both sides of.
GSPO = {"clip_low": 0.15, "clip_high": 0.2}
KL = {"kl_coefficient": 0.3}
OPTIONS = {
    "default": {},
    "dual_clip": {"dual_clip": 1.5},
    "gspo": {"loss": "gspo", **GSPO},
    "gspo_token": {"loss": "gspo_token", "dual_clip": 1.3, **GSPO},
    "cispo": {"loss": "cispo", "cispo_max": 1.3},
    "sapo": {"loss": "sapo", "sapo_tau_positive": 0.8, "sapo_tau_negative": 2.0},
    "dppo": {"loss": "dppo", "clip_low": 0.05, "clip_high": 0.08},
    "gmpo": {"loss": "gmpo", "clip_low": 0.2, "clip_high": 0.3},
    "engine": {"proximal": "engine"},
    "none": {"correction": "none"},
    "sequence_tis": {"correction": "sequence_tis", "correction_cap": 1.5},
    "token_mask": {"token_mask": [0.6, 1.7]},
    "sequence_mask": {"sequence_mask": [0.3, 3.0]},
    "geometric_mask": {"geometric_mask": [0.8, 1.2]},
    "k3_mask": {"k3_mask": 0.12},
    "opsm": {"opsm_threshold": 0.1},
    # Weights beside this proximal policy are refused by `contradictions`; here they show that no
    # gradient goes through them even where they depend on pi.
    "engine_weighted": {
        "proximal": "engine",
        "correction": "token_tis",
        "token_mask": [0.4, 2.5],
        "k3_mask": 0.2,
    },
    "k1": {**KL, "kl_estimator": "k1"},
    "k2": {**KL, "kl_estimator": "k2"},
    "k3": KL,
    "k3+": {**KL, "kl_estimator": "k3+"},
    "kl_corrected": {**KL, "kl_corrected": True, "geometric_mask": [0.8, 1.2]},
    "entropy": {"entropy_coefficient": 0.2},
}
EACH = pytest.mark.parametrize("option", OPTIONS)
# Lengths of the completions in each row.
ROWS = [(3, 5, 4), (1, 6), (7, 2, 2, 1), (), (4, 4), (12,), (2, 3, 1, 4, 2), (6, 5)]
B, C = len(ROWS), 14


@pytest.fixture(autouse=True)
def no_silent_broadcasting():
    with jax.numpy_rank_promotion("raise"):
        yield


class Case(NamedTuple):
    scores: tuple[np.ndarray, np.ndarray]
    batch: TrainBatch
    anchors: Anchors


@functools.cache
def random_case(seed: int) -> Case:
    """Wide ratios, an empty row, a completion that is left out, holes; what stands where nothing is
    trained is not 0."""
    rng = np.random.default_rng(seed)

    def normal(scale):
        return rng.normal(0.0, scale, (B, C)).astype(np.float32)

    completion_BC = np.zeros((B, C), np.int32)
    advantages_BC = normal(1.0)
    for b, lengths in enumerate(ROWS):
        ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)
        completion_BC[b, : len(ids)] = ids
        signs = np.where(rng.random(len(lengths) + 1) < 0.5, 1.0, -1.0)
        advantages_BC[b] = signs[completion_BC[b]] * rng.uniform(0.2, 2.0, C)
    mask_BC = completion_BC > 0
    mask_BC[2, 7:9] = mask_BC[0, 4] = mask_BC[5, 0] = mask_BC[7, 10] = False
    behavior_BC = normal(0.5) - 2.0
    # Completions drift as a whole, too, or the means of long ones would all be near 0.
    proximal_BC = behavior_BC + normal(0.4) + 0.3 * rng.normal(size=(B, 20))[:, :1]
    drift_BC = rng.normal(0.0, 0.25, (B, 20))[np.arange(B)[:, None], completion_BC]
    logprobs_BC = np.float32(proximal_BC + normal(0.4) + drift_BC)
    unused = [np.zeros((B, 1), np.int32)] * 6
    batch = TrainBatch(
        *unused,
        completion_BC,
        np.float32(mask_BC),
        behavior_BC,
        np.float32(advantages_BC),
        np.float32(rng.uniform(0.01, 0.1, (B, C)) * mask_BC),
    )
    entropy_BC = np.abs(normal(1.0))
    anchors = Anchors(np.float32(proximal_BC), logprobs_BC + normal(0.6))
    return Case((logprobs_BC, entropy_BC), batch, anchors)


@functools.cache
def run_of(option: str):
    """run(scores, batch, anchors) -> ((loss, metrics), gradients of both scores)."""
    objective = make_objective(AlgorithmSection(**OPTIONS[option]))
    return jax.jit(jax.value_and_grad(objective, has_aux=True))


# --- the formulas ---


class Token(NamedTuple):
    b: int
    c: int
    new: float
    old: float
    mu: float
    reference: float
    advantage: float
    entropy: float
    share: float


def completions_of(case: Case, engine: bool) -> list[list[Token]]:
    found = defaultdict(list)
    old_BC = case.batch.behavior_logprobs_BC if engine else case.anchors.proximal_BC
    for b, c in np.argwhere(case.batch.loss_mask_BC > 0).tolist():
        arrays = (
            case.scores[0],
            old_BC,
            case.batch.behavior_logprobs_BC,
            case.anchors.reference_BC,
            case.batch.advantages_BC,
            case.scores[1],
            case.batch.share_BC,
        )
        token = Token(b, c, *(float(array[b, c]) for array in arrays))
        found[b, int(case.batch.completion_BC[b, c])].append(token)
    return list(found.values())


def mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


class Formula:
    """One completion at a time. What is detached is taken at the tokens' own `new`."""

    def __init__(self, option: str):
        self.o = AlgorithmSection(**OPTIONS[option])
        self.seen = defaultdict(set)  # which branches were taken, by name

    def clipped(self, ratio: float, advantage: float) -> tuple[float, bool]:
        low, high = 1 - self.o.clip_low, 1 + self.o.clip_high
        if advantage > 0:
            self.seen["up"].add("stopped" if ratio > high else "left" if ratio < low else "inside")
            return -advantage * min(ratio, high), ratio > high
        self.seen["down"].add("stopped" if ratio < low else "left" if ratio > high else "inside")
        stopped, ratio = ratio < low, max(ratio, low)
        if self.o.dual_clip is not None:
            self.seen["dual"].add(ratio > self.o.dual_clip)
            stopped, ratio = (
                stopped or ratio > self.o.dual_clip,
                min(ratio, self.o.dual_clip),
            )
        return -advantage * ratio, stopped

    def policy(self, tokens: list[Token], new: list[float], i: int) -> tuple[float, bool]:
        """Of token i: its term, and whether that stands still as the token's `new` changes."""
        o, token, log = self.o, tokens[i], new[i] - tokens[i].old
        ratio, advantage = math.exp(log), token.advantage
        logs = [x - t.old for x, t in zip(new, tokens, strict=True)]
        match o.loss:
            case "ppo_clip":
                return self.clipped(ratio, advantage)
            case "gspo":
                return self.clipped(math.exp(mean(logs)), advantage)
            case "gspo_token":
                held = math.exp(mean(t.new - t.old for t in tokens))
                return self.clipped(held * math.exp(new[i] - token.new), advantage)
            case "cispo":
                held = math.exp(token.new - token.old)
                self.seen["cispo"].add(held > o.cispo_max)
                return -min(held, o.cispo_max) * advantage * new[i], False
            case "sapo":
                tau = o.sapo_tau_positive if advantage > 0 else o.sapo_tau_negative
                self.seen["sapo"].add(advantage > 0)
                return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage, False
            case "dppo":
                moved = math.exp(token.new) - math.exp(token.old)
                stopped = moved > o.clip_high if advantage > 0 else -moved > o.clip_low
                self.seen["dppo", advantage > 0].add(stopped)
                return -ratio * advantage * (not stopped), stopped
            case "gmpo":
                bounded = [
                    min(x, o.clip_high) if t.advantage > 0 else max(x, -o.clip_low)
                    for x, t in zip(logs, tokens, strict=True)
                ]
                stopped = bounded[i] != logs[i]
                self.seen["gmpo", advantage > 0].add(stopped)
                return -advantage * math.exp(mean(bounded)), stopped
        raise AssertionError(o.loss)

    def weight(self, tokens: list[Token], i: int) -> tuple[float, bool]:
        """The weight of token i, and whether the masks keep it."""
        o = self.o
        logs = [(t.new if o.proximal == "engine" else t.old) - t.mu for t in tokens]
        rho, product = math.exp(logs[i]), math.exp(math.fsum(logs))
        k3 = mean(math.exp(x) - 1 - x for x in logs)
        checks = {
            "token": (o.token_mask, rho),
            "sequence": (o.sequence_mask, product),
            "geometric": (o.geometric_mask, math.exp(mean(logs))),
            "k3": (o.k3_mask and [0.0, o.k3_mask], k3),
        }
        kept = True
        for name, (bounds, value) in checks.items():
            if bounds is not None:
                inside = bounds[0] <= value <= bounds[1]
                self.seen[name].add("in" if inside else "low" if value < bounds[0] else "high")
                kept &= inside
        if o.opsm_threshold is not None:
            left = mean(t.mu - t.new for t in tokens) > o.opsm_threshold
            self.seen["opsm"].add((tokens[i].advantage > 0, left))
            kept &= not (left and tokens[i].advantage < 0)
        chosen = {"none": 1.0, "token_tis": rho, "sequence_tis": product}[o.correction]
        if o.correction != "none":
            self.seen["cap"].add(chosen > o.correction_cap)
        return min(chosen, o.correction_cap), kept

    def outside(self, logs: list[float]) -> tuple[list[bool], list[bool]]:
        """Which tokens a mask with bounds finds below, and which above them."""
        o = self.o
        checks = [
            (o.token_mask, [math.exp(x) for x in logs]),
            (o.sequence_mask, [math.exp(math.fsum(logs))] * len(logs)),
            (o.geometric_mask, [math.exp(mean(logs))] * len(logs)),
        ]
        checks = [(bounds, values) for bounds, values in checks if bounds is not None]
        low = [any(values[i] < bounds[0] for bounds, values in checks) for i in range(len(logs))]
        high = [any(values[i] > bounds[1] for bounds, values in checks) for i in range(len(logs))]
        return low, high

    def kl(self, token: Token, new: float) -> float:
        x, held = new - token.reference, token.new - token.reference
        k3 = math.exp(-x) - 1 + x
        match self.o.kl_estimator:
            case "k1":
                return x
            case "k2":
                return x * x / 2
            case "k3":
                return k3
        return (math.exp(-held) - 1 + held) + x * x / 2 - held * held / 2

    def loss(self, tokens: list[Token], new: list[float]) -> float:
        o, total = self.o, 0.0
        for i, token in enumerate(tokens):
            weight, kept = self.weight(tokens, i)
            term = weight * kept * self.policy(tokens, new, i)[0]
            kl = self.kl(token, new[i])
            if o.kl_corrected:
                kl *= weight * math.exp(new[i] - token.old)
            term += o.kl_coefficient * kl - o.entropy_coefficient * token.entropy
            total += token.share * term
        return total

    def gradient(self, tokens: list[Token]) -> list[float]:
        """Central differences."""
        step, new = 1e-6, [t.new for t in tokens]

        def at(i, change):
            return self.loss(tokens, [x + change * (j == i) for j, x in enumerate(new)])

        return [(at(i, step) - at(i, -step)) / (2 * step) for i in range(len(new))]

    def metrics(self, completions: list[list[Token]]) -> dict[str, float]:
        o, columns = self.o, defaultdict(list)
        geometric, products, touched = [], [], []
        for tokens in completions:
            new = [t.new for t in tokens]
            logs = [(t.new if o.proximal == "engine" else t.old) - t.mu for t in tokens]
            geometric.append(math.exp(mean(logs)))
            products.append(math.exp(math.fsum(logs)))
            touched.append(any(not self.weight(tokens, i)[1] for i in range(len(tokens))))
            low, high = self.outside(logs)
            for i, (token, log) in enumerate(zip(tokens, logs, strict=True)):
                weight, kept = self.weight(tokens, i)
                row = {
                    "log": log,
                    "rho": math.exp(log),
                    "used": weight * kept,
                    "kept": kept,
                    "low": low[i],
                    "high": high[i],
                    "dropped": 0.0 if kept else token.advantage,
                    "stopped": self.policy(tokens, new, i)[1],
                    "up": token.advantage > 0,
                    "log_r": token.new - token.old,
                    "r": math.exp(token.new - token.old),
                    "kl": self.kl(token, token.new),
                }
                for name, value in row.items():
                    columns[name].append(value)
        c = {name: np.array(values) for name, values in columns.items()}
        # Of rho = x: half of x log(x / m) + log(1 / m), where m = (x + 1) / 2 is the mixture's.
        middle = (c["rho"] + 1) / 2
        js = (c["rho"] * np.log(c["rho"] / middle) - np.log(middle)) / 2
        found = {
            "mismatch/mean_abs_dlogp": np.abs(c["log"]).mean(),
            "mismatch/max_abs_dlogp": np.abs(c["log"]).max(),
            "mismatch/k1": -c["log"].mean(),
            "mismatch/k3": (c["rho"] - 1 - c["log"]).mean(),
            "mismatch/js": js.mean(),
            "mismatch/token_mult_prob_error": np.maximum(c["rho"], 1 / c["rho"]).mean(),
            "mismatch/log_ppl_diff": mean(-math.log(x) for x in geometric),
            "mismatch/log_ppl_abs_diff": mean(abs(math.log(x)) for x in geometric),
            "mismatch/chi2": (c["rho"] ** 2).mean() - 1,
            "mismatch/chi2_sequence": mean(x**2 for x in products) - 1,
            "mismatch/ratio_mean": c["rho"].mean(),
            "mismatch/ratio_max": c["rho"].max(),
            "mismatch/geometric_min": min(geometric),
            "mismatch/geometric_max": max(geometric),
            "mismatch/ess": c["rho"].sum() ** 2 / (len(c["rho"]) * (c["rho"] ** 2).sum()),
            "correction/mean": c["used"].mean(),
            "correction/std": c["used"].std(),
            "correction/min": c["used"].min(),
            "correction/max": c["used"].max(),
            "correction/ess": c["used"].sum() ** 2 / (len(c["used"]) * (c["used"] ** 2).sum()),
            "correction/capped_fraction": (c["rho"] > o.correction_cap).mean(),
            "correction/low_fraction": (c["rho"] < 1 / o.correction_cap).mean(),
            "correction/below_fraction": c["low"].mean(),
            "correction/above_fraction": c["high"].mean(),
            "correction/masked_fraction": (~c["kept"]).mean(),
            "correction/masked_completions": mean(touched),
            "correction/masked_advantage_positive": c["dropped"].clip(min=0).mean(),
            "correction/masked_advantage_negative": c["dropped"].clip(max=0).mean(),
            "clip_fraction": c["stopped"].mean(),
            "clip/up_fraction": (c["stopped"] & c["up"]).mean(),
            "clip/down_fraction": (c["stopped"] & ~c["up"]).mean(),
            "ratio/mean": c["r"].mean(),
            "ratio/min": c["r"].min(),
            "ratio/max": c["r"].max(),
            "kl/proximal": (c["r"] - 1 - c["log_r"]).mean(),
        }
        return found | ({"kl/reference": c["kl"].mean()} if o.kl_coefficient else {})


BOTH, ALL = {True, False}, {"stopped", "left", "inside"}
BRANCHES = {  # that the cases together must take, where an option has them
    "up": ALL,
    "down": ALL,
    "dual": BOTH,
    "cispo": BOTH,
    "sapo": BOTH,
    "cap": BOTH,
    ("dppo", True): BOTH,
    ("dppo", False): BOTH,
    ("gmpo", True): BOTH,
    ("gmpo", False): BOTH,
    "token": {"in", "low", "high"},
    "sequence": {"in", "low", "high"},
    "geometric": {"in", "low", "high"},
    "k3": {"in", "high"},
    "opsm": {(up, left) for up in BOTH for left in BOTH},
}


@EACH
def test_loss_metrics_and_gradient_equal_the_formula_token_by_token(option):
    formula = Formula(option)
    for seed in range(3):
        case = random_case(seed)
        completions = completions_of(case, formula.o.proximal == "engine")
        gradient_BC, entropy_gradient_BC = np.zeros((2, B, C))
        for tokens in completions:
            for token, slope in zip(tokens, formula.gradient(tokens), strict=True):
                gradient_BC[token.b, token.c] = slope
                entropy = -token.share * formula.o.entropy_coefficient
                entropy_gradient_BC[token.b, token.c] = entropy
        (loss, metrics), gradients = run_of(option)(*case)
        expected = math.fsum(formula.loss(ts, [t.new for t in ts]) for ts in completions)
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradients[0], gradient_BC, rtol=1e-4, atol=2e-7)
        np.testing.assert_allclose(gradients[1], entropy_gradient_BC, rtol=1e-5)
        measured = formula.metrics(completions)
        assert metrics.keys() == measured.keys()
        for name, value in measured.items():
            np.testing.assert_allclose(
                metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=f"{name}, {seed}"
            )
    assert formula.seen == {name: BRANCHES[name] for name in formula.seen}
    (loss, _), gradients = run_of(option)(*random_case(0))
    (usual, _), usual_gradients = run_of("default")(*random_case(0))
    changed = [
        loss != usual,
        *(np.any(a != b) for a, b in zip(gradients, usual_gradients, strict=True)),
    ]
    assert any(changed) == (option != "default")


def test_every_loss_has_a_case_and_a_name():
    assert {AlgorithmSection(**o).loss for o in OPTIONS.values()} == set(choices.LOSSES)
    assert tuple(OWN) == choices.LOSSES


# --- what must hold of all of them ---


def on_policy(case: Case) -> Case:
    """pi = pi_old = mu = reference, and one advantage and one share for all of a completion."""
    logprobs_BC, entropy_BC = case.scores
    which_BC = case.batch.completion_BC + 9 * np.arange(B)[:, None]
    batch = case.batch._replace(
        behavior_logprobs_BC=logprobs_BC,
        advantages_BC=np.float32(np.sin(which_BC)),
        share_BC=np.float32(case.batch.loss_mask_BC / (1 + which_BC)),
    )
    return Case((logprobs_BC, entropy_BC), batch, Anchors(logprobs_BC, logprobs_BC))


@EACH
def test_on_policy_the_gradient_is_reinforce(option):
    case = on_policy(random_case(0))
    _, (gradient_BC, _) = run_of(option)(*case)
    expected_BC = -case.batch.advantages_BC * case.batch.share_BC
    if option == "k1":  # the one whose gradient has an expectation of 0, not a value
        expected_BC += KL["kl_coefficient"] * case.batch.share_BC
    np.testing.assert_allclose(gradient_BC, expected_BC, rtol=1e-5, atol=1e-8)


def test_without_proximal_log_probs_the_policy_itself_is_held():
    case = random_case(1)
    itself = case._replace(anchors=Anchors(case.scores[0]))
    for found, expected in zip(
        jax.tree.leaves(run_of("default")(case.scores, case.batch, Anchors())),
        jax.tree.leaves(run_of("default")(*itself)),
        strict=True,
    ):
        np.testing.assert_array_equal(found, expected)


@EACH
def test_untrained_positions_cannot_reach_loss_metrics_or_gradient(option):
    case = random_case(2)
    untrained_BC = case.batch.loss_mask_BC == 0
    clean = run_of(option)(*case)
    assert not np.any(clean[1][0][untrained_BC]) and not np.any(clean[1][1][untrained_BC])
    for garbage in np.float32([200.0, -math.inf, math.nan]):  # exp(200) is an infinity

        def spoil(x_BC, garbage=garbage):
            return np.where(untrained_BC, garbage, x_BC)

        numbers = ("behavior_logprobs_BC", "advantages_BC", "share_BC")
        batch = case.batch._replace(**{key: spoil(getattr(case.batch, key)) for key in numbers})
        spoilt = run_of(option)(
            jax.tree.map(spoil, case.scores), batch, jax.tree.map(spoil, case.anchors)
        )
        jax.tree.map(np.testing.assert_array_equal, spoilt, clean)


@EACH
def test_huge_ratios_and_advantages_and_empty_batches_stay_finite(option):
    case = random_case(0)
    near_BC = case.batch.behavior_logprobs_BC
    far_BC, signs_BC = near_BC - 80.0, np.sign(case.batch.advantages_BC)
    nothing = case.batch._replace(loss_mask_BC=np.zeros((B, C), np.float32))
    for new_BC, old_BC, mu_BC, reference_BC, size in (
        (near_BC, far_BC, far_BC, far_BC, 1e6),
        (near_BC, near_BC, far_BC, near_BC, 1e6),
        (far_BC, near_BC, near_BC, near_BC, 1e6),
        (near_BC, near_BC, near_BC, near_BC, 0.0),
    ):
        for batch in (case.batch, nothing):
            batch = batch._replace(
                behavior_logprobs_BC=mu_BC, advantages_BC=np.float32(size * signs_BC)
            )
            found = run_of(option)((new_BC, case.scores[1]), batch, Anchors(old_BC, reference_BC))
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found)), found
            if batch.loss_mask_BC is nothing.loss_mask_BC:
                assert not any(np.any(leaf) for leaf in jax.tree.leaves((found[0][0], found[1])))


@EACH
def test_parts_of_a_batch_add_up_to_the_whole(option):
    case = random_case(1)
    (whole, _), gradients = run_of(option)(*case)
    rows_BC = np.arange(B)[:, None] % 2 * np.ones((1, C), np.float32)
    total, sums = 0.0, [0.0, 0.0]
    for part_BC in (rows_BC, 1 - rows_BC):
        batch = case.batch._replace(loss_mask_BC=case.batch.loss_mask_BC * part_BC)
        (loss, _), parts = run_of(option)(case.scores, batch, case.anchors)
        total, sums = total + loss, [a + b for a, b in zip(sums, parts, strict=True)]
    np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-6)
    for found, expected in zip(sums, gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("option", ["gspo", "kl_corrected", "engine_weighted"])
def test_sharding_the_batch_changes_nothing(option):
    case = random_case(0)
    rows = NamedSharding(jax.make_mesh((8,), ("rows",)), P("rows"))
    put = jax.tree.map(lambda x: jax.device_put(x, rows), case)
    expected = run_of(option)(*case)
    sharded = run_of(option)(*put)
    assert len(sharded[1][0].sharding.device_set) == 8
    assert_same(sharded, expected)


def assert_same(found, expected):
    jax.tree.map(
        lambda f, e: np.testing.assert_allclose(f, e, rtol=1e-5, atol=1e-6), found, expected
    )


class Places(NamedTuple):
    """Where the tokens of a batch go: the same completions, somewhere else."""

    rows_B: list[int]
    orders: list[list[int]]  # of the completions of each row
    starts: list[int]  # slots of padding before them
    ids: list[int]  # that completions have instead of 1, 2, ...


@st.composite
def places(draw) -> Places:
    return Places(
        draw(st.permutations(range(B))),
        [draw(st.permutations(range(1, len(lengths) + 1))) for lengths in ROWS],
        [draw(st.integers(0, C - sum(lengths))) for lengths in ROWS],
        draw(st.permutations(range(1, C + 1))),
    )


def moved(case: Case, to: Places) -> tuple[Case, tuple[np.ndarray, np.ndarray]]:
    """The case, and of each of its slots the one that it came from, as an index [B, C]."""
    from_BC = np.empty((B, C), int)
    for b, source in enumerate(to.rows_B):
        ids_C = case.batch.completion_BC[source]
        kept = [np.flatnonzero(ids_C == i) for i in to.orders[source]]
        padding = np.flatnonzero(ids_C == 0)
        start = to.starts[source]
        from_BC[b] = np.concatenate([padding[:start], *kept, padding[start:]])
    index = np.array(to.rows_B)[:, None], from_BC
    there = jax.tree.map(lambda x: x[index] if x.shape == (B, C) else x, case)
    renamed_BC = np.array([0, *to.ids], np.int32)[there.batch.completion_BC]
    return there._replace(batch=there.batch._replace(completion_BC=renamed_BC)), index


@EACH
@settings(max_examples=10, deadline=None, derandomize=True)
@given(to=places())
def test_where_a_completion_stands_changes_nothing(option, to):
    case = random_case(1)
    there, index = moved(case, to)
    expected, gradients = run_of(option)(*case)
    found, moved_gradients = run_of(option)(*there)
    assert_same(found, expected)
    for gradient, original in zip(moved_gradients, gradients, strict=True):
        np.testing.assert_allclose(gradient, original[index], rtol=1e-5, atol=1e-7)


# --- shares ---

TOKENS_PG = np.array([[3, 5, 0], [0, 0, 0], [2, 7, 4]])


@pytest.mark.parametrize(
    ("aggregation", "total_of"),
    [
        ("token_mean", lambda x: sum(sum(map(sum, row)) for row in x) / 21),
        (
            "sequence_mean_token_mean",
            lambda x: sum(sum(sum(c) / max(len(c), 1) for c in row) for row in x) / 5,
        ),
        ("sequence_mean_token_sum", lambda x: sum(sum(map(sum, row)) for row in x) / 5),
        ("sequence_mean_token_sum_norm", lambda x: sum(sum(map(sum, row)) for row in x) / 5 / 10),
        (
            "prompt_mean",
            lambda x: sum(sum(map(sum, row)) / max(sum(map(len, row)), 1) for row in x) / 2,
        ),
    ],
)
def test_shares_are_the_denominators_of_the_name(aggregation, total_of):
    rng = np.random.default_rng(0)
    terms = [[rng.normal(size=n).tolist() for n in row] for row in TOKENS_PG]
    shares_PG = make_shares(aggregation, 10)(TOKENS_PG)
    found = sum(
        share * sum(completion)
        for row, shares in zip(terms, shares_PG, strict=True)
        for completion, share in zip(row, shares, strict=True)
    )
    assert found == pytest.approx(total_of(terms))
    assert np.all(np.isfinite(make_shares(aggregation, 10)(TOKENS_PG * 0)))


@pytest.mark.parametrize(
    ("loss", "aggregation"),
    [("gspo", "sequence_mean_token_mean"), ("gmpo", "prompt_mean")],
)
def test_how_completions_are_packed_changes_nothing(loss, aggregation):
    """Every token has an id of its own, by which its numbers find it in any layout."""
    rng = np.random.default_rng(3)
    ids = iter(range(1, 1000))
    numbers = rng.normal(-2.0, 0.4, (3, 1000)).astype(np.float32)  # of pi, pi_old, mu

    def group(p):
        rollouts = []
        for i in range(4):
            tokens = np.array([next(ids) for _ in range(rng.integers(1, 9))], np.int32)
            logprobs = np.where(rng.random(len(tokens)) < 0.2, np.nan, numbers[2][tokens])
            rollouts.append(Rollout(tokens, logprobs, tokens, "stop", i))
        return Group(Prompt(p, "", (1, 2, 3), {}), tuple(rollouts))

    groups = [group(p) for p in range(5)]
    advantages_PG, weights_PG = rng.normal(size=(5, 4)), (rng.random((5, 4)) < 0.7) * 1.0
    section = AlgorithmSection(loss=loss, clip_low=0.1, clip_high=0.1, aggregation=aggregation)
    objective, shares = jax.jit(make_objective(section)), make_shares(aggregation, 1)

    def total(order_P, order_G, c):
        shuffled = [
            Group(groups[p].prompt, tuple(groups[p].rollouts[g] for g in order_G)) for p in order_P
        ]
        index = np.ix_(order_P, order_G)
        batch = pack(shuffled, advantages_PG[index], weights_PG[index], c, shares=shares)
        new_BC, old_BC = (x[batch.targets_BC] for x in numbers[:2])
        return float(objective((new_BC, new_BC), batch, Anchors(old_BC))[0])

    expected = total(range(5), range(4), UpdateSection(share_prompts=False, row_tokens=16))
    for order_P, order_G, c in (
        (range(5), range(4), UpdateSection()),
        ([3, 1, 4, 0, 2], [2, 0, 3, 1], UpdateSection(row_tokens=32)),
        ([4, 3, 2, 1, 0], [3, 2, 1, 0], UpdateSection(share_prompts=False, row_tokens=128)),
    ):
        assert total(order_P, order_G, c) == pytest.approx(expected, rel=1e-5)


# --- functions of the user's own ---


def twice_reinforce(tokens, algorithm):
    return -2.0 * tokens.advantages_BC * jnp.exp(tokens.log_ratio_BC)


def scalar(tokens, algorithm):
    return jnp.zeros(())


def of_one(tokens):
    return tokens.advantages_BC


def test_a_loss_of_the_user_s_own_is_weighted_and_shared_like_any_other():
    case = on_policy(random_case(0))
    objective = make_objective(AlgorithmSection(loss=f"{__name__}:twice_reinforce"))
    gradient_BC, _ = jax.grad(lambda *x: objective(*x)[0])(*case)
    expected_BC = -2.0 * case.batch.advantages_BC * case.batch.share_BC
    np.testing.assert_allclose(gradient_BC, expected_BC, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.at_all:f", r"nowhere\.at_all cannot be imported .*No module named"),
        (f"{__name__}:nothing", "has no function nothing"),
        (
            f"{__name__}:of_one",
            r"called as of_one\(tokens, algorithm\), and takes of_one\(tokens\)",
        ),
        (f"{__name__}:scalar", r"returned shape \(\) where one term for each token, \(8, 14\)"),
    ],
)
def test_what_cannot_be_used_as_a_loss_is_told(name, words):
    with pytest.raises(UserError, match=f"algorithm.loss = {name}: .*{words}"):
        make_objective(AlgorithmSection(loss=name))(*random_case(0))
