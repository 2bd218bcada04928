"""`python -m dssync_pg`: the command line."""

from .cli import main

raise SystemExit(main())
