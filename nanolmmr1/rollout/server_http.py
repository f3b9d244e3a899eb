"""HTTP client of one vLLM 0.32 server: its requests, and the meaning of its answers.

The route /inference/v1/generate takes token ids and, for images, the tensors that vLLM's own processor would produce.
It exists on a server started with --enable-scale-out.

Servers are untrusted. An answer has a deadline and a size limit, headers included, and everything in it is checked. The
client is http.client on a socket that enforces both: httpx has a timeout for each read but no deadline for an answer,
reads an endless series of `100 Continue`, and limits headers only.

Next: weight_transfer.py, new weights for servers.
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
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np
import torch

from nanolmmr1.config import without_credentials
from nanolmmr1.data.group import Response
from nanolmmr1.data.prompt import Prompt
from nanolmmr1.errors import UserError
from nanolmmr1.rollout.sampler import SamplingParams, Seed
from nanolmmr1.rollout.vllm_input import check_logps, images_of, sampling_fields
from nanolmmr1.terminal import printable

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

CONNECT_S = 10
MAX_BYTES = 1 << 20  # of an answer without responses
TOKEN_BYTES = 1024  # of one response token in an answer, with its log-prob and text
FORBIDDEN = -1e30  # logit bias of a banned token: JSON has no infinity, and exp of this is 0 too
NOT_A_NUMBER = -9999.0  # the server's log-prob for a NaN


class Lost(Exception):
    """The server is unreachable or broken, or was restarted: another server may answer."""


class Refused(Exception):
    """The server understood the request and rejects it: another server would, too."""


class Server:
    """One server.

    Args:
        url: http(s)://HOST:PORT, optionally with USER:PASSWORD@ (sent as Basic authorization) or KEY@ (as Bearer).
        key: sent as Bearer if the URL has neither.

    Raises:
        UserError: the URL has another form.
    """

    url: str  # without credentials
    host: str
    port: int
    is_secure: bool  # https
    authorization: str  # value of the header; empty: none is sent
    has_own_key: bool  # credentials come from the URL, not from the run's key
    version: str  # name of the weights it must sample from; empty: any
    gpus: int  # number of its GPUs in a weight transfer
    sockets: set[socket.socket]  # of the requests in flight, in all threads
    lost_at: float  # time.monotonic() of the loss; 0: it is not lost
    lost_reason: str
    retry_at: float  # time.monotonic() of the next attempt, if it is lost

    def __init__(self, url: str, key: str = "") -> None:
        self.url = without_credentials(url).rstrip("/")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            host = None
        # A ? or # inside of credentials would turn their first half into the host.
        if not host or parts.scheme not in ("http", "https") or any((*parts[3:], parts.path.strip("/"))):
            raise UserError(f"rollout.servers has {self.url!r}: http://HOST:PORT or https://HOST:PORT is needed")
        self.host, self.port, self.is_secure = host, port, parts.scheme == "https"
        self.version, self.gpus, self.sockets = "", 0, set()
        user, password = (unquote(credential or "") for credential in (parts.username, parts.password))
        self.authorization, self.has_own_key = "", bool(user or password)
        if user and password:
            self.authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        elif key := user or password or key:
            self.authorization = f"Bearer {key}"
        self.mark_found()

    @property
    def is_local(self) -> bool:
        """Whether the server is on this host."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def mark_found(self) -> None:
        """The server has answered."""
        self.lost_at, self.lost_reason, self.retry_at = 0.0, "", 0.0

    def mark_lost(self, reason: Exception, pause_s: float) -> None:
        """A request has failed; retry after a pause. Time and reason are those of the first failure, the cause."""
        now = time.monotonic()
        self.lost_at, self.lost_reason = self.lost_at or now, self.lost_reason or str(reason)
        self.retry_at = now + pause_s

    def ask(self, path: str, deadline: float, body: Any = None, limit: int = MAX_BYTES) -> dict[str, Any]:
        """Send a request and return the JSON object of the answer.

        Args:
            deadline: by time.monotonic().
            body: JSON-able; None sends a GET, anything else a POST.
            limit: most bytes of the answer, headers included.

        Raises:
            Lost, Refused
        """
        connection_type = http.client.HTTPSConnection if self.is_secure else http.client.HTTPConnection
        left = deadline - time.monotonic()
        connection = connection_type(self.host, self.port, timeout=max(0.01, min(left, CONNECT_S)))
        sock = None
        try:
            connection.connect()
            sock = connection.sock
            self.sockets.add(sock)
            _enable_keepalive(sock)
            connection.sock = _LimitedSocket(sock, deadline, limit)
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            headers |= {"Authorization": self.authorization} if self.authorization else {}
            connection.request("GET" if body is None else "POST", path, data, headers)
            response = connection.getresponse()
            text = _read_body(response)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: of a host name or a header
            raise Lost(f"{self.url} {_reason(error)}") from error
        finally:
            if sock:
                self.sockets.discard(sock)
                sock.close()
            connection.close()
        return self._parse(path, response.status, text)

    def _parse(self, path: str, status: int, text: bytes) -> dict[str, Any]:
        """The JSON object of an answer with status 200.

        Raises:
            Lost: status of a broken server. Refused: another status, or no JSON object.
        """
        try:
            answer = json.loads(text or b"{}")
        except (ValueError, RecursionError):
            answer = text[:200].decode(errors="replace")
        if status >= 500:
            raise Lost(f"{self.url} failed with status {status}: {_message(answer)}")
        if status in (401, 403):
            key = "the credentials in its URL" if self.has_own_key else "the run's key, server.key in its folder"
            raise Refused(f"{self.url}{path} does not take {key} (status {status}: {_message(answer)})")
        if status != 200 or not isinstance(answer, dict):
            raise Refused(f"{self.url}{path} answered with status {status}: {_message(answer)}")
        return answer

    def hang_up(self) -> None:
        """Abort all requests in flight; the server stops working on them."""
        for sock in list(self.sockets):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already


class _LimitedSocket:
    """A socket for http.client that enforces a deadline and a size limit, however slowly the answer comes."""

    def __init__(self, sock: socket.socket, deadline: float, limit: int) -> None:
        self.sock, self.deadline, self.bytes_left = sock, deadline, limit

    def set_timeout(self) -> None:
        """Let the next operation end at the deadline.

        Raises:
            TimeoutError: the deadline has passed.
        """
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError
        self.sock.settimeout(left)

    def sendall(self, data: bytes) -> None:
        self.set_timeout()
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_LimitedReader(self))

    def close(self) -> None:
        """Does nothing: http.client calls it before the body is read."""


class _LimitedReader(io.RawIOBase):
    """The stream that http.client reads an answer from."""

    def __init__(self, limited: _LimitedSocket) -> None:
        self.limited = limited

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        self.limited.set_timeout()
        count = self.limited.sock.recv_into(buffer)
        self.limited.bytes_left -= count
        if self.limited.bytes_left < 0:
            raise Flood
        return count


class Flood(http.client.HTTPException):
    """An answer exceeds its size limit."""


def _read_body(response: http.client.HTTPResponse) -> bytes:
    """The body, read in pieces: http.client would allocate the size that the server claims.

    Raises:
        http.client.IncompleteRead: the body is shorter than that.
    """
    pieces = []
    while piece := response.read(1 << 16):
        pieces.append(piece)
    if response.length:  # None: unknown
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


def _enable_keepalive(sock: socket.socket) -> None:
    """Detect within a minute that the host has lost its power, however long an answer may take."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _reason(error: Exception) -> str:
    """An error of a server, as the rest of a sentence."""
    if isinstance(error, TimeoutError):
        return "did not answer in time"
    if isinstance(error, (ConnectionResetError, BrokenPipeError, http.client.IncompleteRead)):
        return f"broke the connection off ({type(error).__name__})"
    if isinstance(error, Flood):
        return "answered with more than anything that was asked for"
    if isinstance(error, http.client.HTTPException):
        return f"does not speak HTTP as a server does ({type(error).__name__}: {printable(str(error))[:100]})"
    return f"cannot be reached ({printable(str(error))[:200] or type(error).__name__})"


def _message(answer: Any) -> str:
    """The sentence in an error answer of vLLM or its web framework."""
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    try:
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (RecursionError, ValueError):  # nested too deep, or a number with too many digits
        text = "an answer that cannot be shown"
    return printable(" ".join(text.split())[:300])


def request(
    prompt: Prompt, params: SamplingParams, seed: Seed, merge: int, dtype: torch.dtype, version: str, **special: Any
) -> dict[str, Any]:
    """Body of the request for all responses to a prompt. Images are sent once, and the prompt is prefilled once.

    Args:
        merge: patches along one side of an image token.
        dtype: of the model; patches are sent in it.
        version: name of the weights. Prefixes and image features are cached under it, so none of other weights is used.
        special: more of vLLM's sampling parameters.

    Raises:
        UserError: the prompt's images do not fit its tokens.
    """
    sampling = dict(
        n=params.num_responses if params.temperature else 1,  # vLLM rejects n > 1 for greedy sampling
        **sampling_fields(params),
        logit_bias={str(token): FORBIDDEN for token in params.banned_ids} or None,
        # vLLM adds i for response i, hence two bits less than 64.
        seed=int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(2)),
    )
    return {
        "token_ids": prompt.ids.tolist(),
        "features": _features(prompt, merge, dtype, version),
        "sampling_params": sampling | special,
        "cache_salt": version,
        "return_token_ids": True,
    }


def answer_bytes(prompt: Prompt, params: SamplingParams) -> int:
    """Size limit of the answer to a request."""
    return MAX_BYTES + 16 * len(prompt.ids) + TOKEN_BYTES * params.num_responses * params.max_tokens


def field(server: Server, path: str, answer: Any, read: Callable[[Any], T]) -> T:
    """`read(answer)`.

    Raises:
        Lost: the field is missing or has another type.
    """
    try:
        return read(answer)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = printable(f"{type(error).__name__}: {error}")[:100]
        raise Lost(f"{server.url}{path} gave an answer that cannot be read ({reason})") from error


def responses(
    answer: Any, prompt: Prompt, params: SamplingParams, server: Server, vocabulary: int = 1 << 31
) -> tuple[list[Response], str]:
    """The responses in an answer, as many as `params` requests, and the version of the weights they come from.

    Args:
        vocabulary: its size; token ids are below it.

    Raises:
        Lost: the answer cannot be read, was truncated, or was sampled from other weights than `server.version`.
        UserError: the server read another prompt, or its tokens or log-probs are impossible.
    """
    prompt_ids, choices = field(server, "", answer, _choices)
    row = f"row {prompt.row.id}: {server.url}"
    if prompt_ids != prompt.ids.tolist():
        raise UserError(f"{row} read {len(prompt_ids)} tokens that are not the prompt's {len(prompt.ids)}")
    versions = {version for choice in choices for version in choice.versions}
    if server.version and versions != {server.version}:
        names = printable(str(sorted(versions)))[:200]
        raise Lost(f"{server.url} sampled from weights {names}, not {server.version!r}: was it restarted?")
    if ends := {choice.finish for choice in choices} - {"stop", "length"}:
        raise Lost(f"{server.url} ended a response by {printable(str(sorted(ends, key=str)))[:200]}")
    requested = params.num_responses if params.temperature else 1
    if len(choices) != requested:
        raise Lost(f"{server.url} gave {len(choices)} of {requested} responses")
    if [choice.number for choice in choices] != list(range(requested)) or not versions:
        raise Lost(f"{server.url} gave responses without numbers from 0 on, or without the version of their weights")
    sampled = []
    for _, ids, logps, finish, _ in choices:
        if not 0 < len(ids) == len(logps) <= params.max_tokens:
            raise UserError(f"{row} gave {len(ids)} tokens with {len(logps)} log-probs, of at most {params.max_tokens}")
        if wrong := next((i for i in ids if not 0 <= i < vocabulary or i in params.banned_ids), None):
            raise UserError(f"{row} gave token {str(wrong)[:20]}, which is banned or none of the model's")
        check_logps(row, logps, NOT_A_NUMBER)
        sampled.append(Response(torch.tensor(ids, dtype=torch.int64), torch.tensor(logps), finish))
    return sampled * (params.num_responses // len(sampled)), max(versions)


class _Choice(NamedTuple):
    """One response of an answer."""

    number: int  # among the responses, from 0 on
    ids: list[int]
    logps: list[float]
    finish: str  # not checked yet: any JSON scalar
    versions: list[str]  # of the weights; several if they were replaced meanwhile


def _choices(answer: Any) -> tuple[list[int], list[_Choice]]:
    """Token ids of the prompt as the server read it, and the responses sorted by number.

    Raises:
        KeyError, TypeError and other errors of an answer with another structure.
    """
    choices = []
    for choice in answer["choices"]:
        logps = [token["logprob"] for token in choice["logprobs"]["content"]]
        versions = [span["version"] for span in choice["weight_versions"]]
        index, ids, finish = choice["index"], choice["token_ids"], choice["finish_reason"]
        if not all(type(x) is int for x in (index, *ids)) or not all(type(x) is str for x in versions):
            raise TypeError("an index, a token or a version is of another type")
        if isinstance(finish, list | dict):
            raise TypeError("a finish reason is of another type")
        if not all(type(x) in (int, float) for x in logps):
            raise TypeError("a log-prob is no number")
        choices.append(_Choice(index, ids, [float(x) for x in logps], finish, versions))
    prompt_ids = answer["prompt_token_ids"]
    if not isinstance(prompt_ids, list):
        raise TypeError("prompt_token_ids is no list")
    return prompt_ids, sorted(choices, key=lambda choice: choice.number)


def _features(prompt: Prompt, merge: int, dtype: torch.dtype, version: str) -> dict[str, Any] | None:
    """A prompt's images, encoded like the output of vLLM's processor; None without images."""
    images = images_of(prompt, merge)
    if not images:
        return None
    hashes, places, data = [], [], []
    for grid, patches, first, length in images:
        pixels = _tensor(patches.to(dtype)), ["flat", {"slices": [[0, len(patches), None]]}]
        shape = _tensor(grid), ["batched", {"keep_on_cpu": True}]
        item = {"pixel_values": pixels, "image_grid_thw": shape}
        packed = _msgpack({name: {"data": tensor, "field": layout} for name, (tensor, layout) in item.items()})
        hashes.append(f"{version}-{hashlib.blake2b(packed, digest_size=16).hexdigest()}")
        places.append({"offset": first, "length": length})
        data.append(base64.b64encode(packed).decode())
    return {"mm_hashes": {"image": hashes}, "mm_placeholders": {"image": places}, "kwargs_data": {"image": data}}


def _tensor(x: torch.Tensor) -> list[Any]:
    """vLLM's form of a tensor: dtype, shape, bytes."""
    return [str(x.dtype).removeprefix("torch."), list(x.shape), x.contiguous().view(torch.uint8).numpy().tobytes()]


def _msgpack(x: Any) -> bytes:
    """MessagePack, every value in its longest form; bytes as extension type 3, vLLM's raw memory.

    Written here because vLLM's encoder is installed only where vLLM is.
    """
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
            flat = (item for pair in x.items() for item in pair)
            return b"\xdf" + struct.pack(">I", len(x)) + b"".join(map(_msgpack, flat))
    raise AssertionError(type(x))
