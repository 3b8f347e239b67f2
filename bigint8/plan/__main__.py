"""`python -m bigint8.plan`: the command, which stands above this room."""

from ..plan_command import main

main()
