"""TraDyOptimizer: which channels and parameters are trained now, with what state; the maths is in `update`."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.optim import Optimizer

from trady_triton.distributed import Processes, StepsWithoutBatch
from trady_triton.gradients import GradientWatch, clip_jointly_, missed_compact
from trady_triton.options import check_group, check_whole, defaults_of, listed, tensors_in
from trady_triton.plan import Plan
from trady_triton.sampling import Scores, Selection
from trady_triton.scores import ChannelScores
from trady_triton.slot import ChannelSlot, find_pool, find_slot
from trady_triton.states import (
    State,
    carry_,
    check_saved,
    check_saved_groups,
    fill_whole_state,
    load_,
    new_channel_state,
    state_shapes,
)
from trady_triton.strict import StepMemory
from trady_triton.update import ChannelUpdate, Trained, update_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class TraDyOptimizer(Optimizer, Joinable):
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
        max_grad_norm: clip the joint norm of all gradients in `step()`. For loops that clip over `model.parameters()`,
            which lacks the compact gradients: what they have clipped is not clipped twice (with one process).
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
        check_whole(state_policy, resample_every, max_grad_norm)
        options = defaults_of(algorithm, momentum, nesterov, betas, eps)
        self.plan, self.algorithm = plan, algorithm
        self.state_policy, self.resample_every, self.max_grad_norm = state_policy, resample_every, max_grad_norm
        self._slots: list[list[ChannelSlot]] = []
        self._scores = ChannelScores(plan)
        self._update_channels = ChannelUpdate(algorithm)
        self._processes, self._digest = Processes(process_group), ""
        self._watch, self._warns = GradientWatch(weighs=max_grad_norm is not None), max_grad_norm is None
        own = {"trady_plan": plan.fingerprint, "trady_every": resample_every, "trady_epoch": -1, "trady_steps": 0}
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, **options, **own})
        if pool is not None:
            self._add_left_out(pool.slots)
        missing = set(plan.pool) - {slot.layer for slot in self._all_slots()}
        if missing:
            raise ValueError(
                f"{len(missing)} of the plan's {len(plan.pool)} layers are not among the parameters, such as "
                f"{min(missing)!r}: call apply_plan(model, plan) first and give the parameters of that very model; a "
                "deepcopy needs remove_plan and apply_plan of its own, and fully_shard comes before apply_plan"
            )
        assert pool is not None
        self._model = pool.model
        self.memory = StepMemory(plan, self.join_device, self._owned) if strict else None
        if self.resample_every != "epoch":
            self.resample()

    @property
    def epoch(self) -> int | None:
        """The epoch, or the index of the draw, whose channels are installed; None before the first `resample`."""
        epoch = self.param_groups[0]["trady_epoch"]
        return None if epoch < 0 else epoch

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters; their proxies take the place of the frozen weights."""
        check_group({**self.defaults, **param_group}, self.algorithm, self.plan.cost)
        params = param_group["params"]
        given = [params] if isinstance(params, Tensor) else list(params)
        named = [item if isinstance(item, tuple) else (None, item) for item in given]
        slots = [slot for _, weight in named if (slot := find_slot(weight)) is not None]
        self._check_slots(slots)
        kept = [(name, parameter) for name, parameter in named if parameter.requires_grad]
        kept += [(_proxy_name(slot), slot.proxy) for slot in slots]
        is_named = any(isinstance(item, tuple) for item in given)
        super().add_param_group({**param_group, "params": kept if is_named else [p for _, p in kept]})
        self._slots.append(slots)
        self._fill_states()
        for _, parameter in named:
            if parameter.requires_grad:
                self._watch.follow(parameter)

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
            RuntimeError: a forward waits for its backward, or gradients wait for step() or zero_grad().
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
        self._take_step()
        return loss

    def _take_step(self) -> None:
        if self.epoch is None:
            raise RuntimeError("no channels are drawn: call optimizer.resample(epoch) at the start of every epoch")
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
            self._unscale()
            self._clip()
            self._scores.see(self._all_slots())
            self._update()
        for slot in self._all_slots():
            slot.draw.unapplied = False
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

    def join_hook(self, **kwargs: Any) -> JoinHook:
        """What a process does that ran out of batches, inside torch's `with Join([model, optimizer]):`.

        It takes part in every step with no gradient of its own, and gets its states from a process that had batches to
        the end, as the model gets its weights.
        """

        @torch.no_grad()
        def step() -> None:
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
        device: torch.device = self.param_groups[0]["params"][0].device
        return device

    @property
    def join_process_group(self) -> Any:
        """The processes that train together."""
        return self._processes.group or torch.distributed.group.WORLD

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the states: `trady_state` of each group, by layer and by position of a whole parameter.

        They stand in the groups, not in "state", because tools such as torch.distributed.checkpoint look there for
        the names of module parameters only, which the drawn channels are not.
        """
        packed = super().state_dict()
        for packed_group, names, members in zip(packed["param_groups"], self._names(), self.param_groups, strict=True):
            states = {name: dict(self.state[p]) for name, p in zip(names, members["params"], strict=True)}
            packed_group["trady_state"] = {name: state for name, state in states.items() if state}
        for packed_group, slots in zip(packed["param_groups"], self._slots, strict=True):
            packed_group["params"] = packed_group["params"][: len(packed_group["params"]) - len(slots)]
        if scores := self._scores.state():
            packed["param_groups"][0]["trady_scores"] = scores
        return {**packed, "state": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict()` of the same plan and install the channels of its epoch.

        Raises:
            ValueError: the state belongs to another plan, algorithm, or other groups. Nothing is changed then.
        """
        groups = state_dict["param_groups"]
        check_saved_groups(groups, self.param_groups, [len(parameters) for _, parameters in self._whole()])
        self._check_idle()
        epoch = groups[0]["trady_epoch"]
        scores = groups[0].get("trady_scores", {})
        channels = self.plan.sample(epoch, scores.get("kept") or None) if epoch >= 0 else {}
        saved = [group.get("trady_state", {}) for group in groups]
        self._check_saved_states(groups, saved, channels)
        extra = ("trady_state", "trady_scores")
        plain = [{key: value for key, value in group.items() if key not in extra} for group in groups]
        for group, own in zip(plain, super().state_dict()["param_groups"], strict=True):
            group["params"] = own["params"]
        super().load_state_dict({**state_dict, "state": {}, "param_groups": plain})
        self._install(epoch, channels)
        self._scores.load(scores, self._all_slots())
        self._fill_states()
        for names, states, members in zip(self._names(), saved, self.param_groups, strict=True):
            for name, member in zip(names, members["params"], strict=True):
                load_(self.state[member], states.get(name, {}))

    def _update(self) -> None:
        """One step of everything that has a gradient."""
        for group, parameters in self._whole():
            moved = [parameter for parameter in parameters if parameter.grad is not None]
            if moved:
                states = [fill_whole_state(self.state[p], p, self.algorithm, group) for p in moved]
                update_whole(self.algorithm, group, moved, states)
        self._update_channels(
            Trained(slot, self.state[slot.proxy], group)
            for group, slots in zip(self.param_groups, self._slots, strict=True)
            for slot in slots
            if slot.proxy.grad is not None
        )

    def _whole(self) -> Iterator[tuple[dict[str, Any], list[Tensor]]]:
        """Of each group, what is trained whole."""
        for group, slots in zip(self.param_groups, self._slots, strict=True):
            yield group, group["params"][: len(group["params"]) - len(slots)]

    def _fill_states(self) -> None:
        """Give everything that is trained the state that it lacks, and an entry of `state` where nothing is kept.

        Without entries torch.distributed.checkpoint would run a step of its own to make them.
        """
        for group, parameters in self._whole():
            for parameter in parameters:
                fill_whole_state(self.state[parameter], parameter, self.algorithm, group)
        for group, slots in zip(self.param_groups, self._slots, strict=True):
            for slot in slots:
                if not self.state[slot.proxy]:
                    self.state[slot.proxy] = new_channel_state(slot, self.algorithm, group)

    def _names(self) -> list[list[str]]:
        """Names of the members of each group in a state_dict: position or, of a proxy, the layer."""
        return [
            [*map(str, range(len(group["params"]) - len(slots))), *(slot.layer for slot in slots)]
            for group, slots in zip(self.param_groups, self._slots, strict=True)
        ]

    def _add_left_out(self, pool: Sequence[ChannelSlot]) -> None:
        given = {id(slot) for slot in self._all_slots()}
        slots = [slot for slot in pool if id(slot) not in given]
        self._check_slots(slots)
        place = max(range(len(self.param_groups)), key=lambda i: self.param_groups[i]["weight_decay"])
        group = self.param_groups[place]
        group["params"].extend(slot.proxy for slot in slots)
        if "param_names" in group:
            group["param_names"].extend(map(_proxy_name, slots))
        self._slots[place].extend(slots)

    def _owned(self) -> Iterator[Tensor]:
        """All that lives from step to step: the model, proxies and gradients, ids of channels, states."""
        if (model := self._model()) is not None:
            yield from (*model.parameters(), *model.buffers())
        for group in self.param_groups:
            yield from group["params"]
            yield from (parameter.grad for parameter in group["params"] if parameter.grad is not None)
        yield from (slot.channels for slot in self._all_slots())
        yield from (value for state in self.state.values() for value in state.values() if isinstance(value, Tensor))

    def _all_slots(self) -> list[ChannelSlot]:
        return [slot for slots in self._slots for slot in slots]

    def _install(self, epoch: int, channels: Mapping[str, Sequence[int]]) -> None:
        """Draw `channels` for `epoch`; their states follow the policy, but a draw that is only moved keeps them."""
        scale, outputs = getattr(channels, "scale", {}), getattr(channels, "outputs", {})
        carries = self.state_policy == "carry" or epoch == self.epoch
        for group, slots in zip(self.param_groups, self._slots, strict=True):
            for slot in slots:
                old, old_channels = self.state.pop(slot.proxy, {}), slot.channels
                slot.set(channels.get(slot.layer, ()), scale.get(slot.layer), outputs.get(slot.layer))
                slot.seed_step(group["trady_steps"])
                state = new_channel_state(slot, self.algorithm, group)
                if carries:
                    carry_(state, slot.channels, old, old_channels)
                self.state[slot.proxy] = state
                self._watch.follow(slot.proxy)
            group["params"][len(group["params"]) - len(slots) :] = [slot.proxy for slot in slots]
            group["trady_epoch"] = epoch
        drawn = sorted((slot.layer, tuple(channels.get(slot.layer, ()))) for slot in self._all_slots())
        self._digest = hashlib.sha256(repr((self.plan.fingerprint, epoch, drawn)).encode()).hexdigest()

    def _check_saved_states(
        self, groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, State]], channels: Mapping[str, Any]
    ) -> None:
        """Raises ValueError unless the saved states are those that the draw and the saved options call for."""
        for options, states, slots, (_, parameters) in zip(groups, saved, self._slots, self._whole(), strict=True):
            for position, parameter in enumerate(parameters):
                wanted = state_shapes(self.algorithm, options, tuple(parameter.shape), False)
                check_saved(wanted, states.get(str(position), {}), f"parameter {position}")
            for slot in slots:
                shape = len(channels.get(slot.layer, ())), *slot.proxy.shape[1:]
                wanted = state_shapes(self.algorithm, options, shape, True)
                check_saved(wanted, states.get(slot.layer, {}), slot.layer)

    def _check_slots(self, slots: list[ChannelSlot]) -> None:
        for slot in slots:
            if slot.plan != self.plan.fingerprint:
                raise ValueError(
                    f"layer {slot.layer!r}: plan {slot.plan} was applied to the model, the optimizer got plan "
                    f"{self.plan.fingerprint}"
                )

    def _check_idle(self) -> None:
        self._check_not_waiting()
        for slot in self._all_slots():
            if slot.is_pending:
                raise RuntimeError(
                    f"layer {slot.layer!r}: gradients wait for step(); call it, or zero_grad(), before channels are "
                    "drawn anew"
                )

    def _check_not_waiting(self) -> None:
        for slot in self._all_slots():
            if slot.is_waiting:
                raise RuntimeError(
                    f"layer {slot.layer!r}: a forward waits for its backward; run it, or drop its output, before "
                    "channels are drawn anew"
                )

    def _found_inf(self) -> bool:
        """Whether a GradScaler, which sets `found_inf` around step(), saw a gradient that is not finite."""
        found = getattr(self, "found_inf", None)
        return found is not None and bool(found)

    def _unscale(self) -> None:
        """Take the factor of a GradScaler out of the gradients, where it left that to step()."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is None:
            return
        for grad in (p.grad for group in self.param_groups for p in group["params"]):
            if grad is not None:
                grad.div_(scale.to(grad.device))

    def _clip(self) -> None:
        """Clip the joint norm, or else tell once that a loop clipped without the compact gradients."""
        whole = [parameter for _, parameters in self._whole() for parameter in parameters]
        # Where processes train together, whole gradients change after the backward by being averaged.
        watch = self._watch if self._processes.count == 1 else None
        if self.max_grad_norm is not None:
            clip_jointly_(whole, self._proxies(), self.max_grad_norm, watch)
        elif self._warns and watch is not None and missed_compact(watch, whole, self._proxies()):
            self._warns = False
            warnings.warn(
                "gradients of the parameters that are trained whole were changed after the backward, as by "
                "clip_grad_norm_(model.parameters(), ...), and those of the drawn channels were not: clip over the "
                "tensors of optimizer.param_groups, or give the optimizer max_grad_norm",
                stacklevel=6,
            )

    def _proxies(self) -> list[Tensor]:
        return [slot.proxy for slot in self._all_slots()]


def _proxy_name(slot: ChannelSlot) -> str:
    return f"{slot.layer}.weight[:, channels]"
