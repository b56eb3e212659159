"""The walk over a model's blocks: one forward pass a batch, all of them kept in step, block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from greenlet import getcurrent
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from ..errors import CalibrationError
from ..modeling_pgsvd import set_submodule
from .anchored import AnchoredRecorder, Seen
from .forward import evaluating, kind
from .gram import GramRecorder, InputObserver, InputSurvey
from .padding import reads_tokens
from .passes import Pass, Replay, Step, first_tensor, merged
from .routing import Routing


class Weights(Protocol):
    """Where the weights of a model come from while it is walked over."""

    def load(self, name: str) -> None:
        """Make the weights of a block resident."""
        ...

    def release(self, name: str) -> None:
        """Let go of them."""
        ...


class InMemory:
    """All weights are in memory, and stay."""

    def load(self, name: str) -> None:
        """Nothing to do."""

    def release(self, name: str) -> None:
        """Nothing to do."""


class BlockWalk(AbstractContextManager):
    """Runs a model on a calibration set in such a way that every batch passes a block before any passes the next.

    Each batch has a forward pass of its own, suspended before every block. So a block is run on exactly what the model
    gives it, whatever the model computes between its blocks, and each weight is needed for a while only. Between two
    blocks, a pass holds what the model's own `forward` holds: a hidden state, what is computed once for all blocks,
    and the embeddings. For anchored calibration a second pass a batch runs through the compressed blocks.

    Args:
        model: run in evaluation mode while the walk is entered; not changed.
        blocks: names of its repeated blocks.
        batches: model inputs, keyword arguments of `forward`.
        weights: asked for a block's weights before it runs.
        whole: whether to compute the logits of every token, which matters to layers outside the blocks only.
        keep: applied to what modules give to later ones, to keep it elsewhere until it is used.
        numbers: of the batches that are measured on, by default all; the survey is of all.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        batches: Sequence[Mapping[str, Any]],
        weights: Weights | None = None,
        whole: bool = False,
        keep: Callable[[nn.Module, tuple, Any], Any] | None = None,
        numbers: Sequence[int] | None = None,
    ):
        self.model, self.batches, self.whole = model, batches, whole
        self.weights, self.keep = weights or InMemory(), keep
        self.numbers = range(len(batches)) if numbers is None else numbers
        self.modules = {name: model.get_submodule(name) for name in blocks}
        self.running: Pass | None = None
        self.order: dict[str, int] = {}
        self.once: frozenset[str] = frozenset()
        self._of_tokens = {name: reads_tokens(model, name) for name in blocks}
        self._expected: dict[frozenset[str], Counter[str]] = {}
        self._ways: list[list[str]] = []
        self._passes: list[Pass] = []
        self._stack = ExitStack()

    def __enter__(self) -> BlockWalk:
        self._stack.enter_context(evaluating(self.model))
        for name, module in self.modules.items():
            before = module.register_forward_pre_hook(self._before(name), with_kwargs=True, prepend=True)
            self._stack.callback(before.remove)
        if self.keep is not None:
            inside = {inner for module in self.modules.values() for inner in list(module.modules())[1:]}
            for module in self.model.modules():
                if module not in inside:
                    self._stack.callback(module.register_forward_hook(self.keep).remove)
        for module in self.modules.values():
            self._stack.callback(module.register_forward_hook(self._after).remove)
        return self

    def __exit__(self, *exception) -> None:
        with self._stack:
            for one in self._passes:
                if one:
                    one.give_up()
            self._passes.clear()

    @property
    def blocks(self) -> list[str]:
        """The blocks in the order in which all batches will have passed them, once `survey` has seen it."""
        return sorted(self.order, key=self.order.__getitem__)

    def rows(self, x: Tensor, values: Tensor) -> Tensor:
        """The rows of a layer's input, or of what it makes of it, that are not padding in the pass that is running."""
        assert self.running is not None
        return self.running.padding.rows(x, values)

    def survey(self, layers: Mapping[str, nn.Module]) -> InputSurvey:
        """Run one batch of each kind through the whole model, and more of them until every layer has been reached.

        Two batches are of one kind if they hold the same inputs: images and text, say, or text alone.

        Raises:
            CalibrationError: the model does not accept a batch.
            NonFiniteError: an activation holds NaN or infinity.
        """
        survey = InputSurvey(layers, self.rows)
        for number, batch in enumerate(self.batches):
            if kind(batch) in self._expected and not survey.unseen:
                continue
            with survey:
                calls = self._through(Pass(self, number))
            self._expected[kind(batch)] = Counter(calls) | self._expected.get(kind(batch), Counter())
            self._ways.append(calls)
        self.order = {block: place for place, block in enumerate(merged(self._ways))}
        self.once = survey.once
        return survey

    def _through(self, one: Pass) -> list[str]:
        """Take a pass through the whole model; the calls of blocks that it makes."""
        self._passes.append(one)
        one.proceed()
        while one:
            block = self._stands(one)
            self.weights.load(block)
            while one and one.at == block:
                one.proceed()
            self.weights.release(block)
        self._passes.remove(one)
        return one.calls

    def measure(
        self, recorder_of: Callable[[str], GramRecorder | None], outside: InputObserver | None = None
    ) -> Iterator[Step]:
        """Run all batches, and hand out each block with what was recorded of it once all of them have passed it.

        The block's layers may be replaced before the next one is asked for. In parallel calibration nothing that is
        measured later comes from replaced layers; with an `AnchoredRecorder` everything does.

        Args:
            recorder_of: called before a block runs for the first time; `None` where nothing is to be recorded.
            outside: sees the layers outside the blocks, all the time.

        Raises:
            CalibrationError: a batch takes another way through the model than the first of its kind did.
            NonFiniteError: an activation holds NaN or infinity.
        """
        passes = [Pass(self, number) for number in self.numbers]

        def run(block: str, one: Pass, recorder: GramRecorder | None, last: bool) -> None:
            with recorder or ExitStack():
                while one and one.at == block:
                    one.proceed()

        with outside or ExitStack():
            yield from self._through_blocks(passes, lambda block: [recorder_of(block)], run)

    def measure_anchored(
        self,
        recorders_of: Callable[[str], Sequence[AnchoredRecorder | None]],
        outside: InputObserver | None = None,
        recalls: bool = False,
    ) -> Iterator[Step]:
        """As `measure`, for anchored calibration, with a second pass a batch through the compressed blocks.

        A block is handed out once for each of its recorders. Its layers that the recorder saw are to be replaced
        before the next one is asked for: what that records comes from them.

        Args:
            recorders_of: called before a block runs; in the order in which its layers do.
            outside: as for `measure`.
            recalls: whether to hand out what it takes to refine a block.

        Raises:
            CalibrationError: besides, a block is called more than once in a forward pass, or compressing sends a batch
                another way through the model.
        """
        self._refuse_repeated()
        dense, compressed = ([Pass(self, number, recall) for number in self.numbers] for recall in (recalls, False))
        twins = dict(zip(self.numbers, compressed, strict=True))
        replaced: dict[str, nn.Module] = {}

        def run(block: str, one: Pass, recorder: AnchoredRecorder | None, last: bool) -> None:
            with Routing(self.modules[block]) as routing:
                with self._instead(replaced):
                    self._look_at_dense(block, one, twins[one.number], recorder, outside if last else None, last)
                if recorder is not None:
                    recorder.pairing, routing.repeats = "compressed", True
                    with recorder:
                        self._observe(block, twins[one.number], recorder)

        self._start(compressed)
        for step in self._through_blocks(dense, recorders_of, run, outside):
            standing = [one for one in compressed if one and one.at == step.block]
            if step.last:
                pairs = zip(dense, compressed, strict=True)
                step.replays = [
                    Replay(self, t, d.outcome) for d, t in pairs if t in standing and d.outcome is not None
                ]
            if step.recorder is not None:
                replaced |= step.recorder.layers
            yield step
            step.release()  # not held while the next block is measured
            if step.last:
                replaced.clear()
                for one in standing:
                    one.proceed()

    def _through_blocks(
        self,
        passes: list[Pass],
        recorders_of: Callable[[str], Sequence[Any]],
        run: Callable[[str, Pass, Any, bool], None],
        at_start: InputObserver | None = None,
    ) -> Iterator[Step]:
        """Send all passes through each block, and hand it out with its recorders, in memory, once none will come back.

        Passes are started here, where they are sent on, too: an error of PyTorch walks up the C stack, past where its
        greenlet begins, and may not find other calls there than those that started it.

        Args:
            passes: not started yet.
            recorders_of: called before a block runs for the first time.
            run: shows a recorder what a pass makes of the block that it stands before, and sends it through if the
                recorder is the block's last.
            at_start: sees the layers before the first block.
        """
        with at_start or ExitStack():
            self._start(passes)
        recorders: dict[str, list[Any]] = {}
        passed: set[str] = set()
        while waiting := [one for one in passes if one]:
            block = self._next(waiting)
            _refuse_again(block, passed)
            self.weights.load(block)
            if block not in recorders:
                recorders[block] = list(recorders_of(block))
            here = [one for one in waiting if one.at == block]
            while len(recorders[block]) > 1:
                for one in here:
                    run(block, one, recorders[block][0], False)
                yield Step(block, recorders[block].pop(0), False)
            for one in here:
                run(block, one, recorders[block][0], True)
            if self._is_passed(block, passes):
                passed.add(block)
                yield Step(block, recorders.pop(block)[0])
            self.weights.release(block)
        for block in list(recorders):  # a batch passed it by that was expected to run it
            self.weights.load(block)
            yield Step(block, recorders.pop(block)[0])
            self.weights.release(block)

    def _look_at_dense(
        self,
        block: str,
        dense: Pass,
        compressed: Pass,
        recorder: AnchoredRecorder | None,
        outside: InputObserver | None,
        send: bool,
    ) -> None:
        """Run a dense block on the dense model's inputs, and if wanted send the pass on."""
        if not compressed or compressed.at != block:
            raise CalibrationError(
                f"batch {dense.number} reaches {block} in the dense model but not after compression, or batches with "
                "the same inputs take several ways through the model; use calibration='parallel'"
            )
        with recorder or ExitStack():
            if recorder is not None:
                recorder.pairing = "dense"
            if recorder is not None and not send:
                self._observe(block, dense, recorder)
                return
            with outside or ExitStack():
                dense.proceed()

    @contextmanager
    def _instead(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Modules of the model by others, for a while."""
        now = {name: self.model.get_submodule(name) for name in modules}
        try:
            for name, module in modules.items():
                set_submodule(self.model, name, module)
            yield
        finally:
            for name, module in now.items():
                set_submodule(self.model, name, module)

    def _observe(self, block: str, one: Pass, recorder: AnchoredRecorder) -> None:
        """Let a recorder see its layers in a block, run as a pass that stands before it would, as far as need be."""
        recorder.awaited = set(recorder.layers) if recorder.layers.keys() <= self.once else set()
        try:
            self._replay(block, one, {})
        except Seen:
            pass
        finally:
            recorder.awaited = set()

    def _replay(self, block: str, one: Pass, weights: Mapping[str, Tensor]) -> Tensor:
        """Run a block on a copy of what a pass that stands before it would give it.

        Args:
            block: its name.
            one: the pass.
            weights: in the place of the block's own, by name.

        Returns:
            The first of its outputs `(T, k)`, padding left out.
        """
        args, kwargs = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, one.arguments)
        self.running = one
        self.enter(one, args, kwargs)
        grad = torch.is_grad_enabled()
        try:
            with one.in_its_modes(), torch.set_grad_enabled(grad):
                outputs = first_tensor(functional_call(self.modules[block], dict(weights), args, kwargs))
            return one.padding.rows(outputs, outputs)
        finally:
            one.padding.leave_block()
            self.running = None

    def _start(self, passes: list[Pass]) -> None:
        self._passes += passes
        for one in passes:
            one.proceed()

    def _place(self, block: str) -> int:
        return self.order.setdefault(block, len(self.order))

    def _stands(self, one: Pass) -> str:
        assert one.at is not None, "a pass that is not at its end stands before a block"
        return one.at

    def _next(self, waiting: list[Pass]) -> str:
        """The block to run."""
        return min((self._stands(one) for one in waiting), key=self._place)

    def _is_passed(self, block: str, passes: list[Pass]) -> bool:
        """Whether no pass will call a block again."""
        return not any(one and (one.at == block or self._will_call(one, block)) for one in passes)

    def _will_call(self, one: Pass, block: str) -> bool:
        """Whether a pass will come to a block that it does not stand before, as the first of its kind foretells."""
        return one.calls.count(block) < self._expected[kind(self.batches[one.number])][block]

    def _refuse_repeated(self) -> None:
        repeated = [block for calls in self._expected.values() for block, times in calls.items() if times > 1]
        if repeated:
            raise CalibrationError(
                f"{repeated[0]} runs more than once in a forward pass, and anchored calibration fits a block where it "
                "runs; use calibration='parallel'"
            )

    def enter(self, one: Pass, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Tell a pass's padding mask which block comes next."""
        block = self._stands(one)
        one.padding.enter_block(self.modules[block], args, kwargs, self._of_tokens[block])

    def _before(self, name: str):
        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            one = getcurrent()
            if isinstance(one, Pass) and one.walk is self:
                one.stop_before(name, args, kwargs)

        return before

    def _after(self, module: nn.Module, args: tuple, result: Any) -> None:
        one = getcurrent()
        if isinstance(one, Pass) and one.walk is self:
            if one.recalls:
                outputs = first_tensor(result)
                # a copy: the model may change what a block gives in place
                one.outcome = one.padding.rows(outputs, outputs).clone()
                if self.keep is not None:
                    one.outcome = self.keep(module, args, one.outcome)
            one.padding.leave_block()


def _refuse_again(block: str, passed: set[str]) -> None:
    if block in passed:
        raise CalibrationError(
            f"a batch of the calibration set runs {block} after the first batch with the same inputs would have been "
            "past it; give batches that take one way through the model"
        )
