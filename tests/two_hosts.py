"""Two hosts, and the link between them is cut for a while: the run comes back by itself, and loses nothing.

    python tests/two_hosts.py [--cut 20] [--steps 6] [--out FOLDER] [dotted.key=value ...]

The hosts are network namespaces of this machine, which needs root and `ip`. Each has a torchrun of its own; they meet
by its c10d rendezvous, and the model is sharded inside each host and replicated across them. The run is repeated with
nothing cut, and the exit status is 1 where final weights or metrics differ.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from kill_run import Run, back, differences, tiny_recipe

PORT = 29400


class Hosts:
    """Two namespaces and the link between them. A context manager, which removes them again."""

    def __init__(self):
        self.names = [f"nanolmm{os.getpid()}{side}" for side in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def __enter__(self):
        try:
            for name in self.names:
                ip("netns", "add", name)
            one, other = self.names
            ip("link", "add", "veth0", "netns", one, "type", "veth", "peer", "name", "veth0", "netns", other)
            for name, address in zip(self.names, self.addresses, strict=True):
                ip("-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
                for device in ("lo", "veth0"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError):
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "del", name)

    def link(self, state):
        """Cut it ("down") or mend it ("up")."""
        ip("-n", self.names[0], "link", "set", "veth0", state)

    def torchrun(self, host, folder, args):
        """The host's half of a run.

        By default a torchrun that gets no answer from the rendezvous for 60 s gives up, and closes it to the other one
        as well: a longer cut would need somebody to start both again. With more patience (read_timeout, join_timeout,
        in seconds) they wait for each other.
        """
        patience = f"is_host={1 - host},read_timeout=900,join_timeout=900"
        options = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"{self.addresses[0]}:{PORT}",
                   "--rdzv_id", "two_hosts", "--rdzv_conf", patience, "--local_addr", self.addresses[host],
                   "--max_restarts", "5"]  # fmt: skip
        return Run(folder, args, ranks=1, torchrun=options, log=f".host{host}", GLOO_SOCKET_IFNAME="veth0",
                   prefix=["ip", "netns", "exec", self.names[host]])  # fmt: skip


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not():
    """Why namespaces cannot be made here; empty where they can."""
    try:
        with Hosts():
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', None) or error}".strip()


def both(hosts, folder, args, cut_s=0.0):
    """A run on two hosts; with cut_s, the link is cut for so long once the first checkpoint is there.

    Returns:
        what the two hosts said.
    """
    began = time.monotonic()

    def tell(text):
        print(f"{time.monotonic() - began:6.1f} s  {text}", flush=True)

    with hosts.torchrun(0, folder, args) as one, hosts.torchrun(1, folder, args) as other:
        tell(f"{folder.name}: started")
        if cut_s:
            one.wait_for(lambda: one.step() and back(one, 1), "checkpoint")
            tell(f"checkpoint of step {one.step()}; the link is cut")
            before = one.ranks() | other.ranks()
            hosts.link("down")
            time.sleep(cut_s)  # the cut itself: nobody waits for it
            hosts.link("up")
            tell("the link is mended")
            for run in (one, other):
                run.wait_for(lambda run=run: back(run, 1) and not run.ranks().items() & before.items(), "new ranks")
            tell(f"both hosts' ranks are new, and go on from step {one.step()}")
        for run in (one, other):
            if run.end(600):
                raise RuntimeError(f"host {run.log} ended with {run.process.returncode}:\n{run.said()[-4000:]}")
        tell(f"finished after {one.step()} steps")
    return one.said(), other.said()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cut", type=float, default=20.0, help="seconds without a link")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/two_hosts"))
    parser.add_argument("overrides", nargs="*", help="of the recipe, dotted.key=value")
    options = parser.parse_args()
    if reason := why_not():
        sys.exit(reason)
    out = options.out.resolve()
    args = [*tiny_recipe(out / "tiny", options.steps), "dist.shard=host", "dist.hang_s=4", "dist.timeout_s=10",
            *options.overrides]  # fmt: skip
    with Hosts() as hosts:
        both(hosts, out / "undisturbed", args)
        both(hosts, out / "cut", args, options.cut)
    wrong = differences(out / "cut", out / "undisturbed")
    print("final weights and metrics: " + (f"{len(wrong)} differ, {wrong[0]} first" if wrong else "equal, bit for bit"))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
