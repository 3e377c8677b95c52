#!/usr/bin/env bash
# All the tests, from nothing: installs what is missing, builds, runs every test, then some again with the address and the
# undefined-behaviour sanitizers. The last line is the sum: "N passed, N failed, N skipped".
# shellcheck source-path=SCRIPTDIR source=scripts/setup.sh
. "$(dirname "$0")/scripts/setup.sh"

need "${build_packages[@]}" libgtest-dev python3 pkg-config

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# run FOLDER [CTEST OPTION]...: runs tests, keeps their counts, shows the output of those that fail.
run() {
  local folder=$1
  shift
  ctest --test-dir "$folder" --output-on-failure --no-tests=error --output-junit "$results/$(basename "$folder").xml" "$@" || true
}

say "building with tests in build-test"
build build-test -DCMAKE_BUILD_TYPE=Release -DTILEWISE_BUILD_TESTS=ON
say "every test"
run build-test --parallel "$jobs"

for sanitizer in address undefined; do
  say "building with the $sanitizer sanitizer in build-$sanitizer"
  build "build-$sanitizer" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTILEWISE_BUILD_TESTS=ON -DTILEWISE_BUILD_EXAMPLES=OFF -DTILEWISE_CUDA=OFF \
    -DCMAKE_CXX_FLAGS="-fsanitize=$sanitizer -fno-sanitize-recover=all -fno-omit-frame-pointer"
  say "core, api and tool tests with the $sanitizer sanitizer"
  OMP_NUM_THREADS=2 run "build-$sanitizer" --parallel "$jobs" --label-regex 'core|api|tool|cpu' --label-exclude slow
done

say "sum"
python3 - "$results" <<'PYTHON'
import pathlib, sys, xml.etree.ElementTree as tree

total = failed = skipped = 0
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.xml")):
    suite = tree.parse(path).getroot()
    counts = [int(suite.get(key, 0)) for key in ("tests", "failures", "skipped")]
    counts[2] += int(suite.get("disabled", 0))
    print(f"{path.stem}: {counts[0]} tests, {counts[1]} failed, {counts[2]} skipped")
    total, failed, skipped = (a + b for a, b in zip((total, failed, skipped), counts))
print(f"{total - failed - skipped} passed, {failed} failed, {skipped} skipped")
sys.exit(1 if failed or total == 0 else 0)
PYTHON
