#!/usr/bin/env bash
# Runs a command on one host: launch/worker.sh COMMAND...
#
# A run that gets SIGTERM saves and exits with 0, which a scheduler would take for the end of the
# training. So a host that was told to stop exits with 143 (128 + SIGTERM) once its run has saved:
# "start the same command again". Any other code is the command's own.

child=''
stopped=''
trap '' HUP # a shutdown sends login sessions SIGTERM and SIGHUP; only the first must count
trap 'stopped=1; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM

"$@" &
child=$!
while kill -0 "$child" 2>/dev/null; do
  wait "$child" # returns early at a signal
done
wait "$child"
code=$?
[[ $code != 0 || -z $stopped ]] || code=143
exit "$code"
