"""Random sequences of what a user may do between steps, on onepass and on torch.optim side by
side."""

from __future__ import annotations

import hypothesis.strategies as st
import test_memory_safety as operations
import torch
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from support.side_by_side import ALGORITHMS, SHAPES, assert_same, both, on_both
from torch import nn

INDEX = st.integers(0, 5)
# Operations that are defined at any time, whatever came before.
KEPT = (
    operations.swap_data_of_all,
    operations.swap_state_tensors,
    operations.replace_state_entries,
    operations.swap_state_data,
    operations.clear_state,
    operations.replace_state_object,
    operations.fill_step,
    operations.replace_step,
    operations.replace_parameter_list,
    operations.reorder_parameters,
    operations.add_group,
    operations.reload_own_state,
    operations.save_and_load,
    operations.deepcopy_both,
    operations.pickle_both,
    operations.change_options,
    operations.drop_gradients_in_turn,
    operations.zero_gradients_in_place,
)


class Machine(RuleBasedStateMachine):
    """Rules change both sides in the same way; after every rule all weights and all state agree."""

    @initialize(algorithm=st.sampled_from(sorted(ALGORITHMS)), seed=st.integers(0, 9))
    def start(self, algorithm, seed):
        self.sides = both(algorithm, (*SHAPES, (5,), (1,)), seed=seed)
        self.with_memory = algorithm not in ("sgd", "momentum", "nesterov")

    def both(self, operation):
        on_both(self.sides, operation)
        assert_same(self.sides, rtol=1e-3, atol=2e-4)

    @rule(only=st.sets(INDEX))
    def step(self, only):
        self.both(lambda side: side.step([i for i in only if i < len(side.params)]))

    @rule()
    def step_all(self):
        self.both(lambda side: side.step())

    @rule(operation=st.sampled_from(KEPT))
    def operate(self, operation):
        if len(self.sides[0].params) < 9 or operation is not operations.add_group:
            self.both(operation)

    @rule(i=INDEX, gradient=st.sampled_from(["expanded", "transposed", "strided", "offset"]))
    def step_with_an_odd_gradient(self, i, gradient):
        def odd(side):
            p = side.params[i]
            if p.dim() == 0:
                return
            g = side.randn(*p.shape)
            if gradient == "expanded":
                g = g[:1].expand(p.shape)
            elif gradient == "transposed":
                g = g.transpose(0, -1).contiguous().transpose(0, -1)
            elif gradient == "strided":
                g = torch.stack([g, g], -1)[..., 0]
            else:
                g = torch.cat([side.randn(3), g.reshape(-1)])[3:].view(p.shape)
            p.grad = g
            side.opt.step()
            side.opt.zero_grad()

        self.both(odd)

    @rule(
        i=INDEX,
        how=st.sampled_from(["clone", "view", "holes", "set_", "storage", "swap", "transposed"]),
    )
    def move_data(self, i, how):
        def move(side):
            p = side.params[i]
            value = side.randn(*p.shape)
            if how == "clone":
                p.data = value
            elif how == "view":
                p.data = torch.cat([side.randn(5), value.reshape(-1)])[5:].view(p.shape)
            elif how == "holes":
                p.data = torch.stack([value, value], -1)[..., 0]
            elif how == "set_":
                with torch.no_grad():
                    p.set_(value)
            elif how == "storage" and p.is_contiguous():
                p.untyped_storage().resize_(p.untyped_storage().nbytes() + 4096)
            elif how == "swap":
                side.opt.zero_grad()
                torch.utils.swap_tensors(p, nn.Parameter(value))
            elif how == "transposed" and p.dim() > 1:
                p.data = value.transpose(0, -1).contiguous().transpose(0, -1)

        self.both(move)

    @rule(
        i=INDEX,
        how=st.sampled_from(["clear", "pop", "scale", "copy", "data", "step number", "fill"]),
    )
    def change_state(self, i, how):
        def change(side):
            p = side.params[i]
            if p not in side.opt.state or not side.opt.state[p]:
                return
            entry = side.opt.state[p]
            names = operations.columns_of(entry)
            if how == "clear":
                entry.clear()
            elif how == "pop":
                del side.opt.state[p]
            elif how == "scale":
                for name in names:
                    entry[name] = entry[name] * 0.5
            elif how == "copy":
                side.opt.state[p] = {name: value.clone() for name, value in entry.items()}
            elif how == "data":
                for name in names:
                    entry[name].data = entry[name].data.clone()
            elif how == "step number" and "step" in entry:
                entry["step"] = torch.tensor(float(entry["step"]) + 3)
            elif how == "fill" and "step" in entry:
                entry["step"].fill_(17)

        self.both(change)

    @rule(i=INDEX, j=INDEX)
    def exchange_states(self, i, j):
        def exchange(side):
            a, b = side.params[i], side.params[j]
            if a.shape == b.shape and side.opt.state.get(a) and side.opt.state.get(b):
                side.opt.state[a], side.opt.state[b] = side.opt.state[b], side.opt.state[a]

        self.both(exchange)

    @rule(i=INDEX)
    def replace_parameter(self, i):
        def replace(side):
            old, new = side.params[i], nn.Parameter(side.randn(*side.params[i].shape))
            side.params[i] = new
            for group in side.opt.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            if old in side.opt.state:
                side.opt.state[new] = side.opt.state.pop(old)

        self.both(replace)

    @rule(data=st.data())
    def move_between_groups(self, data):
        groups = len(self.sides[0].opt.param_groups)
        source, target = (
            data.draw(st.integers(0, groups - 1)),
            data.draw(st.integers(0, groups - 1)),
        )

        def move(side):
            if len(side.opt.param_groups[source]["params"]) > 1:
                side.opt.param_groups[target]["params"].append(
                    side.opt.param_groups[source]["params"].pop()
                )

        self.both(move)

    @rule(lr=st.sampled_from([0.0, 0.01, 0.1]), tensor=st.booleans())
    def change_lr(self, lr, tensor):
        def change(side):
            side.opt.param_groups[-1]["lr"] = torch.tensor(lr) if tensor else lr

        self.both(change)

    @rule(momentum=st.sampled_from([0.0, 0.5]))
    def change_momentum(self, momentum):
        def change(side):
            for group in side.opt.param_groups:
                if "nesterov" in group:
                    group.update(momentum=momentum, nesterov=False)

        self.both(change)

    @rule(threads=st.sampled_from([1, 2]))
    def change_threads(self, threads):
        torch.set_num_threads(threads)


Machine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSequences = Machine.TestCase
