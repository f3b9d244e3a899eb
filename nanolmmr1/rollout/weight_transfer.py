"""New weights for running vLLM servers, by vLLM's own NCCL weight transfer. Not yet run on a GPU.

The servers listen on routes that VLLM_SERVER_DEV_MODE=1 opens, and were started with --weight-transfer-config.
"""

import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from nanolmmr1.config import UserError
from nanolmmr1.rollout.vllm_http import CONNECT_S


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
        self.pool = ThreadPoolExecutor(len(servers))
        self.engine = self._in_time(self._connect)

    def send(self, weights, version):
        """Hand all tensors over, in the model's dtype; from then on the servers' weights are called `version`.

        Raises:
            UserError: a server is lost or refuses, or it takes too long.
        """
        self.weights, self.version = weights, version
        self._in_time(self.engine.send_weights)

    def _connect(self):
        try:
            from vllm.distributed.weight_transfer.nccl_engine import (
                NCCLTrainerInitInfo,
                NCCLTrainerWeightTransferEngine,
            )
        except ImportError as error:
            raise UserError("rollout.server_weights=nccl needs vLLM here too: pip install 'nanolmmr1[vllm]'") from error
        # The address by which the servers see this host is the one from which it reaches them.
        with socket.create_connection((self.servers[0].host, self.servers[0].port), CONNECT_S) as line:
            address = line.getsockname()[0]
        with socket.create_server((address, 0)) as free:
            port = free.getsockname()[1]
        ranks = 1 + sum(server.gpus for server in self.servers)
        return NCCLTrainerWeightTransferEngine.trainer_init(
            NCCLTrainerInitInfo(address, port, ranks, rank=0), client=self, source=self)

    def _in_time(self, work):
        """The result of `work`, in a thread that can be left behind: a broadcast that one server misses never ends."""
        future = Future()

        def run():
            try:
                torch.cuda.set_device(self.policy.device)
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            return future.result(self.timeout_s)
        except UserError:
            raise
        except TimeoutError as error:
            raise UserError(f"the weight hand-over took longer than rollout.timeout_s={self.timeout_s:g} seconds: is "
                            "one of rollout.servers out of reach?") from error
        except Exception as error:
            raise UserError(f"the weight hand-over failed: {type(error).__name__}: {error}") from error

    def _tell(self, path, bodies):
        deadline = time.monotonic() + self.timeout_s
        list(self.pool.map(lambda server, body: server.ask(path, deadline, body), self.servers, bodies))

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
        return ((name, tensor.to(self.policy.dtype)) for name, tensor in self.weights)
