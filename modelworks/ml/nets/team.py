"""Data parallel training: each step's rows are shared among processes, and the gradients are added up.

The process that runs the loop keeps everything: batches, optimiser, checkpoints. Its *peers*, processes on the same
machine, hold a copy of the net and nothing else. Before a step they take over the weights, then each gets its rows, and
at last the gradients are summed into the loop's net, by gloo between CPUs and NCCL between GPUs. A peer that dies costs
the step that was under way, which is done anew.

Rows travel over a socket pair that only parent and child have; what crosses the loopback interface are bare numbers.
"""

from __future__ import annotations

import contextlib
import os
import pickle  # between this process and children that it started itself, never from a file or a network
import secrets
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modelworks.core.errors import InvalidInput, ModelworksError
from modelworks.ml.base import JobContext
from modelworks.ml.nets.share import Share, starved

if TYPE_CHECKING:
    import torch

_LOST = 3  # times in a row that peers may be lost in one step
_GONE = 5.0  # seconds a peer has to end


class PeerLost(Exception):
    """A peer is gone; the others are of no use in this step."""


class Team:
    """`count` - 1 peers beside this process, each with the job's threads. Close it."""

    def __init__(self, net: torch.nn.Module, objective: Any, params: Any, count: int, ctx: JobContext) -> None:
        """`net`: as it is on the CPU. InvalidInput when it cannot be handed on."""
        try:
            self._told = pickle.dumps((net, objective, params))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InvalidInput(
                f"this net cannot be handed to other processes ({error}); set resources.processes to 1",
                code="bad_resources",
                param="resources.processes",
            ) from None
        self._count, self._seed, self._threads, self._workdir = count, ctx.seed, ctx.threads, ctx.workdir
        self._peers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._lost = 0
        self._store: Path | None = None

    def start(self, share: Share) -> None:
        """`share`: what this process does, whose net the peers follow."""
        self._share = share
        try:
            self._start()
        except PeerLost:
            self.renew()

    def begin(self, step: int) -> None:
        """All have the weights that this process has and no gradients, and draw what step `step` draws at random."""
        self._tell("begin", step)
        _exchange(self._share, "broadcast")
        draw(self._seed, 0, step)

    def deal(self, features: np.ndarray, target: np.ndarray, rows: int, micro: int) -> tuple[np.ndarray, np.ndarray]:
        """The peers have their rows of this batch, and work; what is returned is for this process."""
        scaler = self._share.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else None
        cuts = [len(target) * number // self._count for number in range(self._count + 1)]
        for number, (_, peer) in enumerate(self._peers, 1):
            part = slice(cuts[number], cuts[number + 1])
            _send(peer, "work", features[part], target[part], rows, micro, scale)
        return features[: cuts[1]], target[: cuts[1]]

    def gather(self) -> tuple[float, int]:
        """The peers' gradients are added to this process's. (the sum of their losses, of how many rows)

        MemoryError when memory ran out at one of them, PeerLost when one is gone.
        """
        self._tell("sum")
        answers = [_receive(peer) for _, peer in self._peers]
        for error, hungry, _, _ in answers:
            if hungry:
                raise MemoryError(error)
            if error:
                raise ModelworksError(f"a process of the training failed: {error}", code="training_failed")
        self._tell("reduce")
        _exchange(self._share, "reduce")
        self._lost = 0
        return sum(answer[2] for answer in answers), sum(answer[3] for answer in answers)

    def renew(self) -> None:
        """Other peers in place of those that are lost. ModelworksError when they are lost again and again."""
        while True:
            self.close()
            self._lost += 1
            if self._lost >= _LOST:
                raise ModelworksError(
                    f"a process of the training ended {_LOST} times in a row; see the job's log, or set resources.processes to 1",
                    code="training_failed",
                )
            with contextlib.suppress(PeerLost):
                return self._start()

    def close(self) -> None:
        """End the peers."""
        import torch.distributed as dist

        for _, peer in self._peers:
            peer.close()
        for process, _ in self._peers:
            try:
                process.wait(_GONE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._peers = []
        if dist.is_initialized():
            dist.destroy_process_group()
        if self._store:
            self._store.unlink(missing_ok=True)

    def _start(self) -> None:
        self._store = self._workdir / f"team-{secrets.token_hex(8)}"
        # what numbers are exchanged stays on this machine
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        for number in range(1, self._count):
            ours, theirs = socket.socketpair()
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "modelworks.ml.nets.peer", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                )
            peer = Connection(ours.detach())
            self._peers.append((process, peer))
            _send(peer, self._told, number, self._count, self._seed, self._threads, str(self._store))
        for _, peer in self._peers:
            _receive(peer)  # it has its net, and can join
        try:
            join(self._share.device, 0, self._count, str(self._store))
        except RuntimeError as error:
            raise PeerLost(str(error)) from None

    def _tell(self, *message: Any) -> None:
        for _, peer in self._peers:
            _send(peer, *message)


def processes(wanted: int, rows: int) -> int:
    """How many processes there is use for: as `wanted`, but one a GPU, or else one a core, and a row for each."""
    import torch

    places = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1
    return max(1, min(wanted, places, rows))


def join(device: torch.device, rank: int, count: int, store: str) -> None:
    import torch.distributed as dist

    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=count)


def draw(seed: int, rank: int, step: int) -> None:
    """What is drawn at random in a step depends on the seed, the step and the process alone."""
    import torch

    torch.manual_seed(int(np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _exchange(share: Share, how: str) -> None:
    """"broadcast": this process's weights to all; "reduce": all gradients, summed, to the process that runs the loop."""
    import torch
    import torch.distributed as dist

    if how == "broadcast":
        tensors = [weight.data for weight in share.weights]
    else:
        for weight in share.weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        tensors = [weight.grad for weight in share.weights if weight.grad is not None]
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    try:
        if how == "broadcast":
            dist.broadcast(flat, 0)
        else:
            dist.reduce(flat, 0)
    except RuntimeError as error:
        raise PeerLost(str(error)) from None
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def serve(peer: Connection) -> None:
    """What a peer does, until the process that started it is gone or needs it no longer."""
    import torch

    told, rank, count, seed, threads, store = peer.recv()
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    net, objective, params = pickle.loads(told)
    share = Share(net, objective, params)
    net.train()
    peer.send("ready")
    join(share.device, rank, count, store)
    error, hungry, total, rows = "", False, 0.0, 0
    while True:
        command, *given = peer.recv()
        if command == "work" and not error:
            try:
                more, seen = share.add(*given)
                total, rows = total + float(more), rows + seen
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as failed:
                error, hungry = str(failed) or type(failed).__name__, starved(failed)
        elif command == "sum":
            peer.send((error, hungry, total, rows))
        elif command == "reduce":
            _exchange(share, "reduce")
        elif command == "begin":
            share.net.zero_grad()
            error, hungry, total, rows = "", False, 0.0, 0
            _exchange(share, "broadcast")
            draw(seed, rank, given[0])


def _send(peer: Connection, *message: Any) -> None:
    try:
        peer.send(message)
    except OSError as error:
        raise PeerLost(str(error)) from None


def _receive(peer: Connection) -> Any:
    try:
        return peer.recv()
    except (EOFError, OSError) as error:
        raise PeerLost(str(error)) from None
