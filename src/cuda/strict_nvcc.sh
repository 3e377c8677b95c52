#!/bin/sh
# Runs a compiler and fails where ptxas has serialised wgmma (C7500 to C7599), which it only calls information, or spilled 32 bytes or
# more: the rows with three consumer warpgroups keep up to five words of per-tile state in local memory, outside the loop over keys.
log=$("$@" 2>&1)
status=$?
[ -n "$log" ] && printf '%s\n' "$log" >&2
[ $status -ne 0 ] && exit $status
printf '%s\n' "$log" | grep -qE '\(C75[0-9][0-9]\)|([1-9][0-9]{3,}) bytes spill' && exit 1
exit 0
