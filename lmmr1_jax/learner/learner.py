"""The learner: one jitted update with one donated state.

The minibatch lies on the devices as n micro-batches of one static shape. A loop inside the program runs over as many
of them as hold anything and adds up gradients in float32; the loss of each is divided by counts over the whole
minibatch from the start, so that the sum is the gradient, however the minibatch was cut.

What is learned is an `Objective`'s, how it moves a `Trainable`'s; nothing here knows of either more than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lmmr1_jax.learner.objective import LOSS, MAXIMUM, Metrics, Objective
from lmmr1_jax.learner.optimizer import global_norm
from lmmr1_jax.learner.state import POLICY, RESERVED, TrainableState, TrainState
from lmmr1_jax.learner.trainable import Trainable, merge, split
from lmmr1_jax.models.network import Params
from lmmr1_jax.models.packed_forward import micro_batch
from lmmr1_jax.parallel.sharding import put_batch
from lmmr1_jax.types.batches import PackedBatch

PerToken = Callable[[Mapping[str, Params], PackedBatch], Float[Array, "rows slots"]]
"""A number for every response slot of a micro-batch, from the parameters of all trainables; called inside jit."""


class Learner:
    """Owns the compiled programs; the state travels through them.

    Metrics of an update are those of its objectives, and of every trainable `grad_norm` (before clipping) and, where it
    has a schedule, `learning_rate`, under its prefix; and `skipped_updates` (since the run's start).

    Attributes:
      trainables: by name.
    """

    def __init__(
        self,
        trainables: Mapping[str, Trainable],
        objectives: Sequence[Objective],
        mesh: Mesh,
        *,
        passes: Mapping[str, PerToken] | None = None,
    ):
        """
        Args:
          trainables: what is trained, by name; one of them is the `POLICY`.
          objectives: what they are trained for. Each trainable is named by exactly one of them.
          mesh: see `sharding.make_mesh`; the trainables' shardings are on it.
          passes: what `per_token` computes, by name; `log_probs` and `values` need those of their names.

        Raises:
          ValueError: a trainable is trained by none or by several, there is no policy, or a name is taken.
        """
        named = sorted(name for objective in objectives for name in objective.trains)
        if named != sorted(trainables) or POLICY not in trainables:
            raise ValueError(f"trainables {sorted(trainables)}: objectives train {named}; each once, {POLICY!r} too")
        if taken := sorted(set(trainables).intersection(RESERVED)):
            raise ValueError(f"no trainable can be named {taken}")
        self.trainables = dict(trainables)
        self._mesh = mesh
        self._replicated = NamedSharding(mesh, PartitionSpec())
        params = {
            name: jax.tree.map(lambda leaf: _placed(leaf, leaf.sharding or self._replicated), trainable.params)
            for name, trainable in trainables.items()
        }
        self._param_shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
        initial_state = functools.partial(_initial_state, self.trainables)
        self._abstract = _with_shardings(jax.eval_shape(initial_state, params), params, self._replicated)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self._abstract)
        self._init = jax.jit(initial_state, donate_argnums=0, out_shardings=shardings)
        self._update = jax.jit(
            functools.partial(_update, self.trainables, tuple(objectives)),
            donate_argnums=0,
            out_shardings=(shardings, self._replicated),
        )
        self._gradients = jax.jit(functools.partial(_gradients, self.trainables, tuple(objectives)))
        self._passes = {
            name: jax.jit(functools.partial(_per_token, of_micro), out_shardings=self._replicated)
            for name, of_micro in (passes or {}).items()
        }

    def init_state(self, params: Params, **others: Params) -> TrainState:
        """The state before the first update. Parameters are donated: use those of the state from here on.

        Args:
          params: the policy's.
          others: those of every other trainable, by its name.
        """
        return self._init(jax.device_put({POLICY: params, **others}, self._param_shardings))

    def abstract_state(self) -> TrainState:
        """The state's shapes, dtypes and shardings, for `Checkpoints.restore_newest`."""
        return self._abstract

    def put(self, batch: PackedBatch) -> PackedBatch:
        """The batch on the devices, rows split over data and fsdp."""
        return put_batch(batch, self._mesh)

    def update(self, state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict[str, float]]:
        """One optimizer update; `state` is donated and gone afterwards. An update whose gradients or losses are not
        finite changes nothing but `step` and `skipped_updates`. `batch` may be on the host or from `put`."""
        state, metrics = self._update(state, self.put(batch))
        return state, {name: value.item() for name, value in jax.device_get(metrics).items()}

    def gradients(self, params: Params, batch: PackedBatch) -> tuple[Params, dict[str, float]]:
        """Gradients of the trainable parameters before clipping, and the objectives' metrics; what `update` applies.
        For learners of a policy alone."""
        gradients, metrics = self._gradients({POLICY: params}, self.put(batch))
        return gradients[POLICY], {name: float(value) for name, value in jax.device_get(metrics).items()}

    def log_probs(self, params: Params, batch: PackedBatch) -> np.ndarray:
        """Policy log-probs under `params`, float32 `[n, R, M]`, 0 at padding: the pass for old and reference."""
        return self.per_token("log_probs", {POLICY: params}, batch)

    def values(self, state: TrainState, batch: PackedBatch) -> np.ndarray:
        """The critic's values of the states before the completion tokens, float32 `[n, R, M]`, 0 at padding."""
        return self.per_token("values", {name: part.params for name, part in state.trained.items()}, batch)

    def per_token(self, name: str, params: Mapping[str, Params], batch: PackedBatch) -> np.ndarray:
        """What the pass `name` gives for every response slot, float32 `[n, R, M]`, 0 at padding.

        Args:
          name: one of `passes`.
          params: by trainable, those that the pass reads.
          batch: on the host or from `put`.
        """
        return np.asarray(self._passes[name](params, self.put(batch)))

def _with_shardings(state: TrainState, params: Mapping[str, Params], replicated: NamedSharding) -> TrainState:
    """The state's shapes with shardings.

    What an optimizer keeps of a parameter stands under the parameter's path and is split as that is; where it has
    another shape (a factored moment), and where it belongs to none (a count), it lies whole on every device.
    """
    trained = {}
    for name, part in state.trained.items():
        by_path = dict(jax.tree_util.tree_leaves_with_path(params[name]))

        def place(path, leaf, by_path=by_path):
            owners = [by_path[path[i:]] for i in range(len(path)) if path[i:] in by_path]
            owned = bool(owners) and owners[0].shape == leaf.shape
            return _placed(leaf, owners[0].sharding if owned else replicated)

        trained[name] = TrainableState(params[name], jax.tree_util.tree_map_with_path(place, part.opt_state))
    return TrainState(trained, _placed(state.step, replicated), _placed(state.skipped_updates, replicated))


def _placed(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _initial_state(trainables: Mapping[str, Trainable], params: Mapping[str, Params]) -> TrainState:
    trained = {
        name: TrainableState(params[name], trainable.optimizer.init(split(params[name], trainable.mask)[0]))
        for name, trainable in trainables.items()
    }
    zero = jnp.zeros((), jnp.int32)
    return TrainState(trained, zero, zero)


def _update(
    trainables: Mapping[str, Trainable], objectives: Sequence[Objective], state: TrainState, batch: PackedBatch
) -> tuple[TrainState, Metrics]:
    params = {name: part.params for name, part in state.trained.items()}
    gradients, metrics = _gradients(trainables, objectives, params, batch)
    norms = {name: global_norm(tree) for name, tree in gradients.items()}
    # A norm is finite exactly when all gradients are (short of overflow, which is no gradient to follow either).
    losses = [value for name, value in metrics.items() if name.startswith(LOSS)]
    finite = jnp.all(jnp.isfinite(jnp.stack([*norms.values(), *losses])))
    skipped = state.skipped_updates + jnp.where(finite, 0, 1)
    metrics = metrics | {"skipped_updates": skipped}
    trained = {}
    for name, trainable in trainables.items():
        step, moves = state.step - trainable.waits, finite
        if trainable.waits:
            moves = finite & (step >= 0)
        trained[name] = _moved(trainable, state.trained[name], gradients[name], step, moves)
        metrics[f"{trainable.prefix}grad_norm"] = norms[name]
        if trainable.learning_rate is not None:
            rate = trainable.learning_rate(step)
            metrics[f"{trainable.prefix}learning_rate"] = jnp.where(step >= 0, rate, 0.0) if trainable.waits else rate
    return TrainState(trained, state.step + 1, skipped), metrics


def _moved(
    trainable: Trainable, state: TrainableState, gradients: Params, step: Int[Array, ""], moves: Bool[Array, ""]
) -> TrainableState:
    """Parameters and the optimizer's state after the update where `moves` is true, else as they were."""
    old, frozen = split(state.params, trainable.mask)
    optimizer = optax.with_extra_args_support(trainable.optimizer)
    updates, opt_state = optimizer.update(gradients, state.opt_state, old, step=step)
    new = (optax.apply_updates(old, updates), opt_state)
    moved, opt_state = jax.tree.map(lambda new, old: jnp.where(moves, new, old), new, (old, state.opt_state))
    return TrainableState(merge(moved, frozen), opt_state)


def _gradients(
    trainables: Mapping[str, Trainable],
    objectives: Sequence[Objective],
    params: Mapping[str, Params],
    batch: PackedBatch,
) -> tuple[dict[str, Params], Metrics]:
    """Gradients of the minibatch's losses for the trainable parameters of each trainable, and the metrics."""
    gradients, metrics = {}, {}
    for objective in objectives:
        parts = {name: split(params[name], trainables[name].mask) for name in objective.trains}
        frozen = {name: part[1] for name, part in parts.items()}

        def loss(trained, micro, objective=objective, frozen=frozen):
            merged = {name: merge(tree, frozen[name]) for name, tree in trained.items()}
            return objective.loss({**params, **merged}, micro)

        found, sums = _accumulate(loss, {name: part[0] for name, part in parts.items()}, batch)
        gradients |= found
        metrics |= sums
    return gradients, metrics


def _accumulate(
    loss: Callable[[dict[str, Params], PackedBatch], tuple[Float[Array, ""], Metrics]],
    trained: dict[str, Params],
    batch: PackedBatch,
) -> tuple[dict[str, Params], Metrics]:
    """Gradients and metrics of `loss(trained, micro)` over the micro-batches that hold anything."""
    differentiate = jax.grad(loss, has_aux=True)

    def add(index, total):
        gradients, metrics = total
        more, more_metrics = differentiate(trained, micro_batch(batch, index))
        combined = {
            name: (jnp.maximum if name.endswith(MAXIMUM) else jnp.add)(metrics[name], value)
            for name, value in more_metrics.items()
        }
        return jax.tree.map(jnp.add, gradients, more), combined

    _, names = jax.eval_shape(lambda: loss(trained, micro_batch(batch, 0)))
    start = (jax.tree.map(jnp.zeros_like, trained), dict.fromkeys(names, jnp.zeros((), jnp.float32)))
    if batch.tokens.shape[0] == 1:
        # One micro-batch needs no accumulator beside its own gradients.
        return add(0, start)
    return jax.lax.fori_loop(0, batch.micro_batches, add, start)


def _per_token(of_micro: PerToken, params: Mapping[str, Params], batch: PackedBatch) -> Float[Array, "n rows slots"]:
    """What `of_micro` gives for the response slots of every micro-batch, 0 at padding."""

    def fill(index, result):
        micro = micro_batch(batch, index)
        return result.at[index].set(jnp.where(micro.mask > 0, of_micro(params, micro), 0.0))

    return jax.lax.fori_loop(0, batch.micro_batches, fill, jnp.zeros(batch.mask.shape, jnp.float32))
