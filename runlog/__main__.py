from runlog.commands import main
from runlog.record import cli

if __name__ == "__main__":
    cli(main)
