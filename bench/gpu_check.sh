#!/usr/bin/env bash
# The whole GPU check in one call of under nine minutes: versions, build, GPU tests (CUDA graphs and synchronization
# among them), compute-sanitizer, bytes over time of each kernel, bench. Needs nothing from outside.
#
#   bench/gpu_check.sh                    from anywhere; the report goes to ${OUT:-bench/out/gpu}: report.txt, a JSON
#                                         file for each bench, and parts.tar.gz with whole logs and plots
#   bench/gpu_check.sh bench-lm           only the parts named: versions build tests tests-native sanitize kernels bench
#                                         bench-lm bench-train bench-native
#   GPU_CHECK_DEVICE=cpu bench/gpu_check.sh   its CPU form, of the same parts as far as there are any without a GPU
#
# PYTHON names the interpreter (default python3). A package that the machine lacks (smart-pytorch, usually) can be put
# beside the checkout: pip install --no-deps --target .gpu_deps smart-pytorch==0.0.4; DEPS names another folder. With
# liger-kernel added there, its losses are timed too.
# Launch choices are swept by another call: python -m bench tune --limit 480, again until it leaves nothing out.
# Exit status: that of the first part that failed; the parts after it run all the same.
set -uo pipefail
cd "$(dirname "$0")/.."

device=${GPU_CHECK_DEVICE:-cuda}
python=${PYTHON:-python3}
out=${OUT:-bench/out/gpu}
deps=${DEPS:-.gpu_deps}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if [ -d "$deps" ]; then PYTHONPATH="$PYTHONPATH:$(cd "$deps" && pwd)"; fi
parts="$out/parts"
rm -rf "$parts" "$out/report.txt"
mkdir -p "$parts"
status=0
chosen=("$@")

wanted() { [ "${#chosen[@]}" -eq 0 ] || [[ " ${chosen[*]} " == *" $1 "* ]]; }

# run NAME SECONDS COMMAND...: within the limit, log and exit status to $parts.
run() {
    local name=$1 seconds=$2 code start=$SECONDS
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$parts/$name.log" 2>&1
    code=$?
    if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then echo "stopped at its limit of $seconds s" >>"$parts/$name.log"; fi
    echo "exit status $code after $((SECONDS - start)) s" >>"$parts/$name.log"
    echo "$code" >"$parts/$name.code"
}

# ended NAME: remember the first failure, add the end of the log to the report.
ended() {
    local code
    code=$(cat "$parts/$1.code")
    rm "$parts/$1.code"
    if [ "$status" -eq 0 ]; then status=$code; fi
    { echo "== $1"; tail -n 70 "$parts/$1.log"; } | tee -a "$out/report.txt"
}

part() {
    if ! wanted "$1"; then return; fi
    run "$@"
    ended "$1"
}

# Triton and native in processes of their own: a kernel that faults takes down whatever shares its process.
# 20 + 120 (build beside tests) + 50 + 60 + 35 + 75 + 75 + 75 + 25 = 535 s at most. A bench starts no case later than
# 20 s after its --limit.
part versions 20 "$python" -m smart_fast
if [ "$device" = cuda ]; then
    if wanted build; then run build 115 "$python" -m smart_fast build & fi
    part tests 120 "$python" -m pytest -p no:cacheprovider -n 8 -m gpu -k "not native" tests
    wait
    if wanted build; then ended build; fi
    part tests-native 50 "$python" -m pytest -p no:cacheprovider -n 8 -m gpu -k native tests
    if ! command -v compute-sanitizer >/dev/null; then
        if wanted sanitize; then echo "== sanitize: not run, there is no compute-sanitizer" | tee -a "$out/report.txt"; fi
    else
        # An allocation for every tensor: the tool then knows where it ends.
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 part sanitize 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
            "$python" -m bench.sanitize --device cuda --backends triton native
    fi
    part kernels 35 "$python" -m bench kernels --device cuda --limit 28 --seconds 0.3 --backends triton native \
        --json "$out/kernels.json"
    part bench 75 "$python" -m bench ops regulariser overhead --device cuda --limit 45 --seconds 0.7 \
        --backends torch triton --json "$out/results.json" --plot "$parts/speed.png"
    part bench-lm 75 "$python" -m bench lm --device cuda --limit 45 --seconds 0.7 --backends torch triton \
        --json "$out/results-lm.json" --plot "$parts/speed-lm.png"
    part bench-train 75 "$python" -m bench train --device cuda --limit 45 --seconds 0.7 --backends triton \
        --json "$out/results-train.json" --plot "$parts/speed-train.png"
    part bench-native 25 "$python" -m bench ops --device cuda --limit 4 --seconds 0.5 --backends native \
        --json "$out/results-native.json" --plot "$parts/speed-native.png"
else
    part build 120 "$python" -m smart_fast build
    part tests 240 "$python" -m pytest -p no:cacheprovider tests/test_bench.py tests/test_bench_liger.py
    part sanitize 60 "$python" -m bench.sanitize --device cpu --backends native
    part kernels 60 "$python" -m bench kernels --device cpu --quick --backends native --json "$out/kernels.json"
    part bench 140 "$python" -m bench --device cpu --quick --json "$out/results.json" --plot "$parts/speed.png"
fi

tar -czf "$out/parts.tar.gz" -C "$out" parts && rm -rf "$parts"
exit "$status"
