"""What is learned: a loss of parameters, given a micro-batch.

An objective of one's own is any object with these two members; nothing else of the package has to know of it:

    class CrossEntropy:                                        # supervised fine-tuning
        trains = (POLICY,)

        def loss(self, params, micro):
            log_probs, _ = response_log_probs(network, params[POLICY], micro, distribution, mesh)
            loss = -jnp.sum(jnp.where(micro.mask > 0, log_probs, 0.0)) / micro.tokens_total
            return loss, {"loss/cross_entropy": loss}

    learner = Learner({POLICY: Trainable(abstract_params, optax.adamw(1e-5))}, [CrossEntropy()], mesh)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from jaxtyping import Array, Float

from lmmr1_jax.models.network import Params
from lmmr1_jax.types.batches import PackedBatch

Metrics = dict[str, Float[Array, ""]]

MAXIMUM = "/max"
LOSS = "loss/"


class Objective(Protocol):
    """A loss over the parameters of one or more trainables.

    The learner gives every objective a loop of its own over the micro-batches, one objective after the other, so that
    only one objective's activations exist at a time.

    Attributes:
      trains: names of the trainables (`learner.trainable`) for which the loss has gradients. A trainable is trained by
        exactly one objective; all others are constants to it.
    """

    trains: tuple[str, ...]

    def loss(self, params: Mapping[str, Params], micro: PackedBatch) -> tuple[Float[Array, ""], Metrics]:
        """This micro-batch's share of the minibatch's loss, and its shares of the metrics; pure, called inside jit.

        Args:
          params: the parameters of every trainable by its name, the frozen ones among them.
          micro: one micro-batch, from `packed_forward.micro_batch`. Its totals count the whole minibatch: what is
            divided by them adds up to the minibatch's loss, however that was cut.

        Returns:
          The loss, and the metrics. Metrics are added up over the micro-batches; of one whose name ends in "/max" the
          largest (and at least 0) is kept. An update is skipped when a metric that is named "loss/..." isn't finite.
        """
        ...
