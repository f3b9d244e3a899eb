"""A whole run: open it, train its phases from where it stands, export the model.

`train` is the outline, and `Run` has its steps. A run is resumed by the same command: the newest whole
checkpoint says which phases and steps are left, and everything before it is skipped.

Next: trainer.py, one step.
"""

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from nanolmmr1 import config, files
from nanolmmr1.data.prompt import Processor
from nanolmmr1.errors import Preempted, SharedError, UserError
from nanolmmr1.model import weights
from nanolmmr1.parallel import dist, export
from nanolmmr1.parallel.signals import Watch
from nanolmmr1.report.display import Display, print_accuracy
from nanolmmr1.report.page import try_report
from nanolmmr1.report.usage import peak_rss_mb
from nanolmmr1.reward.judge import Judge
from nanolmmr1.run import checkpoint, plan, run_folder, setup
from nanolmmr1.run.evaluate import evaluate
from nanolmmr1.schema import Recipe


def train(cfg: Recipe) -> None:
    """Run every phase of a recipe that its output folder does not hold yet.

    Raises:
        UserError: recipe, data, model or reward functions are wrong, or the disk is full.
        Preempted: SIGTERM or another stop signal arrived; the last complete step has a checkpoint.
    """
    with open_run(cfg) as run:
        if run.is_finished():
            return
        run.prepare()
        with run.display, contextlib.closing(run.trainer.sampler):
            try:
                run.evaluate_start()
                for phase in run.phases_left():
                    run.start_phase(phase)
                    while run.steps_left():
                        run.trainer.step()
                        run.evaluate_if_due()
                        run.save_if_due()
                    run.end_phase()
                run.export()
            except (UserError, Preempted) as stop:
                run.save_before_exit(stop)
                raise
        run.summarize()


@contextlib.contextmanager
def open_run(cfg: Recipe) -> Iterator["Run"]:
    """Join the other ranks, lock the output folder, catch signals, and find out where the run stands."""
    device = setup.choose_device(cfg)
    setup.check_machine(cfg, device)
    run_folder.check_sources(cfg)
    dist.start(device, cfg.dist.timeout_s, cfg.dist.offload or cfg.dist.offload_reference)
    folder = Path(cfg.output)
    with (
        run_folder.locked(folder),
        Judge(cfg.reward) as judge,
        Watch(folder, cfg.dist.hang_s, cfg.dist.timeout_s) as watch,
        contextlib.closing(Run(cfg, device, folder, judge, watch)) as run,
    ):
        yield run


class Run:
    """A run that is open, and where it stands.

    Attributes:
        progress: steps taken, over all phases. latest: folder of the checkpoint that the run resumes from, or None.
        source: folder of the model that the run starts from.
        processor, rows, tasks, policy, trainer: set by `prepare`. phase: set by `start_phase`.
    """

    def __init__(self, cfg: Recipe, device: str, folder: Path, judge: Judge, watch: Watch) -> None:
        self.cfg, self.device, self.folder, self.judge, self.watch = cfg, device, folder, judge, watch
        self.began = time.monotonic()
        steps = {name: phase.steps for name, phase in cfg.phases.items()}
        self.display = Display(steps, quiet=not dist.is_main())
        self.note = self.display.note
        self.checkpoints = checkpoint.Checkpoints(folder, cfg.checkpoint, self.note, cfg.dist.timeout_s)
        self.recipe = config.dump(cfg)  # before paths of the embedded world are filled in
        self.progress, self.latest, self.old_rows = run_folder.find_progress(cfg, folder, self.checkpoints, self.note)
        self.wall_s_before = self.progress.wall_s
        self.forecast: plan.Forecast | None = None
        watch.defer = False  # until the first step there is nothing to save: a signal ends the process at once

    def close(self) -> None:
        if self.forecast:
            self.forecast.close()

    def is_finished(self) -> bool:
        """Whether all steps are taken and the model is exported; then a note says how to train on."""
        finished = bool(self.latest) and run_folder.is_finished(self.cfg, self.folder, self.progress)
        if finished:
            self.note(
                f"{self.folder} is finished after {self.progress.step} steps; to train on, raise its last phase's steps"
            )
        return finished

    def prepare(self) -> None:
        """Load rows, model, checkpoint and sampler: cheap checks first, so that a mistake costs seconds."""
        cfg, progress = self.cfg, self.progress
        if cfg.world:
            setup.build_world(cfg, self.folder, self.display)
        with self.watch.stage("load_data"):
            dist.together(lambda: dist.is_host_main() and weights.find(cfg.model))  # download once per host
            self.source = dist.together(lambda: weights.find(cfg.model))
            dist.together(lambda: weights.read_config(self.source))
            self.processor = Processor(self.source, cfg.prompt)
            data = setup.load_data(cfg, self.processor, self.judge, self.display)
        run_folder.check_rows(self.old_rows, data.hashes, cfg, progress, self.note)
        self.rows, self.tasks = data.rows, data.tasks
        self.checkpoints.about = {"recipe": self.recipe, "rows": data.hashes}
        self.forecast = plan.Forecast(cfg, self.source, data.sizes, self.device, self.note)
        self.policy = setup.load_policy(cfg, self.source, self.device, self.processor, empty=bool(self.latest))
        if self.latest:
            self.checkpoints.load(self.latest, self.policy, optimizer=False)
        dist.together(lambda: [self.policy.trainable_names(phase.freeze) for phase in cfg.phases.values()])
        if dist.is_main():
            run_folder.write_recipe(self.folder, self.recipe, progress.step, self.note)
        self.judge.workers.between = self.watch.check
        self.trainer = setup.make_trainer(
            cfg, self.folder, self.policy, self.source, self.processor, self.judge, self.display, progress, self.watch
        )
        self.watch.defer = True

    def phases_left(self) -> Iterator[str]:
        """Names of the phases that are not finished, in order."""
        for name in self.cfg.phases:
            if not self.progress.phase_done(name, self.cfg.phases):
                yield name

    def start_phase(self, name: str) -> None:
        """Begin a phase, or go on inside it with the optimizer state of the checkpoint."""
        self.phase = self.cfg.phases[name]
        reference = setup.load_reference(
            self.cfg, self.folder, name, self.policy, self.source, self.progress, self.note
        )
        self.trainer.start_phase(name, self.rows[name], reference)
        if self.latest and self.progress.phase_step:
            self.checkpoints.load(self.latest, self.policy, model=False)
            if self.evaluate_if_due():  # SIGTERM cut this evaluation short, after its step was saved
                self.save(self.moment())

    def steps_left(self) -> int:
        """Number of steps left in the phase; 0 too if a resumed run has lowered the phase's steps below those taken."""
        return max(0, self.phase.steps - self.progress.phase_step)

    def evaluate_start(self) -> None:
        """Measure the model before the first step."""
        if self.tasks and not self.progress.step and "start" not in self.progress.accuracy:
            self.evaluate("start")

    def evaluate_if_due(self) -> bool:
        """Measure every `evaluate.every_steps` steps inside a phase. Returns whether it was due now."""
        due = bool(self.tasks) and self.is_due(self.cfg.evaluate.every_steps)
        if not due or self.moment() in self.progress.accuracy:
            return False
        self.evaluate(self.moment())
        return True

    def evaluate(self, moment: str) -> None:
        """Measure held-out accuracy and keep it under the name of this moment of the run."""
        limit = self.cfg.evaluate.max_response_tokens
        assert limit is not None, "the recipe is resolved"
        with self.watch.stage("evaluate", self.progress.step):
            self.progress.accuracy[moment] = evaluate(
                self.tasks, self.trainer.sampler, self.processor, self.judge, limit, self.display,
                self.trainer.should_stop,
            )  # fmt: skip

    def save_if_due(self) -> None:
        """Write a checkpoint every `checkpoint.every_steps` or `every_minutes` inside a phase, unless the last
        update was skipped: its weights may be damaged, and must not prune an older good checkpoint."""
        if self.forecast:
            self.forecast.poll()
        due = self.is_due(self.cfg.checkpoint.every_steps) or self.checkpoints.is_old()
        if due and self.steps_left() and self.trainer.last_update_finite:
            self.save(self.moment())

    def save(self, moment: str) -> None:
        """Write a checkpoint of the last complete step. Its score is the mean accuracy at a moment, if measured."""
        self.progress.wall_s = self.wall_s()
        accuracy = self.progress.accuracy.get(moment)
        score = sum(accuracy.values()) / len(accuracy) if accuracy else None
        with self.watch.stage("save_checkpoint", self.progress.step):
            self.checkpoints.save(self.progress.step, self.policy, self.trainer.state(), score)
        self.trainer.checkpoint_wait_s += self.checkpoints.held_s

    def end_phase(self) -> None:
        """Evaluate, save and report where a phase ends."""
        name = self.progress.phase
        if self.tasks:
            self.evaluate(name)
        self.progress.finished = name
        self.save(name)
        if dist.is_main():
            try_report(self.folder, self.note)

    def export(self) -> None:
        """Write the results: model/, summary.json and report.html."""
        self.checkpoints.wait()
        checkpoint.write_folder(
            self.folder / "model",
            lambda path: export.save(self.policy.model, path, self.source, self.policy.dtype),
        )
        self.pool_bytes = self.trainer.sampler.pool_bytes
        if not dist.is_main():
            return
        summary = {
            "accuracy": self.progress.accuracy,
            "rows": {task: len(self.tasks[task][0]) for task in self.tasks if setup.has_single_rows(self.cfg, task)},
            "wall_s": self.wall_s(),
            "peak_rss_mb": peak_rss_mb(),
            "steps": self.progress.step,
        }
        path = self.folder / "summary.json"
        try:
            files.write_atomically(path, (json.dumps(summary, indent=2) + "\n").encode())
        except OSError as error:
            self.note(f"{path} cannot be written ({error}); started again, the run tries once more")
        try_report(self.folder, self.note)

    def save_before_exit(self, stop: UserError | Preempted) -> None:
        """Save the last complete step if all ranks stop together; the ranks of a single failed one are killed."""
        together = dist.size() == 1 or isinstance(stop, (SharedError, Preempted))
        if together and self.progress.step and self.trainer.last_update_finite:
            self.save(self.moment())
        self.checkpoints.wait()  # a write in the background is finished in any case
        if isinstance(stop, Preempted):
            stop.signal = signal.Signals(self.watch.stopping or signal.SIGTERM)  # without one: another rank got it
            self.note(
                f"stopped by {stop.signal.name} after step {self.progress.step}: start the same command again to go on"
            )

    def summarize(self) -> None:
        """Print accuracy, memory and where the results are."""
        if self.tasks and dist.is_main():
            print_accuracy(self.progress.accuracy)
        if self.forecast and dist.is_main():
            self.note(self.forecast.compare(self.pool_bytes))
        self.note(
            f"{self.progress.step} steps. Model: {self.folder / 'model'}  Report: {self.folder / 'report.html'}"
        )

    def moment(self) -> str:
        """The present step as a key of `progress.accuracy`."""
        return f"{self.progress.phase} {self.progress.phase_step}"

    def is_due(self, every: int) -> bool:
        """Whether the phase is at a multiple of `every` steps; never at its end, where everything is due anyway."""
        step = self.progress.phase_step
        return bool(every) and step % every == 0 and 0 < step < self.phase.steps

    def wall_s(self) -> float:
        """Seconds of this run so far, over all its resumptions."""
        return self.wall_s_before + time.monotonic() - self.began
