"""One step of reinforcement learning in six visible stages, and the phases that are made of steps.

`Trainer.step` is the page that everything else serves: sample, judge, pack, remember, learn,
account. Nothing in it depends on the engine, the model or the phase.

On several ranks each samples and judges its share; then all of them know all groups, and work out alike what follows.
A rollout's vectors are whole on every rank; packs are a rank's own.

Next: pack.py (how tokens lie in memory), objective.py (what is optimised), account.py (what is told of it).
"""

import zlib
from dataclasses import asdict, dataclass, field

import torch

from nanolmmr1.data.rows import PromptSampler, open_image
from nanolmmr1.errors import Preempted, SharedError, UserError
from nanolmmr1.parallel import dist
from nanolmmr1.parallel.export import published
from nanolmmr1.report.record import step_record
from nanolmmr1.report.usage import StageTimer
from nanolmmr1.rollout import SamplingParams
from nanolmmr1.rollout.batch import Batch, gather_groups
from nanolmmr1.update.objective import overlong_penalty, token_advantages, token_weights
from nanolmmr1.update.pack import build, deal, has_images
from nanolmmr1.update.policy import learning_rate


@dataclass
class Progress:
    """Where a run stands. Saved in checkpoints; with the weights, it is all that a resumed run needs."""

    phase: str = ""
    phase_step: int = 0
    step: int = 0  # over all phases
    cursor: int = 0  # rows of the phase taken so far
    bad_steps: int = 0  # steps in a row of whose updates all were non-finite
    skipped_steps: int = 0  # steps with a non-finite update, in all
    wall_s: float = 0.0
    finished: str = ""  # the last phase that was evaluated
    accuracy: dict = field(default_factory=dict)  # moment -> {task: fraction}

    def inside(self, name):
        """Whether steps of this phase have been taken."""
        return self.phase == name and self.phase_step > 0

    def phase_done(self, name, phases):
        """Whether the run is past this phase, its evaluation included."""
        order = list(phases)
        if self.phase not in order or order.index(name) != order.index(self.phase):
            return self.phase in order and order.index(name) < order.index(self.phase)
        return self.phase_step >= phases[name].steps and self.finished == name


class Trainer:
    """A policy, a sampler and a judge, and the phase they work on.

    Args:
        cfg: the recipe. policy, sampler, judge, processor: see their files.
        metrics, samples, display: where a step is told; the first two are None on ranks that write nothing.
        progress: Progress to go on from. watch: Watch, or None.
    """

    def __init__(self, cfg, policy, sampler, judge, processor, metrics, samples, display, progress=None, watch=None):
        self.cfg, self.policy, self.sampler, self.judge, self.processor = cfg, policy, sampler, judge, processor
        self.metrics, self.samples, self.display = metrics, samples, display
        self.progress, self.watch = progress or Progress(), watch
        self.sound = True  # whether the last update was made: weights that gave a NaN must push no good checkpoint out
        self.saved_s = 0.0  # how long a checkpoint has held the run up since the last step

    def start_phase(self, name, rows, reference=None):
        """Begin (or, where progress is inside it, continue) a phase.

        Args:
            rows: the phase's rows, already selected; reference: frozen model for KL, or None.
        """
        self.phase = self.cfg.phases[name]
        if self.progress.phase != name:
            self.progress.phase, self.progress.phase_step, self.progress.cursor = name, 0, 0
        self.rows, self.order = rows, PromptSampler(len(rows), self.cfg.seed, name)
        # Part of each response's seed: phases draw differently from the same rows.
        self.phase_seed = zlib.crc32(name.encode())
        self.policy.start_phase(self.phase, zlib.crc32(f"{self.cfg.seed}/{name}".encode()))
        self.policy.reference = reference
        self.told_split = False
        self.display.start_phase(name, self.progress.phase_step)

    def step(self):
        """One rollout and the updates it pays for. Returns the step's record, as written to metrics.jsonl."""
        phase, objective, policy = self.phase, self.phase.objective, self.policy
        timer = StageTimer(self.watch, self.progress.step + 1)

        with timer.stage("step"):
            # 1. sample, 2. judge: until enough groups can teach something (see collect).
            groups, sampled, cursor = self.collect(timer)
            rollout = Batch(groups)

            # 3. pack: one flat token axis per micro-batch; a group's prompt stands in it once.
            with timer.stage("pack"):
                updates, split = self.pack(groups)

            # 4. remember: log-probs before the first update, and the reference's, with the same packs.
            kl_in_reward = objective.kl_coef and objective.kl_place == "reward"
            if phase.updates_per_rollout > 1 or kl_in_reward:
                with timer.stage("old"):
                    rollout.old_logp = rollout.first_logp = self.score(updates, rollout)
            if policy.reference is not None:
                with timer.stage("ref"):
                    rollout.ref_logp = self.score(updates, rollout, policy.reference)
            with timer.stage("adv"):
                scored = rollout.rewards + overlong_penalty(
                    rollout.lengths, phase.max_response_tokens, objective.overlong_buffer, objective.overlong_penalty
                )
                kl = rollout.old_logp - rollout.ref_logp if kl_in_reward else None
                rollout.advantage = token_advantages(scored, rollout.group, rollout.response, kl, objective)

            # 5. learn: one denominator per update, so that no cut into packs changes the gradient.
            with timer.stage("update_actor"):
                learnt = self.learn(updates, rollout)
            self.progress.step += 1
            self.progress.phase_step += 1
            self.progress.cursor = cursor
            with timer.stage("update_weights"):
                failed = self.hand_over()  # not raised before the step, which is taken, has been told of

        # 6. account: one record, one line on disk.
        learnt |= {"micro_batches": sum(map(len, updates)), "updates": len(updates), "split_groups": split}
        seconds, self.saved_s = timer.seconds() | {"timing_s/save_checkpoint": self.saved_s}, 0.0
        record = step_record(self.progress, objective, rollout, sampled, learnt, self.sampler.stats, seconds)
        if dist.is_main():
            self.metrics.write(record)
            self.keep_sample(rollout)
        self.display.step(record)
        if failed:
            raise failed
        self.check_mismatch(record)
        if self.progress.bad_steps >= self.cfg.optim.max_bad_steps:
            raise SharedError(
                f"{self.progress.bad_steps} steps in a row had a non-finite loss or gradient and were skipped: "
                f"lower lr (now {phase.lr}) or raise objective.kl_coef, and resume from the last checkpoint"
            )
        return record

    def check_mismatch(self, record):
        """Raises SharedError where the sampler's log-probs are not the policy's: its weights are others, or corrupt."""
        limit = mismatch_limit(self.cfg.rollout, self.phase, self.policy.dtype)
        for kind in ("text", "image"):
            gap = record.get(f"mismatch/{kind}/logp_abs", 0.0)
            if limit and gap > limit:  # where it is NaN, so is the gradient: see bad_steps
                raise SharedError(
                    f"step {self.progress.step}: log-probs of responses to {kind} prompts differ from the policy's by "
                    f"{gap:.3g} nats on average, over rollout.max_mismatch={limit:g}: the sampler has other weights or "
                    "settings; `python -m nanolmmr1.doctor` finds which, rollout.sleep_level=1 spares them a reload"
                )

    def collect(self, timer):
        """Sampled and judged groups: `prompts_per_step` of them.

        With dynamic sampling, groups whose rewards are all equal carry no gradient and are replaced,
        `max_refills` times at most; then the step makes do with the groups it has. Returns the
        groups to learn from, all that were sampled, and the row cursor after them.
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
        kept, sampled = [], []
        for _ in range(1 + phase.max_refills * phase.dynamic_sampling):
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

    def sample(self, indices, cursor, params, timer):
        """Judged groups of these rows, this rank's share made here and the others' gathered."""
        engine = self.sampler.ranks
        mine = dist.my_slice(len(indices), dist.size() // engine, dist.rank() // engine)
        indices, groups, trouble = indices[mine], [], None
        try:
            with timer.stage("data"):
                prompts = []
                for i in indices:
                    self.check(0)
                    prompts.append(self.processor.prepare(self.rows[i], self.phase.captions))
            with timer.stage("gen"):
                self.sampler.wake()
                seeds = [(self.cfg.seed, self.phase_seed, cursor + i) for i in range(mine.start, mine.stop)]
                groups = self.sampler.generate(prompts, params, seeds, self.check)
            with timer.stage("reward"):
                self.judge_groups(groups)
        except (Preempted, UserError) as stop:
            groups, trouble = [], stop
        with timer.stage("exchange"):
            return gather_groups(groups, indices, self.rows, trouble, speaks=dist.rank() % engine == 0)

    def check(self, done):
        """Between two prompts or two tokens, when no prompt is `done`: is this rank to stop?"""
        if self.watch and not done:
            self.watch.check()

    def halt(self):
        """Between two packs, on all ranks at once: is any of them to stop?"""
        if self.watch:
            self.watch.pack()
        if dist.any_of(self.watch is not None and bool(self.watch.stopping)):
            self.policy.discard()
            raise Preempted

    def judge_groups(self, groups):
        for group in groups:
            group.texts = [self.processor.decode(r.ids) for r in group.responses]
        pairs = [(text, group.prompt.row.public()) for group in groups for text in group.texts]
        judgements = iter(self.judge.score(pairs))
        for group in groups:
            group.judgements = [next(judgements) for _ in group.texts]

    def pack(self, groups):
        """This rank's packs of each update, equally many on all ranks, and how many groups had to be split."""
        updates, first, split, budget = [], 0, 0, self.cfg.pack.tokens_per_micro_batch
        for part in _parts(groups, self.phase.updates_per_rollout):
            micro_steps, cut = deal(part, budget, dist.size(), first, self.policy.patch_cost)
            updates.append([self.build(step) for step in micro_steps])
            split += cut
            first += sum(len(r.ids) for group in part for r in group.responses)
        if split and not self.told_split:
            self.told_split = True
            self.display.note(
                f"{split} of {len(groups)} groups exceed pack.tokens_per_micro_batch={budget} and are split: "
                "same gradient, but their prompts are computed more than once"
            )
        if dist.size() > 1:
            for group in groups:
                group.prompt = None  # the packs hold what is this rank's; pictures take room
        return updates, split

    def build(self, micro_step):
        """This rank's pack of a micro-step."""
        pieces = micro_step[dist.rank()]
        for group in (piece.group for piece in pieces):
            if group.prompt is None:
                group.prompt = self.processor.prepare(group.row, self.phase.captions)
        return build(pieces, self.policy.model.cfg.vision.patch_dim if has_images(micro_step) else 0)

    def score(self, updates, rollout, model=None):
        """Log-probs of all scored tokens on the flat axis, (M,)."""
        logp = torch.zeros_like(rollout.sampler_logp)
        for pack in (pack for packs in updates for pack in packs):
            self.halt()
            logp[pack.flat_index] = self.policy.logprobs(pack, self.phase.temperature, model)[0].cpu()
        return dist.all_reduce_sum(logp)

    def learn(self, updates, rollout):
        """One optimiser step per update; returns what `account` reports of them."""
        phase, sums, norms, made = self.phase, {}, [], []
        lr = learning_rate(phase, self.cfg.optim, self.progress.phase_step)
        parts = _parts(torch.arange(len(rollout.lengths)).view(len(rollout.groups), -1), len(updates))
        for packs, part in zip(updates, parts, strict=True):
            own = part.flatten()  # (R',) the update's responses, on whichever rank
            rollout.weight[own] = token_weights(
                rollout.lengths[own], phase.objective.loss_avg_mode, phase.max_response_tokens
            )
            told, logps, last = 0.0, [], len(packs) - 1
            last_image = max((i for i, pack in enumerate(packs) if len(pack.grid)), default=last)
            for i, pack in enumerate(packs):
                if not norms:  # later, some of the step's updates are made: it must be finished
                    self.halt()
                tokens, ends = rollout.tokens(pack, self.policy.device), (i == last, i == last_image)
                stats = self.policy.backward(pack, tokens, phase.objective, phase.temperature, ends)
                # Kept where they are: nothing waits for the device before the last pack.
                logps.append((pack.flat_index, stats.pop("logp")))
                told = told + torch.stack([*stats.values()]).double()
            told = dict(zip(stats, dist.all_reduce_sum(told.cpu()).tolist(), strict=True))
            if rollout.old_logp is None:
                for where, logp in logps:
                    rollout.first_logp[where] = logp.cpu()
            norm, updated = self.policy.optimizer_step(lr, told["loss"])
            norms.append(norm)
            made.append(updated)
            sums = {key: sums.get(key, 0.0) + value for key, value in told.items()}
        self.sound = made[-1]
        self.progress.bad_steps = 0 if any(made) else self.progress.bad_steps + 1
        self.progress.skipped_steps += not all(made)
        if rollout.old_logp is None:
            dist.all_reduce_sum(rollout.first_logp)
        return sums | {"lr": lr, "norm": sum(norms) / len(norms)}

    def hand_over(self):
        """Give the sampler the new weights. Returns what went wrong, on all ranks, or None."""
        names = self.policy.trained if self.sampler.remembers else None
        weights = published(self.policy.model, self.sampler.dtype, names)
        try:
            dist.together(lambda: self.sampler.update(weights))
        except UserError as failed:
            return failed
        return None

    def keep_sample(self, rollout):
        """Keep the step's first group, at about ten steps a phase, the first and last among them."""
        step, steps = self.progress.phase_step, self.phase.steps
        if step not in (1, steps) and step % max(1, steps // 10):
            return
        group, first = rollout.groups[0], (rollout.lengths.cumsum(0) - rollout.lengths).tolist()
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
                    "advantage": float(rollout.advantage[first[g]]),
                    "parts": judgement,
                }
                for g, (text, judgement) in enumerate(zip(group.texts, group.judgements, strict=True))
            ],
        }
        self.samples.write(record | ({"caption": row.caption} if self.phase.captions else {}))

    def state(self):
        return asdict(self.progress)


def mismatch_limit(rollout, phase, dtype):
    """Nats; 0: none, as where the sampler draws from another distribution on purpose.

    Rounding to bf16 makes a mean of 0.01 to 0.03; other weights, or wrong positions, tenths and more.
    """
    if rollout.max_mismatch is not None:
        return rollout.max_mismatch
    fixed = rollout.engine == "server" and rollout.server_weights == "fixed" and phase.lr
    if phase.top_p < 1 or phase.top_k or fixed:
        return 0.0
    return 0.01 if dtype == torch.float32 else 0.25 if rollout.engine == "server" else 0.1


def _parts(groups, parts):
    """`parts` contiguous shares, as equal as can be; fewer where there are fewer groups."""
    parts = min(parts, len(groups))
    return [groups[dist.my_slice(len(groups), parts, i)] for i in range(parts)]
