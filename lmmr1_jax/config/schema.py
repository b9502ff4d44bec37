"""What a run is told: frozen dataclasses; a field's documentation and its range stand beside it.

A config file is a Python file that exports `config: TrainConfig`; command-line flags are generated from the same
dataclasses (`--learner.learning-rate 1e-6`). A field that is set and read by nothing is refused:
`algorithms.registry.checked` knows what the chosen algorithm reads.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from lmmr1_jax.config.ranges import ABOVE_1_OR_OFF, DECAY, FRACTION, SHARE, above, at_least


@dataclasses.dataclass(frozen=True)
class RunConfig:
    dir: str = "runs/rloo"
    """The run's folder. A folder that is not empty is refused unless `resume` is set."""
    seed: Annotated[int, at_least(0)] = 0
    """Seeds the prompt order, the sampler and whatever is initialised at random."""
    steps: Annotated[int, at_least(0)] = 0
    """Optimisation steps (one rollout batch each); 0 means as many as `data.epochs` passes over the prompts give."""
    resume: bool = False
    """Go on from the newest whole checkpoint in `dir`, or start if there is none."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    path: str = ""
    """A Hugging Face folder. `embedded:tiny`, or empty, is the tiny Qwen2.5-VL that ships with the package."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of matrix products: auto is bfloat16 on accelerators and float32 on CPUs. Master weights are float32."""
    attention: Literal["auto", "xla"] = "auto"
    """The implementation of attention: auto is the fastest that runs on the devices."""
    freeze_vision: bool = False
    """Do not train the vision tower (its merger included), nor that of PPO's critic."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """JSON, JSONL or parquet of prompts. `embedded:shapes`, or empty, are generated images of coloured shapes."""
    prompt_key: str = "message"
    """The key of the messages: a list, or the same list as a string."""
    answer_key: str = "answer"
    """The key of the gold answer."""
    verifier_key: str = "verifier"
    """The key by which a row may name its verifier; empty where no key does."""
    epochs: Annotated[int, at_least(1)] = 1
    """Passes over the prompts when `run.steps` is 0."""
    shuffle: bool = True
    """Draw the prompts of an epoch in a random order (of `run.seed` and the epoch)."""
    min_pixels: int = 3136
    """Images with fewer pixels are enlarged to this number."""
    max_pixels: int = 1_003_520
    """Images with more pixels are reduced to this number (1,280 image tokens)."""
    max_prompt_tokens: Annotated[int, at_least(1)] = 4096
    """Longer prompts, image tokens included, are skipped and counted."""
    allow_http: bool = False
    """Fetch images from http(s) addresses."""
    image_root: str = ""
    """When set, images may only be read from below this folder."""
    workers: Annotated[int, at_least(1)] = 2
    """Threads that read and resize images."""


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    prompts: Annotated[int, at_least(1)] = 128
    """Prompts per step."""
    completions: Annotated[int, at_least(1)] = 8
    """Completions per prompt: the group."""
    max_new_tokens: Annotated[int, at_least(1)] = 1024
    """A completion is cut at this many tokens."""
    temperature: Annotated[float, above(0)] = 1.0
    """Sampling temperature; the learner's log-probs are of the same distribution."""
    sampler: str = "jax"
    """`jax` samples on the learner's devices; `vllm` with engines of their own, see `vllm` and `ray`."""
    staleness: Annotated[int, at_least(0)] = 0
    """Batches that engines sample ahead of the learner; 0 is strictly on-policy."""
    weight_update: Literal["drain", "in-flight"] = "drain"
    """With staleness: new weights wait until an engine's completions have ended, or reach it in their midst."""
    gap_warn: Annotated[float, above(0, infinite=True)] = 0.02
    """Warn when the mean gap between the learner's and the sampler's log-probs is above this."""
    gap_stop: Annotated[float, above(0, infinite=True)] = 0.2
    """Stop when it is above this for 3 steps in a row."""


@dataclasses.dataclass(frozen=True)
class VllmConfig:
    num_engines: Annotated[int, at_least(1)] = 1
    """Engines, each with the whole model."""
    tensor_parallel: Annotated[int, at_least(1)] = 1
    """Devices of an engine, which share its weights."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What engines run on; auto takes GPUs where the cluster has any when the run starts."""
    cpus: Annotated[int, at_least(1)] = 2
    """CPU cores that an engine reserves; a CPU engine computes with as many threads."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and products; auto is bfloat16 on GPUs and float32 on CPUs."""
    max_num_seqs: Annotated[int, at_least(1)] = 256
    """Completions that an engine samples at a time."""
    gpu_memory_utilization: Annotated[float, SHARE] = 0.9
    """Share of a GPU's memory that an engine takes, its weights included."""
    kv_cache_gib: Annotated[float, at_least(0)] = 0.0
    """Memory for keys and values, GiB; 0 takes what `gpu_memory_utilization` leaves on a GPU, and 1 on a CPU."""
    enforce_eager: bool = False
    """No CUDA graphs and no compilation: a faster start and slower sampling. Always so on a CPU."""
    max_images: Annotated[int, at_least(0)] = 8
    """Images of one prompt, at most; prompts with more are skipped."""
    transport: Literal["auto", "host", "nccl", "ipc"] = "auto"
    """How weights travel: `host` through Ray's object store, from any learner to any engine; `nccl` between GPUs,
    `ipc` within one; auto takes host."""
    bucket_mib: Annotated[int, at_least(1)] = 256
    """Weights travel in buckets of at most this size, or of one tensor; over `host` in parts of an eighth of it."""
    colocate: bool = False
    """Engines share the learner's GPUs: they sleep while it learns."""
    resource: str = ""
    """Engines run only on nodes that were started with this custom resource of Ray."""
    label: str = ""
    """Engines run only on nodes with this label, NAME=VALUE."""
    start_timeout: Annotated[float, above(0)] = 600.0
    """Seconds within which an engine must be there, at the start and after all were lost."""
    sync_timeout: Annotated[float, above(0)] = 600.0
    """Seconds within which an engine must take a bucket of weights; else it is replaced."""
    request_timeout: Annotated[float, above(0)] = 3600.0
    """Seconds within which an engine must finish a group; else it is replaced."""
    restarts: Annotated[int, at_least(0)] = 3
    """How often in a row an engine is replaced before it has finished a group."""
    arguments: str = ""
    """More arguments of vLLM's EngineArgs, as a JSON object; not those that the run needs as they are."""


@dataclasses.dataclass(frozen=True)
class RayConfig:
    address: str = ""
    """HOST:PORT of a cluster that this machine is a node of, or `auto`; empty starts one here, on localhost."""
    timeout: Annotated[float, above(0)] = 60.0
    """Seconds within which the cluster must answer and have room for the engines."""
    devices: str = ""
    """GPUs for the engines of a cluster that is started here, as in CUDA_VISIBLE_DEVICES; empty takes all."""


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    variant: Literal["default", "lmm-r1"] = "default"
    """`default` grades the answer block only; `lmm-r1` reproduces LMM-R1's rules, flaws included."""
    accuracy_weight: float = 1.0
    """Reward of a right answer."""
    format_weight: float = 0.5
    """Reward of the right form."""
    timeout: Annotated[float, above(0)] = 5.0
    """Seconds a verifier may take for one completion before it is killed and the completion earns 0."""
    workers: Annotated[int, at_least(1)] = 2
    """Verifier processes."""
    verifier: str = "math"
    """What makes an answer right: `math`, `number` (`number:0.05` allows 5 %), `choice`, `text`, or a function of your
    own, FILE.py:FUNCTION."""
    verifiers: tuple[str, ...] = ()
    """Other verifiers for some data sources, each SOURCE=VERIFIER; a row's own (`data.verifier_key`) comes first."""
    functions: tuple[str, ...] = ()
    """Your own reward functions, each [NAME=]FILE.py[:FUNCTION][*WEIGHT]; docs/rewards.md says how to write one."""
    function_timeout: Annotated[float, above(0)] = 60.0
    """Seconds a function may take for one prompt's completions, or for being loaded, before it is killed."""
    function_workers: Annotated[int, at_least(1)] = 1
    """Processes for each function; it is called for one prompt's completions at a time."""
    urls: tuple[str, ...] = ()
    """Reward servers, each [NAME=]URL[,URL...][*WEIGHT]; the URLs of one entry share its work."""
    url_timeout: Annotated[float, above(0)] = 180.0
    """Seconds a server may take for one request."""
    url_tries: Annotated[int, at_least(1)] = 5
    """How often a request is made before its completions are given up."""
    url_wait: Annotated[float, above(0)] = 1.0
    """Seconds before the second try; twice as long before each further one, up to a minute."""
    models: tuple[str, ...] = ()
    """Reward models, each [NAME=]FOLDER[*WEIGHT]: Hugging Face folders of Qwen2, Qwen2-VL or Qwen2.5-VL with a score
    head and the policy's tokenizer."""
    on_error: Literal["stop", "zero"] = "stop"
    """When a function, server or model fails: `stop` ends the run with a checkpoint to resume from; `zero` lets the
    completions concerned earn 0, counted in `reward/faults`. The rules' own faults always earn 0."""


@dataclasses.dataclass(frozen=True)
class AlgorithmConfig:
    """Where a field is None, the algorithm has it as its paper does: docs/algorithms.md has the table."""

    name: str = "rloo"
    """How rewards become advantages, which loss they weigh, and what the fields below are where they are None."""
    file: str = ""
    """Your own algorithm: a Python file that exports ALGORITHM (docs/algorithms.md); it needs no `name`."""
    loss: Literal["clip", "gspo", "cispo", "policy_gradient"] | None = None
    """The policy's surrogate: PPO's clip, GSPO's ratio of whole completions, CISPO's clipped weights, or REINFORCE."""
    clip_low: Annotated[float | None, at_least(0)] = None
    """The probability ratio is clipped below 1 minus this."""
    clip_high: Annotated[float | None, at_least(0)] = None
    """The probability ratio is clipped above 1 plus this."""
    dual_clip: Annotated[float, ABOVE_1_OR_OFF] = 0.0
    """Where the advantage is negative, a token's loss is at most this times the advantage's size; above 1, 0 is off."""
    aggregation: Literal["token", "sequence", "constant"] | None = None
    """A token's share of the loss: one over all tokens of the minibatch, the mean over completions of the mean over
    their tokens, or the same with a constant for the number of tokens."""
    aggregation_length: Annotated[int | None, at_least(1)] = None
    """The constant that `aggregation constant` divides by; None takes `rollout.max_new_tokens`."""
    normalize_rewards: Literal["none", "group", "batch"] = "none"
    """Rewards less their mean, over their standard deviation, before the baseline: of each group, or of the step."""
    normalize_advantages: Literal["none", "group", "batch"] | None = None
    """`group` divides by the standard deviation of the group's rewards; `batch` subtracts the mean and divides by the
    standard deviation over all tokens of the step."""
    normalize_std: bool = True
    """Off: `normalize_advantages` does not divide by the standard deviation, only `batch`'s mean is subtracted."""
    reward_clip: Annotated[float | None, above(0)] = None
    """A completion's reward, its baseline taken off, is clipped to plus and minus this, as LMM-R1 does."""
    discount: Annotated[float, FRACTION] = 1.0
    """Gamma: what a reward counts one token earlier."""
    gae_lambda: Annotated[float, FRACTION] = 1.0
    """Lambda of PPO's advantages: 1 goes by the rewards that came, 0 by the critic's value of the next token."""
    dynamic_sampling_rounds: Annotated[int | None, at_least(0)] = None
    """DAPO's dynamic sampling: groups whose completions all earned the same are replaced by fresh prompts, for which a
    step samples at most this many further batches; 0 is off."""
    overlong_share: Annotated[float | None, FRACTION] = None
    """DAPO's soft penalty: in the last such share of `rollout.max_new_tokens` a completion's reward falls; 0 is off."""
    overlong_penalty: Annotated[float, at_least(0)] = 1.0
    """What a completion of `rollout.max_new_tokens` tokens loses."""
    kl_coefficient: Annotated[float, at_least(0)] = 0.0
    """Weight of the KL to the starting policy; 0 keeps no reference model in memory."""
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """Schulman's estimators of the KL per token."""
    kl_placement: Literal["reward", "loss"] | None = None
    """Subtract the KL from the token rewards, or add it to the loss."""
    kl_target: Annotated[float, at_least(0)] = 0.0
    """KL per token, in nats, that the coefficient is steered to; 0 keeps the coefficient as it is."""
    kl_horizon: Annotated[float, above(0)] = 10_000.0
    """Completions over which the coefficient is steered."""
    entropy_bonus: Annotated[float, at_least(0)] = 0.0
    """Weight of the policy's entropy, which is subtracted from the loss."""
    importance: Literal["token", "sequence", "masked_token", "masked_sequence", "none"] = "token"
    """Correct for the sampler's having drawn from a slightly or quite other distribution than the learner's: weigh a
    token's loss by the ratio of the two probabilities, of the token or of its whole completion, cut at the cap or, if
    masked, set to 0 where it lies outside 1 / cap to cap."""
    importance_cap: Annotated[float, at_least(1)] = 2.0
    """Cap of these weights."""


@dataclasses.dataclass(frozen=True)
class CriticConfig:
    """PPO's critic: a value for the state before every completion token, from the same tokens and images. What is not
    here (Adam's decays, weight decay, minibatches, ...) is the learner's."""

    backbone: Literal["own", "shared"] = "own"
    """A model of its own, or a value head on the policy's hidden states, which one forward pass then serves."""
    path: str = ""
    """With a backbone of its own: the Hugging Face folder that it starts from, of a reward model (`score.weight`) or
    of a policy; empty takes `model.path`."""
    freeze_vision: bool = False
    """With a backbone of its own: do not train its vision tower. A critic that learns quickly may else lose its sight
    for good before it has found a use for it (docs/algorithms.md)."""
    learning_rate: Annotated[float, at_least(0)] = 9e-6
    """Peak learning rate."""
    warmup_ratio: Annotated[float, FRACTION] = 0.03
    """Share of all optimizer updates over which the learning rate rises from 0."""
    max_grad_norm: Annotated[float, above(0, infinite=True)] = 1.0
    """The critic's gradients are scaled down to this global norm."""
    value_clip: Annotated[float, at_least(0)] = 0.2
    """Nothing is gained by moving a value further than this from where it was at the rollout; 0 does not clip."""
    loss_weight: Annotated[float, at_least(0)] = 0.1
    """With a shared backbone: weight of the value loss in the backbone's gradient; 0 leaves it to the policy."""
    freezing_actor_steps: Annotated[int, at_least(0)] = 0
    """In the first so many steps the critic learns and the policy is left as it is."""


@dataclasses.dataclass(frozen=True)
class LearnerConfig:
    learning_rate: Annotated[float, at_least(0)] = 1e-6
    """Peak learning rate."""
    warmup_ratio: Annotated[float, FRACTION] = 0.03
    """Share of all optimizer updates over which the learning rate rises from 0."""
    min_learning_rate_ratio: Annotated[float, FRACTION] = 0.1
    """The cosine ends at this share of the peak."""
    adam_b1: Annotated[float, DECAY] = 0.9
    """Adam's decay of the first moment."""
    adam_b2: Annotated[float, DECAY] = 0.95
    """Adam's decay of the second moment."""
    adam_eps: Annotated[float, above(0)] = 1e-8
    """Adam's epsilon."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, above(0, infinite=True)] = 1.0
    """Gradients are scaled down to this global norm."""
    epochs: Annotated[int, at_least(1)] = 1
    """Passes over a rollout batch."""
    minibatches: Annotated[int, at_least(1)] = 1
    """Optimizer updates per pass; groups are dealt to them whole."""
    share_prompts: bool = True
    """A group's prompt stands once in a row and its completions attend to it; else each carries a copy."""
    pack: bool = True
    """Several segments a row; else one prompt with its completions (or one completion) a row."""
    row_length: Annotated[int, at_least(0)] = 0
    """Tokens in a row; 0 chooses from the longest prompt and the completion limit."""
    rows: Annotated[int, at_least(0)] = 0
    """Rows in a micro-batch (a multiple of the devices that split them); 0 chooses."""
    image_rows: Annotated[int, at_least(0)] = 0
    """Vision rows in a micro-batch; 0 chooses."""
    remat: Literal["none", "attention", "full"] = "attention"
    """What the backward pass recomputes: nothing, attention's inner products, or whole layers."""
    logprob_chunk: Annotated[int, at_least(1)] = 1024
    """Completion tokens whose logits over the vocabulary exist at a time."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int = 1
    """Devices over which rows are split, weights copied."""
    fsdp: int = -1
    """Devices over which rows and weights are split; -1 takes all that the other axes leave."""
    tensor: int = 1
    """Devices over which heads and the feed-forward width are split."""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    path: str = ""
    """Held-out prompts; empty holds out the last min(256, 10 %) rows of the data."""
    size: Annotated[int, at_least(0)] = 0
    """Prompts to evaluate; 0 means all held out."""
    every: Annotated[int, at_least(0)] = 0
    """Evaluate every so many steps; 0 means only before the first and after the last."""
    max_new_tokens: Annotated[int, at_least(0)] = 0
    """Length limit while evaluating; 0 means `rollout.max_new_tokens`."""


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: Annotated[int, at_least(1)] = 50
    """Steps between checkpoints; the last step always writes one."""
    keep: Annotated[int, at_least(1)] = 2
    """Newest checkpoints kept, beside the best by evaluated accuracy."""


@dataclasses.dataclass(frozen=True)
class TrackingConfig:
    tensorboard: bool = True
    """Write event files to `tb/`."""
    wandb: bool = False
    """Log to Weights & Biases as well."""
    wandb_project: str = "lmmr1_jax"
    """The W&B project."""
    samples: Annotated[int, at_least(0)] = 4
    """Prompts per step whose completions go to `samples.jsonl`."""
    images_every: Annotated[int, at_least(0)] = 20
    """Steps between samples with images in TensorBoard."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    vllm: VllmConfig = VllmConfig()
    ray: RayConfig = RayConfig()
    rewards: RewardsConfig = RewardsConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    critic: CriticConfig = CriticConfig()
    learner: LearnerConfig = LearnerConfig()
    mesh: MeshConfig = MeshConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
