#!/usr/bin/env bash
# All the tests, from nothing: installs what is missing, builds, runs every test, then those that are not slow again with the
# address and the undefined-behaviour sanitizer. The last line is the sum: "N passed, N failed, N skipped".
# shellcheck source-path=SCRIPTDIR source=scripts/setup.sh
. "$(dirname "$0")/scripts/setup.sh"

need "${build_packages[@]}" libgtest-dev python3 pkg-config

results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT

# run PRESET [CTEST OPTION]...: runs tests, keeps their counts, shows the output of those that fail.
run() {
  local preset=$1
  shift
  ctest --test-dir "build/$preset" --output-on-failure --no-tests=error --output-junit "$results/$preset.xml" --parallel "$jobs" "$@" ||
    [ -s "$results/$preset.xml" ]
}

say "release: building"
build build/release --preset release
say "release: every test"
run release

for preset in asan ubsan; do
  say "$preset: building"
  build "build/$preset" --preset "$preset" -DTILEWISE_BUILD_EXAMPLES=OFF
  say "$preset: every test that is not slow and builds nothing of its own"
  run "$preset" --label-exclude 'slow|builds'
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
sys.exit(1 if failed else 0)
PYTHON
