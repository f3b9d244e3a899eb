"""Weight transfer to vLLM servers: vLLM's NCCL broadcast from the trainer's GPU. Not run on a GPU yet.

The servers need VLLM_SERVER_DEV_MODE=1, which opens the routes for it, and --weight-transfer-config.

Next: ../report/record.py, metrics of a step.
"""

import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from nanolmmr1.errors import UserError
from nanolmmr1.rollout.server_http import CONNECT_S, Lost, Refused, Server
from nanolmmr1.update.policy import Policy

T = TypeVar("T")


class WeightTransfer:
    """The trainer's end of vLLM's NCCL weight transfer: one broadcast to all servers.

    vLLM's transfer engine uses this object in two roles: as its client, which announces tensors to the servers over
    HTTP, and as its source of tensors.

    Args:
        policy: the policy under training.
        servers: all of them take part.
        timeout_s: of connecting, and of each transfer.

    Raises:
        UserError: vLLM is not installed here, or the servers cannot be connected to.
    """

    engine: Any  # vLLM's NCCLTrainerWeightTransferEngine
    weights: Iterator[tuple[str, torch.Tensor]]  # of the current transfer
    version: str  # name of these weights
    outcome: Future[Any]  # of the current `_in_time`; done: its thread must not take another tensor
    pulling: threading.Lock  # held while the engine's thread takes a tensor from `weights`

    def __init__(self, policy: Policy, servers: Sequence[Server], timeout_s: float) -> None:
        self.policy, self.servers, self.timeout_s = policy, servers, timeout_s
        self.weights, self.version = iter(()), ""
        self.pool, self.pulling = ThreadPoolExecutor(len(servers)), threading.Lock()
        self.engine = self._in_time(self._connect)

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: str) -> None:
        """Send all weights, in the model's dtype; the servers report answers as sampled from `version` afterwards.

        Raises:
            UserError: a server is lost or refuses, or it takes longer than timeout_s.
        """
        self.weights, self.version = iter(weights), version
        self._in_time(self.engine.send_weights)

    def _connect(self) -> Any:
        """Set up the NCCL communicator of the trainer and all GPUs of the servers.

        Raises:
            UserError: vLLM is not installed here, or a server is unreachable.
        """
        try:
            from vllm.distributed.weight_transfer.nccl_engine import (
                NCCLTrainerInitInfo,
                NCCLTrainerWeightTransferEngine,
            )
        except ImportError as error:
            raise UserError("rollout.server_weights=nccl needs vLLM here too: pip install 'nanolmmr1[vllm]'") from error
        address = self._address()
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        ranks = 1 + sum(server.gpus for server in self.servers)
        # Not packed: packing reads tensors on other streams, which do not wait for the all-gather of sharded weights.
        info = NCCLTrainerInitInfo(address, port, ranks, rank=0, packed=False)
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=self, source=self)

    def _address(self) -> str:
        """The address at which the servers reach this host: the local end of a connection to them.

        Raises:
            UserError: a server is unreachable.
        """
        addresses = []
        for server in self.servers:
            try:
                with socket.create_connection((server.host, server.port), CONNECT_S) as connection:
                    addresses.append(connection.getsockname()[0])
            except OSError as error:
                raise UserError(f"{server.url} cannot be reached: {error}") from error
        # A server on this host can connect to an external address, but one elsewhere not to localhost.
        external = (address for address in addresses if not ipaddress.ip_address(address).is_loopback)
        return next(external, addresses[0])

    def _in_time(self, work: Callable[[], T]) -> T:
        """The result of `work`, run in a thread that is abandoned after timeout_s.

        A broadcast never ends if one server misses it.

        Raises:
            UserError: `work` failed, or the time is over.
        """
        future: Future[T] = Future()
        device = torch.cuda.current_device()  # a new thread would start with device 0
        self.outcome = future

        def run() -> None:
            try:
                torch.cuda.set_device(device)
                result = work()
            except BaseException as error:
                self._fail(error)
            else:
                with contextlib.suppress(InvalidStateError):
                    future.set_result(result)

        threading.Thread(target=run, daemon=True).start()
        try:
            return future.result(self.timeout_s)
        except UserError:
            raise
        except TimeoutError as error:
            self._fail(error)
            raise UserError(f"the weight hand-over took longer than rollout.timeout_s={self.timeout_s:g} seconds: is "
                            "one of rollout.servers out of reach?") from error  # fmt: skip
        except (Lost, Refused) as error:
            raise UserError(f"the weight hand-over failed: {error}") from error
        except Exception as error:
            raise UserError(f"the weight hand-over failed: {type(error).__name__}: {error}") from error
        finally:
            with self.pulling:
                pass  # wait until an abandoned thread has taken its last tensor

    def _ask_all(self, path: str, bodies: Sequence[dict[str, Any]]) -> None:
        """Send one request to each server, in parallel.

        Raises:
            Lost, Refused: the first failure. It also ends `_in_time`, whose thread may hang in NCCL.
        """
        deadline = time.monotonic() + self.timeout_s

        def ask(server: Server, body: dict[str, Any]) -> None:
            try:
                server.ask(path, deadline, body)
            except Exception as error:
                self._fail(error)
                raise

        list(self.pool.map(ask, self.servers, bodies))

    def _fail(self, error: BaseException) -> None:
        """End `_in_time` with an error, unless it has another one already, and abort all requests."""
        with contextlib.suppress(InvalidStateError):
            self.outcome.set_exception(error)
        for server in self.servers:
            server.hang_up()

    # Interface of vLLM's VLLMWeightSyncClient.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        bodies, rank = [], init_info["rank_offset"]
        for server in self.servers:
            bodies.append({"init_info": init_info | {"rank_offset": rank}})
            rank += server.gpus
        self._ask_all("/init_weight_transfer_engine", bodies)

    def start_weight_update(self) -> None:
        self._ask_all("/start_weight_update", [{}] * len(self.servers))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._ask_all("/update_weights", [{"update_info": update_info}] * len(self.servers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask_all("/finish_weight_update", [{"weight_version": weight_version or self.version}] * len(self.servers))

    # Interface of vLLM's WeightSource.

    def metadata(self) -> list[Any]:
        """Name, dtype and shape of every tensor, in the order of `__iter__`."""
        from vllm.distributed.weight_transfer import ParamMeta

        parameters = self.policy.model.named_parameters()
        return [ParamMeta(name, self.policy.dtype, tuple(p.shape)) for name, p in parameters]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        while True:
            with self.pulling:
                # After a failure the remaining tensors belong to the thread that waited: it consumes them.
                pair = None if self.outcome.done() else next(self.weights, None)
            if pair is None:
                return
            yield pair[0], pair[1].to(self.policy.dtype)
