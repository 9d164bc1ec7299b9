from runlog.commands import main
from runlog.manners import cli

if __name__ == "__main__":
    cli(main)
