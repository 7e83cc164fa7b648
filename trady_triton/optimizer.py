"""TraDyOptimizer: draws and steps. Bookkeeping is in `optim.channel_groups`, the maths in `optim.update`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakMethod

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook

from trady_triton.optim.channel_groups import ChannelGroups
from trady_triton.optim.distributed import Processes, StepsWithoutBatch
from trady_triton.optim.gradients import clip_jointly_, missed_compact, unscale_
from trady_triton.optim.options import check_states, check_whole, defaults_of, listed, tensors_in
from trady_triton.optim.states import fill_channel_state, fill_whole_state
from trady_triton.optim.strict import StepMemory
from trady_triton.optim.update import ChannelUpdate, Trained, update_whole
from trady_triton.plan import Plan
from trady_triton.sampling import Scores, Selection
from trady_triton.slot import find_pool

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TraDyOptimizer(ChannelGroups, Joinable):
    """SGD or AdamW, as in torch.optim, for a model to which `apply_plan` was applied. The paper has plain SGD.

    Call `resample(epoch)` at the start of every epoch, then step as usual; or let `step()` draw anew every so many
    steps (`resample_every`). `param_groups` hold the tensors that have gradients: the parameters that are trained whole
    (the head), and for each weight of the pool the proxy of its compact gradient; so clipping over `param_groups`,
    schedulers and GradScaler see everything that is trained.
    Weight decay touches the drawn channels only; all other weights stay bit for bit what they are. Momentum and AdamW
    keep state for the drawn channels and for what is trained whole, and for nothing else; a plan in bytes must have
    counted it: `make_plan(..., optimizer="momentum")` or "adamw".

    Args:
        params: `model.parameters()`, named parameters, or groups of them; frozen parameters are passed over. Weights of
            the pool that they leave out, as loops do that pass only what requires a gradient, join the first group of
            the largest weight decay.
        plan: the plan that was applied to the model; by default it is found from the parameters.
        lr: learning rate, a float or a 0-dim tensor.
        weight_decay: L2 penalty added to the gradient, as in torch.optim.SGD; with AdamW decoupled from it.
        strict: let `step()` refuse an update whose forward and backward took more than the plan's `memory`. Without it
            nobody looks: another batch size, loss or autocast than the plan was made for go unnoticed. What counts:
            see `StepMemory`; on the CPU what runs inside `with optimizer.metered():`.
        algorithm: "sgd" or "adamw".
        momentum, nesterov: of SGD.
        betas, eps: of AdamW.
        state_policy: what becomes of the drawn channels' state when channels are drawn anew. "carry" keeps that of
            channels that are drawn again and starts others from zero, with step counts of their own; "reset" starts
            all from zero. What is trained whole keeps its state.
        resample_every: "epoch", at which the loop calls `resample(epoch)`; or a number of steps, after which `step()`
            itself makes the next draw, of index 0, 1, ... A step that a GradScaler skips, or of learning rate 0,
            counts for nothing.
        max_grad_norm: clip the joint norm of all gradients in `step()`, for loops that cannot clip over `param_groups`.
            The loop must not clip as well: over `model.parameters()` it would clip what is trained whole twice.
        average_at: when several processes average compact gradients: "step", at once for all backwards of a step; or
            "backward", after each, for loops that unscale or clip before the step and cannot call `synchronize()`.
        process_group: whose processes train together; by default all, where torch.distributed is initialised.

    Raises:
        ValueError: an option out of range; the algorithm keeps more state than the plan has counted; `strict` for a
            plan without `memory`; or the parameters lack a layer of the plan: the plan was not applied, another one
            was, or the model is a copy of the planned one.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        plan: Plan | None = None,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        strict: bool = False,
        *,
        algorithm: str = "sgd",
        momentum: float = 0.0,
        nesterov: bool = False,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        state_policy: str = "carry",
        resample_every: int | str = "epoch",
        max_grad_norm: float | None = None,
        average_at: str = "step",
        process_group: ProcessGroup | None = None,
    ) -> None:
        Joinable.__init__(self)
        groups = listed(params)
        pool = next((found for item in tensors_in(groups) if (found := find_pool(item)) is not None), None)
        plan = pool.plan if plan is None and pool is not None else plan
        if not isinstance(plan, Plan):
            raise TypeError(
                f"plan of type {type(plan).__name__}: wanted the Plan that was applied to the model, and "
                "the parameters lead to none"
            )
        check_whole(state_policy, resample_every, max_grad_norm, average_at)
        options = defaults_of(algorithm, momentum, nesterov, betas, eps)
        self.resample_every, self.max_grad_norm, self.average_at = resample_every, max_grad_norm, average_at
        self._update_channels = ChannelUpdate(algorithm)
        self._processes = Processes(process_group)
        self._warns = True
        defaults = {"lr": lr, "weight_decay": weight_decay, **options, "trady_every": resample_every}
        super().__init__(groups, defaults, plan, pool, algorithm, state_policy)
        self.memory = StepMemory(plan, self.join_device, self._owned) if strict else None
        if self.resample_every != "epoch":
            self.resample()

    def resample(self, epoch: int | None = None, scores: Scores | None = None) -> Selection:
        """Draw the channels of an epoch and install them; without an argument, of the next epoch.

        Asking for the installed epoch again changes nothing (but follows a model that was moved). Where `step()` draws,
        `resample()` without an argument only does that.

        Args:
            epoch: from 0.
            scores: for samplers that draw by what a probe measures (see `trady_triton.probes`), layer -> a number for
                each channel. Norms of weights, and of gradients seen in training, the optimizer keeps itself.

        Returns:
            the channels: layer name -> ids, as `plan.sample(epoch, scores)`.

        Raises:
            ValueError: the sampler needs scores and got none, or they do not fit the layers; or an epoch was given
                where `step()` draws.
            RuntimeError: a forward waits for its backward, or gradients wait for step() or zero_grad(); or the model
                has lost its plan, or weights that it had then.
        """
        if self.resample_every != "epoch":
            if epoch is not None:
                raise ValueError(f"epoch {epoch}: channels are drawn by step(), every {self.resample_every} steps")
            epoch = self.param_groups[0]["trady_steps"] // self.resample_every
        epoch = (-1 if self.epoch is None else self.epoch) + 1 if epoch is None else epoch
        is_new = epoch != self.epoch
        found = self._scores.following(self._all_slots(), scores) if is_new else self._scores.kept
        channels = self.plan.sample(epoch, found)
        if is_new or any(slot.is_stale for slot in self._all_slots()):
            self._check_attached()
            self._check_idle()
            self._install(epoch, channels)
        if is_new:
            self._scores.settle(found)
        if self.memory is not None:
            self.memory.restart()
        return channels

    def metered(self) -> AbstractContextManager[None]:
        """What an optimizer with `strict` counts on the CPU: forward and backward of a step, or of a part of it.

            with optimizer.metered():
                loss_fn(model(x), y).backward()
            optimizer.step()

        On CUDA, where everything is counted, and without `strict` the block changes nothing.
        """
        return nullcontext() if self.memory is None else self.memory.metered()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the drawn channels and what is trained whole.

        Raises:
            RuntimeError: `resample` was never called, so nothing but the head would be trained; or `strict` and the
                step took more memory than the plan promises. Nothing is changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad(), self.metered():
                loss = closure()
        Join.notify_join_context(self)
        try:
            self._take_step()
        except BaseException:  # a GradScaler would multiply what it left here by its scale at the next try
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise
        return loss

    def _take_step(self) -> None:
        if self.epoch is None:
            raise RuntimeError("no channels are drawn: call optimizer.resample(epoch) at the start of every epoch")
        for group in self.param_groups:
            check_states(group, self.algorithm, self.plan.cost)  # a scheduler may have turned momentum on
        if self.memory is not None:
            self.memory.check()
        counts = any(float(group["lr"]) != 0 for group in self.param_groups)
        steps = self.param_groups[0]["trady_steps"] + counts
        draws = self.resample_every != "epoch" and steps // self.resample_every != self.epoch
        if draws:
            self._check_not_waiting()
        if self._processes.count > 1:
            used = hasattr(self, "found_inf") or self._watch.changes(self._proxies()) > 0
            if self._processes.must_average(self._all_slots(), used):
                self.synchronize()
        is_applied = not self._found_inf()
        if is_applied:
            if (scale := getattr(self, "grad_scale", None)) is not None:  # a GradScaler left it to step()
                unscale_(self._leaves(), scale)
            self._scores.see(self._all_slots())  # a process without a batch cannot know how the others clip
            self._clip()
            self._update()
        for slot in self._all_slots():
            slot.settle()
        self._processes.forget()
        if is_applied:
            self._count(steps)
            if draws:
                self.resample()

    def _count(self, steps: int) -> None:
        for group in self.param_groups:
            group["trady_steps"] = steps
        for slot in self._all_slots():
            slot.seed_step(steps)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch.optim, compact gradients included."""
        super().zero_grad(set_to_none)
        for slot in self._all_slots():
            slot.draw.unapplied = False
        self._watch.forget()
        self._processes.forget()

    @torch.no_grad()
    def synchronize(self) -> None:
        """Average the compact gradients over all processes, as DistributedDataParallel does for the others.

        `step()` does it. Call it after the last backward of a step, in every process, where something has to see the
        averages before: clipping, or a GradScaler, whose search for infinities all processes must agree on. With one
        process it does nothing.

        Raises:
            RuntimeError: the processes run different plans or epochs.
        """
        if self._processes.count > 1 and self.epoch is not None:
            name = f"epoch {self.epoch} of plan {self.plan.fingerprint}"
            self._processes.average(self._all_slots(), self._digest, name)

    def _install(self, epoch: int, channels: Mapping[str, Sequence[int]]) -> None:
        super()._install(epoch, channels)
        if self.average_at == "backward":
            for proxy in self._proxies():
                self._processes.after_backward(proxy, WeakMethod(self.synchronize))

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a process does that ran out of batches, inside torch's `with Join([model, optimizer]):`.

        It takes part in every step with no gradient of its own, and gets its states from a process that had batches to
        the end, as the model gets its weights.
        """

        @torch.no_grad()
        def step() -> None:
            with self.metered():
                self.zero_grad()
            self._take_step()

        @torch.no_grad()
        def finish(is_last_joiner: bool) -> None:
            states = [value for state in self.state.values() for value in state.values()]
            self._processes.copy_from_last(states, self.join_device, is_last_joiner)

        return StepsWithoutBatch(step, finish)

    @property
    def join_device(self) -> torch.device:
        """The device of what is trained."""
        return self._leaves()[0].device

    @property
    def join_process_group(self) -> Any:
        """The processes that train together."""
        return self._processes.group or torch.distributed.group.WORLD

    def _update(self) -> None:
        """One step of everything that has a gradient."""
        for group, parameters in self._whole():
            moved = [parameter for parameter in parameters if parameter.grad is not None]
            if moved:
                states = [fill_whole_state(self.state[p], p, self.algorithm, group) for p in moved]
                update_whole(self.algorithm, group, moved, states)
        self._update_channels(
            Trained(slot, fill_channel_state(self.state[slot.proxy], slot, self.algorithm, group), group)
            for group, slots in zip(self.param_groups, self._slots, strict=True)
            for slot in slots
            if slot.proxy.grad is not None
        )

    def _owned(self) -> Iterator[Tensor]:
        """All that lives from step to step: the model, proxies and gradients, ids of channels, states."""
        if self._pool is not None and (model := self._pool.model()) is not None:
            yield from (*model.parameters(), *model.buffers())
        yield from self._leaves()
        yield from (leaf.grad for leaf in self._leaves() if leaf.grad is not None)
        yield from (slot.channels for slot in self._all_slots())
        yield from (value for state in self.state.values() for value in state.values() if isinstance(value, Tensor))

    def _found_inf(self) -> bool:
        """Whether a GradScaler, which sets `found_inf` around step(), saw a gradient that is not finite."""
        found = getattr(self, "found_inf", None)
        return found is not None and bool(found)

    def _clip(self) -> None:
        """Clip the joint norm, or else tell once that a loop clipped without the compact gradients."""
        whole = [parameter for _, parameters in self._whole() for parameter in parameters]
        if self.max_grad_norm is not None:
            clip_jointly_(self._leaves(), self.max_grad_norm)
        # Among processes whole gradients change after the backward by being averaged, or copied.
        elif self._warns and not self._processes.exist and missed_compact(self._watch, whole, self._proxies()):
            self._warns = False
            warnings.warn(
                "gradients of the parameters that are trained whole were changed after the backward, as by "
                "clip_grad_norm_(model.parameters(), ...), and those of the drawn channels were not: clip over the "
                "tensors of optimizer.param_groups, or do not clip and give the optimizer max_grad_norm",
                stacklevel=6,
            )

    def _leaves(self) -> list[Tensor]:
        """All that may have a gradient."""
        return [leaf for group in self.param_groups for leaf in group["params"]]

    def _proxies(self) -> list[Tensor]:
        return [slot.proxy for slot in self._all_slots()]
