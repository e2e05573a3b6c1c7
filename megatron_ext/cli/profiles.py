"""What `--profile` says at the end of a stage: the tables of every rank that was recorded, and where the rest is."""

from __future__ import annotations

from pathlib import Path

from megatron_ext.observe.profiles import FOLDER, as_text, read_profiles


def show_profiles(stage_dir: Path) -> None:
    """Nothing for a stage that runs no model."""
    found = read_profiles(stage_dir)
    for profile in found:
        print(f"\n{as_text(profile)}")
    if found:
        print(f"\nprofile: {stage_dir / FOLDER}; open its *.trace.json.gz in https://ui.perfetto.dev", flush=True)
