"""All commands as one: bigint8 launch, serve, plan, check, quantize, doctor; also python -m bigint8."""

from . import check, doctor, launch, plan_command, quantize, serve
from .terminal.flags import new_app, run_command

app = new_app()
for module in (launch, serve, plan_command, check, quantize, doctor):
    # each command's own app has exactly one function
    (registered,) = module.app.registered_commands
    app.command(module.__name__.rpartition(".")[2].removesuffix("_command"))(registered.callback)  # type: ignore[type-var]


def main() -> None:
    """Run the command line."""
    run_command(app)


if __name__ == "__main__":
    main()
