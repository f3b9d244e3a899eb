"""New weights for running vLLM servers, by vLLM's own NCCL weight transfer. Not yet run on a GPU.

The servers listen on routes that VLLM_SERVER_DEV_MODE=1 opens, and were started with --weight-transfer-config.
"""

import contextlib
import ipaddress
import socket
import threading
import time
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor

import torch

from nanolmmr1.errors import UserError
from nanolmmr1.rollout.server_http import CONNECT_S, Lost, Refused


class WeightTransfer:
    """The trainer's end of vLLM's NCCL weight transfer to all servers at once: one broadcast, however many they are.

    To vLLM's transfer engine this is both its client, which tells the servers what comes, and its source of tensors.

    Args:
        policy: offers `model`, `device` and `dtype`. timeout_s: of the connection, and of each transfer.

    Raises:
        UserError: vLLM is not installed here, or the servers cannot be connected to.
    """

    def __init__(self, policy, servers, timeout_s):
        self.policy, self.servers, self.timeout_s, self.weights, self.version = policy, servers, timeout_s, (), ""
        self.pool, self.pulling = ThreadPoolExecutor(len(servers)), threading.Lock()
        self.engine = self._in_time(self._connect)

    def send(self, weights, version):
        """Hand all tensors over, in the model's dtype; from then on the servers' weights are called `version`.

        Raises:
            UserError: a server is lost or refuses, or it takes too long.
        """
        self.weights, self.version = iter(weights), version
        self._in_time(self.engine.send_weights)

    def _connect(self):
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
        return NCCLTrainerWeightTransferEngine.trainer_init(
            # Not packed: packing reads the tensors on streams of its own, which do not wait for what gathers them.
            NCCLTrainerInitInfo(address, port, ranks, rank=0, packed=False), client=self, source=self)

    def _address(self):
        """The address by which the servers see this host: the one from which it reaches them."""
        seen = []
        for server in self.servers:
            try:
                with socket.create_connection((server.host, server.port), CONNECT_S) as line:
                    seen.append(line.getsockname()[0])
            except OSError as error:
                raise UserError(f"{server.url} cannot be reached: {error}") from error
        # A server on this very host can use the address that the others need, but not the other way round.
        return next((address for address in seen if not ipaddress.ip_address(address).is_loopback), seen[0])

    def _in_time(self, work):
        """The result of `work`, in a thread that can be left behind: a broadcast that one server misses never ends."""
        future, device = Future(), torch.cuda.current_device()  # where a new thread does not begin
        self.outcome = future

        def run():
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
                            "one of rollout.servers out of reach?") from error
        except (Lost, Refused) as error:
            raise UserError(f"the weight hand-over failed: {error}") from error
        except Exception as error:
            raise UserError(f"the weight hand-over failed: {type(error).__name__}: {error}") from error
        finally:
            with self.pulling:
                pass  # a thread left behind has done with the tensor it was at

    def _tell(self, path, bodies):
        deadline = time.monotonic() + self.timeout_s

        def ask(server, body):
            try:
                server.ask(path, deadline, body)
            except Exception as error:  # the other servers, and NCCL here, would wait for this one
                self._fail(error)
                raise

        list(self.pool.map(ask, self.servers, bodies))

    def _fail(self, error):
        """End what `_in_time` waits for, and all requests; what came first is what is told."""
        with contextlib.suppress(InvalidStateError):
            self.outcome.set_exception(error)
        for server in self.servers:
            server.hang_up()

    # vLLM's VLLMWeightSyncClient
    def init_weight_transfer_engine(self, init_info):
        bodies, rank = [], init_info["rank_offset"]
        for server in self.servers:
            bodies.append({"init_info": init_info | {"rank_offset": rank}})
            rank += server.gpus
        self._tell("/init_weight_transfer_engine", bodies)

    def start_weight_update(self):
        self._tell("/start_weight_update", [{}] * len(self.servers))

    def update_weights(self, update_info):
        self._tell("/update_weights", [{"update_info": update_info}] * len(self.servers))

    def finish_weight_update(self, weight_version=None):
        self._tell("/finish_weight_update", [{"weight_version": weight_version or self.version}] * len(self.servers))

    # vLLM's WeightSource
    def metadata(self):
        from vllm.distributed.weight_transfer import ParamMeta

        named = self.policy.model.named_parameters()
        return [ParamMeta(name, self.policy.dtype, tuple(p.shape)) for name, p in named]

    def __iter__(self):
        while True:
            with self.pulling:
                # Once given up, what is left is for the thread that waited.
                named = None if self.outcome.done() else next(self.weights, None)
            if named is None:
                return
            yield named[0], named[1].to(self.policy.dtype)
