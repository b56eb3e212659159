"""Found by `optimum-cli` as `optimum.commands.register.register_pgsvd`; imports nothing heavy."""

from optimum_pgsvd.commands.pgsvd import PGSVDCommand


REGISTER_COMMANDS = [PGSVDCommand]
