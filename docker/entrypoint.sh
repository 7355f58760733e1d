#!/bin/sh
# What the container runs: flags are those of `disco-serve serve`, anything else is a command of disco-serve
# (`models pull NAME`). To change the port set DISCO_PORT, which the health check reads too.
set -eu
case "${1-}" in
  "" | -*) set -- serve "$@" ;;
esac
# exec: signals reach tini, which hands them on. -e 143: a server that drained after SIGTERM ended well.
exec tini -e 143 -- disco-serve "$@"
