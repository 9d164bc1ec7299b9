from common import cli
from runlog.commands import main

if __name__ == "__main__":
    cli(main)
