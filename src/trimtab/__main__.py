"""`trimtab`, and `python -m trimtab`"""

from trimtab.cli import main
from trimtab.startup import quick, quick_end


def run() -> None:
    quick()
    try:
        main()
    finally:
        quick_end()


if __name__ == "__main__":
    run()
