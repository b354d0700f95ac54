"""A comparison of generators that anyone can enter and rerun: a generator is a folder of samples and an `entry.json`.

    entry.py        the entry format, read strictly
    tracks.py       what is compared on what: configs/benchmark/*.yaml
    sides.py        data of a track, checked by hash and split by person into train, test and fresh
    entrants.py     the engine's own entrants and the controls, each a function that leaves an entry
    monai_ldm.py    a latent diffusion model after MONAI's tutorial, as an entrant
    scores.py       fidelity and audit of an entry's samples
    records.py      append-only JSONL, each line chained to the one before
    run.py          equal budgets, failures as rows, scores, records
    verify.py       recomputes what the records say
    table.py        records as Markdown

Standard, tracks and results: docs/benchmark.md.
"""

from __future__ import annotations
