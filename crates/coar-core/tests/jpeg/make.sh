#!/usr/bin/env bash
# Writes the JPEG files of this folder, and for each sampling what libjpeg decodes them to. Needs cjpeg and djpeg of
# libjpeg-turbo; these are of 2.1.5.
set -euo pipefail
cd "$(dirname "$0")"
rm -f ./*.jpg [^s]*.ppm
encode() { cjpeg -quality 90 -optimize "$@" source.ppm; }

# Luma, first and second chroma: decoded.
known="1x1 2x1 1x2 2x2 4x1 4x2 1x4 2x4 2x2,2x1,2x1 2x2,1x2,1x2 2x1,1x2,1x2 2x2,2x1,1x2 2x2,1x1,2x2 4x1,2x1,2x1"
# Refused by name.
refused="1x1,2x2,1x1 1x1,2x1,2x1 1x2,2x1,2x1 1x1,1x1,2x2 1x1,4x1,4x1 3x1 1x4,1x2,1x2 4x1,1x2,1x2"
for sampling in $known; do
    for restart in 0 1 2B; do
        encode -sample "$sampling" -restart $restart >"$sampling-baseline-$restart.jpg"
        encode -sample "$sampling" -restart $restart -progressive >"$sampling-progressive-$restart.jpg"
    done
    djpeg -ppm "$sampling-baseline-0.jpg" >"$sampling.ppm"
done
for sampling in $refused; do
    encode -sample "$sampling" >"$sampling-baseline-0.jpg"
    encode -sample "$sampling" -restart 1 -progressive >"$sampling-progressive-1.jpg"
done
for restart in 0 1 2B; do
    encode -grayscale -restart $restart >"grey-baseline-$restart.jpg"
    encode -grayscale -restart $restart -progressive >"grey-progressive-$restart.jpg"
done
djpeg -rgb -ppm grey-baseline-0.jpg >grey.ppm

# Baseline with a scan for each component: refused by name.
printf '0;\n1;\n2;\n' >scans.txt
for sampling in 1x1 2x1 1x2 2x2; do
    encode -sample "$sampling" -scans scans.txt >"$sampling-scans-0.jpg"
done
rm scans.txt
cjpeg -quality 90 -arithmetic source.ppm >arithmetic.jpg
