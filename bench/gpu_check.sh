#!/usr/bin/env bash
# gpu_check.sh OUTDIR [WHEEL]: everything that needs a GPU, in one call of at most ten minutes and without a network.
#
# Installs WHEEL (or builds the sources for this machine's GPU) into a scratch directory, then: device tests,
# compute-sanitizer, copy ceiling, probes of the chip, the fastest strategy by size, benchmarks against torch and cuDNN,
# errors by mean/std, demo. A stage that fails or runs out of time is recorded in summary.csv and the next one starts.
# OUTDIR ends up flat, with a dozen files at most.
#
#   ONLY="probe sweep"  these stages alone (after install); names are those of summary.csv
#   PYTHON=python3.12   another interpreter; it brings torch, pytest and pytest-benchmark
#   BUDGET=540          seconds for everything
#   --dry-run           without a GPU: the same stages on the CPU, shrunk, with the normkern that PYTHON already has
set -uo pipefail

dry=0
[ "${1:-}" = "--dry-run" ] && { dry=1; shift; }
[ $# -ge 1 ] && [ $# -le 2 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
wheel=${2:+$(realpath "$2")}
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "gpu_check: no ${PYTHON:-python3}" >&2; exit 2; }
deadline=$((SECONDS + ${BUDGET:-540}))
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT

# Everything runs from the scratch directory: in the repository `import normkern` would find the sources, unbuilt.
cd "$scratch" || exit 2
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
device=cuda
[ "$dry" = 1 ] && device=cpu
[ "$dry" = 1 ] || export PYTHONPATH="$scratch/site${PYTHONPATH:+:$PYTHONPATH}"

echo "stage,status,seconds" >"$out/summary.csv"
: >"$out/log.txt"
failures=0

# stage NAME SECONDS COMMAND...: status 0 is ok, 124 is out of time, 77 is skipped.
stage() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) began=$SECONDS status
  shift 2
  if [ -n "${ONLY:-}" ] && [ "$name" != install ] && [[ " $ONLY " != *" ${name%-*} "* ]]; then return; fi
  [ "$limit" -lt "$left" ] || limit=$left
  printf '\n==== %s: %s\n' "$name" "$*" >>"$out/log.txt"
  if [ "$limit" -le 5 ]; then
    status=124
  else
    timeout --kill-after=5 "$limit" "$@" >>"$out/log.txt" 2>&1
    status=$?
  fi
  case $status in
    0) status=ok ;;
    77) status=skipped ;;
    124 | 137) status=timeout ;;
    *) status="failed $status" ;;
  esac
  case $status in ok | skipped) ;; *) failures=$((failures + 1)) ;; esac
  echo "$name,$status,$((SECONDS - began))" | tee -a "$out/summary.csv"
}

# Bodies of stages; `timeout` needs a program, so they are files.
cat >"$scratch/install.sh" <<'END'
set -e
python=$1 repo=$2 site=$3 wheel=$4
pip=("$python" -m pip install --no-index --no-deps --no-build-isolation --no-compile --target "$site")
if [ -n "$wheel" ]; then
  exec "${pip[@]}" "$wheel"
fi
# A copy is built, so that the repository stays as it is.
mkdir source
tar -C "$repo" --exclude=./.git --exclude=./.venv --exclude=./build --exclude='*.so' -cf - . | tar -C source -xf -
TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST NORMKERN_CUDA=1
exec "${pip[@]}" ./source
END
cat >"$scratch/info.py" <<'END'
import sys
import torch
import normkern
from normkern.backends import BACKENDS
device = sys.argv[1]
why = BACKENDS["native"].why_not(torch.empty(8, device=device))
print("normkern", normkern.__file__)
if why:
    sys.exit(f"the native backend cannot run on {device}: {why}")
x = torch.randn(4, 64, 9, 9, device=device)
with normkern.use_backend("native"):
    y = normkern.group_norm(x, 32)
torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 32))
END
cat >"$scratch/sanitize.py" <<'END'
# A few launches of every strategy, forward and backward, small enough for a tool that slows them a hundredfold.
import os
import torch
import normkern
g = torch.Generator().manual_seed(0)
for strategy in ("warp", "block", "cluster", "subgrid", "split"):
    os.environ["NORMKERN_STRATEGY"] = strategy
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(3, 12, 7, 5, generator=g).to("cuda", dtype).contiguous(memory_format=layout).requires_grad_()
            w = torch.randn(12, generator=g).to("cuda", dtype).requires_grad_()
            rows = torch.randn(33, 193, generator=g).to("cuda", dtype).requires_grad_()
            v = torch.randn(193, generator=g).to("cuda", dtype).requires_grad_()
            with normkern.use_backend("native"):
                results = (
                    normkern.batch_norm(x, None, None, w, w, training=True, act="relu"),
                    normkern.group_norm(x, 4, w, w, act="silu"),
                    normkern.instance_norm(x, weight=w, bias=w),
                    normkern.layer_norm(rows, (193,), v, v),
                    normkern.rms_norm(rows, (193,), v),
                )
                sum(y.float().square().sum() for y in results).backward()
torch.cuda.synchronize()
END
cat >"$scratch/probe.sh" <<'END'
set -e
repo=$1 csv=$2
nvcc=$(command -v nvcc || ls /usr/local/cuda*/bin/nvcc 2>/dev/null | head -n 1)
[ -n "$nvcc" ] || { echo "nvcc was not found"; exit 77; }
"$nvcc" -O3 -std=c++17 -arch=native -o probe "$repo/bench/probe.cu"
./probe | tee "$csv"
END
cat >"$scratch/names.py" <<'END'
# The kernels that torch runs for a bfloat16 batch norm.
import torch
x = torch.randn(32, 64, 56, 56, device="cuda", dtype=torch.bfloat16)
for layout in (torch.contiguous_format, torch.channels_last):
    own = x.contiguous(memory_format=layout).requires_grad_()
    weight = torch.ones(64, device="cuda", requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        torch.nn.functional.batch_norm(own, None, None, weight, weight, training=True).sum().backward()
        torch.cuda.synchronize()
    print(layout, *sorted({event.key for event in found.key_averages()}), sep="\n  ")
END
cat >"$scratch/sanitizer.sh" <<'END'
tool=$1 python=$2 script=$3
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -n 1)
[ -n "$sanitizer" ] || { echo "compute-sanitizer was not found"; exit 77; }
exec "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" "$script"
END

if [ "$dry" = 1 ]; then
  quick=(--quick)
  tests=("$repo/tests/test_norms.py" -k "native and not cuda and float32 and group")
  emulator=
else
  stage install 240 bash "$scratch/install.sh" "$python" "$repo" "$scratch/site" "$wheel"
  command -v nvidia-smi >/dev/null && nvidia-smi >>"$out/log.txt" 2>&1
  quick=()
  tests=("$repo/tests" -k native-cuda -p no:cacheprovider)
  # The emulator has no business here: without a compiler its tests are left out, and it is not built.
  emulator=CXX=/absent
fi
stage import 60 "$python" "$scratch/info.py" "$device"
"$python" -m normkern info >"$out/info.txt" 2>&1
pytest=(env ${emulator:+"$emulator"} "$python" -m pytest -q --tb=short --rootdir "$repo" -c "$repo/pyproject.toml")
stage tests 200 "${pytest[@]}" "${tests[@]}" --junitxml "$out/tests.xml"
# Where the kernels cannot run these must fail, not measure what stands in for them.
export NORMKERN_BACKEND=native
stage copy 40 "$python" "$repo/bench/copy_ceiling.py" --device "$device" --csv "$out/copy.csv"
if [ "$dry" = 0 ]; then
  stage probe 60 bash "$scratch/probe.sh" "$repo" "$out/probe.csv"
  stage names 30 "$python" "$scratch/names.py"
fi
stage sweep 120 "$python" "$repo/bench/sweep_strategies.py" --device "$device" --csv "$out/sweep.csv" "${quick[@]}"
stage bench 150 "${pytest[@]}" -p no:cacheprovider --benchmark-columns=median,iqr,rounds --benchmark-sort=name \
  "$repo/bench/bench_norms.py" --device "$device" --csv "$out/norms.csv" "${quick[@]}"
# Where the host's work would hide the kernels': their replays from CUDA graphs, too.
stage small 90 "${pytest[@]}" -p no:cacheprovider --benchmark-columns=median,iqr,rounds --benchmark-sort=name \
  "$repo/bench/bench_norms.py" --grid -k small --device "$device" --csv "$out/small.csv"
stage offset 40 "$python" "$repo/bench/offset_error.py" --device "$device" --csv "$out/offset_error.csv"
unset NORMKERN_BACKEND
if [ "$dry" = 1 ]; then
  stage demo 60 env COLUMNS=100 "$python" -m normkern demo --quick
else
  for strategy in warp block cluster subgrid split; do
    stage "tests-$strategy" 60 env NORMKERN_STRATEGY="$strategy" "${pytest[@]}" "$repo/tests/test_norms.py" -k native-cuda
  done
  for tool in memcheck racecheck initcheck synccheck; do
    stage "sanitizer-$tool" 90 bash "$scratch/sanitizer.sh" "$tool" "$python" "$scratch/sanitize.py"
  done
  stage demo 90 env COLUMNS=100 "$python" -m normkern demo
fi
echo "$failures stages failed; results in $out"
[ "$failures" = 0 ]
