#!/bin/sh
# Serves on every interface of the container; arguments are flags of `disco-serve serve`.
# To change the port set DISCO_PORT, which the health check reads too.
# exec: signals must reach the server, so that it drains.
set -eu
exec disco-serve serve --host "${DISCO_HOST:-0.0.0.0}" "$@"
