"""Compiles the shipped configs ahead of time for four targets without a GPU and reads what they need from the binaries.

Each file `cases_<op>.py` beside this one holds `CASES: list[Case]`, for example

    CASES = [Case("token_wgrad 64x128x64", _kernel, {"x_ptr": "*bf16", "T": "i32"}, {"BM": 64}, aligned=("x_ptr",))]

    export TRITON_INTERPRET=0
    python tests/ops/aot/harness.py                          # all cases: checks limits, diffs resources.csv
    python tests/ops/aot/harness.py --ci                     # only the cases with ci=True
    python tests/ops/aot/harness.py --only grouped --write   # cases_grouped*.py; updates their rows
"""

import argparse
import csv
import importlib.util
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HERE = Path(__file__).parent
TABLE = HERE / "resources.csv"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
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


@dataclass(frozen=True)
class Case:
    """One shipped (kernel, config); arguments that are in neither dict are absent pointers (None)."""

    name: str
    kernel: object
    signature: dict[str, str]  # run-time argument -> "*bf16", "*fp32", "i32", "i64", ...
    constexprs: dict[str, object]
    aligned: tuple[str, ...] = ()  # arguments known to be divisible by 16
    num_warps: int = 4
    num_stages: int = 4
    ci: bool = False
    matrix: bool = False  # has to use matrix instructions
    warpgroup: bool = False  # has to use those of a whole warp group where there are some (sm_90, sm_100)
    wide_loads: bool = False  # must not load 16-bit elements one by one
    max_registers: int = 168  # on sm_90
    max_shared_bytes: int = 113 << 10  # two programs fit on an sm_90
    targets: tuple[str, ...] = field(default=tuple(TARGETS))


def load_cases(only=""):
    """The cases of every cases_*.py whose name contains `only`."""
    cases = []
    for path in sorted(path for path in HERE.glob("cases_*.py") if only in path.stem):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
        cases += module.CASES
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"case names are not unique: {sorted(names)}")
    return cases


def compile_case(case, target):
    """Compile one case and return its row of the table."""
    names = case.kernel.arg_names
    absent = {name: None for name in names if name not in case.signature and name not in case.constexprs}
    constants = {**absent, **case.constexprs}
    source = ASTSource(
        case.kernel,
        {name: case.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned},
    )
    stages = min(case.num_stages, 2) if target == "gfx942" else case.num_stages
    options = {"num_warps": case.num_warps, "num_stages": stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=TARGETS[target], options=options)
    usage = _amd_usage(binary) if target == "gfx942" else _nvidia_usage(binary)
    registers, spill_bytes, code = usage
    return {
        "case": case.name,
        "target": target,
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": binary.metadata.shared,
        "matrix": len(re.findall(MATRIX_INSTRUCTIONS[target], code)),
        "warpgroup": len(re.findall(WARPGROUP_INSTRUCTIONS.get(target, ""), code)),
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
    code = _cuobjdump(binary, "--dump-sass")
    registers, stack = registers_and_stack(binary)
    local = len(re.findall(r"\b(LDL|STL)\b", code))
    return registers, max(stack, 4 * local), code


def registers_and_stack(binary):
    """(registers, bytes of stack) of a thread of a kernel compiled for NVIDIA's; what spills lies on the stack."""
    usage = _cuobjdump(binary, "--dump-resource-usage")
    return tuple(int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))


def _cuobjdump(binary, option):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run(
            [TOOLS / "cuobjdump", option, file.name], check=True, capture_output=True, text=True
        ).stdout


def _compile_named(arguments):
    only, name, target = arguments
    case = next(case for case in load_cases(only) if case.name == name)
    return compile_case(case, target)


def violations(case, row):
    """What the row of a case breaks of the limits, as sentences."""
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["target"] == "sm_90" and row["registers"] > case.max_registers:
        found.append(f"needs {row['registers']} registers, limit {case.max_registers}")
    if row["target"] == "sm_90" and row["shared_bytes"] > case.max_shared_bytes:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, limit {case.max_shared_bytes}")
    if case.matrix and not row["matrix"]:
        found.append("has no matrix instruction")
    if case.warpgroup and not row["warpgroup"]:
        found.append("has no warp-group matrix instruction")
    if case.wide_loads and row["narrow_loads"]:
        found.append(f"loads 16-bit elements one by one, {row['narrow_loads']} times")
    return [f"{case.name} on {row['target']} {sentence}" for sentence in found]


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
    worse = row["registers"] > REGISTER_SLACK * known["registers"] or row["shared_bytes"] > known["shared_bytes"]
    return [f"{row['case']} on {row['target']} needs more than the table says: {row}, was {known}"] if worse else []


def main():
    """Compile, check, and either write or diff the table; exits 1 with one line a violation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ci", action="store_true", help="only the cases with ci=True")
    parser.add_argument("--only", default="", help="only cases_*ONLY*.py")
    parser.add_argument("--match", default="", help="only cases with MATCH in their name")
    parser.add_argument("--write", action="store_true", help="update the rows of the table instead of diffing it")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = (case for case in load_cases(options.only) if options.match in case.name and (case.ci or not options.ci))
    cases = {case.name: case for case in chosen}
    jobs = [(options.only, case.name, target) for case in cases.values() for target in case.targets]
    with ProcessPoolExecutor(options.jobs) as pool:
        rows = list(pool.map(_compile_named, jobs))
    table = read_table()
    found = [line for row in rows for line in violations(cases[row["case"]], row)]
    if options.write:
        write_table(table | {(row["case"], row["target"]): row for row in rows})
    elif triton.__version__.startswith("3.9"):
        found += [line for row in rows for line in differences(row, table)]
    print(f"{len(rows)} binaries, {len(found)} violations", *found, sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
