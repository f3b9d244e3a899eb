"""Start a script on several ranks, as torchrun would, and never leave one behind.

    python ranks.py RANKS HOSTS SCRIPT [ARGS...]     prints [[exit status, what it said], ...], rank after rank

Every rank calls the script's `main(*args)`, or, where `run` is asked, one of its functions.
"""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def launch(ranks, script, *args, hosts=1, prefix=(), timeout=120):
    """[(exit status, what it said)] of every rank; `prefix`: of the command that starts them all."""
    command = [str(word) for word in (*prefix, sys.executable, __file__, ranks, hosts, script, *args)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    options = dict(stdout=-1, stderr=-1, text=True, env=env, start_new_session=True)
    with subprocess.Popen(command, **options) as process:
        try:
            said, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"ranks hang: {process.communicate()[1]}") from None
    assert process.returncode == 0, error
    print(error, file=sys.stderr)
    return [tuple(rank) for rank in json.loads(said)]


def results(*args, **options):
    """As `launch`, for a script whose last line is JSON: that of each rank."""
    done = launch(*args, **options)
    assert [status for status, _ in done] == [0] * len(done)
    return [json.loads(said.splitlines()[-1]) for _, said in done]


def run(count, function, *args, **options):
    """[what each of `count` ranks returned], JSON-able; function: of a test file, called after they have met."""
    script = sys.modules[function.__module__].__file__
    return results(count, script, "run", function.__name__, json.dumps(args), **options)


def answer(function, args):
    from nanolmmr1.parallel import dist

    dist.start("cpu", 60, shard_alone=True)
    print(json.dumps(function(*json.loads(args))))
    dist.barrier()  # rank 0 has the store in it


def on_disk_of(megabytes, folder):
    """A command prefix that gives processes a real disk of that size, mounted on `folder`; skips where it cannot."""
    folder.mkdir()
    prefix = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size={megabytes}M tmpfs "{folder}" && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs unshare and user namespaces")
    return prefix


def main(ranks, hosts, script, *args):
    sys.path[:0] = [str(ROOT), str(Path(script).parent)]
    module = importlib.import_module(Path(script).stem)  # once: importing torch takes longer than most that is asked
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks, local = int(ranks), int(ranks) // int(hosts)
    said = [tempfile.TemporaryFile() for _ in range(ranks)]
    started = [os.fork() or run_rank(module, args, said[rank], rank, ranks, local, port) for rank in range(ranks)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    for file in said:
        file.seek(0)
    print(json.dumps([[status, file.read().decode()] for status, file in zip(statuses, said, strict=True)]))


def run_rank(module, args, said, rank, ranks, local, port):
    """One rank, in a fork that ends here."""
    own = dict(RANK=rank, WORLD_SIZE=ranks, LOCAL_RANK=rank % local, LOCAL_WORLD_SIZE=local, MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in own.items()}, MASTER_ADDR="127.0.0.1")
    os.dup2(said.fileno(), 1)
    status = 1
    try:
        if args[:1] == ("run",):
            answer(getattr(module, args[1]), args[2])
        else:
            module.main(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
