#!/usr/bin/env bash
# The whole GPU check in one call of under nine minutes: versions, the GPU tests, the bench. Needs nothing from outside.
#
#   bench/gpu_check.sh                    from anywhere; results go to ${OUT:-bench/out/gpu}
#   GPU_CHECK_DEVICE=cpu bench/gpu_check.sh   its CPU form: the tests of the bench itself, then the quick cases
#
# PYTHON names the interpreter (default python3). A package that the machine lacks (smart-pytorch, usually) can be put
# beside the checkout: pip install --no-deps --target .gpu_deps smart-pytorch==0.0.4; DEPS names another folder.
# Exit status: that of the first part that failed; the parts after it run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."

device=${GPU_CHECK_DEVICE:-cuda}
python=${PYTHON:-python3}
out=${OUT:-bench/out/gpu}
deps=${DEPS:-.gpu_deps}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -d "$deps" ]; then PYTHONPATH="$PYTHONPATH:$(cd "$deps" && pwd)"; fi
mkdir -p "$out"
status=0

# part NAME SECONDS COMMAND...: run within the limit, log to $out/NAME.log, remember the first failure.
part() {
    local name=$1 seconds=$2 code
    shift 2
    echo "== $name (at most $seconds s)"
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1
    code=$?
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then echo "stopped at its limit of $seconds s" >>"$out/$name.log"; fi
    if [ "$status" -eq 0 ]; then status=$code; fi
    echo "exit status $code" >>"$out/$name.log"
}

if [ "$device" = cuda ]; then
    tests=(-m gpu -n 8 tests)  # most of a test's time is compiling its kernels
    cases=(--device cuda --limit 190 --seconds 1)
else
    tests=(tests/test_bench.py)
    cases=(--device cpu --quick)
fi

# 20 + 230 + 250 = 500 s, and ten more for each part that has to be killed: 530 s.
part versions 20 "$python" -m smart_fast
part tests 230 "$python" -m pytest -p no:cacheprovider "${tests[@]}"
part bench 250 "$python" -m bench "${cases[@]}" --json "$out/results.json" --plot "$out/speed.png"

cat "$out/versions.log"
echo "== tests"
tail -n 15 "$out/tests.log"
echo "== bench"
tail -n 130 "$out/bench.log"
exit "$status"
