#!/usr/bin/env bash
# Programs that benchmarks are held against (peers from PyPI come with the extra `perf`). As root on Debian or Ubuntu the
# missing ones are installed; elsewhere they are named, and their rows in the records say that they are missing.
# plink2: most releases of Debian carry 2.00a3.5, which has no --r2-phased; Debian 13's source (a6.9 or newer) is fetched
# through apt with lists of its own (the system's are left alone), built for AVX2 and kept in $ENGINE_PERF_CACHE.
set -euo pipefail
cache=${ENGINE_PERF_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/engine-perf}
log="$cache/build.log"

say() { echo "[peers] $*" >&2; }
is_root_on_debian() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
has_r2() { command -v "$1" >/dev/null 2>&1 && ! "$1" --help r2-phased 2>&1 | grep -q 'No help entry'; }

apt_install() { # only what is not there: apt-get update costs seconds
  local package missing=()
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  say "installing ${missing[*]} with apt-get"
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >>"$log" 2>&1
}

fetch_source() { # the tarballs of plink2, checked by apt against Debian's signed index
  local keys=/usr/share/keyrings/debian-archive-keyring.gpg options mirror
  # the mirror this machine already uses for Debian itself
  # shellcheck disable=SC2016
  mirror=$(apt-get indextargets --format '$(SITE)' | grep -E '/debian/?$' | sort -u | head -n 1)
  [ -n "$mirror" ] || { echo "no mirror of Debian in the sources of apt" >>"$log"; return 1; }
  [ -f "$keys" ] || apt_install debian-archive-keyring
  mkdir -p "$cache/apt/lists/partial" "$cache/apt/archives/partial" "$cache/plink2"
  echo "deb-src [signed-by=$keys] $mirror trixie main" >"$cache/apt/sources.list"
  options=(-o "Dir::Etc::sourcelist=$cache/apt/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$cache/apt/lists"
    -o "Dir::Cache=$cache/apt" -o Dir::State::status=/dev/null -o APT::Sandbox::User=root)
  apt-get "${options[@]}" update -qq >>"$log" 2>&1
  cd "$cache/plink2"
  # status=/dev/null above: else apt asks for the source of the version that is installed. Two calls: with the .dsc a mirror that lacks that one small file would fail the whole
  apt-get "${options[@]}" -qq source --download-only --tar-only plink2 >>"$log" 2>&1
  apt-get "${options[@]}" -qq source --download-only --diff-only plink2 >>"$log" 2>&1
}

build_plink2() {
  local tree="$cache/plink2/tree" patch flags simd=""
  apt_install g++ make patch xz-utils libdeflate-dev libzstd-dev zlib1g-dev liblapack-dev libopenblas-dev libsimde-dev
  fetch_source
  rm -rf "$tree" && mkdir -p "$tree"
  tar xf "$cache"/plink2/plink2_*.orig.tar.xz -C "$tree"
  tar xf "$cache"/plink2/plink2_*.debian.tar.xz -C "$tree"
  cd "$tree"
  while read -r patch; do
    patch -s -p1 <"debian/patches/$patch" >>"$log" 2>&1
  done <debian/patches/series
  if grep -qw avx2 /proc/cpuinfo; then simd="-mavx2 -mbmi -mbmi2 -mlzcnt -mfma"; fi
  flags="$simd -fopenmp-simd -DSIMDE_ENABLE_OPENMP -I/usr/include/simde -DIGNORE_BUNDLED_LIBDEFLATE"
  CFLAGS="$flags" CXXFLAGS="$flags" LDFLAGS=-ldeflate make -C build_dynamic SFX= plink2 >>"$log" 2>&1
  mkdir -p "$cache/bin"
  mv build_dynamic/plink2 "$cache/bin/plink2"
  rm -rf "$tree"
}

mkdir -p "$cache"
: >"$log"
for name in plink1.9 bcftools; do
  if is_root_on_debian; then
    apt_install "$name" || say "no $name, see $log; its rows will say so"
  else
    command -v "$name" >/dev/null || say "not found: $name (sudo apt-get install $name); its rows will say so"
  fi
done

if has_r2 "$cache/bin/plink2" || has_r2 plink2; then
  say "plink2 with --r2-phased is there"
elif is_root_on_debian; then
  say "building plink2 from Debian's source (about 3 minutes, once)"
  # a subshell of its own: in the condition of an `if`, set -e would not stop at the first failure
  export -f say apt_install fetch_source build_plink2
  export cache log
  if ! bash -euo pipefail -c build_plink2; then
    say "plink2 could not be built, see $log; its rows will say so"
    tail -n 3 "$log" >&2
  fi
else
  say "plink2 with --r2-phased not found (2.00a5 or newer on the PATH, or \$ENGINE_PERF_CACHE/bin); its rows will say so"
fi
