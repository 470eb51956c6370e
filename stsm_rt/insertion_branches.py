"""The residual branches of a network, found by structure: where its values fork and where they are added again.

One run on shapes alone, in which nothing is computed, records which value was computed from which, and inside which
modules. A residual block is then a sum of terms that all come from one value, the fork: one of them through at most
one layer with weights (the identity, or its projection), the others, the branches, through more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from stsm_rt.errors import UserError

_SUMS = {"add", "add_"}
_WITH_WEIGHTS = {"convolution", "addmm", "mm", "bmm", "baddbmm"}
# An arm that takes part of the fork is no identity: Res2Net adds one share of the channels to another.
_PARTS = {"slice", "select", "split", "split_with_sizes", "unbind"}


@dataclass(frozen=True)
class Value:
    """A tensor of the run that depends on the network's input.

    Attributes:
        operation: What computed it, an ATen name.
        sources: The values that it was computed from, by number.
        shape: Its shape.
        weighted: Whether the operation is a convolution or a product with weights.
    """

    operation: str
    sources: tuple[int, ...]
    shape: tuple[int, ...]
    weighted: bool


@dataclass
class Call:
    """A module's turn in the run.

    Attributes:
        path: Of the module in the network.
        module: The module.
        value: Which value its first argument is; None if that does not depend on the network's input.
        times: How often that tensor stands among its arguments.
        start: The number of the first value computed inside.
        stop: One past the last.
    """

    path: str
    module: nn.Module
    value: int | None
    times: int
    start: int
    stop: int = 0

    def holds(self, value: int) -> bool:
        """Whether a value was computed inside."""
        return self.start <= value < self.stop


@dataclass(frozen=True)
class ResidualBlock:
    """A sum of an identity and branches.

    Attributes:
        fork: The value that all terms come from.
        total: The value that is their sum.
        first_layers: For the branches, the modules that read the fork first.
    """

    fork: int
    total: int
    first_layers: tuple[Call, ...]


class Trace(TorchDispatchMode):
    """What happened in one run of a network, in order.

    Attributes:
        given: The network's input.
        values: All values, sources before what is computed from them; number 0 is the network's input.
        calls: All turns of modules.
        flops: Of the run, as `torch.utils.flop_counter` counts them.
    """

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.values = [Value("input", (), tuple(given.shape), False)]
        self.calls: list[Call] = []
        self.flops = 0
        self.given = given
        self._numbers = {id(given): 0}
        self._alive: list[Tensor] = []  # an id is its tensor's as long as that lives
        self._open: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note one operation."""
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        sources = tuple(self._numbers[id(x)] for x in tensors if id(x) in self._numbers)
        fixed = any(id(x) not in self._numbers and x.dim() > 1 for x in tensors)
        result = func(*args, **(kwargs or {}))
        if sources:
            name = func.overloadpacket.__name__
            for output in tree_leaves(result):
                if isinstance(output, Tensor):
                    self._numbers[id(output)] = len(self.values)
                    self._alive.append(output)
                    self.values.append(Value(name, sources, tuple(output.shape), name in _WITH_WEIGHTS and fixed))
        return result

    @contextmanager
    def watching(self, network: nn.Module) -> Iterator[None]:
        """Note the turns of the network's modules, too."""
        with ExitStack() as hooks:
            for path, module in network.named_modules():
                before = partial(self._enter, path)
                hooks.callback(module.register_forward_pre_hook(before, prepend=True).remove)
                hooks.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        first = args[0] if args else None
        number = self._numbers.get(id(first))
        times = sum(argument is first for argument in args)
        self._open.append(Call(path, module, number, times, len(self.values)))
        self.calls.append(self._open[-1])

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._open.pop().stop = len(self.values)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own mode is restored."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def explaining(network: nn.Module, given: Tensor) -> Iterator[None]:
    """Turn what a network raises on an input into a sentence for the person who gave it.

    Raises:
        UserError: The network does not run.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # any network's
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{type(network).__name__} does not run on {tuple(given.shape)}: {reason}; give an input of the size and "
            f"type that it takes"
        ) from error


def run_on_shapes(network: nn.Module, given: Tensor) -> Trace:
    """Run a network on a tensor's shape, dtype and device; neither weights nor statistics change.

    Raises:
        UserError: The network does not run on such a tensor.
    """
    fast_attention = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that hides its products, and knows no shapes
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with explaining(network, given), evaluating(network), fake, FlopCounterMode(display=False) as counter:
            trace = Trace(fake.from_tensor(given))
            with trace.watching(network), trace:
                network(trace.given)
            trace.flops = counter.get_total_flops()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
    return trace


def residual_blocks(trace: Trace) -> list[ResidualBlock]:
    """The residual blocks of a run, in order."""
    values = trace.values
    readers: list[list[int]] = [[] for _ in values]
    for number, value in enumerate(values):
        for source in set(value.sources):
            readers[source].append(number)
    forks = _forks(values)
    blocks = []
    for total, value in enumerate(values):
        if not _adds(value):
            continue
        fork = forks[total]
        terms = _terms(values, readers, forks, total)
        if any(values[term].shape != value.shape for term in terms):
            continue
        arms = [_arm(values, fork, term) for term in terms]
        layers = [sum(values[number].weighted for number in arm) for arm in arms]
        identity = arms[layers.index(min(layers))]
        if min(layers) > 1 or any(values[number].operation in _PARTS for number in identity):
            continue
        branches = {n for arm, count in zip(arms, layers, strict=True) if count > min(layers) for n in arm}
        first_layers = _first_layers(trace, readers, fork, total, branches, identity)
        if first_layers:
            blocks.append(ResidualBlock(fork, total, tuple(first_layers)))
    return blocks


def _adds(value: Value) -> bool:
    return value.operation in _SUMS and len(set(value.sources)) == 2


def _forks(values: list[Value]) -> list[int]:
    """For each value the last one that all ways to it from the input pass: its immediate dominator."""
    forks, depths = [0], [0]

    def meet(a: int, b: int) -> int:
        while a != b:
            if depths[a] < depths[b]:
                a, b = b, a
            a = forks[a]
        return a

    for value in values[1:]:
        forks.append(reduce(meet, value.sources))
        depths.append(depths[forks[-1]] + 1)
    return forks


def _terms(values: list[Value], readers: list[list[int]], forks: list[int], total: int) -> list[int]:
    """What a sum adds up; the terms of a sum of sums, if all come from the same fork."""
    terms = []
    for source in values[total].sources:
        nested = _adds(values[source]) and len(readers[source]) == 1 and forks[source] == forks[total]
        terms += _terms(values, readers, forks, source) if nested else [source]
    return terms


def _arm(values: list[Value], fork: int, term: int) -> set[int]:
    """All values on the ways from the fork to a term; without the fork."""
    arm: set[int] = set()
    ahead = [term]
    while ahead:
        number = ahead.pop()
        if number != fork and number not in arm:
            arm.add(number)
            ahead += values[number].sources
    return arm


def _first_layers(
    trace: Trace, readers: list[list[int]], fork: int, total: int, branches: set[int], identity: set[int]
) -> list[Call]:
    """The innermost modules that read the fork, or what is made of it, and lie within the branches alone."""
    layers: dict[str, Call] = {}
    ahead = [fork]
    for value in ahead:
        for reader in readers[value]:
            if reader in branches:
                calls = [c for c in trace.calls if c.value == value and c.holds(reader) and not c.holds(total)]
                if calls and reader not in identity:
                    layers[calls[-1].path] = calls[-1]
                elif reader not in ahead and not _adds(trace.values[reader]):
                    ahead.append(reader)
    return list(layers.values())
