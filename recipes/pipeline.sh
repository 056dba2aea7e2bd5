#!/usr/bin/env bash
# Convert, check, verify, and put manifest and reports in place: a checkpoint goes in, a release comes out, or an exit code says why not.
#
#   recipes/pipeline.sh SOURCE OUTPUT REPORTS
#
# SOURCE   the checkpoint's folder            OUTPUT  the artifact's folder (an interrupted run is resumed)
# REPORTS  gets manifest.json, verify.xml (JUnit), verify.json, check.json, inspect.json, SHA256SUMS, and manifest.sig when signed
#
# Environment:
#   SCHEME, TP             what to make (default w4afp8 and 1); SCHEME=none converts without quantizing
#   VERIFY                 more arguments for `mxconv verify`, as "--windows 32 --limit kl_mean=0.05"
#   SIGNING_KEY, PUBLIC_KEY  PEM files: the manifest is signed with the one and checked with the other (pip install 'mxconv[sign]')
#   UPLOAD                 a command that gets two folders as arguments, as "hf-upload.sh": the artifact without its run.log, which names
#                          this machine, and REPORTS, which name the folders as given here; without it nothing leaves the machine
#   MXCONV                 how to call mxconv (default: mxconv)
#
# The exit code is that of the step that failed: 2 request, 3 malformed, 4 incomplete, 5 conflict, 6 resources (run again), 7 numeric,
# 8 wrong or corrupt, 130/143 interrupted (run again). Nothing is uploaded unless every step has passed.
set -euo pipefail

source_folder=${1:?source folder}
output=${2:?output folder}
reports=${3:?reports folder}
scheme=${SCHEME:-w4afp8}
tp=${TP:-1}
read -r -a mxconv <<< "${MXCONV:-mxconv}"
read -r -a verify_arguments <<< "${VERIFY:-}"
mkdir -p "$reports"
# what an earlier run said is not this one's
(cd "$reports" && rm -f inspect.json run.jsonl check.json verify.xml verify.json manifest.json SHA256SUMS manifest.sig)

step() { printf '== %s\n' "$*" >&2; }

request=(--tp "$tp")
job=convert
if [ "$scheme" != none ]; then
  job=quantize
  request+=(--scheme "$scheme")
fi

step "inspect $source_folder"
"${mxconv[@]}" inspect "$source_folder" --json > "$reports/inspect.json"

step "$job to $output"
"${mxconv[@]}" "$job" "$source_folder" "$output" "${request[@]}" --resume --json > "$reports/run.jsonl"

step "check every byte"
"${mxconv[@]}" check "$output" --json > "$reports/check.json"

step "verify against the source"
"${mxconv[@]}" verify "$output" --source "$source_folder" --junit "$reports/verify.xml" --json ${verify_arguments[@]+"${verify_arguments[@]}"} \
  > "$reports/verify.json"

step "manifest and sums"
cp "$output/manifest.json" "$reports/manifest.json"
(cd "$output" && find . -type f ! -name run.log -print0 | LC_ALL=C sort -z | xargs -0 sha256sum) > "$reports/SHA256SUMS"

if [ -n "${SIGNING_KEY:-}" ]; then
  step "sign the manifest"
  python3 -m model_signing sign key "$output/manifest.json" --private_key "$SIGNING_KEY" --signature "$reports/manifest.sig"
  "${mxconv[@]}" check "$output" --signature "$reports/manifest.sig" --public-key "${PUBLIC_KEY:?the key to check with}" > /dev/null
fi

if [ -n "${UPLOAD:-}" ]; then
  step "upload"
  read -r -a upload <<< "$UPLOAD"
  name=$(basename "$(realpath "$output")")
  staged=$(mktemp -d "$(dirname "$(realpath "$output")")/.$name.upload.XXXXXX")
  trap 'rm -rf "$staged"' EXIT
  cp -al "$output/." "$staged/$name" # links: no byte is copied
  rm -f "$staged/$name/run.log"
  "${upload[@]}" "$staged/$name" "$reports"
fi
step "done: $output"
