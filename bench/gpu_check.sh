#!/usr/bin/env bash
# The whole GPU check in one call of under nine minutes: versions, build, GPU tests, bench. Needs nothing from outside.
#
#   bench/gpu_check.sh                    from anywhere; results go to ${OUT:-bench/out/gpu}
#   bench/gpu_check.sh bench-lm           only the parts named: versions build tests tests-native bench bench-lm bench-train bench-native
#   GPU_CHECK_DEVICE=cpu bench/gpu_check.sh   its CPU form: the tests of the bench itself, then the quick cases
#
# PYTHON names the interpreter (default python3). A package that the machine lacks (smart-pytorch, usually) can be put
# beside the checkout: pip install --no-deps --target .gpu_deps smart-pytorch==0.0.4; DEPS names another folder. With
# liger-kernel added there, its losses are timed too.
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
chosen=("$@")

# part NAME SECONDS COMMAND...: run within the limit, log to $out/NAME.log, remember the first failure.
part() {
    local name=$1 seconds=$2 code
    shift 2
    if [ "${#chosen[@]}" -gt 0 ] && [[ " ${chosen[*]} " != *" $name "* ]]; then return; fi
    echo "== $name (at most $seconds s)"
    timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1
    code=$?
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then echo "stopped at its limit of $seconds s" >>"$out/$name.log"; fi
    if [ "$status" -eq 0 ]; then status=$code; fi
    echo "exit status $code" >>"$out/$name.log"
}

# Triton and native in processes of their own: a kernel that faults takes down whatever shares its process.
# 20 + 80 + 115 + 50 + 80 + 80 + 80 + 30 = 535 s at most. A bench starts no case later than 20 s after its --limit.
part versions 20 "$python" -m smart_fast
if [ "$device" = cuda ]; then
    part build 80 "$python" -m smart_fast build
    part tests 115 "$python" -m pytest -p no:cacheprovider -n 8 -m gpu -k "not native" tests
    part tests-native 50 "$python" -m pytest -p no:cacheprovider -n 8 -m gpu -k native tests
    part bench 80 "$python" -m bench ops regulariser overhead --device cuda --limit 50 --seconds 0.7 \
        --backends torch triton --json "$out/results.json" --plot "$out/speed.png"
    part bench-lm 80 "$python" -m bench lm --device cuda --limit 50 --seconds 0.7 --backends torch triton \
        --json "$out/results-lm.json" --plot "$out/speed-lm.png"
    part bench-train 80 "$python" -m bench train --device cuda --limit 50 --seconds 0.7 --backends triton \
        --json "$out/results-train.json" --plot "$out/speed-train.png"
    part bench-native 30 "$python" -m bench ops --device cuda --limit 8 --seconds 0.5 --backends native \
        --json "$out/results-native.json" --plot "$out/speed-native.png"
else
    part tests 150 "$python" -m pytest -p no:cacheprovider tests/test_bench.py tests/test_bench_liger.py
    part bench 140 "$python" -m bench --device cpu --quick --json "$out/results.json" --plot "$out/speed.png"
fi

cat "$out/versions.log" 2>/dev/null
for name in tests tests-native bench bench-lm bench-train bench-native; do
    if [ -f "$out/$name.log" ]; then
        echo "== $name"
        tail -n 70 "$out/$name.log"
    fi
done
exit "$status"
