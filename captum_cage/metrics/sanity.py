"""Whether an attribution depends on the model at all, and on nothing but it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
import torch
from torch import Tensor, nn

from captum_cage._captum import family
from captum_cage._checks import complaint, shown, whole_number
from captum_cage._restored import AsFound
from captum_cage.metrics.truth import agreement
from captum_cage.result import GraphAttributionResult

__all__ = [
    "Randomization",
    "parameter_randomization",
    "randomized",
    "reproducibility",
    "sensitivity",
]

Array = npt.NDArray[np.float64]

_LAYER = re.compile(r"\.(\d+)\.")
# Agreement with the attribution of the trained model above which one of a model without
# any trained weight counts as the same.
_SAME = 0.5
# Chance of so much agreement of random ranks, above which nothing is to be concluded.
_CHANCE = 0.05
_SEEDS = "Pass a whole number below 2**32, which NumPy takes."


@dataclass(frozen=True)
class Randomization:
    """Agreement of attributions as more and more of the model's weights are shuffled.

    Attributes:
        stages (tuple[str, ...]): what was shuffled besides the stages before it.
        agreement (tuple[float, ...]): mean rank correlation with the attribution of the
            trained model over the seeds, one per stage; NaN where only one of the two
            is the same for all sources, 1 where both are.
        seeds (int): number of seeds.
        chance (float): how often random rankings of as many sources agree at least as
            much as those with all weights shuffled do, either way round.
    """

    stages: tuple[str, ...]
    agreement: tuple[float, ...]
    seeds: int
    chance: float

    @property
    def depends_on_model(self) -> bool:
        """Whether nothing shows that it stays once all weights are shuffled.

        It is shown by an absolute rank correlation with the trained model's attribution
        of one half or more, which random rankings have in less than one case of twenty.
        """
        stays = abs(self.agreement[-1]) >= _SAME
        return not (stays and self.chance < _CHANCE)

    def __str__(self) -> str:
        verdict = "changes" if self.depends_on_model else "does not change"
        lines = [f"The attribution {verdict} when the model's weights are shuffled."]
        if abs(self.agreement[-1]) >= _SAME and self.depends_on_model:
            lines = [
                "The attribution agrees with that of the shuffled model, but random "
                f"rankings of so few sources do so in {self.chance:.0%} of cases. "
                "Explain by smaller units, or pass more seeds."
            ]
        lines += [
            f"{stage}: {found:.3f}"
            for stage, found in zip(self.stages, self.agreement, strict=True)
        ]
        return "\n".join(lines)


def _groups(model: nn.Module) -> list[tuple[str, list[nn.Parameter]]]:
    """Parameters from the output to the input: the head, layers, and the rest."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    shared = getattr(model, "get_input_embeddings", lambda: None)()
    own = {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    if isinstance(shared, nn.Module):
        own -= {id(p) for p in shared.parameters()}
    layers: dict[int, list[nn.Parameter]] = {}
    first: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        found = _LAYER.search(f".{name}")
        if not parameter.is_floating_point():
            continue
        if id(parameter) in own:
            first.append(parameter)
        elif found is not None:
            layers.setdefault(int(found.group(1)), []).append(parameter)
        else:
            rest.append(parameter)
    groups = [("output layer", first)] if first else []
    groups += [(f"layer {number}", layers[number]) for number in sorted(layers)[::-1]]
    return [*groups, ("embeddings and the rest", rest)] if rest else groups


@contextmanager
def randomized(
    model: nn.Module, seed: int = 0, parameters: Sequence[nn.Parameter] | None = None
) -> Iterator[None]:
    """A model whose weights are shuffled within each parameter; as it was, afterwards.

    Shuffling keeps the size and spread of the weights, and nothing of what they say.

    Args:
        model (nn.Module): the model.
        seed (int, optional): of the shuffling. Default: ``0``
        parameters (Sequence[nn.Parameter], optional): which ones. Default: all

    Raises:
        ValueError: if some of the weights are offloaded.

    Source: Adebayo et al. (2018), :cite:p:`adebayo2018sanity`.
    """
    chosen = list(model.parameters()) if parameters is None else list(parameters)
    if any(one.is_meta for one in chosen):
        raise ValueError(
            complaint(
                "model",
                "its weights must be in memory to be shuffled",
                "some are kept elsewhere and come for each pass alone",
                "Load it without offloading, or a smaller model of its kind.",
            )
        )
    chosen = [one for one in chosen if one.is_floating_point()]
    before = [one.detach().to("cpu", copy=True) for one in chosen]
    generator = torch.Generator().manual_seed(seed)

    def restore() -> None:
        with torch.no_grad():
            for one, kept in zip(chosen, before, strict=True):
                one.copy_(kept)

    found = AsFound(model)
    with found, found:
        try:
            with torch.no_grad():
                for one, kept in zip(chosen, before, strict=True):
                    order = torch.randperm(kept.numel(), generator=generator)
                    one.copy_(kept.flatten()[order].view_as(kept))
            yield
        finally:
            try:
                restore()
            finally:  # once more, for an interrupt on the way
                restore()


def parameter_randomization(
    result: GraphAttributionResult, *, seeds: int = 3, cascade: bool = True
) -> Randomization:
    """Whether the result would be the same of a model that knows nothing.

    The weights are shuffled from the output layer down to the embeddings, a layer more
    each time, and the same question is asked of each such model. An attribution that
    stays as it was says something about the text, not about the model.

    Args:
        result (GraphAttributionResult): what was attributed.
        seeds (int, optional): number of shufflings. Default: ``3``
        cascade (bool, optional): measure after each layer; else once, all weights
            shuffled. Default: ``True``

    Raises:
        TypeError: if the model is remote.
        ValueError: if the result was loaded, or has fewer than two sources, or some of
            the model's weights are offloaded.

    Source: Adebayo et al. (2018), Sanity checks for saliency maps,
    :cite:p:`adebayo2018sanity`.
    """
    count = whole_number("seeds", seeds, minimum=1, remedy="Pass 1 or more.")
    model = _model_of(result, "parameter_randomization")
    if result.graph.n_sources < 2:
        raise ValueError(
            complaint(
                "result",
                "must have several sources to rank",
                f"it has {result.graph.n_sources}",
                "Explain by smaller units.",
            )
        )
    groups = _groups(model)
    if not cascade:
        groups = [("all weights", [one for _, some in groups for one in some])]
    found = np.zeros((count, len(groups)))
    own = result.seq_attr.numpy()
    for seed in range(count):
        for stage in range(len(groups)):
            shuffled = [one for _, some in groups[: stage + 1] for one in some]
            with randomized(model, seed, shuffled):
                other = result.repeat().seq_attr.numpy()
            found[seed, stage] = _likeness(own, other)
    # A constant attribution has no ranks: it does not agree with another.
    valid = np.isfinite(found)
    means = np.where(valid, found, 0.0).sum(axis=0) / np.maximum(valid.sum(axis=0), 1)
    means = np.where(valid.any(axis=0), means, np.nan)
    return Randomization(
        tuple(name for name, _ in groups),
        tuple(means.tolist()),
        count,
        _chance(own, float(means[-1]), count),
    )


def _chance(own: Array, found: float, seeds: int, draws: int = 2000) -> float:
    """How often random rankings agree as much with some scores, in the mean."""
    if np.isnan(found):
        return 1.0
    if np.ptp(own) == 0.0:
        return 0.0  # what is the same for all sources says nothing of any model
    rng = np.random.default_rng(0)
    ranks = scipy.stats.rankdata(own)
    ranks = (ranks - ranks.mean()) / ranks.std()
    plain = np.arange(own.size) - (own.size - 1) / 2
    random = rng.permuted(np.tile(plain / plain.std(), (draws * seeds, 1)), axis=1)
    means = (random @ ranks / own.size).reshape(draws, seeds).mean(axis=1)
    return float((np.abs(means) >= abs(found) - 1e-9).mean())


def _likeness(one: Array, other: Array) -> float:
    if np.ptp(one) == np.ptp(other) == 0.0:
        return 1.0
    return agreement(one, other)


def reproducibility(result: GraphAttributionResult, *, seed: int = 0) -> float:
    """Largest difference between two answers to the question with the same seed.

    Args:
        result (GraphAttributionResult): what was attributed.
        seed (int, optional): that both start from. Default: ``0``

    Returns:
        float: 0.0 where the same seed gives the same numbers.

    Raises:
        ValueError: if the result was loaded.
    """
    number = whole_number("seed", seed, stop=2**32, remedy=_SEEDS)
    found = []
    with _own_random_states():
        for _ in range(2):
            _seed(number)
            found.append(result.repeat().seq_attr)
    return float((found[0] - found[1]).abs().max())


def sensitivity(
    result: GraphAttributionResult,
    *,
    radius: float = 0.02,
    samples: int = 10,
    seed: int = 0,
) -> float:
    """Largest relative change of the result when embeddings change a little.

    ``max ||attr(e + d) - attr(e)|| / ||attr(e)||``, ``d`` drawn within ``radius``
    times the spread of the embeddings, as ``captum.metrics.sensitivity_max`` has it.
    The embedding of each distinct token of the text is moved, wherever it stands.

    Args:
        result (GraphAttributionResult): what was attributed.
        radius (float, optional): largest change of an entry, as a share of the standard
            deviation of the model's embeddings. Default: ``0.02``
        samples (int, optional): number of random changes. Default: ``10``
        seed (int, optional): of the changes, and of random methods. Default: ``0``

    Returns:
        float: 0 or more; NaN for a result without any mass.

    Raises:
        TypeError: if the model is remote or has no embeddings.
        ValueError: if the result was loaded, or the radius is not above zero.

    Source: Yeh et al. (2019), :cite:p:`yeh2019infidelity`.
    """
    count = whole_number("samples", samples, minimum=1, remedy="Pass 1 or more.")
    number = whole_number("seed", seed, stop=2**32, remedy=_SEEDS)
    is_number = isinstance(radius, int | float) and not isinstance(radius, bool)
    if not is_number or not 0.0 < radius < float("inf"):
        raise ValueError(
            complaint(
                "radius",
                "must be a finite number above zero",
                f"{shown(radius)} came",
                "Pass 0.02, for example.",
            )
        )
    model = _model_of(result, "sensitivity")
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(
            complaint(
                "sensitivity",
                "needs a model with embeddings",
                f"{type(model).__name__} came",
                "Use a model of transformers.",
            )
        )
    scale = float(radius) * float(weight.detach().float().std())
    task = result.evaluator().task
    ids = np.unique([*task.prompt.ids, *task.generated])
    shape = (len(ids), weight.shape[1])

    with _own_random_states():
        _seed(number)
        # The moves first, as what is random in the method starts anew each time.
        moves = (2 * torch.rand(count, *shape) - 1) * scale
        _seed(number)
        plain = result.repeat().seq_attr
        changes = []
        for move in moves:
            _seed(number)
            with _moved(embeddings, ids, move):
                changes.append((result.repeat().seq_attr - plain).norm())
    size = plain.norm()
    return float(torch.stack(changes).max() / size) if size else float("nan")


@contextmanager
def _moved(embeddings: Any, ids: npt.NDArray[np.int64], move: Tensor) -> Iterator[None]:
    row = torch.full((int(embeddings.weight.shape[0]),), len(ids))
    row[torch.from_numpy(ids)] = torch.arange(len(ids))
    table = torch.cat([move, move.new_zeros(1, move.shape[1])])

    def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        own = table[row[args[0].cpu()]]
        return output + own.to(device=output.device, dtype=output.dtype)

    handle = embeddings.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _own_random_states() -> Iterator[None]:
    """Random states that may be changed; as they were, afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    state = np.random.get_state()  # noqa: NPY002  # some of Captum's methods draw there
    try:
        with torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002


def _model_of(result: GraphAttributionResult, where: str) -> Any:
    """The model that a result came from."""
    llm_attr = result.evaluator().task.llm_attr
    if family(llm_attr) == "remote" or not isinstance(llm_attr.model, nn.Module):
        raise TypeError(
            complaint(
                where,
                "needs the weights of the model",
                "the model is remote",
                "Load the model.",
            )
        )
    return llm_attr.model
