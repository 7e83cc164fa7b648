"""Compiles what the ops launch for four targets, without a GPU, and reads from the binaries what they need.

export TRITON_INTERPRET=0
python tests/ops/aot/harness.py                                # all of calls.py: checks limits, diffs resources.csv
python tests/ops/aot/harness.py --ci                           # the first launch of each kernel, and those of CI below
python tests/ops/aot/harness.py --match grouped_wgrad --write  # those with MATCH in their name; updates their rows
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import triton
from calls import CALLS
from pretended import TARGETS, pretended_cuda
from shipped import missing

TABLE = Path(__file__).with_name("resources.csv")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX_INSTRUCTIONS = {
    "sm_80": r"\bHMMA\b",
    "sm_90": r"\b(HMMA|HGMMA)\b",
    "sm_100": r"\b(HMMA|UTCHMMA|UTCQMMA)\b",
    "gfx942": r"\bv_mfma",
}
WARPGROUP_INSTRUCTIONS = {"sm_90": r"\bHGMMA\b", "sm_100": r"\bUTC[HQ]MMA\b"}
NARROW_LOADS = r"\bLDG\S*\.[US]16\b"
FIELDS = ("case", "target", "registers", "spill_bytes", "shared_bytes", "matrix")
REGISTER_SLACK = 1.10
CI = (
    "token_wgrad tokens 64x", "token_wgrad nchw14 128x", "conv_wgrad 3x3 nchw14 128x", "conv_wgrad 3x3 nhwc56 128x",
    "depthwise_wgrad 5x5 nchw7 ", "quantize tokens to tokens int4 stochastic", "scatter_update adamw bf16",
)  # fmt: skip
LAUNCHES = []  # what the forked workers compile


def launches(arch):
    """({name: launch} of the first launch of each tile of each label of CALLS, what a device would refuse)."""
    found = {}
    with pretended_cuda(arch) as recorded:
        for label, function in ((label, function) for label, functions in CALLS.items() for function in functions):
            recorded.launches.clear()
            function()
            for launch in recorded.launches:
                if launch.name == label.split()[0]:
                    found.setdefault(f"{label} {'x'.join(map(str, launch.tile.values()))}", launch)
    return found, recorded.problems


def compile_all(named, jobs):
    """Rows of the table for {name: launch}, which `violations` understands."""
    LAUNCHES[:] = named
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        return list(pool.map(_compile, range(len(LAUNCHES))))


def _compile(number):
    name, launch = LAUNCHES[number]
    row = {"case": name, "target": launch.arch, "error": ""}
    attrs = {path: list(map(list, value)) for path, value in launch.attrs}
    source = triton.compiler.ASTSource(launch.kernel, dict(launch.signature), dict(launch.constexprs), attrs)
    try:
        binary = triton.compile(source, target=TARGETS[launch.arch], options=launch.options.__dict__)
    except Exception as error:  # every launch is to be heard of
        return row | {"error": f"does not compile: {error!r}"}
    registers, spill_bytes, code = (_amd_usage if launch.arch == "gfx942" else _nvidia_usage)(binary)
    return row | {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": binary.metadata.shared,
        "matrix": len(re.findall(MATRIX_INSTRUCTIONS[launch.arch], code)),
        "warpgroup": len(re.findall(WARPGROUP_INSTRUCTIONS.get(launch.arch, ""), code)),
        "narrow_loads": len(re.findall(NARROW_LOADS, code)),
    }


def _amd_usage(binary):
    code = binary.asm["amdgcn"]
    vgprs, spilled, private = (
        int(re.search(rf"\.{key}:\s+(\d+)", code)[1])
        for key in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    return vgprs, max(4 * spilled, private), code


def _nvidia_usage(binary):
    code, usage = (_cuobjdump(binary, option) for option in ("--dump-sass", "--dump-resource-usage"))
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    local = len(re.findall(r"\b(LDL|STL)\b", code))
    return registers, max(stack, 4 * local), code


def _cuobjdump(binary, option):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
        ).stdout


def limits(launch):
    """(registers, bytes of shared memory) of a launch on an sm_90: two programs are to fit."""
    constants, registers = launch.constants, 168
    if constants.get("PEEL"):
        registers = 255
    elif constants.get("PARTIAL") is False:
        registers = 188  # writing [K, O, TAPS] directly costs addresses, after the loop
    elif launch.name == "depthwise_wgrad" and "scale_ptr" not in constants:
        registers = 188  # 4 filter rows of codes wait in registers to be scaled
    alone = (launch.name == "token_wgrad" and constants["BM"] >= 128) or constants.get("BM") == 256
    return registers, (160 if alone else 113) << 10


def spills(row):
    """Why a binary must not be shipped whatever its sizes are, as sentences: it does not compile, or spills."""
    sentence = row["error"] or (f"spills {row['spill_bytes']} bytes" if row["spill_bytes"] else "")
    return [f"{row['case']} on {row['target']} {sentence}"] * bool(sentence)


def violations(launch, row):
    """What the row of a launch breaks of the limits, as sentences."""
    if row["error"]:
        return spills(row)
    registers, shared_bytes = limits(launch)
    constants, found = launch.constants, []
    tokens = launch.name in ("token_wgrad", "wgrad_sqnorm")
    if row["target"] == "sm_90" and row["registers"] > registers:
        found.append(f"needs {row['registers']} registers, limit {registers}")
    if row["target"] == "sm_90" and row["shared_bytes"] > shared_bytes:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, limit {shared_bytes}")
    if "PREC" in constants and not launch.is_fp32 and not row["matrix"]:
        found.append("has no matrix instruction")
    if tokens and not launch.is_fp32 and constants["BM"] >= 64 and not row["warpgroup"]:
        found.append("has no warp-group matrix instruction")
    aligned = constants.get("PQ", 1) % 4 == 0 or constants.get("PQ") == 1
    if tokens and aligned and not constants.get("PEEL") and not constants.get("BITS") and row["narrow_loads"]:
        found.append(f"loads 16-bit elements one by one, {row['narrow_loads']} times")
    return spills(row) + [f"{row['case']} on {row['target']} {sentence}" for sentence in found]


def read_table():
    """{(case, target): row} of the checked-in table."""
    if not TABLE.exists():
        return {}
    with TABLE.open() as file:
        rows = [{key: int(v) if v.isdigit() else v for key, v in row.items()} for row in csv.DictReader(file)]
    return {(row["case"], row["target"]): row for row in rows}


def write_table(rows):
    """Replace the table by `rows`, sorted."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[key] for key in sorted(rows))


def differences(row, table):
    """What got worse than the checked-in row: more than 10% more registers, or any more shared memory."""
    known = table.get((row["case"], row["target"]))
    if known is None:
        return [f"{row['case']} on {row['target']} is not in {TABLE.name}; run with --write"]
    if row["error"]:
        return []
    worse = row["registers"] > REGISTER_SLACK * known["registers"] or row["shared_bytes"] > known["shared_bytes"]
    return [f"{row['case']} on {row['target']} needs more than the table says: {row}, was {known}"] if worse else []


def arguments(description):
    """The parser of what this and dry_run.py take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ci", action="store_true", help="only what CI has time for")
    parser.add_argument("--match", default="", help="only what has MATCH in its name")
    parser.add_argument("--jobs", type=int, default=2)
    return parser


def main():
    """Compile, check, and either write or diff the table; exits 1 with one line a violation."""
    parser = arguments(__doc__)
    parser.add_argument("--write", action="store_true", help="update the rows of the table instead of diffing it")
    options = parser.parse_args()
    found, chosen, table = [], [], read_table()
    for arch in TARGETS:
        named, problems = launches(arch)
        found += problems + missing(arch, named.values())
        first = {launch.name: name for name, launch in reversed(named.items())}.values()
        in_ci = (name for name in named if name in first or name.startswith(CI))
        chosen += [(name, named[name]) for name in (in_ci if options.ci else named) if options.match in name]
    rows = compile_all(chosen, options.jobs)
    found += [line for (_, launch), row in zip(chosen, rows, strict=True) for line in violations(launch, row)]
    if options.write:
        write_table(table | {(row["case"], row["target"]): row for row in rows})
    elif triton.__version__.startswith("3.9"):
        found += [line for row in rows for line in differences(row, table)]
    print(f"{len(rows)} binaries, {len(found)} violations", *found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
