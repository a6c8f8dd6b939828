"""The losses of the two networks, and their training in turns.

WGAN-GP (Gulrajani et al. 2017) between graphs: the critic sees the generator's raw logits beside one-hot graphs.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo import train
from zoo.data.molecular_graphs import Graph, MoleculeCodec
from zoo.papers.druggen.model import DrugGENCritic, DrugGENGenerator
from zoo.train.state import TrainState

Critic = Callable[[jax.Array, jax.Array], jax.Array]


class Graphs(NamedTuple):
    """Molecules, one-hot or logits."""

    nodes: jax.Array  # (B, N, A)
    edges: jax.Array  # (B, N, N, K)


class Penalty(NamedTuple):
    """A gradient penalty, and what it holds to one."""

    value: jax.Array  # ()
    norm: jax.Array  # (B,), of the critic's gradient by nodes and edges together


def interpolation_factors(rng: jax.Array, batch: int) -> tuple[jax.Array, jax.Array]:
    """Uniform shares of the real graph in an interpolation: of nodes (B, 1, 1), and others of edges (B, 1, 1, 1)."""
    nodes, edges = jax.random.split(rng)
    return jax.random.uniform(nodes, (batch, 1, 1)), jax.random.uniform(edges, (batch, 1, 1, 1))


def gradient_penalty(critic: Critic, real: Graphs, fake: Graphs, factors: tuple[jax.Array, jax.Array]) -> Penalty:
    """mean (|grad critic| - 1)^2 between real and generated graphs; the norm is of both gradients, concatenated.

    Args:
      critic: (nodes, edges) to (B, 1).
      real, fake: of the same shapes.
      factors: from `interpolation_factors`.
    """
    mixed = [share * a + (1 - share) * b for share, a, b in zip(factors, real, fake, strict=True)]
    by_nodes, by_edges = jax.grad(lambda nodes, edges: critic(nodes, edges).sum(), argnums=(0, 1))(*mixed)
    squares = jnp.sum(by_nodes**2, axis=(1, 2)) + jnp.sum(by_edges**2, axis=(1, 2, 3))
    # A critic that is flat somewhere has a norm of 0 there, and a gradient of 0 and not NaN.
    norm = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)
    return Penalty(jnp.mean((norm - 1) ** 2), norm)


def critic_loss(
    critic: Critic, real: Graphs, fake: Graphs, factors: tuple[jax.Array, jax.Array], penalty: float = 10.0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """mean critic(fake) - mean critic(real) + penalty * gradient penalty; the generated graphs are constants.

    Args:
      critic, real, fake, factors: as of `gradient_penalty`.
      penalty: lambda.

    Returns:
      The loss, and its parts: "gap" (real above generated), "gradient_penalty", "critic_gradient_norm".
    """
    fake = jax.lax.stop_gradient(fake)
    gap = critic(*real).mean() - critic(*fake).mean()
    found = gradient_penalty(critic, real, fake, factors)
    parts = {"gap": gap, "gradient_penalty": found.value, "critic_gradient_norm": found.norm.mean()}
    return penalty * found.value - gap, parts


def generator_loss(critic: Critic, fake: Graphs) -> jax.Array:
    """-mean critic(fake)."""
    return -critic(*fake).mean()


def build_optimizer(learning_rate: float, b1: float = 0.9, b2: float = 0.999) -> train.Optimizer:
    """AdamW (weight decay 0.01, PyTorch's default) for each network, in a state of parameters by network's name."""
    single = optax.adamw(learning_rate, b1, b2, weight_decay=0.01)

    def init(params: Mapping[str, Any]) -> dict[str, Any]:
        return {name: single.init(part) for name, part in params.items()}

    def update(updates: Mapping[str, Any], state: Mapping[str, Any], params: Any = None) -> tuple[Any, Any]:
        found = {name: single.update(part, state[name], params[name]) for name, part in updates.items()}
        return {name: part for name, (part, _) in found.items()}, {
            **state,
            **{name: new for name, (_, new) in found.items()},
        }

    return train.Optimizer(optax.GradientTransformation(init, update), optax.constant_schedule(learning_rate))


def make_gan_step(
    generator: DrugGENGenerator, critic: DrugGENCritic, optimizer: train.Optimizer, penalty: float = 10.0
) -> Callable[[TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Compiles a step: an update of the critic, and then one of the generator against the new critic.

    A batch has "nodes" and "edges", the molecules to edit, and "real_nodes" and "real_edges", those to be like. An
    update that is not finite is not applied, as in `zoo.train.make_train_step`.

    Args:
      generator, critic: modules of the same graphs.
      optimizer: from `build_optimizer`.
      penalty: of the critic's gradient.
    """

    def update(state: TrainState, name: str, gradient: Any) -> TrainState:
        updates, opt_state = optimizer.transformation.update({name: gradient}, state.opt_state, state.params)
        params = {**state.params, name: optax.apply_updates(state.params[name], updates[name])}
        return state.replace(params=params, opt_state=opt_state)

    @partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(state.rng, state.step)
        mixing, first, second, third = jax.random.split(rng, 4)
        real = Graphs(batch["real_nodes"], batch["real_edges"])

        def generate(params: Any, rng: jax.Array) -> Graphs:
            rngs = {"dropout": rng}
            made: Any = generator.apply({"params": params}, batch["nodes"], batch["edges"], train=True, rngs=rngs)
            return Graphs(*made)

        def judge(params: Any, rng: jax.Array) -> Any:
            return lambda nodes, edges: critic.apply(
                {"params": params}, nodes, edges, train=True, rngs={"dropout": rng}
            )

        fake, to_generator = jax.vjp(lambda params: generate(params, first), state.params["generator"])
        factors = interpolation_factors(mixing, len(real.nodes))
        (loss, parts), gradient = jax.value_and_grad(
            lambda params: critic_loss(judge(params, second), real, fake, factors, penalty), has_aux=True
        )(state.params["critic"])
        new = update(state, "critic", gradient)
        new_critic = judge(new.params["critic"], third)
        other, by_fake = jax.value_and_grad(lambda fake: generator_loss(new_critic, fake))(fake)
        (other_gradient,) = to_generator(by_fake)
        new = update(new, "generator", other_gradient)
        metrics = {
            "loss": loss + other,
            "critic_loss": loss,
            "generator_loss": other,
            **parts,
            "gradient_norm": optax.global_norm((gradient, other_gradient)),
        }
        healthy = state.healthy & jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        kept = jax.tree.map(
            lambda a, b: jnp.where(healthy, a, b), (new.params, new.opt_state), (state.params, state.opt_state)
        )
        return (
            state.replace(step=state.step + healthy, params=kept[0], opt_state=kept[1], healthy=healthy),
            {name: jnp.asarray(value, jnp.float32) for name, value in metrics.items()},
        )

    return step


def cyclic_pairs(codec: MoleculeCodec, inputs: Graph, real: Graph, batch_size: int, seed: int) -> grain.MapDataset:
    """Batches of `make_gan_step` without end; each set has its own order an epoch, and starts again when it is through.

    Args:
      codec: of both.
      inputs: molecules to edit, stacked.
      real: molecules to be like, stacked; usually far fewer, and perhaps fewer than a batch.
      batch_size: of both.
      seed: of both orders.

    Raises:
      ValueError: the batch is empty.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")

    @functools.lru_cache(maxsize=8)
    def order(which: int, count: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, which, epoch]).permutation(count)

    def take(graphs: Graph, which: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(graphs.atoms)
        places = [divmod(step * batch_size + index, count) for index in range(batch_size)]
        chosen = np.array([order(which, count, epoch)[place] for epoch, place in places])
        return codec.one_hot(Graph(*(array[chosen] for array in graphs)))

    def batch(step: int) -> dict[str, np.ndarray]:
        nodes, edges = take(inputs, 0, step)
        real_nodes, real_edges = take(real, 1, step)
        return {"nodes": nodes, "edges": edges, "real_nodes": real_nodes, "real_edges": real_edges}

    return grain.MapDataset.range(2**31).map(batch)


@functools.lru_cache(maxsize=8)
def _step_of(generator: DrugGENGenerator, critic: DrugGENCritic, learning_rate: float, penalty: float) -> Any:
    """One program for all seeds and data sets of the same networks."""
    return make_gan_step(generator, critic, build_optimizer(learning_rate), penalty)


def fit_gan(
    generator: DrugGENGenerator,
    critic: DrugGENCritic,
    data: grain.MapDataset,
    run: train.Run,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    penalty: float = 10.0,
) -> tuple[dict[str, Any], dict[str, float]]:
    """Trains both networks, with checkpoints, and returns their parameters by name, and metrics of the last 20th.

    Args:
      generator, critic: modules of the same graphs.
      data: batches, see `make_gan_step`.
      run: from `zoo.train.open_run`.
      steps: of both.
      learning_rate: of both.
      seed: of parameters and interpolation.
      penalty: of the critic's gradient.
    """
    optimizer = build_optimizer(learning_rate)
    mesh = train.make_mesh(train.MeshConfig(data=1))
    example = data[0]

    def init(rng: jax.Array) -> dict[str, Any]:
        rngs = jax.random.split(rng)
        pairs = (("generator", generator, rngs[0]), ("critic", critic, rngs[1]))
        made = {name: module.init(rng, example["nodes"][:1], example["edges"][:1]) for name, module, rng in pairs}
        return {"params": {name: variables["params"] for name, variables in made.items()}}

    state = train.init_sharded(init, optimizer, jax.random.key(seed), mesh)
    step = _step_of(generator, critic, learning_rate, penalty)
    options = train.FitConfig(steps=steps, log_every=max(steps // 20, 1))
    result = train.fit(step, state, data, options, run, mesh=mesh)
    with open(run.path / "metrics" / "train.csv", newline="") as file:  # also of a training that was finished before
        *_, last = csv.DictReader(file)
    return nn.meta.unbox(result.state.params), {name: float(value) for name, value in last.items()}


def generate(
    generator: DrugGENGenerator, params: Any, codec: MoleculeCodec, inputs: Graph, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """The generator's logits of stacked molecules: nodes (M, N, node_types), edges (M, N, N, edge_types).

    `codec.decode` makes SMILES of them, and `codec.classes` graphs.

    Args:
      generator: a module of the codec's sizes.
      params: its parameters.
      codec, inputs: molecules to edit.
      batch_size: graphs at once; the last batch is padded to it, so that one program serves all.
    """
    apply = jax.jit(lambda nodes, edges: generator.apply({"params": params}, nodes, edges))
    count = len(inputs.atoms)
    found = []
    for start in range(0, count, batch_size):
        chosen = np.minimum(np.arange(start, start + batch_size), count - 1)
        found.append(jax.device_get(apply(*codec.one_hot(Graph(*(array[chosen] for array in inputs))))))
    nodes, edges = (np.concatenate(arrays)[:count] for arrays in zip(*found, strict=True))
    return nodes, edges


def attention_of_pairs(
    generator: DrugGENGenerator, params: Any, nodes: np.ndarray, edges: np.ndarray, block: int = 0
) -> jax.Array:
    """How much each vertex takes from each: softmax weights of a block, mean over channels, (B, N, N), for drawing.

    Raises ValueError for a block that does not exist, or a generator whose scores are summed.
    """
    config = generator.config
    if not 0 <= block < config.depth:
        raise ValueError(f"block {block} does not exist: there are {config.depth}")
    if config.scores == "summed":
        raise ValueError("summed scores have no weights a channel")
    _, seen = generator.apply({"params": params}, nodes, edges, mutable=["intermediates"])
    return seen["intermediates"]["body"][f"block_{block}"]["attention"]["weights"][0]
