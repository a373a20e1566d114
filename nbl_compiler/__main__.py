"""``python -m nbl_compiler`` is ``nbl``, for launchers that start modules."""

from nbl_compiler.cli import main

if __name__ == "__main__":
    main()
