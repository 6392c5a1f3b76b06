"""Distillation: the reverse KL to a teacher of any family, on the student's samples; no reward."""

import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxrl.advantages import estimate_advantages
from jaxrl.config import AlgorithmSection, Config, MeshSection, UpdateSection
from jaxrl.learner import build_learner, open_model
from jaxrl.mesh import make_mesh
from jaxrl.models.config import load_config
from jaxrl.objectives.objective import make_objective
from jaxrl.objectives.tokens import Anchors
from jaxrl.packing import pack
from jaxrl.types import Group, Prompt, Rollout, UserError
from jaxrl.update import make_gradient
from tests.reference_policy import FAMILY_VOCAB, family_model, make_reference, save_reference

TINY = Path(__file__).parent.parent / "configs" / "tiny_policy"
DISTILL = {"preset": "distill", "reference": "teacher"}
V, END, START = 4, 0, 1


class Bigram:
    """Its parameters are the logits of each token behind each."""

    config, mesh, compute_dtype = SimpleNamespace(vocab_size=V), None, jnp.float32

    def hidden(self, params, tokens_BT, positions_BT, seen):
        return jax.nn.one_hot(tokens_BT, V), None

    def unembed(self, params, hidden):
        return hidden @ params["table"]


def log_softmax(table):
    return table - np.log(np.exp(table).sum(axis=-1, keepdims=True))


def test_the_expected_gradient_is_that_of_the_reverse_kl_at_what_the_student_sampled():
    """Over all completions of at most two tokens, against differences of the KL itself."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, V, V))
    logs, expected_logs = log_softmax(student), log_softmax(teacher)

    def reverse_kl(table):
        """At both tokens, of prefixes that are sampled as often as they were."""
        each_V = (np.exp(log_softmax(table)) * (log_softmax(table) - expected_logs)).sum(axis=-1)
        second = sum(np.exp(logs[START, a]) * each_V[a] for a in range(V) if a != END)
        return each_V[START] + second

    gradient = np.zeros((V, V))
    for place in itertools.product(range(V), repeat=2):
        step = np.zeros((V, V))
        step[place] = 1e-6
        gradient[place] = (reverse_kl(student + step) - reverse_kl(student - step)) / 2e-6

    every = [(END,), *itertools.product(range(1, V), range(V))]
    rollouts, teacher_logs, odds = [], [], []
    for tokens in every:
        pairs = list(zip((START, *tokens), tokens, strict=False))
        own = np.array([logs[pair] for pair in pairs], np.float32)
        ids, versions = np.array(tokens, np.int32), np.zeros(len(tokens), np.int64)
        rollouts.append(Rollout(ids, own, versions, "stop", 0))
        teacher_logs.append([expected_logs[pair] for pair in pairs])
        odds.append(np.exp(own.sum()))
    np.testing.assert_allclose(sum(odds), 1.0, rtol=1e-6)

    section = AlgorithmSection(**DISTILL)
    unknown_PG = np.full((1, len(every)), np.nan, np.float32)
    advantages = estimate_advantages(unknown_PG, np.ones(unknown_PG.shape, int), section)
    groups = [Group(Prompt(0, "", (START,), {}), tuple(rollouts))]
    batch = pack(groups, *advantages, UpdateSection(), shares=lambda _: np.array([odds]))
    reference_BC = np.zeros(batch.targets_BC.shape, np.float32)
    for b, c in np.argwhere(batch.loss_mask_BC > 0):
        before = batch.tokens_BT[b, batch.predictor_BC[b, c]]
        reference_BC[b, c] = expected_logs[before, batch.targets_BC[b, c]]
    of_batch = make_gradient(
        Bigram(), make_objective(section), UpdateSection(), 1.0, make_mesh(MeshSection())
    )
    params = {"table": jnp.asarray(student, jnp.float32)}
    found, _ = of_batch(params, {}, batch, Anchors(reference_BC=reference_BC))
    np.testing.assert_allclose(found["table"], gradient, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).max() > 0.1


def make_config(model: Path, teacher: Path, **sections) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "x", "steps": 20},
            "model": {"path": str(model), "compute_dtype": "float32"},
            "data": {"source": "reasoning_gym", "task": "x", "max_prompt_tokens": 16},
            "rollout": {"engine": "inprocess", "max_new_tokens": 16, "temperature": 1.3},
            "algorithm": {"preset": "distill", "reference": str(teacher)},
        }
        | sections
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_the_teacher_scores_what_the_student_sampled_whatever_either_is(rank, tmp_path):
    student, teacher = make_reference(vocab_size=FAMILY_VOCAB).bfloat16(), family_model("gemma2")
    folder = save_reference(student, tmp_path / "student")
    c = make_config(folder, save_reference(teacher, tmp_path / "teacher"), lora={"rank": rank})
    learner = build_learner(c, folder, load_config(folder))

    rng = np.random.default_rng(0)
    groups, x = [], []
    for p in range(3):
        prompt = tuple(rng.integers(3, FAMILY_VOCAB, 5).tolist())
        rollouts = []
        for length in (1, 4, 9):
            ids = rng.integers(3, FAMILY_VOCAB, length).astype(np.int32)
            own, other = (logprobs_of(model.float(), prompt, ids) for model in (student, teacher))
            rollouts.append(Rollout(ids, own, np.zeros(length, np.int64), "length", 0))
            x += (own - other).tolist()
        groups.append(Group(Prompt(p, "", prompt, {}), tuple(rollouts)))
    ones = np.ones((3, 3), np.float32)
    batch = pack(groups, 0 * ones, ones, c.update)
    _, metrics = learner.update(learner.state, [batch])
    expected = np.square(x).mean() / 2
    assert expected > 0.5 and metrics["clip_fraction"] == 0
    np.testing.assert_allclose(metrics["kl/reference"], expected, rtol=1e-3)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-3)


def logprobs_of(model, prompt, tokens) -> np.ndarray:
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *tokens.tolist()]])).logits[0] / 1.3
    logs_TV = torch.log_softmax(logits_TV[len(prompt) - 1 : -1], -1)
    return logs_TV[range(len(tokens)), tokens.tolist()].numpy()


def swapped(raw: dict) -> None:
    vocab = raw["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]


UNFIT = {
    "other tokenizer": ("tokenizer.json", swapped, "its tokenizer is not that of "),
    "fewer tokens": ("config.json", lambda c: c.update(vocab_size=313), "of 313 tokens, and "),
    "fewer positions": (
        "config.json",
        lambda c: c.update(max_position_embeddings=31),
        "has 31 positions, but ",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_teacher_that_cannot_score_every_sample_is_refused(case, tmp_path):
    file, change, words = UNFIT[case]
    for name in ("student", "teacher"):
        shutil.copytree(TINY, tmp_path / name)
        raw = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(raw | {"vocab_size": 320}))
    c = make_config(tmp_path / "student", tmp_path / "teacher")
    open_model(c)
    path = tmp_path / "teacher" / file
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"^algorithm.reference = .*/teacher: .*{words}"):
        open_model(c)
