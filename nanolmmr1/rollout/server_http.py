"""One vLLM 0.32 server over HTTP: what it is asked, and what its answers mean.

The route /inference/v1/generate takes token ids, and for pictures the tensors that vLLM's own processor would have
made of them. It is open on a server that was started with --enable-scale-out.

A server is untrusted: an answer has a deadline and a largest size, however it comes, and everything in it is checked.
"""

import base64
import hashlib
import http.client
import io
import ipaddress
import json
import socket
import struct
import time
from urllib.parse import unquote, urlsplit

import numpy as np
import torch

from nanolmmr1.config import without_credentials
from nanolmmr1.errors import UserError
from nanolmmr1.rollout import Response
from nanolmmr1.rollout.vllm_input import check_logps, images_of, sampling_fields
from nanolmmr1.terminal import printable

CONNECT_S = 10
MAX_BYTES = 1 << 20  # of an answer without responses
TOKEN_BYTES = 1024  # of a response's token, with its log-prob and text
FORBIDDEN = -1e30  # a logit bias; JSON has no infinity, and exp of this is 0 all the same
NOT_A_NUMBER = -9999.0  # what the server writes for a NaN


class Lost(Exception):
    """The server is out of reach, broken, or not the one it was: another may answer."""


class Refused(Exception):
    """The server understood and will not: another would not either."""


class Server:
    """One server and what is known of it.

    Args:
        url: http(s)://HOST:PORT, perhaps with USER:PASSWORD@ (sent as Basic authorisation) or KEY@ (as Bearer).
        key: sent as Bearer to one whose URL has neither.

    Attributes:
        url: without credentials. is_local: whether it is on this host.
        version: of the weights it must sample from; empty: whatever it holds.
        gpus: how many take part in a weight transfer.
        lost_at, reason, again: since when and why it is lost, and when to try it next; 0, "", 0 if it is not.
    """

    def __init__(self, url, key=""):
        self.url = without_credentials(url).rstrip("/")
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            parts, self.host = None, None
        # A ? or # inside of credentials would make their first half the host.
        if not self.host or parts.scheme not in ("http", "https") or any((*parts[3:], parts.path.strip("/"))):
            raise UserError(f"rollout.servers has {self.url!r}: http://HOST:PORT or https://HOST:PORT is needed")
        self.is_secure, self.version, self.gpus, self.sockets = parts.scheme == "https", "", 0, set()
        user, password = (unquote(part or "") for part in (parts.username, parts.password))
        self.authorization, self.has_own_key = "", bool(user or password)
        if user and password:
            self.authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        elif key := user or password or key:
            self.authorization = f"Bearer {key}"
        self.found()

    @property
    def is_local(self):
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def found(self):
        self.lost_at, self.reason, self.again = 0.0, "", 0.0

    def lose(self, reason, pause):
        now = time.monotonic()
        # What came first says why; what follows is that nobody answers.
        self.lost_at, self.reason, self.again = self.lost_at or now, self.reason or str(reason), now + pause

    def ask(self, path, deadline, body=None, limit=MAX_BYTES):
        """The server's answer, from JSON; a request with a body is a POST.

        Args:
            deadline: by time.monotonic(); the server is lost when it comes. limit: bytes of the answer, headers too.

        Raises:
            Lost, Refused.
        """
        kind = http.client.HTTPSConnection if self.is_secure else http.client.HTTPConnection
        left = deadline - time.monotonic()
        connection = kind(self.host, self.port, timeout=max(0.01, min(left, CONNECT_S)))
        line = None
        try:
            connection.connect()
            line = connection.sock
            self.sockets.add(line)
            _notice_dead_hosts(line)
            connection.sock = _Line(line, deadline, limit)
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            headers |= {"Authorization": self.authorization} if self.authorization else {}
            connection.request("GET" if body is None else "POST", path, data, headers)
            response = connection.getresponse()
            text = _body(response)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of a host name or a header
            raise Lost(f"{self.url} {_reason(error)}") from error
        finally:
            self.sockets.discard(line)
            if line:
                line.close()
            connection.close()
        try:
            answer = json.loads(text or b"{}")
        except (ValueError, RecursionError):
            answer = text[:200].decode(errors="replace")
        if response.status >= 500:
            raise Lost(f"{self.url} failed with status {response.status}: {_message(answer)}")
        if response.status in (401, 403):
            where = "the credentials in its URL" if self.has_own_key else "the run's key, server.key in its folder"
            raise Refused(f"{self.url}{path} does not take {where} (status {response.status}: {_message(answer)})")
        if response.status != 200 or not isinstance(answer, dict):
            raise Refused(f"{self.url}{path} answered with status {response.status}: {_message(answer)}")
        return answer

    def hang_up(self):
        """End all requests; the server stops working on them."""
        for line in list(self.sockets):
            try:
                line.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it ended by itself


class _Line:
    """A socket as http.client wants it. Its answer ends at a deadline and after a number of bytes, however it comes."""

    def __init__(self, sock, deadline, limit):
        self.sock, self.deadline, self.left = sock, deadline, limit

    def wait(self):
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError
        self.sock.settimeout(left)

    def sendall(self, data):
        self.wait()
        self.sock.sendall(data)

    def makefile(self, mode):
        return io.BufferedReader(_Reader(self))

    def close(self):
        """Nothing: http.client calls it before the body is read."""


class _Reader(io.RawIOBase):
    def __init__(self, line):
        self.line = line

    def readable(self):
        return True

    def readinto(self, buffer):
        self.line.wait()
        count = self.line.sock.recv_into(buffer)
        self.line.left -= count
        if self.line.left < 0:
            raise Flood
        return count


class Flood(http.client.HTTPException):
    """An answer is longer than anything that was asked for."""


def _body(response):
    """The body, in pieces: http.client would allocate as much as the server claims to send."""
    pieces = []
    while piece := response.read(1 << 16):
        pieces.append(piece)
    if response.length:  # None where it is not known
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def _notice_dead_hosts(line):
    """A host that loses its power says nothing more: notice within a minute, however long an answer may take."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _reason(error):
    if isinstance(error, TimeoutError):
        return "did not answer in time"
    if isinstance(error, (ConnectionResetError, BrokenPipeError, http.client.IncompleteRead)):
        return f"broke the connection off ({type(error).__name__})"
    if isinstance(error, Flood):
        return "answered with more than anything that was asked for"
    if isinstance(error, http.client.HTTPException):
        return f"does not speak HTTP as a server does ({type(error).__name__}: {printable(str(error))[:100]})"
    return f"cannot be reached ({printable(str(error))[:200] or type(error).__name__})"


def _message(answer):
    """The sentence of an error, in vLLM's or its web framework's form."""
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    try:
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (RecursionError, ValueError):  # nested too deep to be shown; a number too long to be
        text = "an answer that cannot be shown"
    return printable(" ".join(text.split())[:300])


def request(prompt, params, seed, merge, dtype, salt, **special):
    """The body of a request for all responses to a prompt: its pictures travel once, and it is read once.

    Args:
        merge: patches along a side of an image token. dtype: of the model; patches travel in it.
        salt: names the weights; prefixes and image features cached under another are not found.
        special: sampling parameters of vLLM's besides ours.

    Raises:
        UserError: the prompt's images do not fit its tokens.
    """
    sampling = dict(
        n=params.num_responses if params.temperature else 1,  # vLLM takes no greedy groups
        **sampling_fields(params),
        logit_bias={str(token): FORBIDDEN for token in params.banned_ids} or None,
        seed=int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(2)),  # response i's: + i
    )
    return {
        "token_ids": prompt.ids.tolist(),
        "features": _features(prompt, merge, dtype, salt),
        "sampling_params": sampling | special,
        "cache_salt": salt,
        "return_token_ids": True,
    }


def answer_bytes(prompt, params):
    """How long an answer to a request may be."""
    return MAX_BYTES + 16 * len(prompt.ids) + TOKEN_BYTES * params.num_responses * params.max_tokens


def field(server, path, answer, read):
    """`read(answer)`.

    Raises:
        Lost: it is not there, or not of its type.
    """
    try:
        return read(answer)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = printable(f"{type(error).__name__}: {error}")[:100]
        raise Lost(f"{server.url}{path} gave an answer that cannot be read ({reason})") from error


def responses(answer, prompt, params, server, vocabulary=1 << 31):
    """The responses of an answer, one for each that `params` asks for, and the version of the weights they come from.

    Args:
        vocabulary: token ids are below it.

    Raises:
        Lost: the answer cannot be read, was cut short, or sampled from other weights than `server.version`.
        UserError: the server read another prompt, or gave tokens or log-probs that there are none of.
    """
    prompt_ids, choices = field(server, "", answer, _choices)
    row = f"row {prompt.row.id}: {server.url}"
    if prompt_ids != prompt.ids.tolist():
        raise UserError(f"{row} read {len(prompt_ids)} tokens that are not the prompt's {len(prompt.ids)}")
    versions = {version for *_, found in choices for version in found}
    if server.version and versions != {server.version}:
        found = printable(str(sorted(versions)))[:200]
        raise Lost(f"{server.url} sampled from weights {found}, not {server.version!r}: was it restarted?")
    if ends := {finish for _, _, _, finish, _ in choices} - {"stop", "length"}:
        raise Lost(f"{server.url} ended a response by {printable(str(sorted(ends, key=str)))[:200]}")
    if len(choices) != (asked := params.num_responses if params.temperature else 1):
        raise Lost(f"{server.url} gave {len(choices)} of {asked} responses")
    if [index for index, *_ in choices] != list(range(asked)) or not versions:
        raise Lost(f"{server.url} gave responses without numbers from 0 on, or without the version of their weights")
    made = []
    for _, ids, logps, finish, _ in choices:
        if not 0 < len(ids) == len(logps) <= params.max_tokens:
            raise UserError(f"{row} gave {len(ids)} tokens with {len(logps)} log-probs, of at most {params.max_tokens}")
        if wrong := next((i for i in ids if not 0 <= i < vocabulary or i in params.banned_ids), None):
            raise UserError(f"{row} gave token {str(wrong)[:20]}, which is banned or none of the model's")
        check_logps(row, logps, NOT_A_NUMBER)
        made.append(Response(torch.tensor(ids, dtype=torch.int64), torch.tensor(logps), finish))
    return made * (params.num_responses // len(made)), max(versions)


def _choices(answer):
    """(token ids of the prompt, [(index, token ids, log-probs, finish, versions)] by index) of an answer."""
    found = []
    for choice in answer["choices"]:
        logps = [token["logprob"] for token in choice["logprobs"]["content"]]
        versions = [span["version"] for span in choice["weight_versions"]]
        index, ids, finish = choice["index"], choice["token_ids"], choice["finish_reason"]
        typed = ((index,), int), (ids, int), (versions, str)
        if not all(type(x) is kind for values, kind in typed for x in values) or isinstance(finish, list | dict):
            raise TypeError("an index, a token or a version is of another type")
        if not all(type(x) in (int, float) for x in logps):
            raise TypeError("a log-prob is no number")
        found.append((index, ids, [float(x) for x in logps], finish, versions))
    prompt_ids = answer["prompt_token_ids"]
    if not isinstance(prompt_ids, list):
        raise TypeError("prompt_token_ids is no list")
    return prompt_ids, sorted(found, key=lambda choice: choice[0])


def _features(prompt, merge, dtype, salt):
    """A prompt's pictures as vLLM's processor would hand them to its engine, None where there are none."""
    images = images_of(prompt, merge)
    if not images:
        return None
    hashes, places, data = [], [], []
    for grid, pixels, first, length in images:
        pixels = _tensor(pixels.to(dtype)), ["flat", {"slices": [[0, len(pixels), None]]}]
        shape = _tensor(grid), ["batched", {"keep_on_cpu": True}]
        item = {"pixel_values": pixels, "image_grid_thw": shape}
        packed = _msgpack({key: {"data": value, "field": field} for key, (value, field) in item.items()})
        hashes.append(f"{salt}-{hashlib.blake2b(packed, digest_size=16).hexdigest()}")
        places.append({"offset": first, "length": length})
        data.append(base64.b64encode(packed).decode())
    return {"mm_hashes": {"image": hashes}, "mm_placeholders": {"image": places}, "kwargs_data": {"image": data}}


def _tensor(x):
    return [str(x.dtype).removeprefix("torch."), list(x.shape), x.contiguous().view(torch.uint8).numpy().tobytes()]


def _msgpack(x):
    """MessagePack, each thing in its longest form; bytes as extension type 3, vLLM's raw memory."""
    match x:
        case None:
            return b"\xc0"
        case bool():
            return b"\xc3" if x else b"\xc2"
        case int():
            return b"\xd3" + struct.pack(">q", x)
        case str():
            return b"\xdb" + struct.pack(">I", len(x.encode())) + x.encode()
        case bytes():
            return b"\xc9" + struct.pack(">IB", len(x), 3) + x
        case list():
            return b"\xdd" + struct.pack(">I", len(x)) + b"".join(map(_msgpack, x))
        case dict():
            flat = (part for pair in x.items() for part in pair)
            return b"\xdf" + struct.pack(">I", len(x)) + b"".join(map(_msgpack, flat))
