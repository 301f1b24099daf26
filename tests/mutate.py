"""mutate.py: does the checked emulator catch what a slip of the pen would break?

Takes each barrier, fence, bound, ticket and guard of csrc/cuda/*.cuh away in turn, rebuilds the kernels of one dtype in
a temporary directory and runs a compact set of cases on several schedules and chips. A mutant that no case catches has
survived: it is either equivalent, which the list in EQUIVALENT must then say, or a hole in the tests.

    python tests/mutate.py               every mutant (about half a minute each on a core)
    python tests/mutate.py --quick 12    so many of them, spread evenly, as in CI
    python tests/mutate.py --only merge  mutants of files or lines that contain the word
"""

from __future__ import annotations

import argparse
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
DTYPE = "bf16"
PARTS = int(re.findall(r"kMostParts = (\d+)", (ROOT / "csrc" / "cuda" / "standardize.h").read_text())[0])
FILES = (
    "vec.cuh", "merge.cuh", "map.cuh", "team.cuh", "fused.cuh", "fused_backward.cuh", "reduce.cuh", "launch.cuh",
    "perturb.cu", "standardize.cuh",
)  # fmt: skip

# name, pattern, replacement
OPERATORS = (
    ("no barrier", r"\b(__syncthreads|__syncwarp|cluster_sync|grid_sync|exchange_\.meet|seat\.part)\([^()]*\);", ";"),
    ("no fence", r"\bfence\(\);", ";"),
    ("no wait", r"\bcopy_async_wait<\d+>\(\);", ";"),
    ("no commit", r"\bcopy_async_commit\(\);", ";"),
    ("lost update", r"atomicAdd\((\w+), 1u\)", r"(*\1)++"),
    ("wrong last", r"unsigned\(blocks - 1\)", "unsigned(blocks)"),
    ("tickets not zeroed", r"NK_CHECK_CUDA\(zero_async\(.*\)\);", ";"),
    ("tickets not prepared", r"\*?\w+(\.\w+)?\[[^\]]*\] = 0u?;", ";"),
    ("one buffer", r"round\+\+ & 1", "0"),
    ("one box", r"meeting & 1", "0"),
    ("not cleared", r"\bstart_afresh\(\);", ";"),
    ("nobody waits", r"while \(int\(load_acquire.*", "if (false) {"),
    ("one stage", r"stage \^ 1", "stage"),
    ("small shared array", r"\[kWarp\]\)", "[kWarp / 32])"),
    ("wrong mask", r"0xffffffffu", "0x7fffffffu"),
    ("short tree", r"other = lanes / 2", "other = lanes / 4"),
    ("everyone writes", r"if \((threadIdx\.x|lane) == 0\)", "if (true)"),
    ("everyone leads", r"seat\.(leads|first_lane)\(\) && ", ""),
    # Not the loops over the elements of one access: those are registers, and the compiler sees their end itself.
    ("bound off by one", r"(?<=[\w\])]) < (?=[\w(])(?!(?:V|kPiece|kWidth|access\.value|2);)", " <= "),
    ("statistics stay", r"if \(running\.mean\.data\) move_channel\(.*\);", ";"),
    ("no tail", r"if \((\w+\.n) == V\)", r"if (\1 > 0)"),
    ("no guard", r"if \((\w+\.n) > 0\)", "if (true)"),
)

# Mutants that compute the same as the original: how "file: line" begins, and the reason.
SAME, ZERO = "both sides are the same where they are equal", "what lies beyond a chunk is loaded as zero"
WHOLE = "a block without columns has runs of whole accesses"
REGISTERS = "numbers of one access's columns: registers, set again where they are used"
EQUIVALENT = {
    "vec.cuh: if (c.n > 0) store<T, V>(to->v, load_chunk": "callers visit no empty chunk",
    "vec.cuh: const int64_t from = aligned > begin": SAME,
    "merge.cuh: fence();  // load_acquire": "an acquire and the barrier after it are enough",
    "team.cuh: const int count = (end < f.units": SAME,
    "team.cuh: const int columns = int(u.columns": SAME,
    "team.cuh: s.lines = lines < u.lines ?": SAME,
    "team.cuh: s.end = end < columns ?": SAME,
    "team.cuh: for (int first = first_line(); first < s.lines;": "line_end is called for lines beyond the last anyway",
    "team.cuh: const int lines = s.lines - first_line(), standing": SAME,
    "team.cuh: if (line < s.lines && left < s.end) {": WHOLE,
    "team.cuh: return line < s.lines && left < s.end && (begin": WHOLE,
    "fused.cuh: if (i < own.n) shift[i] = A(to_float(f.element": "not used, and read from the unit's next line",
    "fused.cuh: for (int i = 0; i < N; ++i) sum[i] = squares[i]": REGISTERS,
    "fused.cuh: for (int i = 0; i < N; ++i) {": REGISTERS,
    "fused.cuh: finish(i, exact, var < 0": SAME,
    "fused_backward.cuh: const int64_t cell = mine / kCell": SAME,
    "fused_backward.cuh: const A one = i < c.n ?": ZERO,
    "fused_backward.cuh: const int64_t first = set * holds, left": SAME,
    "fused_backward.cuh: for (int i = 0; i < N; ++i) {": "an access has no column N, so nothing is read for it",
    "fused_backward.cuh: const int64_t group = seat.group(s)": "not used: the next line has the bound again",
    "fused_backward.cuh: const int together = team.width": SAME,
    "reduce.cuh: first[i] = i < c.n ?": ZERO,
    "reduce.cuh: second[i] = i < c.n ?": ZERO,
    "reduce.cuh: if (chunk.n > 0) op.push(": "pushing nothing adds nothing",
    "reduce.cuh: const int64_t last = first + per_part": SAME,
    "reduce.cuh: while (slot < last) {": "the last round has an empty chunk",
    "reduce.cuh: const int columns = int(tile.columns": SAME,
    "reduce.cuh: const int64_t first = part * per_part": SAME,
    "perturb.cu: for (int i = int(threadIdx.x); i < w.count;": "the word behind the table is written again later",
    "perturb.cu: for (int64_t e = p.begin + int(threadIdx.x)": "a run of no elements",
    "perturb.cu: use(e, p.end - e < kWidth": SAME,
    "perturb.cu: for (int64_t index = blockIdx.x; index < job.pieces;": "empty; a total comes where its sum is",
    "perturb.cu: const double value = i < n ?": "what lies beyond a run is not stored",
    "perturb.cu: for (int64_t first = 0; first < size;": "writes no words",
    "perturb.cu: w.count = size - first < kWords": SAME,
    "perturb.cu: for (int stage = 0; stage < kStages;": "there is no such stage",
    "reduce.cuh: if (lane < tile.lanes) {": "a lane too many writes where no lane is read",
}


@dataclass(frozen=True)
class Mutant:
    file: str
    line: int
    operator: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.operator}: {self.before.strip()[:90]}"


def mutants() -> Iterator[Mutant]:
    for file in FILES:
        for number, text in enumerate((ROOT / "csrc" / "cuda" / file).read_text().splitlines()):
            code = text.split("//", 1)[0]
            if code.lstrip().startswith(("#", "template", "struct", "class")):
                continue
            for name, pattern, replacement in OPERATORS:
                for match in re.finditer(pattern, code):
                    after = text[: match.start()] + match.expand(replacement) + text[match.end() :]
                    yield Mutant(file, number + 1, name, text, after)


class Workshop:
    """A copy of csrc with its own build directory, in which one mutant after the other is tried."""

    seconds = 1800.0  # what the cases may take: for a mutant, some times what they take the original (see main)

    def __init__(self, folder: Path) -> None:
        self.csrc, self.build = folder / "csrc", folder / "build"
        shutil.copytree(ROOT / "csrc", self.csrc)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        self.run(
            "cmake", "-S", str(HERE / "emulator"), "-B", str(self.build), *generator,
            "-DNORMKERN_EMULATOR_MODES=checked", f"-DNORMKERN_EMULATOR_DTYPES={DTYPE}",
            f"-DNORMKERN_EMULATOR_SOURCES={self.csrc}",
        )  # fmt: skip

    @staticmethod
    def run(*command: str, timeout: float = 1800, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **environment}
        )

    def verdict(self, mutant: Mutant | None) -> str:
        """'survived', or how the mutant was caught."""
        if mutant is None:
            return self.try_out()
        path = self.csrc / "cuda" / mutant.file
        original = path.read_text()
        lines = original.split("\n")
        lines[mutant.line - 1] = mutant.after
        path.write_text("\n".join(lines))
        try:
            return self.try_out()
        finally:
            path.write_text(original)

    def try_out(self) -> str:
        built = self.run("cmake", "--build", str(self.build), "--target", "normkern_emulated_checked")
        if built.returncode:
            return "does not compile"
        try:
            done = self.run(
                sys.executable,
                str(Path(__file__)),
                "--cases",
                timeout=Workshop.seconds,
                NORMKERN_EMULATOR_DIR=str(self.build),
            )
        except subprocess.TimeoutExpired:
            return "killed: timeout"
        if done.returncode == 0:
            return "survived"
        text = (done.stdout + done.stderr).strip().split("\n")
        found = [line for line in text if line.startswith("FOUND ")]
        return "killed: " + (found[0][6:] if found else f"exit {done.returncode}, {text[-1]}")[:200]


def perturbation(seed: int, busy: int) -> str:
    """What is wrong with an ascent over tensors of one piece and of many, more than a table takes at once."""
    import torch
    from emulator.perturb import EmulatedAscent

    from normkern.optim.ascent import Member, Rule

    generator = torch.Generator().manual_seed(7)
    sizes = [1, 3, 17_000, 64, 4100, *range(1, 70)]
    tensors = [torch.randn(2, size, generator=generator) for size in sizes]
    members = [Member(weight.clone(), grad, 0.5, True, len(grad)) for weight, grad in tensors]
    copies = [torch.empty_like(m.weight) for m in members]
    try:
        EmulatedAscent(seed=seed, busy=busy)(members, copies, Rule(2, "layer", 0.1), 1.0)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    scales = [1.1 * float(weight.double().norm()) for weight, _ in tensors]
    norm = sum((t * float(grad.double().norm())) ** 2 for t, (_, grad) in zip(scales, tensors, strict=True)) ** 0.5
    for t, (weight, grad), m, copy in zip(scales, tensors, members, copies, strict=True):
        expected = weight.double() + 0.5 * t * t / norm * grad.double()
        if not torch.equal(copy, weight) or not torch.allclose(m.weight.double(), expected, rtol=1e-6, atol=1e-6):
            return "wrong values"
    return ""


def standardization(seed: int) -> str:
    """What is wrong with weights standardized together: lines of every length, more tensors than a launch takes."""
    import torch
    from emulator.standardize import EmulatedStandardizer

    import normkern
    from normkern.backends import BACKENDS, use_backend

    generator = torch.Generator().manual_seed(7)
    sizes = [(3, 1), (5, 27), (2, 2304), (64, 9), (33, 64), *((1 + i % 3, 1 + i) for i in range(60))]
    weights = [torch.randn(size, generator=generator).bfloat16().requires_grad_() for size in sizes]
    gains = [torch.linspace(0.5, 2, len(w)).bfloat16().requires_grad_() for w in weights]
    BACKENDS["mutant"] = EmulatedStandardizer(seed=seed)
    results = []
    for backend in ("eager", "mutant"):
        try:
            with use_backend(backend):
                found = normkern.weight_standardize_all(weights, gains, 1e-3)
                normkern.weight_standardize_all(weights[:PARTS], gains[:PARTS], 1e-3)  # exactly one launch
                dys = [torch.cos(torch.arange(y.numel())).reshape(y.shape).to(y.dtype) for y in found]
                results.append([*found, *torch.autograd.grad(found, [*weights, *gains], dys)])
        except RuntimeError as error:
            return str(error).split("\n")[0]
    for one, two in zip(*results, strict=True):
        if not bool(((one.double() - two.double()).abs() <= 0.02 * one.double().abs().amax().clamp(min=1)).all()):
            return "wrong values"
    return ""


def run_cases() -> int:
    """The compact set: every strategy, both walks, groups and columns in several parts, runs that fill no access."""
    sys.path[:0] = [str(HERE), str(ROOT)]
    import torch
    from emulator.backend import MEDIUM, SMALL, STRATEGIES, TINY, EmulatedBackend

    import normkern
    from normkern.backends import BACKENDS, use_backend

    generator = torch.Generator().manual_seed(7)
    last = torch.channels_last

    def image(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        x = torch.randn(shape, generator=generator) * 2 + 3
        return x.to(torch.bfloat16).contiguous(memory_format=layout)

    def group(x, w, b):  # type: ignore[no-untyped-def]
        return normkern.group_norm(x, 3, w, b, act="silu", residual=x.detach().cos())

    def one_group(x, w, b):  # type: ignore[no-untyped-def]
        return normkern.group_norm(x, 1, w, b)

    def batch(x, w, b):  # type: ignore[no-untyped-def]
        running = torch.linspace(-1, 1, x.shape[1]), torch.ones(x.shape[1])
        y = normkern.batch_norm(x, *running, w, b, training=True, momentum=0.5)
        return y + sum(running).view(1, -1, 1, 1).to(y.dtype)

    def masked(x, w, b):  # type: ignore[no-untyped-def]
        return normkern.batch_norm(x, None, None, w, b, training=True, residual=x.detach().sin(), act="relu")

    def layer(x, w, b):  # type: ignore[no-untyped-def]
        return normkern.layer_norm(x, (x.shape[-1],), w, b)

    def rms(x, w, b):  # type: ignore[no-untyped-def]
        return normkern.rms_norm(x, (x.shape[-1],), w) + 0 * b.sum()

    cases = [
        ("group", group, image(2, 6, 5, 7)),
        ("group last", group, image(3, 6, 5, 7, layout=last)),
        ("group last, long runs", group, image(2, 96, 3, 3, layout=last)),
        ("batch", batch, image(3, 4, 5, 7)),
        ("batch, parts", batch, image(2, 2, 97, 98)),
        ("batch last", batch, image(3, 5, 7, 9, layout=last)),
        ("batch last, parts", batch, image(3, 8, 37, 40, layout=last)),
        ("batch, mask", masked, image(2, 4, 8, 9)),
        ("batch last, mask", masked, image(3, 8, 5, 7, layout=last)),
        ("layer", layer, image(70, 131)),
        ("layer, aligned", layer, image(37, 64)),
        ("layer, lanes that change columns", layer, image(40, 401)),
        ("rms", rms, image(9, 1000)),
        ("tall layer", layer, image(400, 24)),
        ("tall group", one_group, image(60, 2, 5, 8)),
        ("tall group last", one_group, image(60, 4, 3, 5, layout=last)),
    ]
    for seed, busy in ((3, 0), (0, 0), (1, 2)):
        found = perturbation(seed, busy)
        if found:
            print("FOUND", found, "[perturb]")
            return 1
    for seed in (3, 0):
        found = standardization(seed)
        if found:
            print("FOUND", found, "[standardize]")
            return 1
    for seed, gpu in ((3, TINY), (0, MEDIUM), (1, SMALL)):
        for strategy in STRATEGIES:
            BACKENDS["mutant"] = EmulatedBackend("checked", gpu=gpu, strategy=strategy, seed=seed)
            for name, function, x in cases:
                channels = x.shape[-1] if x.dim() == 2 else x.shape[1]
                leaves = [x, torch.linspace(0.5, 2, channels).bfloat16(), torch.linspace(-1, 1, channels).bfloat16()]
                results = []
                for backend in ("eager", "mutant"):
                    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
                    try:
                        with use_backend(backend):
                            y = function(*own)
                            dy = torch.cos(torch.arange(y.numel())).reshape(y.shape).to(y.dtype)
                            results.append([y, *torch.autograd.grad(y, own, dy)])
                    except RuntimeError as error:
                        print("FOUND", str(error).split("\n")[0], f"[{name}, {strategy}]")
                        return 1
                for one, two in zip(*results, strict=True):
                    scale = one.double().abs().amax().clamp(min=1)
                    if not bool(((one.double() - two.double()).abs() <= 0.02 * scale).all()):
                        print(f"FOUND wrong values [{name}, {strategy}]")
                        return 1
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", type=int, metavar="N", help="only N mutants, spread evenly")
    parser.add_argument("--only", default="", metavar="REGEX", help="only mutants whose description matches")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--list", action="store_true", help="show the mutants and do nothing")
    parser.add_argument("--cases", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cases:
        return run_cases()
    chosen = [mutant for mutant in mutants() if re.search(args.only, str(mutant))]
    if args.quick and args.quick < len(chosen):
        chosen = [chosen[i * len(chosen) // args.quick] for i in range(args.quick)]
    if args.list:
        print(*chosen, sep="\n")
        return 0
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        workshops: queue.Queue[Workshop] = queue.Queue()
        for i in range(args.jobs):
            workshops.put(Workshop(Path(folder) / str(i)))

        def judge(mutant: Mutant | None) -> tuple[Mutant | None, str]:
            workshop = workshops.get()
            try:
                verdict = workshop.verdict(mutant)
            finally:
                workshops.put(workshop)
            print(f"{mutant or 'the original'}\n    {verdict}", flush=True)
            return mutant, verdict

        started = time.time()
        if judge(None)[1] != "survived":
            print("mutate: the unchanged kernels fail the cases")
            return 1
        Workshop.seconds = max(120.0, 5 * (time.time() - started))  # with building; a machine may be busy at times
        with ThreadPoolExecutor(args.jobs) as pool:
            verdicts = list(pool.map(judge, chosen))
    tried = [(mutant, verdict) for mutant, verdict in verdicts if verdict != "does not compile"]
    killed = sum(verdict.startswith("killed") for _, verdict in tried)
    survivors = [
        mutant
        for mutant, verdict in tried
        if mutant
        and verdict == "survived"
        and not f"{mutant.file}: {mutant.before.strip()}".startswith(tuple(EQUIVALENT))
    ]
    print(f"{killed} of {len(tried)} mutants killed, {len(survivors)} unexplained, {time.time() - start:.0f} s")
    return len(survivors) > 0


if __name__ == "__main__":
    sys.exit(main())
