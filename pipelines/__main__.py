"""`python -m pipelines` is the `curate` command."""

from pipelines.cli import main

main()
