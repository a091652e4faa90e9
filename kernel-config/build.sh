#!/bin/bash
# Builds the guest kernel:
#
#   build.sh SOURCE_DIR OUT_DIR [FRAGMENT…]
#
# SOURCE_DIR is an unpacked kernel source; it stays untouched: the patches beside
# this script are applied to links of its files, in OUT_DIR/source, and
# everything is built in OUT_DIR/build. FRAGMENT defaults to the four beside this script
# that make Hull's kernel; a later fragment overrides an earlier one. Leaves
#
#   OUT_DIR/vmlinux      stripped ELF with its PVH note
#   OUT_DIR/System.map   addresses, to read a trace by
#   OUT_DIR/config       the whole configuration
#
# The base is tinyconfig: what no fragment asks for is n, whatever Kconfig's
# default says. Fails, and lists them all, when an option that a fragment asks
# for does not stand in the configuration as asked.
#
# JOBS (default: number of processors) says how many compilers run at once;
# CONFIG_ONLY=1 stops after the check.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
source_dir=$(cd "$1" && pwd)
mkdir -p "$2/build"
out=$(cd "$2" && pwd)
shift 2
[ $# -gt 0 ] || set -- "$here"/{base,containers,netfilter,hardening}.config

original=$source_dir
source_dir=$out/source
rm -rf "$source_dir"
cp -al "$original" "$source_dir"
for change in "$here"/*.patch; do
    # Makes each changed file anew, and so leaves the original of the link alone.
    patch --quiet --strip=1 --directory="$source_dir" < "$change"
done

build=$out/build
asked=$build/asked.config

# One line an option, the last that names it wins: `CONFIG_X=value`.
cat "$source_dir"/kernel/configs/tiny{-base,}.config \
    "$source_dir"/arch/x86/configs/tiny.config "$@" |
    awk '
        /^# CONFIG_[A-Za-z0-9_]+ is not set/ { value[$2] = "n"; next }
        /^CONFIG_/ { at = index($0, "="); value[substr($0, 1, at - 1)] = substr($0, at + 1) }
        END { for (name in value) print name "=" value[name] }
    ' | sort > "$asked"

# The same kernel from the same source on every machine and day.
export KBUILD_BUILD_USER=hull KBUILD_BUILD_HOST=hull
export KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970'
kernel_make() { make -C "$source_dir" O="$build" ARCH=x86_64 "$@"; }

kernel_make -s KCONFIG_ALLCONFIG="$asked" allnoconfig > "$build/kconfig.log" 2>&1 ||
    { cat "$build/kconfig.log" >&2; exit 1; }

# Only what the fragments ask is checked: tinyconfig's own lines are a base.
dropped=$(awk '
    FILENAME == ARGV[1] && /^CONFIG_/ { at = index($0, "="); have[substr($0, 1, at - 1)] = substr($0, at + 1); next }
    /^CONFIG_/ { at = index($0, "="); want[substr($0, 1, at - 1)] = substr($0, at + 1); from[substr($0, 1, at - 1)] = FILENAME }
    END {
        for (name in want) {
            is = (name in have) ? have[name] : "n"
            if (is != want[name]) print "  " name "=" want[name] " asked by " from[name] ", is " is
        }
    }' "$build/.config" "$@" | sort)
if [ -n "$dropped" ]; then
    printf 'these options were asked for and dropped by Kconfig (a dependency is missing, or another option selects them):\n%s\n' "$dropped" >&2
    exit 1
fi
echo "configuration: $(grep -c '=y$' "$build/.config") options set, none dropped"
[ -z "${CONFIG_ONLY:-}" ] || exit 0

kernel_make -j"${JOBS:-$(nproc)}" vmlinux

# No section headers beyond what a loader reads; the PVH note lives in .notes,
# inside a PT_NOTE segment, and survives.
objcopy --strip-all --remove-section=.comment "$build/vmlinux" "$out/vmlinux.new"
cp "$build/System.map" "$out/System.map"
cp "$build/.config" "$out/config"
mv "$out/vmlinux.new" "$out/vmlinux"
size "$out/vmlinux" | awk 'NR == 2 { printf "vmlinux: text %.1f MB, data %.1f MB, bss %.1f MB\n", $1 / 1e6, $2 / 1e6, $3 / 1e6 }'
