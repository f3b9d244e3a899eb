"""Several processes: the process group, FSDP2, gathering weights, signals and hang detection.

The room imports model/ and errors.py.
Begin with dist.py; fsdp.py shards a model, export.py gathers it, signals.py handles SIGTERM and hangs.
"""
