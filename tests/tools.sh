#!/bin/sh
# See that programs are there, given as PROGRAM:PACKAGE. Root gets missing ones by apt-get; others are told.
set -u
PATH=$PATH:/usr/sbin:/sbin
missing=
for pair in "$@"; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair#*:}"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    # shellcheck disable=SC2086  # a list
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
        >/dev/null 2>&1 && exit 0
fi
echo "missing here:$missing; install them first: sudo apt-get install$missing" >&2
exit 1
