"""DeepSpeed, wrapped: the only file that imports it.

What it is asked to do here: keep the decoder partitioned (ZeRO-3; below that it is whole on every
rank), accumulate and reduce the gradients of what is trained in float32, and update float32
masters. What it is kept from doing:
divide the loss (the caller has divided by the step's label count), schedule, checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from train import config as cfg
from train.meeting import meet
from train.watchdog import Watchdog

if TYPE_CHECKING:
    from data.collate import Batch
    from train.model.speech_llm import SpeechLLM

MOMENTS = ("exp_avg", "exp_avg_sq")

# What the run's YAML already says; a DeepSpeed file that repeats it could contradict it.
_INJECTED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "communication_data_type",
    "data_types",
)


class World:
    """This process's place among the ranks, and the few collectives the loop needs."""

    def __init__(self, limit: float) -> None:
        environment()
        if not torch.cuda.is_available():
            # Shared-memory collectives would be compiled at start-up (40 s), for nothing here.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))
        self.rank, self.size, self.local_rank = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        )
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)
            self.device = torch.device("cuda", self.local_rank)
        self._store = meet(limit)
        dist.init_process_group(
            get_accelerator().communication_backend_name(), store=self._store, rank=self.rank,
            world_size=self.size, timeout=default_pg_timeout,
            device_id=self.device if self.device.type == "cuda" and self.size > 1 else None,
        )  # fmt: skip
        deepspeed.init_distributed(verbose=False)  # finds the group there

    def sum(self, *values: float) -> list[float]:
        """Sums over all ranks, in float64. A collective."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def reduce(self, tensor: torch.Tensor) -> None:
        """Make `tensor` its sum over all ranks, in place. A collective."""
        dist.all_reduce(tensor)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` (any picklable object of our own making), on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, in rank order, on every rank."""
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value)
        return boxes

    def barrier(self) -> None:
        dist.barrier()

    @contextmanager
    def watched(self, limit: float) -> Iterator[Watchdog]:
        """A watchdog over this rank, inside the context; see `train.watchdog`."""
        watchdog = Watchdog(self._store, self.rank, self.size, limit)
        try:
            yield watchdog
        finally:
            watchdog.close()

    def close(self) -> None:
        """Leave the process group; without it a gloo rank ends in SIGABRT."""
        if dist.is_initialized():
            dist.destroy_process_group()


@contextmanager
def world(limit: float = 300.0) -> Iterator[World]:
    """The process group, left in good order whatever happens inside.

    Args:
        limit: seconds that ranks wait for each other to come; see `train.meeting`.
    """
    here = World(limit)
    try:
        yield here
    finally:
        here.close()


def policy(train: cfg.Train) -> dict[str, Any]:
    """DeepSpeed's own file, checked.

    Raises:
        ConfigError: missing, no JSON, repeats what the YAML says, or has no stage.
    """
    path = train.engine
    try:
        tree = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise cfg.ConfigError(f"train.engine: {path} does not exist") from None
    except json.JSONDecodeError as e:
        raise cfg.ConfigError(f"train.engine: {path} is not JSON: {e}") from None
    repeated = [key for key in _INJECTED if key in tree]
    if repeated:
        raise cfg.ConfigError(
            f"train.engine: {path} sets {', '.join(repeated)}, which the YAML decides; remove it"
        )
    if '"auto"' in json.dumps(tree):
        raise cfg.ConfigError(f'train.engine: {path} holds "auto"; write the value')
    stage = tree.get("zero_optimization", {}).get("stage")
    if stage not in (0, 1, 2, 3):
        raise cfg.ConfigError(
            f"train.engine: {path}: zero_optimization.stage must be 0, 1, 2 or 3, found {stage!r}"
        )
    if stage == 0 and train.precision == "bf16":
        raise cfg.ConfigError(
            f"train.engine: {path}: DeepSpeed's stage 0 cannot accumulate bf16's gradients in "
            "float32; use stage 1, which costs no more, or train.precision fp32"
        )
    return tree


def stage_of(train: cfg.Train) -> int:
    """The ZeRO stage; 3 alone partitions the model's own weights."""
    stage: int = policy(train)["zero_optimization"]["stage"]
    return stage


def ds_config(train: cfg.Train, accumulation: int) -> dict[str, Any]:
    """The policy with the run's own settings put in."""
    return policy(train) | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": train.clip,
        "bf16": {"enabled": train.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 10**9,
    }


def partitioned(train: cfg.Train) -> AbstractContextManager[None]:
    """Models that transformers loads inside are born partitioned over the ranks, in stage 3."""
    return _born_partitioned(train) if stage_of(train) == 3 else nullcontext()


@contextmanager
def _born_partitioned(train: cfg.Train) -> Iterator[None]:
    # transformers keeps only a weak reference, so this one must live as long as the loading.
    keep = HfDeepSpeedConfig(ds_config(train, 1))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep


_setup_linear = LinearFunctionForZeroStage3.setup_context


def _setup_frozen(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    input, weight, *bias = inputs
    _setup_linear(ctx, (input if weight.requires_grad else None, weight, *bias), output)


# DeepSpeed's linear, which stands in for torch's in stage 3, keeps every input for the backward
# pass, and reads only those of trained weights: a fifth to a third of a frozen LLM's activations.
LinearFunctionForZeroStage3.setup_context = staticmethod(_setup_frozen)


def inference(model: nn.Module, train: cfg.Train) -> None:
    """Make a frozen model that was loaded partitioned run: its weights are gathered as it needs
    them. Every rank must then run it equally often."""
    deepspeed.initialize(model=model, config=ds_config(train, 1), dist_init_required=False)


def gathered(params: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Makes partitioned parameters whole inside the context. A collective."""
    return deepspeed.zero.GatheredParameters(params)


def rewritten(params: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Like `gathered`; what rank 0 writes inside is kept, on all ranks."""
    return deepspeed.zero.GatheredParameters(params, modifier_rank=0)


def partition(param: Any) -> torch.Tensor:
    """This rank's flat part of a partitioned parameter, padded at the end of the last rank's."""
    part: torch.Tensor = param.ds_tensor
    return part


class Engine:
    """One model under ZeRO with AdamW on what is trained."""

    def __init__(self, model: SpeechLLM, train: cfg.Train, here: World, accumulation: int):
        self.here, self.accumulation = here, accumulation
        self._params = model.trained()
        self.num_trained = sum(p.numel() for p in self._params.values())
        optimizer = torch.optim.AdamW(
            self._params.values(),
            lr=train.lr,
            betas=train.betas,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            model_parameters=list(self._params.values()),
            config=ds_config(train, accumulation),
            dist_init_required=False,
        )
        self._engine.train()
        self._updates = 0
        self._largest = torch.zeros((), device=here.device)
        for param in self._params.values():
            param.register_hook(self._note)

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Summed losses of one bin (see `SpeechLLM.forward`)."""
        return self._engine(batch)

    def backward(self, loss: torch.Tensor, *, last: bool) -> torch.Tensor:
        """Accumulate the gradient of `loss`, over micro-batches and ranks.

        Args:
            loss: sums, divided by the counts of the whole global step (see `train.loss.mixed`).
            last: whether this is the step's last micro-batch on this rank.
        Returns:
            The largest absolute gradient of this micro-batch alone, float32 [], on the device;
            not finite where one of its gradients is not.
        """
        # DeepSpeed averages over ranks (and would divide by the accumulation): undone here,
        # so that the update is the gradient of the sum of what all of them hand in.
        # A loss that is not finite makes the factor NaN, and with it all gradients, so that the
        # one check of them, before the update, is enough.
        self._largest = torch.zeros_like(self._largest)
        factor = self.here.size + 0.0 * loss.detach()
        self._engine.backward(loss * factor, scale_wrt_gas=False)
        if not last:
            self._engine.step()
        return self._largest

    @torch.no_grad()
    def _note(self, gradient: torch.Tensor) -> None:
        """Called with each parameter's gradient of one micro-batch, before ranks are summed."""
        largest = torch.linalg.vector_norm(gradient, torch.inf).float()
        self._largest = torch.maximum(self._largest, largest)  # both keep NaN

    @torch.no_grad()
    def score(self, batch: Batch) -> torch.Tensor:
        """As calling the engine does, with neither gradients nor dropout. A collective."""
        self._engine.eval()
        try:
            sums: torch.Tensor = self._engine(batch)
        finally:
            self._engine.train()
        return sums

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, update, clear the gradients.

        Returns:
            The gradient's norm before clipping, and whether the update was made: it is not where
            the norm is not finite, on all ranks alike. Weights and moments are then as before.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._optimizer is self._adam():  # stage 0 in float32, where DeepSpeed looks at no norm
            grads = [p.grad for p in self._params.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(grads))
            if made := math.isfinite(norm):
                self._engine.step()
            else:
                self._engine.zero_grad()
                self._engine.micro_steps += 1
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            made = not self._optimizer.overflow
        self._updates += made
        return norm, made

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, so that both can go and another engine come."""
        self._engine.destroy()

    @torch.no_grad()
    def weights(self) -> dict[str, torch.Tensor]:
        """Float32 masters of what is trained, whole, on rank 0's CPU; elsewhere none. A collective.

        On one rank alone: of a whole LLM, with its moments, they take 12 bytes a parameter.
        """
        found = ((name, self._get(p)) for name, p in self._params.items())
        return {name: value for name, value in found if self.here.rank == 0}

    @torch.no_grad()
    def moments(self) -> dict[str, torch.Tensor]:
        """Adam's moments as `moment/name`, like `weights`. A collective."""
        if not self._updates:  # the optimizer makes them with its first update
            found = (
                (f"{moment}/{name}", torch.zeros(getattr(p, "ds_shape", p.shape)))
                for moment in MOMENTS
                for name, p in self._params.items()
            )
            return dict(found) if self.here.rank == 0 else {}
        found = (
            (f"{moment}/{name}", self._get(p, moment))
            for moment in MOMENTS
            for name, p in self._params.items()
        )
        return {name: value for name, value in found if self.here.rank == 0}

    @torch.no_grad()
    def load(
        self, weights: dict[str, torch.Tensor], moments: dict[str, torch.Tensor], updates: int
    ) -> None:
        """Continue from what `weights` and `moments` returned after so many updates.

        The model itself must already hold `weights` (rounded to its own precision) when the
        engine is made; here the float32 masters get the bits that rounding dropped.
        """
        self._updates = updates
        for master in self._masters():
            self._adam().state[master] = {
                "step": torch.tensor(float(updates), device=master.device),  # as fused wants it
                **{moment: torch.zeros_like(master) for moment in MOMENTS},
            }
        if hasattr(self._optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._optimizer._lazy_init_hp_params_optimizer_state()  # finds the states just made
        for name, p in self._params.items():
            self._set(p, weights[name])
            for moment in MOMENTS:
                self._set(p, moments[f"{moment}/{name}"], moment)

    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer that DeepSpeed's own one wraps, if it does."""
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def _masters(self) -> list[torch.Tensor]:
        """What `_adam` updates on this rank; each kind of wrapper has its own name for it."""
        for name in (
            "fp32_partitioned_groups_flat",  # stage 3
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_groups_flat_partition",  # stage 0 in bf16
        ):
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        return list(self._params.values())  # stage 0 in float32: a plain optimizer

    def _get(self, p: Any, moment: str | None = None) -> torch.Tensor:
        """One parameter's master, or one of its moments, whole, on the CPU. A collective."""
        if hasattr(p, "ds_id"):
            mine = safe_get_local_optimizer_state(p, moment) if moment else None
            return self._whole(p, safe_get_local_fp32_param(p) if mine is None else mine)
        if hasattr(p, "_hp_mapping"):
            full = safe_get_full_optimizer_state(p, moment) if moment else None
            full = safe_get_full_fp32_param(p) if full is None else full
        else:
            full = self._adam().state[p][moment] if moment else p
        return full.detach().to("cpu", copy=True)

    def _set(self, p: Any, value: torch.Tensor, moment: str | None = None) -> None:
        """The inverse of `_get`; not a collective."""
        if hasattr(p, "ds_id"):
            mine = self._mine(p, value)
            if moment:
                safe_set_local_optimizer_state(p, mine, moment)
            else:
                safe_set_local_fp32_param(p, mine)
        elif hasattr(p, "_hp_mapping"):
            value = value.to(self.here.device)
            if moment:
                safe_set_full_optimizer_state(p, value, moment)
            else:
                safe_set_full_fp32_param(p, value)
        elif moment:
            self._adam().state[p][moment].copy_(value)
        else:
            p.copy_(value)

    def _whole(self, p: Any, mine: torch.Tensor) -> torch.Tensor:
        """Join the ranks' equal slices of a flattened parameter; the last one may be padded."""
        size = p.partition_numel()
        slices = torch.zeros(self.here.size * size, device=self.here.device)
        padded = torch.zeros(size, device=self.here.device)
        padded[: mine.numel()] = mine
        dist.all_gather_into_tensor(slices, padded)
        return slices[: p.ds_numel].view(p.ds_shape).to("cpu", copy=True)

    def _mine(self, p: Any, value: torch.Tensor) -> torch.Tensor:
        """This rank's slice of a whole tensor: the inverse of `_whole`."""
        size = p.partition_numel()
        padded = torch.zeros(size * self.here.size)
        padded[: value.numel()] = value.flatten()
        return padded[self.here.rank * size :][:size].to(self.here.device)


def environment() -> None:
    """Put the ranks into the environment where no launcher has: srun's tasks, or just this one."""
    if "RANK" in os.environ:
        return
    if "SLURM_STEP_ID" in os.environ and "MASTER_ADDR" in os.environ:
        here = os.environ
        here.update(
            RANK=here["SLURM_PROCID"],
            WORLD_SIZE=here["SLURM_NTASKS"],
            LOCAL_RANK=here["SLURM_LOCALID"],
            # "2(x2),1": tasks on the nodes; they are equally many wherever DeepSpeed runs
            LOCAL_WORLD_SIZE=here["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0],
        )
        here.setdefault("MASTER_PORT", "29500")
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
