#!/bin/sh
# The same on the command line: in words, then as the recipe's file. Run it in this folder.
set -e
tersor run mine.py:net --task mine.py:task --out out/words --quiet \
    prune keep=0.3 epochs=30 ramp=0.5 lr=0.01 cluster entries=16 epochs=5 entropy
tersor check recipe.yaml --model mine.py:net
tersor run mine.py:net --task mine.py:task --recipe recipe.yaml --out out/yaml --quiet
tersor show out/words/model.tersor
tersor verify out/words/model.tersor
