#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The Debian package and the installed program.
#
#     tests/tool/package.sh BUILD_DIR
#
# BUILD_DIR is one with CONCERTINA_INSTALL_TOOL, built; skipped (77) where Debian's tools are missing.
set -euo pipefail

[ $# = 1 ] || { echo "usage: package.sh BUILD_DIR" >&2; exit 2; }
for tool in dpkg-deb dpkg-shlibdeps; do
  command -v $tool >/dev/null || { echo "skipped: there is no $tool"; exit 77; }
done
build=$(realpath "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'echo "line $LINENO failed: $BASH_COMMAND"' ERR
cd "$scratch"

cpack --config "$build/CPackConfig.cmake" -G DEB -B "$scratch/made" >log 2>&1 || { cat log; exit 1; }
package=$(echo made/concertina_*.deb)
dpkg-deb --contents "$package" | awk '{print $6}' >contents
for file in bin/concertina share/man/man1/concertina.1 share/bash-completion/completions/concertina \
  include/concertina/concertina.hpp include/concertina/detail/tree.hpp share/doc/concertina/LICENSE; do
  grep -qx "./usr/$file" contents || { echo "not in the package: $file"; exit 1; }
done
grep -q '^./usr/lib/.*cmake/concertina/concertinaConfig.cmake$' contents
[ "$(dpkg-deb --field "$package" Section)" = science ]
[[ $(dpkg-deb --field "$package" Depends) == *'libc6 (>= '* ]]
[[ $(dpkg-deb --field "$package" Description) == *ONNX* ]]

# check PREFIX: what is installed there
check() {
  [[ $("$1/bin/concertina" --version) =~ ^concertina\ [0-9]+\.[0-9]+\.[0-9]+$ ]]
  [[ $("$1/bin/concertina" --help) == *contract* ]]
  cmp "$1/share/man/man1/concertina.1" <("$1/bin/concertina" --man)
  cmp "$1/share/bash-completion/completions/concertina" <("$1/bin/concertina" --completion)
}
dpkg-deb --extract "$package" extracted
check extracted/usr
cmake --install "$build" --prefix "$scratch/prefix" >log
check prefix
if command -v man >/dev/null; then
  warnings=$(LC_ALL=C.UTF-8 man --warnings -E UTF-8 -l -Tutf8 -Z prefix/share/man/man1/concertina.1 2>&1 >/dev/null)
  [ -z "$warnings" ] || { echo "the man page: $warnings"; exit 1; }
fi
echo "$package: $(wc -l <contents) entries"
