"""The processes that a launcher (torchrun, accelerate) started for one piece of work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorakit.errors import LorakitError, RequestError
from lorakit.launcher import failed_elsewhere, num_launched

T = TypeVar("T")

# Gradients cross in messages of at most so many numbers, so that no second copy of all is made.
_MESSAGE_NUMBERS = 1 << 24


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of one run, this one among them; by default it is alone.

    Every method that names others is called by all of them, in the same order.

    Attributes:
        rank: this process, 0 to num - 1.
        num: how many there are.
        num_here: how many of them are on this machine.
    """

    rank: int = 0
    num: int = 1
    num_here: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there are no others."""
        return self.num == 1

    def wait(self) -> None:
        """Go on when all are here."""
        if not self.alone:
            dist.barrier()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the processes, in float64; all get the same bits."""
        if self.alone:
            return list(values)
        total = torch.tensor(list(values), dtype=torch.float64, device=_device())
        dist.all_reduce(total)
        return total.tolist()

    def any(self, here: bool) -> bool:
        """Whether it holds in any process."""
        return self.sum([float(here)])[0] > 0

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.num
        dist.all_gather_object(found, value)
        return found

    def from_first(self, value: T) -> T:
        """The value of the first process."""
        if self.alone:
            return value
        box: list[Any] = [value if self.is_first else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def everywhere(self, work: Callable[[], T]) -> T:
        """The result of work that every process does for itself, without the others.

        Raises:
            LorakitError: this process failed, and is the first of those that did.
            FailedElsewhereError: another one failed.
        """
        if self.alone:
            return work()
        try:
            result, error = work(), None
        except LorakitError as found:
            result, error = None, found
        codes = self.gather(None if error is None else error.exit_code)
        failed = [rank for rank, code in enumerate(codes) if code is not None]
        if failed:
            if error is not None and failed[0] == self.rank:
                raise error
            raise failed_elsewhere(failed[0], codes[failed[0]] or 1) from error
        return result  # pyright: ignore[reportReturnType]

    def on_first(self, work: Callable[[], T]) -> T:
        """The result of work that the first process does alone while the others wait.

        Raises:
            LorakitError: it failed, and this is the first process.
            FailedElsewhereError: it failed, and this is another one.
        """
        if self.alone:
            return work()
        result, error = None, None
        if self.is_first:
            try:
                result = work()
            except LorakitError as found:
                error = found
        result, code = self.from_first((result, None if error is None else error.exit_code))
        if error is not None:
            raise error
        if code is not None:
            raise failed_elsewhere(0, code)
        return result  # pyright: ignore[reportReturnType]

    def shared(self, error: LorakitError) -> LorakitError:
        """The error that this process raises where all of them found the same one."""
        return error if self.is_first else failed_elsewhere(0, error.exit_code)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes; mutates the parameters.

        A parameter that has a gradient in any process has one in all afterwards.
        """
        if self.alone or not parameters:
            return
        device = parameters[0].device
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)
        has = has.to(device)
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        learned = [p for p, found in zip(parameters, has.tolist(), strict=True) if found]
        for parameter in learned:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for message in _messages([p.grad for p in learned if p.grad is not None]):
            flat = torch.cat([gradient.reshape(-1) for gradient in message])
            dist.all_reduce(flat)
            parts = flat.split([gradient.numel() for gradient in message])
            for gradient, part in zip(message, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def copy_first(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors the values that they have in the first process; mutates them."""
        if self.alone:
            return
        with torch.no_grad():
            for tensor in tensors:
                value = tensor.detach().contiguous()
                dist.broadcast(value, src=0)
                tensor.copy_(value)


def _messages(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype in groups that cross together."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for same in by_dtype.values():
        message: list[Tensor] = []
        for gradient in same:
            size = sum(g.numel() for g in message)
            if message and size + gradient.numel() > _MESSAGE_NUMBERS:
                yield message
                message = []
            message.append(gradient)
        if message:
            yield message


def _device() -> torch.device:
    """Where small values cross: the GPU where the processes have one each."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that the launcher started, joined inside the block; alone without a launcher.

    Where torch.distributed runs already, its processes are taken.

    Raises:
        RequestError: the launcher did not say which process this is, or where the first one is.
    """
    if not dist.is_available() or (num_launched() == 1 and not dist.is_initialized()):
        yield Processes()
        return
    ours = not dist.is_initialized()
    if ours:
        _require_launcher()
        cuda = torch.cuda.is_available()
        if cuda:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            torch.cuda.set_device(local % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    num = dist.get_world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num))
    yield Processes(rank=dist.get_rank(), num=num, num_here=here)
    # Behind an error the others may never come to the end: the process's own end closes it.
    if ours:
        # Nobody closes while another still reads what was sent last.
        dist.barrier()
        dist.destroy_process_group()


def _require_launcher() -> None:
    missing = [n for n in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(n)]
    if missing:
        raise RequestError(
            "WORLD_SIZE says that there are several processes, and no launcher says more",
            where="the environment, " + ", ".join(missing),
            expected="what torchrun or accelerate launch set",
            found=f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} alone",
            remedy="torchrun --nproc-per-node 2 -m lorakit train CONFIG.yaml, or unset WORLD_SIZE",
        )
