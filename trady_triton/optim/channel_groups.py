"""Groups of an optimizer that train parameters whole and channels of others: members, states, saving and loading."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from trady_triton.optim.gradients import GradientWatch
from trady_triton.optim.options import check_group
from trady_triton.optim.scores import ChannelScores
from trady_triton.optim.states import (
    State,
    carry_,
    check_saved,
    check_saved_groups,
    fill_channel_state,
    fill_whole_state,
    load_,
    state_shapes,
)
from trady_triton.plan import Plan
from trady_triton.sharding import is_sharded
from trady_triton.slot import ChannelSlot, Pool, find_slot


class ChannelGroups(Optimizer):
    """The bookkeeping of TraDyOptimizer: which leaves have gradients now, and what is kept of them from step to step.

    A group's "params" are the parameters that are trained whole, and after them the proxies of its slots.
    """

    def __init__(
        self, groups: list[Any], defaults: dict[str, Any], plan: Plan, pool: Pool | None, algorithm: str,
        state_policy: str,
    ) -> None:  # fmt: skip
        """`pool` was found from the parameters; raises ValueError where it is not the plan's."""
        self.plan, self.algorithm, self.state_policy = plan, algorithm, state_policy
        self._slots: list[list[ChannelSlot]] = []
        self._pool = pool
        self._scores = ChannelScores(plan)
        self._watch, self._digest = GradientWatch(), ""
        super().__init__(groups, {**defaults, "trady_plan": plan.fingerprint, "trady_epoch": -1, "trady_steps": 0})
        if pool is not None:
            self._add_left_out(pool.slots)
        missing = set(plan.pool) - {slot.layer for slot in self._all_slots()}
        if missing:
            raise ValueError(
                f"{len(missing)} of the plan's {len(plan.pool)} layers are not among the parameters, such as "
                f"{min(missing)!r}: call apply_plan(model, plan) first and give the parameters of that very model; a "
                "deepcopy needs remove_plan and apply_plan of its own, and fully_shard comes before apply_plan"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Raises TypeError: channels belong to one model, so no copy of an optimizer could train."""
        raise TypeError(
            "a TraDyOptimizer cannot be copied or pickled: save its state_dict(); a copied model needs remove_plan, "
            "apply_plan and an optimizer of its own, into which the state_dict is loaded"
        )

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
        for parameter in (parameter for _, parameter in named if parameter.requires_grad):
            weakref.finalize(self._watch, self._watch.follow(parameter).remove)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and the states: `trady_state` of each group, by layer and by position of a whole parameter.

        They stand in the groups, not in "state", because tools such as torch.distributed.checkpoint look there for
        the names of module parameters only, which the drawn channels are not.
        """
        self._fill_states()  # a scheduler may have turned momentum on or off since the last step
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
                fill_channel_state(self.state[slot.proxy], slot, self.algorithm, group)

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
                state = fill_channel_state({}, slot, self.algorithm, group)
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
            if self._pool is None or all(slot is not own for own in self._pool.slots):
                raise ValueError(f"layer {slot.layer!r}: of a second planned model; wanted an optimizer for each model")

    def _check_attached(self) -> None:
        """Raises RuntimeError where the model would be trained no more, which nothing else tells."""
        assert self._pool is not None
        if (model := self._pool.model()) is None:
            return
        modules = dict(model.named_modules())
        for slot in self._all_slots():
            weight = getattr(modules.get(slot.layer), "weight", None)
            # Between forward and backward fully_shard puts others in the place of sharded weights.
            if not is_sharded(slot.weight) and (weight is None or find_slot(weight) is not slot):
                raise RuntimeError(
                    f"layer {slot.layer!r}: the plan was removed, or the weight replaced, as load_state_dict("
                    "assign=True) does; call remove_plan and apply_plan, and make a new optimizer"
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


def _proxy_name(slot: ChannelSlot) -> str:
    return f"{slot.layer}.weight[:, channels]"
