"""Data sets: one folder each, its prepare.py writes train.bin, val.bin and meta.json beside itself."""
