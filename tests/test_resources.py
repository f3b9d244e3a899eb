"""What the kernels compile to, without a GPU: no spills, within the chip's shared memory, matmuls on tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# `make test` unpacks a second Triton beside the environment's own: that of torch 2.11.
TRITONS = {"own": None, "3.6.0": Path(sys.prefix) / "triton-3.6.0"}
CHIPS = 80, 90  # A100, H100; `python -m bench.resources --arch 100` compiles for a B200
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes a program may have: CUDA programming guide
MATMULS = "logprob_partials", "forward_kernel", "dq_kernel", "dkv_kernel"  # the second is rmsnorm's and swiglu's too


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """Rows of `python -m bench.resources`, by Triton version and chip; all run at once, and print their tables.

    The older Triton compiles for sm_90 alone, the chip that is measured.
    """
    running = {}
    for version, path in TRITONS.items():
        if path is not None and not path.is_dir():
            continue
        for chip in (90,) if path else CHIPS:
            folder = tmp_path_factory.mktemp(f"{version}-{chip}")
            environment = os.environ | {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
            environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, [path, ROOT])))
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, "-m", "bench.resources", "--arch", str(chip), "--json", folder / "rows.json"]
            running[version, chip] = folder / "rows.json", subprocess.Popen(command, env=environment, cwd=ROOT)
    codes = {key: process.wait() for key, (_, process) in running.items()}
    assert not any(codes.values()), codes
    return {key: json.loads(path.read_text())["rows"] for key, (path, _) in running.items()}


def test_every_op_compiles_for_every_chip(survey, capsys):
    from bench import resources  # its kernels are interpreted here; only names are read

    wanted = {op.__name__ for op in resources.OPS}
    for key, table in survey.items():
        assert {row["op"] for row in table} == wanted, key
    with capsys.disabled():
        if ("3.6.0", 90) not in survey:
            print(f"\nno folder {TRITONS['3.6.0']}: compiled with one Triton only (`make test` unpacks the other)")
        for (version, chip), table in survey.items():
            print(f"\ntriton {version}, sm_{chip}: {len(table)} compiled\n{resources.HEADER}")
            print(*(resources.Resources(**row) for row in table), sep="\n")


def test_nothing_spills(survey):
    # fp32 is there for checks, and its exact products use no tensor cores: a few bytes may go to the stack.
    allowed = {"bf16": 0, "fp32": 16}
    assert not [(k, row) for k, table in survey.items() for row in table if row["stack"] > allowed[row["dtype"]]]


def test_shared_memory_fits_the_chip(survey):
    assert not [(key, row) for key, table in survey.items() for row in table if row["shared"] > SHARED_LIMIT[key[1]]]


def test_products_of_bf16_tiles_run_on_tensor_cores(survey):
    for key, table in survey.items():
        for row in table:
            product = row["kernel"] in MATMULS and row["op"] in ("linear_logprob", "attention")
            if product and row["dtype"] == "bf16":
                assert row["tensor_core"] > 0, (key, row)


def test_hopper_reads_the_head_by_bulk_copies(survey):
    for (version, chip), table in survey.items():
        head = [row for row in table if row["op"] == "linear_logprob" and row["dtype"] == "bf16"]
        found = [row for row in head if row["kernel"] == "logprob_partials" and "N 128" in row["config"]]
        assert found and all(bool(row["tma"]) == (chip >= 90) for row in found), (version, chip)
