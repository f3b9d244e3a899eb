"""What several test files share: small checkpoints at the real vocabulary, and memory that is never clean by luck."""

import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads crawl when another program wants the core

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton: kernels run as Python on CPU tensors

SHARED = Path(__file__).resolve().parents[2] / "shared"

# A shell's background job ignores SIGINT, and all that it starts do too: no test could send one.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(min(2, torch.get_num_threads()))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network


def pytest_configure(config):
    config.addinivalue_line("markers", "acceptance: a promise about speed or memory; takes about a minute")


@pytest.fixture(scope="session")
def device():
    """Where Triton kernels run: compiled on a GPU, interpreted on a CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def shared():
    """The folder of shared data and tools beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder `shared` beside the repository")
    return SHARED


def make_checkpoint(shared, out, *options):
    """A random Qwen2.5-VL folder in fp32, as published; returns `out`."""
    tool = shared / "tools" / "make_tiny_checkpoint.py"
    subprocess.run([sys.executable, tool, out, "--dtype", "float32", *options], check=True, capture_output=True)
    return out


@pytest.fixture(scope="session")
def tiny(shared, tmp_path_factory):
    """A folder with 20 M parameters, most of them the embedding, which is also the head."""
    return make_checkpoint(shared, tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A folder of 400 kB with a tokenizer of its own, for what does not depend on the model."""
    from nanolmmr1.doctor import write_model

    return write_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def least(shared, tmp_path_factory):
    """A folder with 5 M parameters: the smallest model that reads text and pictures with the real tokenizer."""
    return make_checkpoint(shared, tmp_path_factory.mktemp("least") / "model", *(
        "--hidden 32 --intermediate 32 --layers 1 --heads 2 --kv-heads 1 --vision-depth 1 --vision-hidden 32 "
        "--vision-heads 2 --vision-intermediate 32").split())  # fmt: skip


@pytest.fixture(scope="session")
def tiny_untied(shared, tmp_path_factory):
    """As `tiny`, with a head of its own."""
    return make_checkpoint(shared, tmp_path_factory.mktemp("tiny_untied") / "model", "--untied")


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Uninitialised floats are NaN, so that an element nobody wrote shows."""

    def poisoned(make):
        def empty(*args, **kwargs):
            out = make(*args, **kwargs)
            with torch.no_grad():
                return out.fill_(float("nan")) if out.is_floating_point() else out

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def head_inputs():
    """Maker of hidden (N, H), weight (V, H) and target (N,) whose logits spread over a few nats."""

    def make(tokens=13, hidden=24, vocab=101, dtype=torch.float64, seed=0):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
        w = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) * 3 / hidden**0.5
        return x.to(dtype), w.to(dtype), torch.randint(0, vocab - 3, (tokens,), generator=generator)

    return make


@pytest.fixture
def plain_head():
    """log_softmax of whole logits in the inputs' dtype, differentiable; banned ids are rows that the head lacks."""

    def logp_and_entropy(hidden, weight, target, temperature=1.0, banned=()):
        kept = torch.tensor([token for token in range(len(weight)) if token not in banned])
        logits = hidden @ weight[kept].T / temperature  # (N, V - banned)
        logps = logits.log_softmax(-1)
        logp = logps.gather(1, torch.searchsorted(kept, target)[:, None]).squeeze(1)
        return logp, -(logps.exp() * logps).sum(-1)

    return logp_and_entropy


@pytest.fixture
def sharded_weight():
    """A (7, 4) head as FSDP leaves it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield distribute_tensor(torch.randn(7, 4), init_device_mesh("cpu", (1,)))
    dist.destroy_process_group()


HEAD_FAULTS = [  # what to change in a correct call of sizes N = 5, H = 4, V = 7, and words of the complaint
    (dict(weight=torch.zeros(7, 4, dtype=torch.bfloat16)), "float32.*bfloat16"),
    (dict(hidden=torch.zeros(5, 3)), r"\(5, 3\)"),
    (dict(hidden=torch.zeros(1, 5, 4)), r"\(1, 5, 4\)"),
    (dict(target=torch.tensor([0, 1, 2, 3])), r"\(4,\)"),
    (dict(target=torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)), "int32"),
    (dict(target=torch.tensor([0, 1, 2, 3, 7])), "0 to 7.* 7 rows"),
    (dict(target=torch.tensor([0, 1, 2, 3, -1])), "-1 to 3"),
    (dict(banned=(3,)), r"banned.*3"),
    (dict(banned=(-1,)), r"banned=\(-1,\).*\[0, 7\)"),
    (dict(banned={7}), r"banned=\(7,\)"),
    (dict(chunk_tokens=-1), "chunk_tokens=-1"),
    (dict(temperature=0.0), "temperature=0"),
    (dict(temperature=-1.0), "temperature=-1"),
    (dict(temperature=float("nan")), "temperature=nan"),
    (dict(impl="fast"), "fast.*chunked"),
]


@pytest.fixture(params=HEAD_FAULTS, ids=lambda fault: fault[1])
def head_fault(request):
    """Arguments of a wrong call, and words that its ValueError must hold."""
    changes, words = request.param
    return dict(hidden=torch.zeros(5, 4), weight=torch.zeros(7, 4), target=torch.arange(5)) | changes, words
