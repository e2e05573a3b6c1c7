"""`python -m megatron_ext.cli`: the same as the console script `megatron-ext`."""

from megatron_ext.cli.main import main

raise SystemExit(main())
