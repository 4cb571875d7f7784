"""The heads of all groups: which ranks hold them, their gradients, optimisers and whereabouts.

Heads stay outside the module that DDP wraps. In the joint schedule a rank trains the heads of its slots' groups
only, and a head's gradients travel only among the ranks that share it; in the sequential schedule all ranks hold
all heads. A sharded head's classes are split over all ranks, and its weight's gradients never travel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shards.classes import ClassTable
from shards.console import JobError
from training.distributed import RankGroups, World, to_device
from training.heads import Head, ScoreForm
from training.optimisers import Average, make_adam
from training.presets import TrainConfig
from training.schedules import count_of_group, holders_of_groups, parts_of_share
from training.scoring import ClassBlock, class_blocks
from training.sharded_head import ShardedHead


class HeadBank:
    """One head and one Adam per group. `heads` is keyed by group id; so is all that follows.

    `holders` are the ranks that train a head; the others keep it at its initial weights, without an optimiser.
    `heads[group].part` says which of the group's classes this rank's head covers.
    """

    def __init__(self, classes: ClassTable, config: TrainConfig, dim: int, world: World) -> None:
        self.classes = classes
        self.config = config
        self.world = world
        self.groups = classes.groups
        self.sharded = config.shard_head and world.size > 1
        everyone = tuple(range(world.size))
        self.holders = holders_of_groups(
            config.schedule, self.groups, batch_size=config.batch_size, world_size=world.size
        )
        if self.sharded:
            self.holders = dict.fromkeys(self.groups, everyone)
        self.parts_by_rank = [parts_of_share(config.batch_size, r, world.size, config.accumulate) for r in everyone]
        self.heads: dict[int, Head] = {group: self._make_head(group, dim) for group in self.groups}
        trained = [group for group in self.groups if world.rank in self.holders[group]]
        self.optimizers = {group: make_adam(self.heads[group].parameters(), config.head_lr) for group in trained}
        self.averages = {
            group: Average(dict(self.heads[group].named_parameters()), config.ema) for group in trained if config.ema
        }
        rank_groups = RankGroups(world)
        self.rank_groups = {group: rank_groups.of(self.holders[group]) for group in self.groups}

    def _make_head(self, group: int, dim: int) -> Head:
        """A head whose initial weights depend on seed and group alone, so that all ranks agree."""
        config, count = self.config, self.classes.count(group)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([config.seed, 1, group]).generate_state(1)[0]))
            if not self.sharded:
                head = Head(config.head, dim, count, config.s, config.m)
            elif count < self.world.size:
                raise JobError(f"--shard-head: group {group} has {count} classes for {self.world.size} processes")
            else:
                rate = config.head_sample_rate
                head = ShardedHead(config.head, dim, count, config.s, config.m, sample_rate=rate)
        return head.to("cpu" if config.offload_heads else self.world.device)

    def sources(self, group: int) -> tuple[int, ...]:
        """The ranks whose heads together make up the group's: all of them for a sharded head, else the first holder."""
        return self.holders[group] if self.sharded else self.holders[group][:1]

    def groups_of_step(self, groups: np.ndarray) -> list[int]:
        """The groups that this rank's heads take part in when its samples are of `groups` (int64 [b])."""
        if self.sharded and self.config.schedule == "joint":
            return list(self.groups)  # a sharded head needs all ranks, also those without a sample of it
        return [int(group) for group in np.unique(groups)]

    def losses(self, descriptors: Tensor, labels: Tensor, groups: np.ndarray, part: int = 0) -> tuple[Tensor, Tensor]:
        """Loss float [b] and hit bool [b] (the label scores highest, margin aside) of every sample of this rank.

        `descriptors` [b, D], `labels` int64 [b], `groups` int64 [b] of group ids on the host; `part`: which part of the
        rank's share they are (`--accumulate`).
        """
        present = self.groups_of_step(groups)
        if len(present) == 1:
            return self._losses_of_group(present[0], descriptors, labels, part)
        order = np.argsort(groups, kind="stable")
        there, back = to_device(torch.from_numpy(np.stack([order, np.argsort(order)])), descriptors.device)
        counts = [int(np.count_nonzero(groups == group)) for group in present]
        of_groups = zip(present, descriptors[there].split(counts), labels[there].split(counts), strict=True)
        found = [self._losses_of_group(*of_group, part) for of_group in of_groups]
        losses, hits = (torch.cat(column)[back] for column in zip(*found, strict=True))
        return losses, hits

    def _losses_of_group(self, group: int, descriptors: Tensor, labels: Tensor, part: int) -> tuple[Tensor, Tensor]:
        head, config = self.heads[group], self.config
        if not isinstance(head, ShardedHead):
            return head.losses_and_hits(descriptors, labels)
        sizes = [count_of_group(config.schedule, self.groups, group, parts[part]) for parts in self.parts_by_rank]
        return head.losses_and_hits(descriptors, labels, sizes)

    def reduce_gradients(self, groups: Iterable[int]) -> int:
        """Sum the gradients of these groups' heads over the ranks that hold them; returns the bytes that travelled.

        The loss was scaled by the number of ranks for DDP, which averages; that factor leaves here.
        """
        moved = 0
        for group in groups:
            for parameter in self.heads[group].parameters():
                if parameter.grad is None:
                    continue
                if len(self.holders[group]) > 1 and not self.sharded:
                    dist.all_reduce(parameter.grad, group=self.rank_groups[group])
                    moved += parameter.grad.numel() * parameter.grad.element_size()
                if self.world.size > 1:
                    parameter.grad.div_(self.world.size)
        return moved

    def gradient_norms(self, groups: Iterable[int]) -> dict[int, float]:
        """Norms of the gradients of these groups' heads, of a sharded one this rank's part."""
        found = {}
        for group in groups:
            gradients = [p.grad for p in self.heads[group].parameters() if p.grad is not None]
            found[group] = float(torch.nn.utils.get_total_norm(gradients))
        return found

    def place(self, groups: Iterable[int]) -> None:
        """With `--offload-heads`: bring these groups' heads to the device, and send the others to main memory."""
        if not self.config.offload_heads:
            return
        wanted = set(groups)
        for group, head in self.heads.items():
            device = self.world.device if group in wanted else torch.device("cpu")
            head.to(device)
            for state in self.optimizers[group].state.values():
                state.update({key: value.to(device) for key, value in state.items()})
            if group in self.averages:
                self.averages[group].to(device)

    def start_averages(self) -> None:
        """Let the running averages, where the run keeps any, begin at the weights as they are."""
        for average in self.averages.values():
            average.restart()

    def update_averages(self, groups: Iterable[int]) -> None:
        """Move the running averages of these groups' heads, where the run keeps any."""
        for group in groups:
            if group in self.averages:
                self.averages[group].update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block the heads hold their running averages (where the run keeps any)."""
        with ExitStack() as stack:
            for average in self.averages.values():
                stack.enter_context(average.swapped_in())
            yield

    def blocks(self, form: ScoreForm) -> list[ClassBlock]:
        """The blocks of the class table that this rank scores; over all ranks every class occurs once."""
        mine = {}
        for i, (group, head) in enumerate(self.heads.items()):
            holders = self.holders[group]
            if self.sharded or holders[i % len(holders)] == self.world.rank:
                mine[group] = head
        return class_blocks(mine, self.classes, form)

    def collect(self) -> tuple[dict[int, dict[str, Tensor]], dict[str, Tensor]]:
        """All heads by group, and the tensors of what trains them by name: complete on rank 0, empty on the others. All
        ranks must call it."""
        heads: dict[int, dict[str, Tensor]] = {}
        tensors: dict[str, Tensor] = {}
        for group in self.groups:
            pieces = []
            for source in self.sources(group):
                local = self._state_of(group) if self.world.rank == source else None
                pieces.append(self.world.bring_to_main(local, source))
            for name in pieces[0]:
                tensor = _join([piece[name] for piece in pieces])
                if name.startswith("head."):
                    heads.setdefault(group, {})[name.removeprefix("head.")] = tensor
                else:
                    tensors[f"{group}.{name}"] = tensor
        return heads, tensors

    def _state_of(self, group: int) -> dict[str, Tensor]:
        """This rank's tensors of a group: `head` what is evaluated, `raw` the weights behind an average, `adam`."""
        state: dict[str, Tensor] = {}
        average = self.averages.get(group)
        for name, parameter in self.heads[group].named_parameters():
            state[f"head.{name}"] = parameter if average is None else average.tensors[name]
            if average is not None:
                state[f"raw.{name}"] = parameter
            for key, value in self.optimizers[group].state.get(parameter, {}).items():
                state[f"adam.{name}.{key}"] = value
        if average is not None:
            state["average_updates"] = torch.tensor(average.updates)
        return state

    @torch.no_grad()
    def restore(self, heads: Mapping[int, Mapping[str, Tensor]], tensors: Mapping[str, Tensor]) -> None:
        """Take up what `collect` gathered, on any number of ranks. JobError where the shapes do not fit."""
        for group, head in self.heads.items():
            averages: dict[str, Tensor] = {}
            for name, parameter in head.named_parameters():
                saved = heads.get(group, {}).get(name)
                if saved is None or len(saved) != head.classes or saved.shape[1:] != parameter.shape[1:]:
                    raise JobError(f"the checkpoint's head of group {group} does not fit ({name}); use --init-from")
                parameter.copy_(_cut(tensors.get(f"{group}.raw.{name}", saved), head.part))
                averages[name] = _cut(saved, head.part)
                prefix = f"{group}.adam.{name}."
                found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if found and group in self.optimizers:
                    self.optimizers[group].state[parameter] = {
                        key: _cut(value, head.part).to(parameter.device, copy=True) for key, value in found.items()
                    }
            if group in self.averages:
                self.averages[group].load(averages, int(tensors.get(f"{group}.average_updates", torch.tensor(0))))


def _join(pieces: list[Tensor]) -> Tensor:
    """Tensors of parts of a head as the whole head's: rows follow each other, a step count is the same in all."""
    return pieces[0] if len(pieces) == 1 or pieces[0].ndim == 0 else torch.cat(pieces)


def _cut(tensor: Tensor, part: range) -> Tensor:
    """The inverse of `_join` for one part."""
    return tensor if tensor.ndim == 0 else tensor[part.start : part.stop]
