# Sourced by the tests of the command-line tool, with the program as $bin: a folder to work in, checks that count.
# SPDX-License-Identifier: Apache-2.0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch" || exit 2
failures=0 checks=0

fail() {
  failures=$((failures + 1))
  echo "FAILED: $*"
  sed 's/^/    /' out err 2>/dev/null | cut -c1-300
}

# expect CODE ARGUMENTS...: runs the program; its output is in the files out and err
expect() {
  local code=$1
  shift
  checks=$((checks + 1))
  timeout 120 "$bin" "$@" >out 2>err </dev/null
  local got=$?
  [ "$got" = "$code" ] || fail "exit code $got instead of $code: concertina $*"
  # Errors are one line that begins with the program's name; success has none, and 6 is no error.
  if [ "$code" = 0 ] && [ -s err ]; then fail "something on standard error: concertina $*"; fi
  if [ "$code" -gt 1 ] && [ "$code" != 6 ] && ! { [ "$(wc -l <err)" = 1 ] && grep -q '^concertina: error: ' err; }; then
    fail "not a one-line error: concertina $*"
  fi
  # Users of the program know its options, not the library's names.
  if grep -qE 'interior_only|exact_at|::' err; then fail "a name of the library: concertina $*"; fi
}

# says FILE TEXT: the text is in the file (out or err)
says() {
  checks=$((checks + 1))
  grep -qF -- "$2" "$1" || fail "\"$2\" is not in $1"
}

is_json() {
  checks=$((checks + 1))
  python3 -m json.tool out >parsed 2>&1 || fail "not JSON"
}

# finish: says how it went; fails where a check did
finish() {
  echo "$checks checks, $failures failed"
  [ "$failures" = 0 ]
}
