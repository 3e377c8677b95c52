#!/bin/sh
# Runs a compiler and fails where ptxas has serialised wgmma (C7500 to C7599), which it only calls information, or spilled 256 bytes or
# more. Below that: with three or four consumer warpgroups the loaders have few registers, and the warp that stores keeps what it needs to
# compute a rare row anew in local memory; up to eight words of consumers' state lie there too, outside the loop over keys. The compiler's
# output is shown where it fails; `cuobjdump -res-usage` tells what each kernel takes.
log=$("$@" 2>&1)
status=$?
slow='\(C75[0-9][0-9]\)|(25[6-9]|2[6-9][0-9]|[3-9][0-9]{2}|[1-9][0-9]{3,}) bytes spill stores'
[ $status -eq 0 ] && printf '%s\n' "$log" | grep -qE "$slow" && status=1
[ $status -ne 0 ] && printf '%s\n' "$log" >&2
exit $status
