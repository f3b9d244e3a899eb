"""One step of reinforcement learning, and the phases that steps make up.

`Trainer.step` reads top to bottom: sample and judge, pack, log-probs, advantages, update the policy, send the weights
to the sampler, record. It does not depend on the engine, the model or the phase.

With several ranks each one samples and judges its share of the prompts. Then an all-gather gives every rank all groups,
and each computes the same advantages and the same assignment of groups to ranks. Vectors of a `Batch`, over the M
tokens of all responses, are complete on every rank; packs (micro-batches) are one rank's part of an update (optimizer
step).

Next: ../data/rows.py, where prompts come from.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nanolmmr1.data.group import Group
from nanolmmr1.data.prompt import Processor
from nanolmmr1.data.rows import PromptSampler, Row, open_image
from nanolmmr1.errors import Preempted, SharedError, UserError
from nanolmmr1.model.qwen import Qwen25VL
from nanolmmr1.parallel import dist
from nanolmmr1.parallel.export import published
from nanolmmr1.parallel.signals import Watch
from nanolmmr1.report.diagnose import Diagnosis
from nanolmmr1.report.display import Display
from nanolmmr1.report.logs import MetricsLog, SampleLog
from nanolmmr1.report.record import step_record
from nanolmmr1.report.usage import StageTimer
from nanolmmr1.reward.judge import Judge
from nanolmmr1.rollout.batch import Batch, gather_groups
from nanolmmr1.rollout.sampler import Sampler, SamplingParams
from nanolmmr1.schema import Phase, Recipe, Rollout
from nanolmmr1.update.objective import overlong_penalty, token_advantages, token_weights
from nanolmmr1.update.pack import Pack, Piece, build, deal, has_images
from nanolmmr1.update.policy import Policy, learning_rate


@dataclass
class Progress:
    """The position of a run; with weights and optimizer state, everything that changes between checkpoints."""

    phase: str = ""
    phase_step: int = 0
    step: int = 0  # over all phases
    cursor: int = 0  # rows of the phase taken so far
    bad_steps: int = 0  # consecutive steps in which every update was skipped (NaN or inf)
    skipped_steps: int = 0  # steps with at least one skipped update, over the run
    wall_s: float = 0.0
    finished: str = ""  # the last phase whose final evaluation is done
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)  # moment -> task -> fraction right

    def inside(self, name: str) -> bool:
        """Whether steps of this phase have been taken."""
        return self.phase == name and self.phase_step > 0

    def phase_done(self, name: str, phases: dict[str, Phase]) -> bool:
        """Whether the run is past this phase, its final evaluation included."""
        order = list(phases)
        if self.phase not in order or order.index(name) != order.index(self.phase):
            return self.phase in order and order.index(name) < order.index(self.phase)
        return self.phase_step >= phases[name].steps and self.finished == name


class Trainer:
    """Takes the steps of one phase after another.

    Attributes:
        policy, sampler, judge, processor: the model being trained, the engine that samples from it, the rewards, and
            the conversion between rows, prompts and text.
        metrics, samples: logs of the run folder, on the main rank; None on the others.
        display: shows progress. watch: signals and hang detection; None in tests.
        progress: where the run stands.
        last_update_finite: False after a skipped update. Until the next good one nothing is saved inside a phase:
            weights that gave a NaN must not prune an older good checkpoint.
        checkpoint_wait_s: seconds that saving has blocked training since the last record, which the next one reports.
    """

    def __init__(
        self,
        cfg: Recipe,
        policy: Policy,
        sampler: Sampler,
        judge: Judge,
        processor: Processor,
        metrics: MetricsLog | None,
        samples: SampleLog | None,
        display: Display,
        progress: Progress | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.cfg, self.policy, self.sampler, self.judge, self.processor = cfg, policy, sampler, judge, processor
        self.metrics, self.samples, self.display = metrics, samples, display
        self.progress, self.watch = progress or Progress(), watch
        self.last_update_finite = True
        self.checkpoint_wait_s = 0.0
        rewarded = {"format": bool(cfg.reward.format_weight), "accuracy": bool(cfg.reward.accuracy_weight)}
        self.diagnosis = Diagnosis({name: phase.steps for name, phase in cfg.phases.items()}, rewarded)

    def start_phase(self, name: str, rows: Sequence[Row], reference: Qwen25VL | None = None) -> None:
        """Begin a phase, or continue it where `progress` is inside it.

        Args:
            rows: the phase's rows that passed selection. reference: frozen model of the KL term.
        """
        self.phase = self.cfg.phases[name]
        if self.progress.phase != name:
            self.progress.phase, self.progress.phase_step, self.progress.cursor = name, 0, 0
        self.rows, self.order = rows, PromptSampler(len(rows), self.cfg.seed, name)
        # Part of each response's seed: two phases draw different responses to the same row.
        self.phase_seed = zlib.crc32(name.encode())
        self.policy.start_phase(self.phase, zlib.crc32(f"{self.cfg.seed}/{name}".encode()))
        self.policy.reference = reference
        self.warned_split = False
        self.display.start_phase(name, self.progress.phase_step)

    def step(self) -> dict[str, Any]:
        """One rollout and its optimizer steps. Returns the step's record, as written to metrics.jsonl."""
        phase, objective, policy = self.phase, self.phase.objective, self.policy
        timer = StageTimer(self.watch, self.progress.step + 1)

        with timer.stage("step"):
            # 1. Sample and judge; with dynamic sampling, repeat with other prompts if too few groups differ in reward.
            groups, sampled, cursor = self.sample_and_judge(timer)
            batch = Batch(groups)

            # 2. Pack: for each update this rank's packs, in which a group's prompt is computed once.
            with timer.stage("pack"):
                updates, num_split = self.make_packs(groups)

            # 3. Log-probs before the first update, from the policy and from the reference, on the same packs. With a
            # single update its own forward pass gives them; first_logp also serves the mismatch metrics.
            kl_in_reward = objective.kl_coef > 0 and objective.kl_place == "reward"
            if phase.updates_per_rollout > 1 or kl_in_reward:
                with timer.stage("old"):
                    batch.old_logp = batch.first_logp = self.logprobs(updates, batch)
            if policy.reference is not None:
                with timer.stage("ref"):
                    batch.ref_logp = self.logprobs(updates, batch, policy.reference)

            # 4. Advantages: from rewards, and from KL where that is part of the reward.
            with timer.stage("adv"):
                rewards = batch.rewards + overlong_penalty(
                    batch.lengths, phase.max_response_tokens, objective.overlong_buffer, objective.overlong_penalty
                )
                kl = None
                if kl_in_reward:
                    assert batch.old_logp is not None and batch.ref_logp is not None
                    kl = batch.old_logp - batch.ref_logp  # (M,)
                batch.advantage = token_advantages(rewards, batch.group, batch.response, kl, objective)

            # 5. Update: one denominator per optimizer step, so the gradient does not depend on the packing.
            with timer.stage("update_actor"):
                update_stats = self.update_policy(updates, batch)
            self.progress.step += 1
            self.progress.phase_step += 1
            self.progress.cursor = cursor
            with timer.stage("update_weights"):
                error = self.update_sampler()  # raised only after the step, which is complete, has been recorded

        # 6. Record: one line in metrics.jsonl.
        update_stats |= {"micro_batches": sum(map(len, updates)), "updates": len(updates), "split_groups": num_split}
        seconds = timer.seconds() | {"timing_s/save_checkpoint": self.checkpoint_wait_s}
        self.checkpoint_wait_s = 0.0
        record = step_record(self.progress, objective, batch, sampled, update_stats, self.sampler.stats, seconds)
        if self.metrics is not None:
            self.metrics.write(record)
            self.keep_sample(batch)
        self.display.step(record)
        if sentence := self.diagnosis.see(record):
            self.display.note(f"step {self.progress.step}: {sentence}")
        if error:
            raise error
        self.check_mismatch(record)
        self.check_bad_steps()
        return record

    def check_bad_steps(self) -> None:
        """Raises SharedError after `optim.max_bad_steps` consecutive steps without an update."""
        if self.progress.bad_steps >= self.cfg.optim.max_bad_steps:
            raise SharedError(
                f"{self.progress.bad_steps} steps in a row had a non-finite loss or gradient and were skipped: "
                f"lower lr (now {self.phase.lr}) or raise objective.kl_coef, and resume from the last checkpoint"
            )

    def check_mismatch(self, record: dict[str, Any]) -> None:
        """Raises SharedError if sampler and policy log-probs differ too much: the sampler's weights are wrong."""
        limit = mismatch_limit(self.cfg.rollout, self.phase, self.policy.dtype)
        for kind in ("text", "image"):
            gap = record.get(f"mismatch/{kind}/logp_abs", 0.0)
            if limit and gap > limit:  # a NaN gap comes with a NaN gradient, which bad_steps counts
                raise SharedError(
                    f"step {self.progress.step}: log-probs of responses to {kind} prompts differ from the policy's by "
                    f"{gap:.3g} nats on average, over rollout.max_mismatch={limit:g}: the sampler has other weights or "
                    "settings; `python -m nanolmmr1.doctor` finds which, rollout.sleep_level=1 spares them a reload"
                )

    def sample_and_judge(self, timer: StageTimer) -> tuple[list[Group], list[Group], int]:
        """Sample `prompts_per_step` groups and judge their responses.

        With dynamic sampling (DAPO, arXiv 2503.14476) groups whose rewards are all equal are replaced, in at most
        `max_refills` rounds; then the step uses the groups it has.

        Returns:
            groups to train on, all groups sampled, row cursor after them
        """
        phase, cursor = self.phase, self.progress.cursor
        params = SamplingParams(
            phase.group_size,
            phase.max_response_tokens,
            phase.temperature,
            phase.top_p,
            phase.top_k,
            self.processor.stop_ids,
            self.processor.banned_ids,
        )
        kept: list[Group] = []
        sampled: list[Group] = []
        for _ in range(1 + (phase.max_refills if phase.dynamic_sampling else 0)):
            count = phase.prompts_per_step - len(kept)
            groups = self.sample(self.order.take(cursor, count), cursor, params, timer)
            cursor += count
            sampled += groups
            kept += [g for g in groups if not phase.dynamic_sampling or len(set(g.rewards)) > 1]
            if len(kept) == phase.prompts_per_step:
                break
        dist.together(self.sampler.sleep)
        if not kept:
            self.display.note(
                f"step {self.progress.step + 1}: all {len(sampled)} groups have equal rewards, so nothing is learnt; "
                "the rows are too easy or too hard, or the reward is wrong"
            )
        return kept or sampled[-phase.prompts_per_step :], sampled, cursor

    def sample(self, indices: list[int], cursor: int, params: SamplingParams, timer: StageTimer) -> list[Group]:
        """Judged groups of these rows: this rank makes its share, then all ranks exchange theirs.

        Args:
            indices: into the phase's rows. cursor: the first one's place in the row order, part of the seeds.
        """
        # Ranks of one tensor-parallel engine pass it the same prompts; the first sends the groups to other engines.
        per_engine = self.sampler.ranks_per_engine
        mine = dist.my_slice(len(indices), dist.size() // per_engine, dist.rank() // per_engine)
        indices, groups, error = indices[mine], [], None
        try:
            with timer.stage("data"):
                prompts = []
                for i in indices:
                    if self.should_stop():
                        raise Preempted
                    prompts.append(self.processor.prepare(self.rows[i], self.phase.captions))
            with timer.stage("gen"):
                self.sampler.wake()
                seeds = [(self.cfg.seed, self.phase_seed, cursor + i) for i in range(mine.start, mine.stop)]
                groups = self.sampler.generate(prompts, params, seeds, should_stop=self.should_stop)
            with timer.stage("reward"):
                self.judge_groups(groups)
        except (Preempted, UserError) as stop:
            groups, error = [], stop
        with timer.stage("exchange"):
            return gather_groups(groups, indices, self.rows, error, sends=dist.rank() % per_engine == 0)

    def should_stop(self) -> bool:
        """Whether this rank received a stop signal. Asking counts as progress for hang detection. Other ranks learn of
        the signal when groups are exchanged."""
        return self.watch is not None and self.watch.should_stop()

    def stop_together(self) -> None:
        """Raise Preempted on all ranks if one of them received a stop signal, and drop the gradient of the update.

        A collective, called between packs; also a heartbeat.
        """
        if self.watch:
            self.watch.heartbeat()
        if dist.any_of(self.watch is not None and bool(self.watch.stopping)):
            self.policy.discard()
            raise Preempted

    def judge_groups(self, groups: list[Group]) -> None:
        """Decode the responses of this rank's groups and score them, all in one call."""
        for group in groups:
            group.texts = [self.processor.decode(r.ids) for r in group.responses]
        pairs = [(text, group.row.public()) for group in groups for text in group.texts]
        judgements = iter(self.judge.score(pairs))
        for group in groups:
            group.judgements = [next(judgements) for _ in group.texts]

    def make_packs(self, groups: list[Group]) -> tuple[list[list[Pack]], int]:
        """This rank's packs of each optimizer step, and how many groups had to be split.

        All ranks get equally many packs: with FSDP every forward pass is a collective. With several ranks the groups'
        prompts are then released: packs hold copies, and images take memory.
        """
        updates, first, num_split, budget = [], 0, 0, self.cfg.pack.tokens_per_micro_batch
        for part in _slices(len(groups), self.phase.updates_per_rollout):
            micro_steps, cut = deal(groups[part], budget, dist.size(), first, self.policy.patch_cost)
            updates.append([self.make_pack(micro_step) for micro_step in micro_steps])
            num_split += cut
            first += sum(len(r.ids) for group in groups[part] for r in group.responses)
        if num_split and not self.warned_split:
            self.warned_split = True
            self.display.note(
                f"{num_split} of {len(groups)} groups exceed pack.tokens_per_micro_batch={budget} and are split: "
                "same gradient, but their prompts are computed more than once"
            )
        if dist.size() > 1:
            for group in groups:
                group.prompt = None
        return updates, num_split

    def make_pack(self, micro_step: list[list[Piece]]) -> Pack:
        """This rank's pack of a micro-step, the packs that all ranks run at the same time. Prompts of groups that
        another rank sampled are prepared here."""
        pieces = micro_step[dist.rank()]
        for group in (piece.group for piece in pieces):
            if group.prompt is None:
                group.prompt = self.processor.prepare(group.row, self.phase.captions)
        return build(pieces, self.policy.model.cfg.vision.patch_dim if has_images(micro_step) else 0)

    def logprobs(self, updates: list[list[Pack]], batch: Batch, model: Qwen25VL | None = None) -> torch.Tensor:
        """Log-probs (M,) of all scored tokens, by the policy or by another model, gathered from all ranks."""
        logp = torch.zeros_like(batch.sampler_logp)  # (M,)
        for pack in (pack for packs in updates for pack in packs):
            self.stop_together()
            logp[pack.flat_index] = self.policy.logprobs(pack, self.phase.temperature, model)[0].cpu()
        return dist.all_reduce_sum(logp)

    def update_policy(self, updates: list[list[Pack]], batch: Batch) -> dict[str, float]:
        """Take one optimizer step per update. Returns the sums that `step_record` reports.

        Stop signals are honoured until the first optimizer step. After that the step is completed.
        """
        phase, sums = self.phase, dict[str, float]()
        norms: list[float] = []
        updated: list[bool] = []
        lr = learning_rate(phase, self.cfg.optim, self.progress.phase_step)
        group_size = len(batch.lengths) // len(batch.groups)
        for packs, part in zip(updates, _slices(len(batch.groups), len(updates)), strict=True):
            responses = slice(part.start * group_size, part.stop * group_size)  # of this update, on all ranks
            batch.weight[responses] = token_weights(
                batch.lengths[responses], phase.objective.loss_avg_mode, phase.max_response_tokens
            )
            totals, logps, last = torch.zeros(()), [], len(packs) - 1  # totals: broadcast to one sum per statistic
            last_image = max((i for i, pack in enumerate(packs) if len(pack.grid)), default=last)
            for i, pack in enumerate(packs):
                if not updated:
                    self.stop_together()
                tokens, final = batch.tokens(pack, self.policy.device), (i == last, i == last_image)
                stats = self.policy.backward(pack, tokens, phase.objective, phase.temperature, final)
                # They stay on the device: the host must not wait for it before the last pack.
                logps.append((pack.flat_index, stats.pop("logp")))
                totals = totals + torch.stack([*stats.values()]).double()
            update_sums = dict(zip(stats, dist.all_reduce_sum(totals.cpu()).tolist(), strict=True))
            if batch.old_logp is None:
                for flat_index, logp in logps:
                    batch.first_logp[flat_index] = logp.cpu()
            norm, finite = self.policy.optimizer_step(lr, update_sums["loss"])
            norms.append(norm)
            updated.append(finite)
            sums = {key: sums.get(key, 0.0) + value for key, value in update_sums.items()}
        self.last_update_finite = updated[-1]
        self.progress.bad_steps = 0 if any(updated) else self.progress.bad_steps + 1
        self.progress.skipped_steps += not all(updated)
        if batch.old_logp is None:
            dist.all_reduce_sum(batch.first_logp)
        return sums | {"lr": lr, "norm": sum(norms) / len(norms)}

    def update_sampler(self) -> UserError | None:
        """Send the new weights to the sampler, gathered one by one as it takes them. Returns the ranks' error, or None.
        """
        names = self.policy.trained if self.sampler.keeps_unchanged else None
        weights = published(self.policy.model, self.sampler.dtype, names)
        try:
            dist.together(lambda: self.sampler.update(weights))
        except UserError as error:
            return error
        return None

    def keep_sample(self, batch: Batch) -> None:
        """Write the step's first group to samples.jsonl, at about ten steps per phase and at its first and last."""
        step, steps = self.progress.phase_step, self.phase.steps
        if self.samples is None or (step not in (1, steps) and step % max(1, steps // 10)):
            return
        group, starts = batch.groups[0], (batch.lengths.cumsum(0) - batch.lengths).tolist()
        row = group.row
        record = {
            "phase": self.progress.phase,
            "step": self.progress.step,
            "problem": row.problem,
            "answer": row.answer,
            "images": [open_image(item) for item in row.images],
            "responses": [
                {
                    "text": text,
                    "reward": judgement["overall"],
                    "advantage": float(batch.advantage[start]),
                    "parts": judgement,
                }
                for start, text, judgement in zip(starts, group.texts, group.judgements, strict=False)
            ],
        }
        self.samples.write(record | ({"caption": row.caption} if self.phase.captions else {}))

    def state(self) -> dict[str, Any]:
        """The run's position, as a checkpoint stores it."""
        return asdict(self.progress)


def mismatch_limit(rollout: Rollout, phase: Phase, dtype: torch.dtype) -> float:
    """Largest accepted mean difference of sampler and policy log-probs, in nats; 0: no limit.

    Rounding to bf16 causes 0.01 to 0.03; wrong weights or positions cause tenths and more. There is no limit where the
    sampler draws from another distribution on purpose.
    """
    if rollout.max_mismatch is not None:
        return rollout.max_mismatch
    fixed = rollout.engine == "server" and rollout.server_weights == "fixed" and phase.lr
    if phase.top_p < 1 or phase.top_k or fixed:
        return 0.0
    return 0.01 if dtype == torch.float32 else 0.25 if rollout.engine == "server" else 0.1


def _slices(count: int, parts: int) -> list[slice]:
    """Contiguous slices of nearly equal size of `count` items; fewer than `parts` if there are fewer items."""
    parts = min(parts, count)
    return [dist.my_slice(count, parts, i) for i in range(parts)]
