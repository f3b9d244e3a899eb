"""One vLLM 0.32 server over HTTP: what it is asked, and what its answers mean.

The route /inference/v1/generate takes token ids, and for pictures the tensors that vLLM's own processor would have
made of them. It is open on a server that was started with --enable-scale-out.
"""

import base64
import hashlib
import http.client
import json
import socket
import struct
import time
from urllib.parse import urlsplit

import numpy as np
import torch

from nanolmmr1.config import UserError
from nanolmmr1.rollout import Response
from nanolmmr1.rollout.vllm_input import images_of, sampling_fields

CONNECT_S = 10
FORBIDDEN = -1e30  # a logit bias; JSON has no infinity, and exp of this is 0 all the same
NOT_A_NUMBER = -9999.0  # what the server writes for a NaN


class Lost(Exception):
    """The server is out of reach, broken, or not the one it was: another may answer."""


class Refused(Exception):
    """The server understood and will not: another would not either."""


class Server:
    """One server and what is known of it.

    Attributes:
        version: of the weights it must sample from; empty: whatever it holds.
        gpus: how many take part in a weight transfer.
        lost_at, reason, again: since when and why it is lost, and when to try it next; 0, "", 0 if it is not.
    """

    def __init__(self, url):
        parts = urlsplit(url)
        try:
            self.host, self.port = parts.hostname, parts.port or 80
        except ValueError:
            self.host = None
        if parts.scheme != "http" or not self.host or parts.path.strip("/"):
            raise UserError(f"rollout.servers has {url!r}: http://HOST:PORT is needed")
        self.url, self.version, self.gpus, self.sockets = url.rstrip("/"), "", 0, set()
        self.found()

    def found(self):
        self.lost_at, self.reason, self.again = 0.0, "", 0.0

    def lose(self, reason, pause):
        now = time.monotonic()
        # What came first says why; what follows is that nobody answers.
        self.lost_at, self.reason, self.again = self.lost_at or now, self.reason or str(reason), now + pause

    def ask(self, path, deadline, body=None):
        """The server's answer, from JSON; a request with a body is a POST.

        Args:
            deadline: by time.monotonic(); the server is lost when it comes.

        Raises:
            Lost, Refused.
        """
        left = deadline - time.monotonic()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=max(0.01, min(left, CONNECT_S)))
        line = None
        try:
            connection.connect()
            line = connection.sock
            self.sockets.add(line)
            line.settimeout(max(0.01, deadline - time.monotonic()))
            _notice_dead_hosts(line)
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("GET" if body is None else "POST", path, data, headers)
            response = connection.getresponse()
            text = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise Lost(f"{self.url} {_reason(error)}") from error
        finally:
            self.sockets.discard(line)
            connection.close()
        try:
            answer = json.loads(text or b"{}")
        except ValueError:
            answer = text[:200].decode(errors="replace")
        if response.status >= 500:
            raise Lost(f"{self.url} failed with status {response.status}: {_message(answer)}")
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
    return f"cannot be reached ({error or type(error).__name__})"


def _message(answer):
    """The sentence of an error, in vLLM's or its web framework's form."""
    error = answer.get("error", answer.get("detail", answer)) if isinstance(answer, dict) else answer
    return " ".join(str(error.get("message", error) if isinstance(error, dict) else error).split())[:300]


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


def responses(answer, prompt, params, server):
    """The responses of an answer, one for each that `params` asks for, and the version of the weights they come from.

    Raises:
        Lost: the answer was cut short, or sampled from other weights than `server.version`.
        UserError: the server read another prompt, or its log-probs are not numbers.
    """
    row, choices = f"row {prompt.row.id}: {server.url}", sorted(answer["choices"], key=lambda choice: choice["index"])
    if answer["prompt_token_ids"] != prompt.ids.tolist():
        raise UserError(f"{row} read {len(answer['prompt_token_ids'])} tokens that are not the prompt's "
                        f"{len(prompt.ids)}")
    versions = {span["version"] for choice in choices for span in choice["weight_versions"]}
    if server.version and versions != {server.version}:
        raise Lost(f"{server.url} sampled from weights {sorted(versions)}, not {server.version!r}: was it restarted?")
    if ends := {choice["finish_reason"] for choice in choices} - {"stop", "length"}:
        raise Lost(f"{server.url} ended a response by {sorted(ends)}")
    if len(choices) != (asked := params.num_responses if params.temperature else 1):
        raise Lost(f"{server.url} gave {len(choices)} of {asked} responses")
    made = []
    for choice in choices:
        logp = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
        if logp.min() <= NOT_A_NUMBER:
            raise UserError(f"{row} gave a log-prob that is not a number: its weights are broken")
        made.append(Response(torch.tensor(choice["token_ids"], dtype=torch.int64), logp, choice["finish_reason"]))
    return made * (params.num_responses // len(made)), max(versions)


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
