"""Training loop: the only one, run through Accelerate: one process, several, or a GPU by configuration.

loss = (1 - w) * task loss + w * soft targets, w = teacher_weight (model/losses.py)      Hinton 2015
     + feature_weight * mean squared difference of named layers' outputs     Romero 2015
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tersor.boundary import no_memory
from tersor.errors import RefusedError, TaskError, need
from tersor.model.batches import device_of, generators_of, length_of, move, seeded, shapes
from tersor.model.features import Features, features_of
from tersor.model.hidden_state import check_unlisted
from tersor.model.learning_rates import groups_of
from tersor.model.outputs import as_floats
from tersor.model.snapshot import restore, restoring, snapshot
from tersor.model.task import MISFIT, Task
from tersor.model.trainable_forms import TrainableForms

if TYPE_CHECKING:
    from accelerate import Accelerator

SCHEDULES = ("cosine", "linear", "constant", "onecycle", "step")
OPTIMIZERS = ("adamw", "adam", "sgd")


@dataclass(frozen=True)
class TrainingPlan:
    """The settings of a training, common to all steps that train."""

    epochs: float = 1  # passes over the training batches; may be a fraction
    lr: float = 1e-3
    schedule: str = "cosine"  # of the learning rate over this training
    optimizer: str = "adamw"
    weight_decay: float = 0.0
    teacher_weight: float = 0.0  # weight of the teacher in the loss: 0 no teacher, 1 only the teacher
    temperature: float = 4.0
    features: str = ""  # layers whose outputs are matched to the teacher's: see features.py
    feature_weight: float = 1.0
    feature_loss: str = "outputs"  # see feature_loss.py
    bf16: bool = False  # forward passes in bfloat16
    channels_last: bool = False  # convolutions in channels-last layout, which is faster on CPUs
    max_grad_norm: float | None = None  # limit for the norm of all gradients together (Pascanu 2013)
    lr_of: str = ""  # globs of sites with factors of the learning rate: see groups.py
    frozen: str = "stay"  # how frozen tensors are treated: see frozen.py; View.train reads it


class EpochStore(Protocol):
    """Stores a training after each epoch, so that a killed run can be resumed."""

    def save(self, epoch: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None: ...

    def load(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None: ...


def rate(step: int, total: int, schedule: str) -> float:
    """The factor of the learning rate at this step of `total`."""
    t = step / max(total, 1)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * t))
    if schedule == "linear":
        return 1 - t
    if schedule == "step":  # a tenth at half, a hundredth at three quarters (He 2016)
        return 0.1 ** ((t >= 0.5) + (t >= 0.75))
    if schedule == "onecycle":  # up for a quarter, then a half cosine (Smith 2018)
        return t / 0.25 if t < 0.25 else 0.5 * (1 + math.cos(math.pi * (t - 0.25) / 0.75))
    return 1.0


def fit(
    tuned: TrainableForms, task: Task, plan: TrainingPlan, *, seed: int, teacher: nn.Module | None = None,
    on_step: Callable[[int, int], None] | None = None, checkpoint: EpochStore | None = None,
    watch: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train the leaves of `tuned`; returns {"steps", "loss" (mean of the last epoch)}.

    `on_step(step, total)` runs before each optimizer step (gradual pruning narrows its masks there). With a
    checkpoint the training resumes after the last finished epoch: parameters, masks, feature maps, optimizer
    and random state. The teacher is moved to the device and put in eval mode: give a copy.
    """
    check_unlisted(tuned, task)
    accelerator = make_accelerator(tuned)
    batches = task.batches("train")
    per_epoch = length_of(batches)
    with seeded(seed), restoring(batches) as counters, torch.enable_grad(), contextlib.ExitStack() as stack:
        teacher = teacher.to(device_of(tuned)).eval() if teacher is not None else None
        features = features_of(plan.features, tuned, teacher, task, seed, kind=plan.feature_loss)
        stack.enter_context(features.beside(tuned))
        groups = groups_of(tuned, plan.lr_of, plan.weight_decay)
        optimizer = make_optimizer(groups, plan)
        net, optimizer, loader = accelerator.prepare(tuned, optimizer, sharded(batches, accelerator))
        generators = generators_of(batches)  # after prepare, which gives a sampler one for several processes
        for generator in generators:
            generator.manual_seed(seed)
        device = accelerator.device
        teacher = teacher.to(device) if teacher is not None else None
        if plan.channels_last:
            tuned.layout = torch.channels_last
            teacher = teacher.to(memory_format=torch.channels_last) if teacher is not None else None
        if per_epoch is not None:
            per_epoch = length_of(loader) or per_epoch  # several processes share the batches
        else:
            per_epoch = sum(1 for _ in batches)
        total = max(1, round(plan.epochs * per_epoch))
        step, epoch, losses = 0, 0, [math.nan]
        begun = checkpoint.load() if checkpoint is not None else None
        if begun is not None:
            epoch, tensors, facts = begun
            step, losses = facts["step"], [facts["loss"]]
            restore(tuned, optimizer, generators, tensors, facts)
            counters.restore(facts.get("counters", {}))
        net.train()
        with features.catching(tuned, teacher):
            while step < total:
                losses = []
                counters.epoch(epoch, loader)
                for batch in loader:
                    batch = move(batch, device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=plan.bf16):
                        try:
                            loss = loss_of(net, teacher, task, plan, batch, features)
                        except MISFIT as error:
                            if no_memory(error):
                                raise
                            raise TaskError(
                                f"training: a batch, {shapes(batch)}, does not fit the model or its loss. "
                                f"{type(error).__name__}: {error}"
                            ) from error
                    optimizer.zero_grad()
                    accelerator.backward(loss)
                    if plan.max_grad_norm is not None:
                        accelerator.clip_grad_norm_(net.parameters(), plan.max_grad_norm)
                    if on_step is not None:
                        on_step(step, total)
                    for group in optimizer.param_groups:
                        group["lr"] = plan.lr * group["factor"] * max(rate(step, total, plan.schedule), 1e-4)
                    optimizer.step()
                    losses.append(float(loss.detach()))
                    step += 1
                    if watch is not None and (step % 10 == 0 or step == total):
                        watch(step, total, f"loss {losses[-1]:.4f}")
                    if step == total:
                        break
                if not losses:
                    raise TaskError(
                        "the training set returned no batch in its second pass: give a list or a DataLoader"
                    )
                if not math.isfinite(losses[-1]):
                    raise RefusedError(
                        f"training: the loss is {losses[-1]} after {step} of {total} steps. Lower "
                        f"lr={plan.lr}."
                    )
                epoch += 1
                if checkpoint is not None and accelerator.is_main_process:
                    tensors, facts = snapshot(tuned, optimizer, generators)
                    mean = sum(losses) / len(losses)
                    facts |= {"step": step, "loss": mean, "counters": counters.facts()}
                    checkpoint.save(epoch, tensors, facts)
        if accelerator.num_processes > 1:  # running statistics differ: each process has other batches
            for buffer in tuned.buffers():
                torch.distributed.broadcast(buffer, 0)
        tuned.eval()
    return {"steps": step, "loss": sum(losses) / len(losses)}


def make_accelerator(tuned: TrainableForms) -> Accelerator:
    try:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin
    except ImportError:
        raise need("accelerate", "train", "training") from None
    on_cpu = all(p.device.type == "cpu" for p in tuned.parameters())
    # The recipe says how to train; the environment, Accelerate's configuration and other Accelerators of this
    # process do not. Their precision is shared, and asking for another one would be an error.
    every_batch = GradientAccumulationPlugin(num_steps=1)
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_plugin=every_batch)
    accelerator.native_amp, accelerator.scaler = False, None
    return accelerator


class Shard:
    """Every n-th batch of a set that Accelerate does not shard itself (it shards DataLoaders only)."""

    def __init__(self, batches: Iterable[Any], accelerator: Accelerator):
        self.batches, self.first, self.of = batches, accelerator.process_index, accelerator.num_processes

    def __iter__(self) -> Iterator[Any]:
        held: list[Any] = []
        for batch in self.batches:
            held.append(batch)
            if len(held) == self.of:  # a remainder is left out: every process must take as many steps
                yield held[self.first]
                held = []

    def __len__(self) -> int:
        return (length_of(self.batches) or 0) // self.of


def sharded(batches: Iterable[Any], accelerator: Accelerator) -> Iterable[Any]:
    alone = accelerator.num_processes == 1 or isinstance(batches, DataLoader)
    return batches if alone else Shard(batches, accelerator)


def make_optimizer(groups: list[dict[str, Any]], plan: TrainingPlan) -> torch.optim.Optimizer:
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=plan.lr, momentum=0.9, nesterov=True)
    kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=plan.lr)


def loss_of(  # noqa: PLR0917 (all six come from the loop)
    net: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    plan: TrainingPlan,
    batch: Any,
    features: Features,
) -> Tensor:
    """The training loss of one batch."""
    features.clear()
    output = as_floats(task.run(net, batch))
    terms: list[Tensor] = []
    if plan.teacher_weight < 1:
        terms.append((1 - plan.teacher_weight) * task.loss_of(output, batch))
    if teacher is not None:
        with torch.no_grad():
            wanted = as_floats(task.run(teacher, batch))
        if plan.teacher_weight > 0:
            terms.append(plan.teacher_weight * task.soft_loss(output, wanted, batch, plan.temperature))
        terms += [plan.feature_weight * term for term in features.distance(batch, output)]
    return sum(terms[1:], terms[0].float())
