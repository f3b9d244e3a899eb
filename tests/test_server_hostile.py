"""Servers that drip, flood, lie or answer nonsense: each ends in an error that names it, in bounded time and memory."""

import json
import re
import socket
import ssl
import stat
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_server import RUN, connect, folder, free_address, policy, processor, recipe  # noqa: F401, fixtures

from nanolmmr1.data.rows import Row
from nanolmmr1.errors import UserError
from nanolmmr1.report import usage
from nanolmmr1.rollout.server import ServerSampler
from nanolmmr1.rollout.server_http import Lost, Refused, Server

OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n"


class Hostile:
    """A server on this host that reads each request and leaves the answer to `answer(line, path)`."""

    def __init__(self, answer, context=None):
        self.answer, self.context, self.heads = answer, context, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        try:
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()
        except OSError:
            pass  # closed

    def _serve(self, line):
        try:
            line = self.context.wrap_socket(line, server_side=True) if self.context else line
            asked = b""
            while b"\r\n\r\n" not in asked:
                asked += line.recv(1 << 16)
            head, _, body = asked.partition(b"\r\n\r\n")
            size = int((re.search(rb"(?i)content-length: (\d+)", head) or [0, 0])[1])
            while len(body) < size:
                body += line.recv(1 << 16)
            self.heads.append(head.decode())
            self.answer(line, head.split()[1].decode())
        except OSError:
            pass  # hung up on
        finally:
            line.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.listener.close()


def drip(before, piece=b"x"):
    def answer(line, path):
        line.sendall(before)
        while True:
            line.sendall(piece)
            time.sleep(0.05)

    return answer


def flood(before, piece):
    def answer(line, path):
        line.sendall(before)
        while True:
            line.sendall(piece * (65536 // len(piece)))

    return answer


def say(data):
    return lambda line, path: line.sendall(data)


def body(text, head=OK):
    return say(head + b"Content-Length: %d\r\n\r\n" % len(text) + text)


def pause(line, path):
    while line.recv(1 << 16):
        pass  # until the other end hangs up


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("nanolmmr1.rollout.server.CONNECT_S", 1.0)


BAD_HTTP = {  # what a server answers -> words of the error
    "nothing": (pause, "did not answer in time"),
    "hangs up": (lambda line, path: None, "broke the connection off|does not speak HTTP"),
    "drips its status line": (drip(b"HTTP/1.1 2"), "did not answer in time"),
    "drips a header": (drip(OK + b"X-Long: "), "did not answer in time"),
    "drips its body": (drip(OK + b"\r\n"), "did not answer in time"),
    "drips chunks": (drip(OK + CHUNKED, b"1\r\nx\r\n"), "did not answer in time"),
    "floods its status line": (flood(b"", b"HTTP"), "does not speak HTTP"),
    "floods headers": (flood(OK, b"X-A: b\r\n"), "does not speak HTTP|more than"),
    "floods one header": (flood(OK + b"X: ", b"y"), "does not speak HTTP|more than"),
    "floods its body": (flood(OK + b"\r\n", b"[1,"), "more than anything that was asked for"),
    "floods chunks": (flood(OK + CHUNKED, b"4\r\nabcd\r\n"), "more than anything"),
    "floods 100 Continue": (flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "more than anything"),
    "claims a petabyte": (say(OK + b"Content-Length: 1000000000000000\r\n\r\n{}"), "broke the connection off"),
    "claims a huge chunk": (say(OK + CHUNKED + b"FFFFFFFFFFFFFFF\r\n{}"), "broke the connection"),
    "a chunk of no size": (say(OK + CHUNKED + b"zz\r\n{}"), "broke the connection off|HTTP"),
    "less than it claims": (say(OK + b"Content-Length: 99\r\n\r\n{}"), "broke the connection off"),
    "another protocol": (say(b"SSH-2.0-OpenSSH_9.0\r\n\r\n"), "does not speak HTTP"),
    "binary": (say(bytes(range(256)) * 9), "does not speak HTTP"),
    "redirects": (body(b"", b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n"), "status 302"),
    "no content": (say(b"HTTP/1.1 204 No Content\r\n\r\n"), "status 204"),
    "gzip": (body(b"\x1f\x8b\x08\x00garbage", OK + b"Content-Encoding: gzip\r\n"), "status 200"),
    "a page": (body(b"<html>hello</html>"), "status 200: <html>"),
    "control codes": (body(b"\x1b[31mred\x07", b"HTTP/1.1 404 No\r\n"), r"status 404: \\x1b\[31mred\\x07"),
    "deep JSON": (body(b"[" * 500_000), "status 200"),
    "deep JSON as an error": (body(b'{"error":' * 90_000 + b"1" + b"}" * 90_000, b"HTTP/1.1 500 No\r\n"), "status 500"),
    "a list": (body(b"[1, 2]"), "status 200"),
    "a huge number": (body(b"9" * 100_000), "status 200"),
    "fails": (body(b'{"error": {"message": "no\\nroom"}}', b"HTTP/1.1 503 No\r\n"), "status 503: no room"),
    "wants another key": (body(b"{}", b"HTTP/1.1 401 No\r\n"), "does not take the run's key, server.key"),
    "another version": (body(b'{"version": [1, {"a": 2}]}'), "version .* of vLLM, and only"),
    "a version of control codes": (body(b'{"version": "\\u001b[2J"}'), r"version \\x1b\[2J of vLLM, and only"),
}


@pytest.mark.parametrize("name", BAD_HTTP)
def test_what_a_server_answers_ends_in_an_error_that_names_it(connect, quick, name):  # noqa: F811
    answer, words = BAD_HTTP[name]
    before, began = usage.rss_mb(), time.monotonic()
    with Hostile(answer) as server, pytest.raises(UserError, match=f"(?s){re.escape(server.url)}.*({words})") as error:
        connect(server.url)
    assert time.monotonic() - began < 15 and usage.rss_mb() - before < 200
    assert "\x1b" not in str(error.value)


def right(path, ids, last):
    """The answer of a server that does as it is told, to the first question: one token, the only one allowed."""
    if path == "/version":
        return {"version": "0.32.0"}
    if path == "/v1/models":
        return {"data": [{"max_model_len": 4096}]}
    choice = {"index": 0, "token_ids": [last], "finish_reason": "length", "weight_versions": [{"version": "a"}],
              "logprobs": {"content": [{"logprob": 0.0}]}}  # fmt: skip
    return {"prompt_token_ids": ids, "choices": [choice]}


def change(where, value):
    """An answer with something in it replaced, or left out where value is KeyError."""

    def changed(answer):
        *parents, leaf = where
        for key in parents:
            answer = answer[key]
        if value is KeyError:
            del answer[leaf]
        else:
            answer[leaf] = value

    return changed


C = ("choices", 0)
BAD_ANSWERS = {
    "no choices": (change(["choices"], KeyError), "cannot be read"),
    "choices null": (change(["choices"], None), "cannot be read"),
    "choices a number": (change(["choices"], 7), "cannot be read"),
    "choices empty": (change(["choices"], []), "gave 0 of 1"),
    "a choice is text": (change(C, "text"), "cannot be read"),
    "no tokens": (change((*C, "token_ids"), KeyError), "cannot be read"),
    "no log-probs": (change((*C, "logprobs"), None), "cannot be read"),
    "tokens as text": (change((*C, "token_ids"), ["5"]), "cannot be read"),
    "a token that is true": (change((*C, "token_ids"), [True]), "cannot be read"),
    "a token with a point": (change((*C, "token_ids"), [5.0]), "cannot be read"),
    "a token past the vocabulary": (change((*C, "token_ids"), [10**9]), "none of the model's"),
    "a token past every integer": (change((*C, "token_ids"), [10**30]), "none of the model's"),
    "a token past every float": (change((*C, "token_ids"), [10**400]), "gave token 10{19}, which"),
    "a token below 0": (change((*C, "token_ids"), [-1]), "none of the model's"),
    "more tokens than asked for": (change((*C, "token_ids"), [5] * 9), "9 tokens with 1 log-probs"),
    "no token at all": (change((*C, "token_ids"), []), "0 tokens with 1 log-probs"),
    "another token": (change((*C, "token_ids"), [5]), "not of the distribution sampled from"),
    "a log-prob as text": (change((*C, "logprobs", "content", 0, "logprob"), "0.0"), "cannot be read"),
    "a log-prob of null": (change((*C, "logprobs", "content", 0, "logprob"), None), "cannot be read"),
    "a log-prob above 0": (change((*C, "logprobs", "content", 0, "logprob"), 3.0), "not a number up to 0"),
    "a log-prob that is NaN": (change((*C, "logprobs", "content", 0, "logprob"), float("nan")), "not a number up to 0"),
    "a log-prob of infinity": (change((*C, "logprobs", "content", 0, "logprob"), -float("inf")), "not a number up to"),
    "a log-prob past floats": (change((*C, "logprobs", "content", 0, "logprob"), 10**400), "cannot be read"),
    "another index": (change((*C, "index"), 1), "without numbers from 0 on"),
    "an index of text": (change((*C, "index"), "0"), "cannot be read"),
    "another finish": (change((*C, "finish_reason"), "\x1b[2J"), r"ended a response by \['\\x1b\[2J'\]"),
    "a finish of parts": (change((*C, "finish_reason"), {}), "cannot be read"),
    "no version": (change((*C, "weight_versions"), []), "without the version"),
    "a version of parts": (change((*C, "weight_versions"), [{"version": [1]}]), "cannot be read"),
    "another prompt": (change(["prompt_token_ids"], [1, 2]), "read 2 tokens that are not the prompt's"),
    "no prompt": (change(["prompt_token_ids"], KeyError), "cannot be read"),
    "a prompt of text": (change(["prompt_token_ids"], "1"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_wrong_answer_is_a_named_error(connect, policy, processor, quick, name):  # noqa: F811
    spoil, words = BAD_ANSWERS[name]
    ids = processor.prepare(Row("How much is 1 + 1?", "2", id="check"), False).ids.tolist()
    last = policy.model.head.shape[0] - 1

    def answer(line, path):
        told = right(path, ids, last)
        if "choices" in told:
            spoil(told)
        line.sendall(OK + b"\r\n" + json.dumps(told).encode())

    with Hostile(answer) as server, pytest.raises(UserError, match=f"(?s){re.escape(server.url)}.*{words}"):
        connect(server.url)


@pytest.mark.parametrize(("path", "told"), [
    ("/v1/models", {}), ("/v1/models", {"data": []}), ("/v1/models", {"data": [{"max_model_len": "many"}]}),
    ("/v1/models", {"data": 5}), ("/v1/models", {"data": [{"max_model_len": None}]}),
    ("/get_world_size", {}), ("/get_world_size", {"world_size": "two"}), ("/get_world_size", {"world_size": -1}),
    ("/get_world_size", {"world_size": [1]}), ("/get_world_size", {"world_size": 10**9}),
])  # fmt: skip
def test_settings_that_cannot_be_read_are_named(policy, processor, path, told):  # noqa: F811
    def answer(line, asked):
        line.sendall(OK + b"\r\n" + json.dumps(told if asked == path else right(asked, [], 0)).encode())

    # Weights are handed over from a GPU alone, and servers are asked for theirs before anything is computed.
    on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=policy.dtype, model=policy.model, banned_ids=())
    with Hostile(answer) as server, \
            pytest.raises(UserError, match=f"{re.escape(server.url + path)} (gave an answer|tells of)"):
        ServerSampler(on_gpu, recipe([server.url], server_weights="nccl"), processor, "folder")


def refuse(line, path):
    line.sendall(b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\n{}")


@pytest.mark.parametrize(("credentials", "sent"), [
    ("", "Bearer run-key"), ("K3Y@", "Bearer K3Y"), (":K3Y@", "Bearer K3Y"), ("us%40er:p%3Aw@", "Basic dXNAZXI6cDp3"),
])  # fmt: skip
def test_a_key_is_sent_and_never_told(credentials, sent):
    with Hostile(refuse) as web:
        server = Server(web.url.replace("://", f"://{credentials}"), "run-key")
        with pytest.raises(Refused) as error:
            server.ask("/version", time.monotonic() + 5)
    assert f"Authorization: {sent}" in web.heads[0].splitlines()
    said = str(error.value)
    assert server.url == web.url and web.url in said and not re.search("K3Y|p%3Aw|us%40er", said)


@pytest.mark.parametrize("mark", "?#")
def test_a_key_never_becomes_the_name_of_a_host(mark):
    with pytest.raises(UserError, match="rollout.servers has 'http://host:1': http://HOST:PORT") as error:
        Server(f"http://s3cret{mark}more@host:1", "run-key")
    assert "s3cret" not in str(error.value)


@pytest.mark.parametrize(("url", "flags"), [
    ("http://0.0.0.0:1", "--host 127.0.0.1 --port 1 "), ("http://0:1", "--host 127.0.0.1 --port 1 "),
    ("http://[::]:1", "--host 127.0.0.1 --port 1 "), ("http://[::1]:1", "--host ::1 --port 1 "),
    ("http://gpu10.local", "--host gpu10.local --port 80 "), ("https://10.0.0.1", "--host 10.0.0.1 --port 443 "),
])  # fmt: skip
def test_the_command_never_listens_on_every_interface(policy, url, flags):  # noqa: F811
    sampler = object.__new__(ServerSampler)  # connected to nothing
    sampler.policy, sampler.cfg, sampler.folder = policy, recipe([]), "model"
    sampler.is_fixed, sampler.longest = True, 9
    command = sampler.command(Server(url, "run-key"))
    assert flags in command and "run-key" not in command
    assert ("--ssl-certfile" in command) == url.startswith("https")


def test_credentials_are_not_in_any_message(connect):  # noqa: F811
    for url in (free_address().replace("://", "://user:s3cret@"), "http://s3cret@host:port", "https://u:s3cret@[::1"):
        with pytest.raises(UserError) as error:
            connect(url)
        assert "s3cret" not in str(error.value) and "user:" not in str(error.value)


def test_the_runs_key_is_its_own_and_only_its_users(connect):  # noqa: F811
    path = Path(RUN, "server.key")
    keys = set()
    for _ in range(2):
        with pytest.raises(UserError, match=re.escape(f'VLLM_API_KEY="$(cat {path})" ')) as error:
            connect()
        keys.add(path.read_text())
        assert path.read_text() not in str(error.value) and "0.0.0.0" not in str(error.value)
    assert len(keys) == 1 and len(keys.pop()) > 30 and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_server_elsewhere_is_warned_of_and_one_here_is_not(policy, processor):  # noqa: F811
    here = ["http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1"]
    elsewhere = ["http://192.0.2.1:1", "https://192.0.2.1:1"]
    notes, cfg = [], recipe(here + elsewhere)  # one here fails first, so that nothing is sent elsewhere
    with pytest.raises(UserError, match="127.0.0.1:1 cannot be reached"):
        ServerSampler(policy, cfg, processor, "folder", note=notes.append)
    assert len(notes) == 2 and all("192.0.2.1:1 is not on this host" in note for note in notes)
    assert ["can be read on the way" in note for note in notes] == [True, False]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A key and a certificate of 127.0.0.1, signed by itself."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
               "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", file, "-out", f"{file}.crt"]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl")
    return file, Path(f"{file}.crt")


def test_https_is_spoken_and_a_stranger_is_not_trusted(certificate, monkeypatch):
    key, chain = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    with Hostile(body(b'{"version": "0.32.0"}'), context) as web:
        with pytest.raises(Lost, match="certificate"):
            Server(web.url).ask("/version", time.monotonic() + 5)
        monkeypatch.setenv("SSL_CERT_FILE", str(chain))
        assert Server(web.url).ask("/version", time.monotonic() + 5) == {"version": "0.32.0"}


def test_hanging_up_ends_a_request_over_tls_too(certificate, monkeypatch):
    key, chain = certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(chain))
    failed = []
    with Hostile(pause, context) as web:
        server = Server(web.url)

        def ask():
            try:
                server.ask("/version", time.monotonic() + 60)
            except Lost as error:
                failed.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        deadline = time.monotonic() + 20
        while not web.heads and time.monotonic() < deadline:
            time.sleep(0.01)
        server.hang_up()
        asking.join(10)
        assert failed and not asking.is_alive() and not server.sockets
