"""Every knob: its default, its unit, its meaning, and the rules that tie knobs together.

A configuration is one YAML file plus overrides (`settings.py` reads them); here is what may stand
in it. Models are frozen and strict, and a key that is not listed is an error.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from jaxrl.objectives.choices import ADVANTAGES, LOSSES, PRESETS, resolved
from jaxrl.types import MOST_BEAMS


def knob(default: Any, meaning: str, *, unit: str = "", **bounds: Any) -> Any:
    """A field with its meaning and unit, which `--help` prints. `...` as default: required."""
    return Field(default, description=meaning, json_schema_extra={"unit": unit}, **bounds)


OWN_FUNCTION = r"^\w+(\.\w+)*:\w+$"  # MODULE:FUNCTION

EngineDtype = Literal["auto", "float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class RunSection(Section):
    name: str = knob(..., "name of the run; its outputs go to DIR/NAME", pattern=r"^\w[\w.-]*$")
    dir: str = knob("runs", "directory that holds all runs")
    steps: int = knob(
        ...,
        "batches in the whole run, resumed parts included; algorithm.minibatches and "
        "updates_per_batch say how many optimizer steps each is",
        ge=1,
    )
    seed: int = knob(0, "seed of sampling and data order", ge=0, lt=2**31)


class ModelSection(Section):
    path: str = knob(
        ..., "Hugging Face model: a local directory, or a hub id where it is reachable"
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto",
        "dtype of the trainer's matrix products; master weights and logits are float32 always. "
        "auto: bfloat16 on TPU and GPU, float32 on CPU",
    )
    remat: Literal["auto", "full", "attention", "dots", "none"] = knob(
        "auto",
        "what the backward pass computes again instead of keeping it, least memory first. full: "
        "all but a layer's input; attention: all but that and the output of its heads; dots: all "
        "but that and the products with its weights, experts' excepted; none: nothing but norms "
        "and activations. auto: none on CPU, full elsewhere",
    )
    ignore_config_fields: list[str] = knob(
        [],
        "fields of the model's config.json that are not known here and that you know to change "
        "nothing in what it computes; any other unknown field is refused",
    )

    attention: Literal["auto", "xla", "splash", "cudnn"] = knob(
        "auto",
        "what computes attention in the update: splash on TPU, cudnn on NVIDIA GPUs, xla anywhere. "
        "auto: the one meant for the device, or xla where that one lacks what the model needs",
    )


class LoraSection(Section):
    rank: int = knob(0, "rank of the adapters; 0: no adapters, all weights are trained", ge=0)
    alpha: float = knob(32.0, "adapters are scaled by alpha / rank", gt=0.0)
    targets: list[str] = knob(
        ["all-linear"],
        "linear layers that get an adapter, by their Hugging Face names (q_proj, down_proj, ...); "
        "all-linear: every one but the router, the experts, the embedding and the head",
        min_length=1,
    )


class DataSection(Section):
    source: Literal["reasoning_gym", "jsonl"] = knob(
        ...,
        "reasoning_gym: endless tasks of that library; jsonl: a file with one object a line, "
        '{"prompt": text, "answer": text}',
    )
    task: str | None = knob(None, "name of the reasoning_gym dataset")
    task_args: dict[str, int | float | str | bool | list[str]] = knob(
        {}, "arguments of the reasoning_gym dataset"
    )
    path: str | None = knob(None, "the jsonl file with training prompts")
    held_out_path: str | None = knob(
        None, "a jsonl file with held-out prompts; default: the first prompts of data.path"
    )
    held_out: int = knob(
        200, "prompts kept for evaluation and never trained on", unit="prompts", ge=0
    )
    prompt_template: str = knob(
        "{prompt}", "text given to the policy; {prompt} stands for the question"
    )
    max_prompt_tokens: int = knob(
        1024, "longer prompts are skipped, and counted", unit="tokens", ge=1
    )
    answer_keys: ClassVar[tuple[str, ...]] = ("answer",)  # in a jsonl file, the first that is there


class RolloutDataSection(DataSection):
    easy: float | None = knob(
        None,
        "rows of the jsonl file whose completions had at least this mean reward, when they were "
        "last sampled, are not asked for again, 0.9; default: they are",
    )
    hard: float | None = knob(
        None,
        "rows with at most this mean reward are passed over for data.revisit epochs, 0.0; default: "
        "they are not",
    )
    revisit: int = knob(
        1, "passes through the file without a row that data.hard is about", unit="epochs", ge=1
    )


class SftDataSection(DataSection):
    source: Literal["reasoning_gym", "jsonl"] = knob(
        ...,
        "reasoning_gym: endless tasks of that library, with their answers; jsonl: a file with one "
        'object a line, {"prompt": text, "completion": text}, or as for GRPO with "answer"',
    )
    completion_template: str = knob(
        "{completion}",
        "text the policy learns to give; {completion} stands for the row's. The model's first "
        "end-of-sequence token follows, unless the text ends with one",
    )
    max_completion_tokens: int = knob(
        1024,
        "rows with longer completions, their end included, are skipped, and counted",
        unit="tokens",
        ge=1,
    )
    answer_keys: ClassVar[tuple[str, ...]] = ("completion", "answer")


class FurtherReward(Section):
    """One of `reward.also`."""

    weight: float = 1.0
    matches: str | None = None  # a regular expression
    function: Annotated[str, Field(pattern=OWN_FUNCTION)] | None = None


RewardName = Annotated[str, Field(pattern=r"^\w[\w-]*$")]


class RewardSection(Section):
    kind: Literal["task", "exact"] = knob(
        "task",
        "the main reward, which evaluation looks at alone. task: the scorer of the reasoning_gym "
        "dataset; exact: 1 if the answer is the reference",
    )
    weight: float = knob(1.0, "of the main reward in the sum of all")
    answer_pattern: str | None = knob(
        None,
        "regular expression whose last match in a completion is its answer (group 1 if it has "
        "one); default: the whole completion, stripped",
    )
    also: dict[RewardName, FurtherReward] = knob(
        {},
        "further rewards, {NAME: {weight: 1.0, matches: REGEX}}, 1 where the regular expression is "
        "found in the completion and else 0, or {NAME: {weight: 1.0, function: MODULE:FUNCTION}}, "
        "called with the prompt, the completion and the task",
    )
    overlong_tokens: int | None = knob(
        None,
        "before rollout.max_new_tokens, over which a penalty grows; default: none does",
        unit="tokens",
        ge=1,
    )
    overlong_penalty: float = knob(
        1.0, "taken from the reward of a completion of rollout.max_new_tokens", ge=0.0
    )


class RolloutSection(Section):
    engine: Literal["vllm", "inprocess"] = knob(
        "vllm", "vllm: Ray actors; inprocess: a jitted sampler in the trainer, without vLLM or Ray"
    )
    prompts_per_step: int = knob(32, "prompts in one step", unit="prompts", ge=1)
    group_size: int = knob(8, "completions of each prompt", unit="completions", ge=2)
    max_new_tokens: int = knob(512, "length limit of a completion", unit="tokens", ge=1)
    temperature: float = knob(1.0, "sampling temperature of training rollouts", gt=0.0)
    top_p: float = knob(1.0, "nucleus sampling; only 1.0 (off) for now", gt=0.0, le=1.0)
    top_k: int = knob(0, "top-k sampling; only 0 (off) for now", ge=0)
    min_p: float = knob(0.0, "min-p sampling; only 0.0 (off) for now", ge=0.0, le=1.0)
    mode: Literal["synchronous", "overlap", "continuous"] = knob(
        "synchronous",
        "synchronous: a step is sampled, trained and published, one after the other; overlap: the "
        "next step is sampled while one is trained; continuous: sampling never stops, and new "
        "weights enter the engines under way",
    )
    max_lag: int | None = knob(
        None,
        "versions between the weights that are trained and those that sampled a completion's "
        "oldest token; nothing older is trained on. default: by mode, 0, 1 and 1",
        unit="versions",
        ge=0,
    )
    too_old: Literal["wait", "drop", "resample"] = knob(
        "wait",
        "what is done about completions that would be older than max_lag; wait: a step waits for "
        "them, so that there are none; drop: they are cancelled; resample: they are cancelled and "
        "sampled again, by newer weights",
    )
    resample_equal: bool = knob(
        False,
        "groups whose rewards are all equal are dropped when they arrive, and others are asked for "
        "in their place (DAPO's dynamic sampling)",
    )
    max_resample: int = knob(
        10,
        "batches of such groups that are dropped for one step; then it is trained with what comes",
        unit="batches",
        ge=1,
    )
    straggler_s: float | None = knob(
        None,
        "that a group waits for its other completions once half of them are there; then it goes "
        "without. default: it waits for all",
        unit="seconds",
        gt=0.0,
    )
    timeout_s: float = knob(
        600.0,
        "deadline for an engine to sample a group it was given: one that is late is replaced, and "
        "others sample it. Twice as long without any finished group ends the run",
        unit="seconds",
        gt=0.0,
    )


class EngineRange(Section):
    min: int = Field(ge=1)
    max: int = Field(ge=1)


class VllmSection(Section):
    engines: Annotated[int, Field(ge=0)] | EngineRange = knob(
        1,
        "vLLM engines, each one Ray actor: a run starts with all, and goes on with what is left. "
        "{min: A, max: B}: it starts with A, the others join when the cluster has room, and fewer "
        "than A for start_timeout_s end it",
        unit="engines",
    )
    servers: list[Annotated[str, Field(pattern=r"^https?://[^/\s]+/?$")]] = knob(
        [],
        "URLs, http://HOST:PORT, of vLLM or SGLang servers that run already (docs/engines.md): "
        "engines beside those of vllm.engines, which may be 0 then",
    )
    dtype: EngineDtype | Annotated[list[EngineDtype], Field(min_length=1)] = knob(
        "auto",
        "dtype the engines run in; auto: bfloat16 on GPU, float32 on CPU. Of a list the engines "
        "take one item each, and start again from the first",
    )
    tensor_parallel: int = knob(1, "devices one engine is split over", unit="devices", ge=1)
    max_num_seqs: int = knob(256, "completions decoded at the same time", unit="completions", ge=1)
    kv_cache_mib: int | None = knob(
        None,
        "KV cache of one engine; default: vLLM's own choice on GPU, 512 on CPU, where vLLM would "
        "ask for nearly all memory",
        unit="MiB",
        ge=1,
    )
    gpu_memory_utilization: float = knob(
        0.9, "share of a GPU's memory that an engine takes", gt=0.0, le=1.0
    )
    enforce_eager: bool = knob(False, "no compilation in the engine: starts faster, runs slower")
    cpus_per_engine: float = knob(1.0, "CPU cores Ray reserves", unit="cores", gt=0.0)
    gpus_per_engine: float = knob(
        1.0, "GPUs Ray reserves; 0: vLLM's CPU build", unit="GPUs", ge=0.0
    )
    ray_address: str | None = knob(
        None, "Ray cluster to join, for example auto or ray-head:6379; default: a local one"
    )
    object_store_mib: int = knob(
        1024, "shared memory of the Ray cluster started here", unit="MiB", ge=80
    )
    start_timeout_s: float = knob(
        600.0, "deadline for an engine to be ready", unit="seconds", gt=0.0
    )
    max_restarts: int = knob(
        3,
        "engines started in the place of one that is lost, one after the other; a new one joins as "
        "soon as it has proved that it holds the newest version",
        unit="engines",
        ge=0,
    )
    silence_s: float = knob(
        60.0,
        "an engine that answers nothing, or has work and gets nowhere with it, for so long is "
        "ended and replaced",
        unit="seconds",
        gt=0.0,
    )

    @property
    def min_engines(self) -> int:
        """Servers included."""
        own = self.engines if isinstance(self.engines, int) else self.engines.min
        return own + len(self.servers)

    @property
    def keep_engines(self) -> int:
        """That a run cannot long be without: of a plain number of engines, one."""
        return 1 if isinstance(self.engines, int) else self.min_engines

    @property
    def max_engines(self) -> int:
        """Servers included."""
        own = self.engines if isinstance(self.engines, int) else self.engines.max
        return own + len(self.servers)

    @property
    def how_many(self) -> str:
        several = "" if self.min_engines == self.max_engines else f" to {self.max_engines}"
        servers = f", {len(self.servers)} of them servers," if self.servers else ""
        return f"{self.min_engines}{several} vLLM engine(s){servers}"


def _known(names: Collection[str], or_own: bool = True) -> AfterValidator:
    listed = ", ".join(names) + (" or MODULE:FUNCTION of your own" if or_own else "")

    def check(name: str) -> str:
        own = or_own and re.fullmatch(OWN_FUNCTION, name)
        if name not in names and not own:
            raise PydanticCustomError("name", "{listed}", {"listed": listed})
        return name

    return AfterValidator(check)


Bounds = Annotated[list[float], Field(min_length=2, max_length=2)]
Lengths = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class AlgorithmSection(Section):
    """docs/algorithms.md has the formulas."""

    preset: Annotated[str, _known(PRESETS, or_own=False)] | None = knob(
        None,
        f"a paper's choices for the keys below: {', '.join(PRESETS)}. What is set "
        "beside it wins, and --dry-run shows what comes out. default: the defaults of each key",
    )
    advantage: Annotated[str, _known(ADVANTAGES)] = knob(
        "grpo",
        f"how rewards become advantages: {', '.join(ADVANTAGES)}, or MODULE:FUNCTION, called with "
        "rewards and trained tokens [prompts, completions]",
    )
    mask_equal_rewards: bool = knob(
        True,
        "groups whose rewards are all equal leave the loss, its denominators and the statistics of "
        "a batch; reinforce_pp has false as default",
    )
    mask_truncated: bool = knob(
        False,
        "completions that ended at rollout.max_new_tokens leave the loss and its denominators, but "
        "not the statistics that others are compared with",
    )
    length_bounds: Lengths | None = knob(
        None,
        "fewest and most tokens of a completion; another is as one of unknown reward",
        unit="tokens",
    )
    loss: Annotated[str, _known(LOSSES)] = knob(
        "ppo_clip",
        f"what a token contributes: {', '.join(LOSSES)}, or MODULE:FUNCTION, called with "
        "jaxrl.objectives.tokens.Tokens and this section",
    )
    clip_low: float = knob(
        0.2,
        "how far down the policy may move, in the terms of the loss: the ratio to 1 - clip_low "
        "(ppo_clip), the completion's (gspo: 3e-4), the log-ratio to -clip_low (gmpo: 0.4), the "
        "probability by clip_low (dppo: 0.2). Others do not look at it",
        ge=0.0,
        le=1.0,
    )
    clip_high: float = knob(0.28, "how far up, likewise (gspo: 4e-4, gmpo: 0.4, dppo: 0.2)", ge=0.0)
    dual_clip: float | None = knob(
        None,
        "ppo_clip and gspo: tokens of negative advantage stop at this ratio, too; default: never",
        gt=1.0,
    )
    cispo_max: float = knob(5.0, "cispo: ceiling of the ratio itself, not of ratio - 1", gt=0.0)
    sapo_tau_positive: float = knob(1.0, "sapo: steepness where the advantage is positive", gt=0.0)
    sapo_tau_negative: float = knob(1.05, "sapo: steepness where it is not", gt=0.0)
    aggregation: Literal[
        "token_mean",
        "sequence_mean_token_mean",
        "sequence_mean_token_sum",
        "sequence_mean_token_sum_norm",
        "prompt_mean",
    ] = knob(
        "token_mean",
        "denominators, over the whole batch: all tokens alike, all completions alike (mean, sum, "
        "or sum / aggregation_constant of their tokens), or all prompts alike",
    )
    aggregation_constant: int | None = knob(
        None,
        "of sequence_mean_token_sum_norm; default: rollout.max_new_tokens",
        unit="tokens",
        ge=1,
    )
    entropy_coefficient: float = knob(0.0, "entropy is rewarded by this much", ge=0.0)
    kl_coefficient: float = knob(
        0.0,
        "distance from a reference policy is penalised by this much; beyond 0 the trainer holds "
        "that policy, of which adapters need no copy",
        ge=0.0,
    )
    reference: str | None = knob(
        None,
        "the reference policy, or teacher: a Hugging Face model of the same tokenizer, and of any "
        "family and size. default: the policy that the run began with",
    )
    reference_every: int | None = knob(
        None,
        "the reference becomes the present policy every so many steps; default: never",
        unit="steps",
        ge=1,
    )
    kl_estimator: Literal["k1", "k2", "k3", "k3+"] = knob(
        "k3", "of the distance; k3+: the value of k3 with the gradient of k2"
    )
    kl_corrected: bool = knob(
        False, "weight the distance by policy / engine, as far as the policy's term is"
    )
    proximal: Literal["trainer", "engine"] = knob(
        "trainer",
        "what ratios are measured from. trainer: its policy when the batch arrives, and what "
        "differs from the engine is left to the correction; engine: what the engine sampled with, "
        "and correction has none as default",
    )
    correction: Literal["none", "token_tis", "sequence_tis"] = knob(
        "token_tis",
        "importance weight between engine and trainer, truncated: of each token, or the product "
        "over its completion",
    )
    correction_cap: float = knob(2.0, "ceiling of the importance weight", gt=0.0)
    token_mask: Bounds | None = knob(
        None, "tokens with trainer / engine outside these bounds give no gradient, [0.5, 2.0]"
    )
    sequence_mask: Bounds | None = knob(
        None, "completions likewise, by the product of their tokens, [0.0, 3.0]"
    )
    geometric_mask: Bounds | None = knob(
        None, "completions likewise, by the geometric mean, [0.99, 1.01]"
    )
    k3_mask: float | None = knob(
        None, "completions likewise, with a mean k3 of more than this, 0.01", unit="nats", gt=0.0
    )
    opsm_threshold: float | None = knob(
        None,
        "completions of negative advantage likewise, that the policy has moved away from by more "
        "than this since the engine sampled them, in the mean over tokens, 0.5",
        unit="nats",
        gt=0.0,
    )
    minibatches: int = knob(
        1,
        "parts of a batch, of whole prompts in their order: one optimizer step each, with "
        "denominators of its own. Advantages are of the whole batch",
        ge=1,
    )
    updates_per_batch: int = knob(
        1, "times that each batch is gone over, all of its minibatches", unit="updates", ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, given: Any) -> Any:
        return resolved(given) if isinstance(given, dict) else given

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps."""
        return self.minibatches * self.updates_per_batch

    @property
    def scores_first(self) -> bool:
        """Whether pi_old must be computed before the first update on a batch."""
        return self.proximal == "trainer" and self.steps_per_batch > 1


class OptimizerSection(Section):
    learning_rate: float = knob(1e-6, "AdamW learning rate after warm-up", gt=0.0, le=1.0)
    warmup_steps: int = knob(10, "optimizer steps of linear warm-up", unit="steps", ge=0)
    beta1: float = knob(0.9, "decay of the first moment", ge=0.0, lt=1.0)
    beta2: float = knob(0.999, "decay of the second moment", ge=0.0, lt=1.0)
    eps: float = knob(1e-8, "AdamW epsilon", gt=0.0)
    weight_decay: float = knob(0.01, "decoupled weight decay", ge=0.0)
    first_moment_dtype: Literal["float32", "bfloat16"] = knob(
        "float32",
        "dtype that Adam's first moment is kept in between updates. The second is float32 always: "
        "a step changes it by 1 - beta2 of itself, which bfloat16 would round away",
    )
    offload: Literal["none", "host"] = knob(
        "none",
        "host: both moments lie in the memory of the hosts, pinned, and visit the devices a slice "
        "at a time in the update; what is learned differs by rounding alone",
    )
    max_grad_norm: float = knob(1.0, "gradients are scaled down to this global norm", gt=0.0)
    max_skipped_updates: int = knob(
        3, "non-finite updates in a row that end the run", unit="updates", ge=1
    )


class UpdateSection(Section):
    share_prompts: bool = knob(
        True, "compute a prompt once for the completions behind it, not once for each of them"
    )
    row_tokens: int = knob(
        4096,
        "longest row that may be chosen; what is chosen has the least to compute. A longer "
        "completion lengthens rows regardless",
        unit="tokens",
        ge=1,
    )
    max_tokens_per_microbatch: int | None = knob(
        None,
        "row slots, over all devices, whose gradient is computed at a time; the result does not "
        "depend on it. default: 2048 a device on CPU, 16384 elsewhere",
        unit="tokens",
        ge=1,
    )
    logits_mib: int = knob(
        160,
        "float32 logits of the update that exist at a time on a device; the rest is computed later",
        unit="MiB",
        ge=1,
    )


class SftUpdateSection(UpdateSection):
    share_prompts: bool = knob(False, "completions do not share prompts here; leave it false")


class MeshSection(Section):
    data: int = knob(1, "batch shards; parameters are copied over this axis", unit="devices", ge=1)
    fsdp: int = knob(
        1, "batch shards; parameters are split over this axis too", unit="devices", ge=1
    )
    expert: int = knob(
        1,
        "batch shards; each has its part of the experts, and of other parameters too",
        unit="devices",
        ge=1,
    )
    tensor: int = knob(1, "shards of heads, MLP width and vocabulary", unit="devices", ge=1)

    @property
    def row_shards(self) -> int:
        """How many parts the rows of a batch are split into."""
        return self.data * self.fsdp * self.expert

    @property
    def devices(self) -> int:
        return self.row_shards * self.tensor


class HostsSection(Section):
    coordinator: str | None = knob(
        None,
        "HOST:PORT of the first process, whose PORT + 1 is jax's; auto: a TPU pod, SLURM, Open MPI "
        "or Kubernetes says it; default: the run has one process",
        pattern=r"^(auto|.+:\d{1,5})$",
    )
    processes: int | None = knob(
        None, "processes of the run, one a host; auto knows", unit="processes", ge=1
    )
    process_id: int | None = knob(
        None, "which of them this one is; 0 leads: it has the run directory and the engines", ge=0
    )
    timeout_s: float = knob(
        300.0, "deadline for all processes to come together", unit="seconds", ge=1.0
    )
    silence_s: float = knob(
        60.0, "a host that answers nothing for so long is given up", unit="seconds", ge=1.0
    )


class PublishSection(Section):
    channel: Literal["object_store", "shuttle"] = knob(
        "object_store", "how weights travel: Ray's shared memory, or a directory all machines see"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto",
        "dtype on the wire and of the export at the end; auto: bfloat16, or float32 where the "
        "engines run float32 or are in the trainer",
    )
    shuttle_dir: str | None = knob(
        None,
        "directory of the shuttle, or its URL in an object storage, s3://BUCKET/RUN or "
        "gs://BUCKET/RUN; default: weights/ in the run",
    )
    encoding: Literal["auto", "full", "delta"] = knob(
        "auto",
        "full: every version whole; delta: what changed since the last, without loss, and a copy "
        "of a version in the trainer's memory and on each node of engines; auto: full until a "
        "version takes more than a second to reach the engines, at less than 2.5 GB/s",
    )
    compare: Literal["auto", "mesh", "host"] = knob(
        "auto",
        "where differences are found; mesh: by the devices, which keep a copy of the last version "
        "in the wire's dtype, split as the parameters are, and send only what changed to the host; "
        "host: there, from all of each version; auto: mesh, or host where the devices are CPUs",
    )
    anchor_every: int = knob(
        16, "deltas after which a version is whole again", unit="versions", ge=1
    )
    bucket_mib: int = knob(
        256,
        "size of one buffer on the wire, at most; a host holds a few; of several hosts each has at "
        "least four",
        unit="MiB",
        ge=1,
    )
    keep_versions: int = knob(2, "published versions kept alive", unit="versions", ge=1)
    timeout_s: float = knob(
        120.0,
        "deadline for an engine to fetch, load and prove a version; two fifths of it for the bytes "
        "to arrive",
        unit="seconds",
        gt=0.0,
    )
    examine_every: int = knob(
        16,
        "versions from one for which every engine compares all that its model holds with what was "
        "sent to the next; the first is one, as is an engine's first; 0: none",
        unit="versions",
        ge=0,
    )
    fallback: Literal["none", "shuttle"] = knob(
        "none",
        "shuttle: an engine that cannot have a version from the object store gets it, whole, "
        "through publish.shuttle_dir",
    )
    probe_tolerance: float | None = knob(
        None,
        "largest difference between engine and trainer log-probs on the probe prompt before an "
        "engine is refused; default: 1e-4 in float32, 0.5 otherwise",
        unit="nats",
        gt=0.0,
    )


class EvalSection(Section):
    every_steps: int = knob(
        10,
        "evaluation on the held-out prompts every so many steps; 0: only first and last",
        unit="steps",
        ge=0,
    )


class RolloutEvalSection(EvalSection):
    temperature: float = knob(0.0, "sampling temperature of evaluation; 0: greedy", ge=0.0)
    top_p: float = knob(1.0, "nucleus sampling in evaluation; 1.0: off", gt=0.0, le=1.0)
    top_k: int = knob(0, "top-k sampling in evaluation; 0: off", ge=0)
    beams: int = knob(
        1,
        "evaluation takes the best completion of a beam search of this width; 1: off",
        unit="beams",
        ge=1,
        le=MOST_BEAMS,
    )
    max_new_tokens: int | None = knob(
        None,
        "length limit of a completion in evaluation; default: rollout.max_new_tokens",
        unit="tokens",
        ge=1,
    )


class CheckpointSection(Section):
    every_steps: int = knob(
        20, "steps between checkpoints; the last step always has one", unit="steps", ge=1
    )
    keep: int = knob(2, "verified checkpoints kept", unit="checkpoints", ge=1)


class AlarmSection(Section):
    """Thresholds whose crossing is said once, on the console; null: never."""

    mismatch_k3: float | None = knob(
        0.01,
        "k3 estimate of KL(engine || trainer), per token, above which one may serve other weights "
        "than the other has",
        unit="nats",
        gt=0.0,
    )
    mismatch_growth: float | None = knob(
        1.5,
        "factor by which that estimate grows in each of three steps in a row; what is below 0.001 "
        "counts as 0.001",
        gt=1.0,
    )
    ess: float | None = knob(
        0.5, "effective sample size of a step's tokens, as a share of them", gt=0.0, le=1.0
    )
    entropy: float | None = knob(
        0.1, "entropy, as a share of the first step's, below which sampling collapses", gt=0.0
    )
    grad_norm: float | None = knob(
        10.0, "gradient norm, as a multiple of its median over the last steps", gt=1.0
    )
    nonfinite_updates: int | None = knob(
        0,
        "updates of a step that were skipped because their loss or gradient was not finite; "
        "optimizer.max_skipped_updates in a row end the run",
        unit="updates",
        ge=0,
    )
    unknown_rewards: float | None = knob(
        0.05, "share of a step's completions whose reward is unknown", ge=0.0, le=1.0
    )
    disk_free_gib: float | None = knob(
        1.0,
        "room on the disk of run.dir, below which checkpoints may soon fail",
        unit="GiB",
        gt=0.0,
    )


class LogSection(Section):
    samples_per_step: int = knob(
        2, "prompts whose completions are written to samples/ each step", unit="prompts", ge=0
    )
    tensorboard: bool = knob(True, "write TensorBoard events")


class SftSection(Section):
    # What `update` asks of an algorithm: one step a batch, and no other policy to look at.
    updates_per_batch: ClassVar[int] = 1
    steps_per_batch: ClassVar[int] = 1
    scores_first: ClassVar[bool] = False
    kl_coefficient: ClassVar[float] = 0.0
    reference: ClassVar[None] = None
    reference_every: ClassVar[None] = None

    sequences_per_step: int = knob(
        64, "prompts with their completions in one step", unit="sequences", ge=1
    )
    export_dtype: Literal["bfloat16", "float32"] = knob(
        "bfloat16", "dtype of the export at the end; adapters are float32 in any case"
    )


class RunConfig(Section):
    """What runs of every kind have."""

    program: ClassVar[str]  # python -m
    purpose: ClassVar[str]
    lengths: ClassVar[str]  # the keys that `max_model_len` is made of

    run: RunSection
    model: ModelSection
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    mesh: MeshSection = MeshSection()
    hosts: HostsSection = HostsSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name


class Config(RunConfig):
    program: ClassVar[str] = "jaxrl.train"
    purpose: ClassVar[str] = "Trains a policy with GRPO."
    lengths: ClassVar[str] = (
        "data.max_prompt_tokens and the larger of rollout.max_new_tokens and eval.max_new_tokens"
    )

    data: RolloutDataSection
    reward: RewardSection = RewardSection()
    rollout: RolloutSection = RolloutSection()
    vllm: VllmSection = VllmSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    update: UpdateSection = UpdateSection()
    publish: PublishSection = PublishSection()
    eval: RolloutEvalSection = RolloutEvalSection()
    alarm: AlarmSection = AlarmSection()

    @property
    def temperature(self) -> float:
        """Of the distribution that is trained."""
        return self.rollout.temperature

    @property
    def limits(self) -> dict[str, int]:
        """The keys that bound a sequence, and what they add to it, in tokens."""
        return {
            "data.max_prompt_tokens": self.data.max_prompt_tokens,
            "rollout.max_new_tokens": self.rollout.max_new_tokens,
        }

    @property
    def completions_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def max_lag(self) -> int:
        """Versions, the default resolved."""
        if self.rollout.max_lag is not None:
            return self.rollout.max_lag
        return 0 if self.rollout.mode == "synchronous" else 1

    @property
    def eval_new_tokens(self) -> int:
        """Length limit of a completion in evaluation, the default resolved."""
        return self.eval.max_new_tokens or self.rollout.max_new_tokens

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest prompt with the longest completion, of training or evaluation."""
        longest = max(self.rollout.max_new_tokens, self.eval_new_tokens)
        return self.data.max_prompt_tokens + longest

    @property
    def aggregation_constant(self) -> int:
        """Tokens, the default resolved."""
        return self.algorithm.aggregation_constant or self.rollout.max_new_tokens

    @property
    def engine_dtypes(self) -> list[str]:
        """What the engines run in, one after the other, `auto` resolved."""
        given = self.vllm.dtype if isinstance(self.vllm.dtype, list) else [self.vllm.dtype]
        auto = "bfloat16" if self.vllm.gpus_per_engine else "float32"
        return [auto if dtype == "auto" else dtype for dtype in given]

    @property
    def engine_dtype(self) -> str:
        """The widest that an engine runs in."""
        return "float32" if "float32" in self.engine_dtypes else self.engine_dtypes[0]

    @property
    def kv_cache_bytes(self) -> int | None:
        """Of one engine, the default resolved; None: as much as vLLM takes."""
        on_cpu = 512 if self.vllm.gpus_per_engine == 0 else None
        mib = on_cpu if self.vllm.kv_cache_mib is None else self.vllm.kv_cache_mib
        return None if mib is None else mib << 20

    @property
    def wire_dtype(self) -> str:
        """What crosses the bridge and what is exported at the end, `auto` resolved."""
        if self.publish.dtype != "auto":
            return self.publish.dtype
        # Adapters are small, and bfloat16 would lose most of what one step changes in them.
        adapters = self.lora.rank > 0
        exact = adapters or self.rollout.engine == "inprocess" or self.engine_dtype == "float32"
        return "float32" if exact else "bfloat16"

    @property
    def probe_tolerance(self) -> float:
        """Nats, the default resolved: a wrong tensor shows as whole nats, rounding does not."""
        if self.publish.probe_tolerance is not None:
            return self.publish.probe_tolerance
        exact = {*self.engine_dtypes, self.wire_dtype} == {"float32"}
        return 1e-4 if exact and self.model.compute_dtype != "bfloat16" else 0.5


class SftConfig(RunConfig):
    """Supervised fine-tuning. Has properties where a `Config` has fields that mean nothing here."""

    program: ClassVar[str] = "jaxrl.sft"
    purpose: ClassVar[str] = "Fine-tunes a policy on given completions."
    lengths: ClassVar[str] = "data.max_prompt_tokens and data.max_completion_tokens"

    data: SftDataSection
    sft: SftSection = SftSection()
    update: SftUpdateSection = SftUpdateSection()
    eval: EvalSection = EvalSection()

    @property
    def algorithm(self) -> SftSection:
        return self.sft

    @property
    def temperature(self) -> float:
        return 1.0

    @property
    def publish(self) -> PublishSection:
        """Nothing is, but the export at the end is made as a version is."""
        return PublishSection()

    @property
    def wire_dtype(self) -> str:
        return "float32" if self.lora.rank else self.sft.export_dtype

    @property
    def limits(self) -> dict[str, int]:
        return {
            "data.max_prompt_tokens": self.data.max_prompt_tokens,
            "data.max_completion_tokens": self.data.max_completion_tokens,
        }

    @property
    def max_model_len(self) -> int:
        return sum(self.limits.values())


def contradictions(c: Config | SftConfig) -> list[str]:
    """The rules no single field can state; each problem with its way out."""
    found = []
    longest = sum(c.limits.values())
    microbatch = c.update.max_tokens_per_microbatch
    if microbatch is not None and microbatch < longest:
        found.append(
            f"update.max_tokens_per_microbatch = {microbatch} is less than the longest sample: "
            f"{' + '.join(c.limits)} = {longest}; make it at least {longest}, or lower one of the "
            "two"
        )
    found += _contradictions_of_hosts(c.hosts)
    if c.optimizer.first_moment_dtype == "bfloat16" and c.optimizer.beta1 > 1 - 2**-8:
        found.append(
            f"optimizer.beta1 = {c.optimizer.beta1}: a step changes the first moment by 1 - beta1 "
            "of itself, and bfloat16 rounds away less than 2^-8; make it 0.996 or less, or set "
            "optimizer.first_moment_dtype = float32"
        )
    if c.data.source == "reasoning_gym" and not c.data.task:
        found.append("data.source = reasoning_gym needs data.task, the name of a dataset")
    if c.data.source == "jsonl" and not c.data.path:
        found.append("data.source = jsonl needs data.path, a file with one object a line")
    if "{prompt}" not in c.data.prompt_template:
        found.append("data.prompt_template must contain {prompt}, where the question goes")
    if c.optimizer.warmup_steps > c.run.steps * c.algorithm.steps_per_batch:
        found.append(
            f"optimizer.warmup_steps = {c.optimizer.warmup_steps} is longer than the run "
            f"(run.steps = {c.run.steps}): the learning rate would never be reached"
        )
    if isinstance(c, Config):
        found += _contradictions_of_publish(c) + _contradictions_of_rollouts(c)
        found += _contradictions_of_rewards(c)
        return found + _contradictions_of_algorithm(c.algorithm, c.rollout.prompts_per_step)
    if "{completion}" not in c.data.completion_template:
        found.append("data.completion_template must contain {completion}, where the row's goes")
    return found


def _contradictions_of_publish(c: Config) -> list[str]:
    found = _faults_of_url(c.publish.shuttle_dir or "")
    if c.publish.fallback != "none" and c.publish.channel != "object_store":
        found.append(
            f"publish.fallback = {c.publish.fallback} with publish.channel = {c.publish.channel}: "
            "it is for publish.channel = object_store; set publish.fallback = none"
        )
    return found


def _contradictions_of_rollouts(c: Config) -> list[str]:
    found = []
    for key in ("easy", "hard"):
        value = getattr(c.data, key)
        if value is not None and c.data.source == "reasoning_gym":
            found.append(
                f"data.{key} = {value} with data.source = reasoning_gym, whose tasks never come "
                "again: it is for data.source = jsonl; leave it out"
            )
    if c.data.easy is not None and c.data.hard is not None and c.data.hard >= c.data.easy:
        found.append(
            f"data.hard = {c.data.hard} is not less than data.easy = {c.data.easy}: a row would be "
            "both"
        )
    if c.data.source == "jsonl" and c.reward.kind == "task":
        found.append("reward.kind = task needs data.source = reasoning_gym; use reward.kind: exact")
    for key, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
        value = getattr(c.rollout, key)
        if value != off:
            found.append(
                f"rollout.{key} = {value}: a truncated sampling distribution gives log-probs that "
                "the trainer, which sees the whole vocabulary, cannot reproduce, so every "
                f"importance ratio would be biased; leave it at {off} (off)"
            )
    found += _contradictions_of_evaluation(c)
    mode, max_lag = c.rollout.mode, c.max_lag
    if mode != "synchronous" and c.rollout.engine == "inprocess":
        found.append(
            f"rollout.mode = {mode} with rollout.engine = inprocess, which samples on the "
            "trainer's own devices: it cannot while they train; set rollout.mode = synchronous"
        )
    wanted = {"synchronous": max_lag == 0, "overlap": max_lag == 1, "continuous": max_lag >= 1}
    if not wanted[mode]:
        bound = {"synchronous": "is 0", "overlap": "is 1", "continuous": "is 1 or more"}[mode]
        found.append(
            f"rollout.max_lag = {max_lag} with rollout.mode = {mode}, where it {bound}: leave it "
            "out, or set another rollout.mode"
        )
    if c.rollout.too_old != "wait" and mode != "continuous":
        found.append(
            f"rollout.too_old = {c.rollout.too_old} with rollout.mode = {mode}: nothing is ever "
            "too old there; leave it out, or set rollout.mode = continuous"
        )
    found += _contradictions_of_servers(c) + _faults_of_ray(c.vllm.ray_address)
    if c.vllm.min_engines > c.vllm.max_engines:
        found.append(
            f"vllm.engines: min = {c.vllm.min_engines} is more than max = {c.vllm.max_engines}"
        )
    return found


def _contradictions_of_rewards(c: Config) -> list[str]:
    found = []
    for name, reward in c.reward.also.items():
        if (reward.matches is None) == (reward.function is None):
            found.append(
                f"reward.also.{name}: expected one of matches, a regular expression, and function, "
                "MODULE:FUNCTION"
            )
    if c.reward.kind in c.reward.also:
        found.append(
            f"reward.also.{c.reward.kind} has the name of reward.kind; give it another, so "
            "that their metrics can be told apart"
        )
    buffer, limit = c.reward.overlong_tokens, c.rollout.max_new_tokens
    if buffer is not None and buffer >= limit:
        found.append(
            f"reward.overlong_tokens = {buffer} is no part of rollout.max_new_tokens = {limit}: "
            f"every completion would be too long; make it at most {limit - 1}"
        )
    bounds = c.algorithm.length_bounds
    if bounds is not None and not bounds[0] <= min(bounds[1], limit):
        found.append(
            f"algorithm.length_bounds = {bounds}: expected [fewest, most] tokens of a completion, "
            f"the fewest at most rollout.max_new_tokens = {limit}"
        )
    return found


def _contradictions_of_evaluation(c: Config) -> list[str]:
    found = []
    for key, off in (("top_p", 1.0), ("top_k", 0), ("beams", 1)):
        value = getattr(c.eval, key)
        if value == off:
            continue
        if c.rollout.engine == "inprocess":
            found.append(
                f"eval.{key} = {value} with rollout.engine = inprocess, which has no such option; "
                f"leave it at {off} (off)"
            )
        elif c.eval.beams == 1 and c.eval.temperature == 0:
            found.append(
                f"eval.{key} = {value} with eval.temperature = 0: a greedy completion has nothing "
                f"to draw from; set eval.temperature, or leave it at {off} (off)"
            )
    draws = {"temperature": 0.0, "top_p": 1.0, "top_k": 0}
    drawn = {key: value for key, off in draws.items() if (value := getattr(c.eval, key)) != off}
    if c.eval.beams > 1 and drawn:
        found.append(
            f"eval.beams = {c.eval.beams} with "
            f"{', '.join(f'eval.{key} = {value}' for key, value in drawn.items())}: a beam search "
            "draws nothing; leave that out, or set eval.beams = 1"
        )
    return found


def _contradictions_of_servers(c: Config) -> list[str]:
    if not c.vllm.servers:
        nobody = c.vllm.engines == 0 and c.rollout.engine == "vllm"
        return ["vllm.engines = 0 without vllm.servers: nobody would sample"] if nobody else []
    found = []
    if "shuttle" not in (c.publish.channel, c.publish.fallback):
        found.append(
            "vllm.servers reads weights from the shuttle alone: set publish.channel = shuttle, or "
            "publish.fallback = shuttle where other engines use the object store"
        )
    if c.lora.rank:
        found.append(
            f"lora.rank = {c.lora.rank} with vllm.servers: adapters are not brought to servers; "
            "use vllm.engines, or train all weights"
        )
    if c.eval.beams > 1:
        found.append(
            f"eval.beams = {c.eval.beams} with vllm.servers, which are asked for no beam search; "
            "use vllm.engines, or set eval.beams = 1"
        )
    return found


def _contradictions_of_algorithm(c: AlgorithmSection, prompts: int) -> list[str]:
    found = []
    if c.minibatches > prompts:
        found.append(
            f"algorithm.minibatches = {c.minibatches}: a step has no more than "
            f"rollout.prompts_per_step = {prompts} prompts to split; lower the one, or raise the "
            "other"
        )
    if c.proximal == "engine" and c.correction != "none":
        found.append(
            f"algorithm.correction = {c.correction} with algorithm.proximal = engine: ratios are "
            "measured from the engine already, and would count twice; set algorithm.correction = "
            "none, or algorithm.proximal = trainer"
        )
    found += _contradictions_of_reference(c)
    for key in ("token_mask", "sequence_mask", "geometric_mask"):
        bounds = getattr(c, key)
        if bounds is not None and not 0 <= bounds[0] < bounds[1]:
            found.append(
                f"algorithm.{key} = {bounds}: expected [lowest, highest] ratio that is kept, such "
                "as [0.5, 2.0]"
            )
    return found


def _contradictions_of_reference(c: AlgorithmSection) -> list[str]:
    if c.advantage == "none" and c.reference is None:
        return [
            "algorithm.advantage = none: nothing but the distance from algorithm.reference is "
            "learned; set that to the teacher, a Hugging Face directory"
        ]
    found = [
        f"algorithm.{key} = {getattr(c, key)} with algorithm.kl_coefficient = 0: nothing measures "
        "the distance from it; set algorithm.kl_coefficient"
        for key in ("reference", "reference_every")
        if getattr(c, key) is not None and not c.kl_coefficient
    ]
    if c.reference is not None and c.reference_every is not None:
        found.append(
            f"algorithm.reference_every = {c.reference_every} with algorithm.reference = "
            f"{c.reference}, a model that stays as it is; leave out one of the two"
        )
    return found


def _faults_of_url(shuttle_dir: str) -> list[str]:
    protocol, is_url, rest = shuttle_dir.partition("://")
    if is_url and protocol == "file":
        return [f"publish.shuttle_dir = {shuttle_dir}: a directory is named by its path, {rest}"]
    if is_url and ("@" in rest or "?" in rest or "#" in rest or "::" in protocol):
        return [
            "publish.shuttle_dir: a URL is PROTOCOL://BUCKET/RUN and nothing else; credentials and "
            "endpoints come from the environment of each machine"
        ]
    if is_url and not rest.strip("/"):
        return [
            f"publish.shuttle_dir = {shuttle_dir}: names no bucket; {protocol}://BUCKET/RUN does"
        ]
    if is_url and (set("*[]") & set(rest) or {".", ".."} & set(rest.split("/"))):
        return [
            f"publish.shuttle_dir = {shuttle_dir}: no part of it may be . or .., and none may hold "
            "*, [ or ], which storages take for patterns"
        ]
    return []


def _faults_of_ray(address: str | None) -> list[str]:
    if address is None or address in ("auto", "local") or "://" in address:  # Ray's own words
        return []
    host, _, port = address.rpartition(":")
    if host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16:
        return []
    return [
        f"vllm.ray_address = {address}: expected HOST:PORT, for example ray-head:6379, or auto; a "
        "port is a number below 65536"
    ]


def _contradictions_of_hosts(c: HostsSection) -> list[str]:
    given = [key for key in ("processes", "process_id") if getattr(c, key) is not None]
    if c.coordinator is None or c.coordinator == "auto":
        value = "auto" if c.coordinator else "not set"
        return [
            f"hosts.{key} = {getattr(c, key)} with hosts.coordinator {value}: it goes with "
            "hosts.coordinator = HOST:PORT"
            for key in given
        ]
    if len(given) < 2:
        return ["hosts.coordinator = HOST:PORT needs hosts.processes and hosts.process_id"]
    assert c.processes is not None and c.process_id is not None
    if c.process_id >= c.processes:
        return [
            f"hosts.process_id = {c.process_id}: the last of hosts.processes = {c.processes} "
            f"processes is {c.processes - 1}"
        ]
    if int(c.coordinator.rpartition(":")[2]) > 65534:
        return [f"hosts.coordinator = {c.coordinator}: the highest port is 65534"]
    return []
